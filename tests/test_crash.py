"""kill -9 anywhere, then the same command: exit 0, and the results of a run that nobody interrupted, bit for bit."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from tiny_study import CONFIG, SMALL, Done, Study, cards, command, end, make_study, start

KILLED = -signal.SIGKILL
MOMENTS = ("teacher-step", "base-save", "before-card", "after-card", "sampling", "evaluation")


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Study:
    """One base and its students, on one worker."""
    return make_study(tmp_path_factory, "small", SMALL, workers=1)


@pytest.fixture(scope="session")
def study(tmp_path_factory) -> Study:
    """Two bases and the students that pair them, on two workers side by side."""
    return make_study(tmp_path_factory, "whole", CONFIG, workers=2)


class Crashes:
    """Commands on one workdir, some of which are killed."""

    def __init__(self, study: Study, folder: Path):
        self.study, self.workdir, self.folder = study, folder / "work", folder

    def run(self, *kills: str, **more: object) -> Done:
        """The study's command, with these kills on its way; all of them must come about."""
        return self.do(self.study.words(self.workdir), *kills, **more)

    def do(self, words: list[str], *kills: str, **more: object) -> Done:
        markers = self.folder / "markers"
        markers.mkdir(exist_ok=True)
        path = str(Path(__file__).parent / "crash")
        done = command(self.study.shared, *words, KILL=" ".join(kills), KILL_MARKERS=markers, PYTHONPATH=path, **more)
        assert {kill.split(":")[1] for kill in kills} <= {marker.name for marker in markers.iterdir()}, done.err
        return done

    def finish(self, *, clean: bool = True) -> None:
        """Run to the end, and compare."""
        done = self.run()
        assert done.status == 0, done.err
        self.study.assert_same(self.workdir, clean=clean)


@pytest.fixture
def crashes(small, tmp_path) -> Crashes:
    return Crashes(small, tmp_path)


def test_kills_at_every_moment_one_after_another(crashes):
    done = crashes.run("worker:base-save", "worker:teacher-step", "group:before-card")
    assert done.status == KILLED
    assert done.err.count("the worker was killed by signal 9, SIGKILL") == 2
    (corpus,) = (crashes.workdir / "corpus").iterdir()
    assert list(corpus.glob("payload-*/rows.parquet"))  # a whole payload, of which no card says so
    assert not (corpus / "card.json").exists()
    made = cards(crashes.workdir)

    assert crashes.run("worker:after-take-over", "group:sampling").status == KILLED
    done = crashes.run("worker:before-take-over", "worker:evaluation")
    assert done.status == 0, done.err
    crashes.study.assert_same(crashes.workdir)
    now = cards(crashes.workdir)
    assert {node: now[node] for node in made} == made  # what was made before was not made again


@pytest.mark.parametrize("moment", [pytest.param("base-step", marks=pytest.mark.slow), "state-save"])
def test_a_base_goes_on_from_its_newest_whole_checkpoint(crashes, moment):
    config, steps = crashes.study.words(crashes.workdir)[1], crashes.folder / "steps"
    (base,) = (crashes.study.workdir / "base").iterdir()
    words = ["stage", base.name, f"--workdir={crashes.workdir}", "--workers=1", "--quiet"]
    assert crashes.do(["plan", config, f"--workdir={crashes.workdir}"]).status == 0
    assert crashes.do(words, f"group:{moment}", KILL_SAVES=1, KILL_STEPS=steps).status == KILLED
    # Killed in the second block of 11 steps, or in the save of its state, while the third may be under way.
    before = len(steps.read_text().splitlines())
    assert before == 22 or (moment, before) == ("state-save", 33)
    done = crashes.do(words, KILL_SAVES=1, KILL_STEPS=steps)
    assert done.status == 0, done.err
    whole = cards(crashes.study.workdir)[f"base/{base.name}"]
    # The newest whole state is the first's; in the block after it that may be still on its way to the disk.
    saved = before + whole["config"]["steps"] - len(steps.read_text().splitlines())
    assert saved == 11 or (moment, saved) == ("base-step", 0)
    card = cards(crashes.workdir)[f"base/{base.name}"]
    assert card["digest"] == whole["digest"]
    curves = [
        (study / "base" / base.name / made["payload"] / "metrics.jsonl").read_text()
        for study, made in ((crashes.workdir, card), (crashes.study.workdir, whole))
    ]
    assert curves[0] == curves[1]
    assert not (crashes.workdir / "partial").exists() or not list((crashes.workdir / "partial").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["worker", "group"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_one_kill(study, tmp_path, moment, whom):
    crashes = Crashes(study, tmp_path)
    clean = moment != "after-card"  # a committed node has no next builder, to remove the lock of its dead one
    done = crashes.run(f"{whom}:{moment}")
    assert done.status == (KILLED if whom == "group" else 0), done.err
    if whom == "worker":
        study.assert_same(crashes.workdir, clean=clean)  # the run went on by itself
    crashes.finish(clean=clean)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["worker", "group"])
@pytest.mark.parametrize("moment", ["before-take-over", "after-take-over"])
def test_a_kill_in_the_taking_over_of_a_dead_owners_lock(study, tmp_path, moment, whom):
    crashes = Crashes(study, tmp_path)
    assert crashes.run("group:teacher-step").status == KILLED
    done = crashes.run(f"{whom}:{moment}")
    assert done.status == (KILLED if whom == "group" else 0), done.err
    crashes.finish()


@pytest.mark.slow
def test_ten_kills_at_random_moments(study, tmp_path):
    seed = int(os.environ.get("CRASH_SEED") or random.SystemRandom().randrange(2**32))
    print(f"CRASH_SEED={seed} repeats these moments")
    begun = time.monotonic()
    assert command(study.shared, *study.words(tmp_path / "uninterrupted")).status == 0
    length = time.monotonic() - begun
    study.assert_same(tmp_path / "uninterrupted")
    draw = random.Random(seed)
    for tenth in range(10):
        # One in each tenth of the time that a whole run takes, so that no part of it is left out.
        moment = (tenth + draw.random()) / 10 * length
        workdir = tmp_path / f"work-{tenth}"
        process = start(study.shared, *study.words(workdir))
        time.sleep(moment)
        os.killpg(process.pid, signal.SIGKILL)
        status, made = end(process).status, cards(workdir)
        print(f"killed after {moment:.2f} s of {length:.2f}: status {status}, {len(made)} nodes made")
        assert status in (KILLED, 0)
        done = command(study.shared, *study.words(workdir))
        assert done.status == 0, done.err
        study.assert_same(workdir, clean=False)  # the moment may be just after a card
        assert {node: cards(workdir)[node] for node in made} == made
