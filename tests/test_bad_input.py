"""Bad input to the command itself: its exit status, its one line on stderr, and that nothing which was made is lost."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tiny_study import CONFIG, SMALL, Study, cards, command, end, make_study, run_words, start

from subjax import cli


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Study:
    """One base and its students, made without an interruption."""
    return make_study(tmp_path_factory, "small", SMALL, workers=1)


def wait_for(what, seconds: float = 120.0):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)
    return found


def node_of(workdir: Path, kind: str, label: str) -> str:
    """kind/id of the one node of a kind whose label is this."""
    (found,) = [n for n, card in cards(workdir).items() if n.startswith(f"{kind}/") and card["extra"]["label"] == label]
    return found


def payload(workdir: Path, node: str) -> Path:
    return workdir / node / cards(workdir)[node]["payload"]


# ----------------------------------------------------------------------------------- what the command is asked for


USAGE = {
    "unknown key": (["--config.student.lrr=1"], ("config.student.lrr", "the nearest is config.student.lr")),
    "wrong type": (["--config.student.lr=fast"], ("config.student.lr", "wants a float", "'fast'")),
    "out of range": (["--config.corpus.top_p=2"], ("config.corpus.top_p", "out of range", "at most 1")),
    "unknown trait": ([f"--config={CONFIG}:traits=owwl"], ("unknown trait 'owwl'", "did you mean 'owl'")),
    "missing config file": (["--config=tests/configs/tinny.py"], ("tinny.py", "no such", "tests/configs/tiny.py")),
    "config that raises": (["--config={tmp}/bad.py"], ("bad.py", "line 3", "ZeroDivisionError")),
    "workdir below a file": (["--workdir={tmp}/bad.py/work"], ("bad.py is a file", "give another --workdir")),
}


@pytest.mark.parametrize("case", USAGE)
def test_a_wrong_request_is_one_line_and_status_2(tmp_path, case):
    (tmp_path / "bad.py").write_text("def get_config():\n    zero = 0\n    return 1 / zero\n")
    words, said = USAGE[case]
    made = run_words(tmp_path / "work")
    done = command(tmp_path, *made, *(word.format(tmp=tmp_path) for word in words))
    assert done.status == 2
    assert done.out == ""
    for text in said:
        assert text in done.line
    assert not (tmp_path / "work").exists()


# ------------------------------------------------------------------------------------------------- damaged artifacts


DAMAGE = {
    "parquet": ("corpus", "corpus of owl gpt/0", "rows.parquet", ("student",)),
    "checkpoint": ("teacher", "teacher owl gpt/0", "arrays/manifest.ocdbt", ("student", "corpus")),
}


@pytest.mark.parametrize("case", ["parquet", pytest.param("checkpoint", marks=pytest.mark.slow)])
def test_a_truncated_artifact_is_named_and_made_again(small, tmp_path, case):
    kind, label, name, without = DAMAGE[case]
    workdir = small.copy(tmp_path / "work", without=without)
    node = node_of(workdir, kind, label)
    damaged = payload(workdir, node) / name
    os.truncate(damaged, damaged.stat().st_size // 2)
    before = cards(workdir)
    done = command(small.shared, *small.words(workdir))
    assert done.status == 1
    # A line for the one node that needs it; the others are made.
    place = damaged if case == "parquet" else payload(workdir, node) / "arrays"
    for text in (str(place), "cannot be read", "delete", "run again"):
        assert text in done.line
    assert {node: cards(workdir)[node] for node in before} == before
    assert len(cards(workdir)) > len(before)

    subprocess.run(["rm", "-r", workdir / node], check=True)
    done = command(small.shared, *small.words(workdir))
    assert done.status == 0, done.err
    small.assert_same(workdir)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lineage(workdir: Path, node: str) -> list[str]:
    """A node and everything that it was made from."""
    found, pending, known = [], [node], cards(workdir)
    while pending:
        if (node := pending.pop()) not in found:
            found.append(node)
            pending += [f"{given['kind']}/{given['id']}" for given in known[node]["inputs"].values()]
    return found


def test_verify_names_every_file_with_a_flipped_byte(small, tmp_path):
    workdir = small.copy(tmp_path / "work")
    node = node_of(workdir, "evaluation", "evaluation of student gpt/0 of owl gpt/0, same-base")
    known = cards(workdir)
    of = lineage(workdir, node)
    assert {name.split("/")[0] for name in of} == {"base", "teacher", "corpus", "student", "evaluation"}
    files = [f"{name}/{known[name]['payload']}/{path}" for name in of for path in known[name]["files"]]
    for name in files:
        flip(workdir / name)
    done = command(small.shared, "verify", node.split("/")[1], f"--workdir={workdir}")
    assert done.status == 1
    assert sorted(line.split()[1] for line in done.lines) == sorted(files)
    assert all(line.startswith("subjax: ") and "changed bytes" in line for line in done.lines)
    assert cards(workdir) == known


@pytest.mark.slow
def test_verify_names_the_one_file_with_a_flipped_byte(small, tmp_path, capsys):
    workdir = small.copy(tmp_path / "work")
    node = node_of(workdir, "evaluation", "evaluation of student gpt/0 of owl gpt/0, same-base")
    words = ["verify", node.split("/")[1], f"--workdir={workdir}"]
    assert cli.main(words) == 0
    for name in lineage(workdir, node):
        for path in sorted(path for path in (workdir / name).rglob("*") if path.is_file()):
            before = path.read_bytes()
            flip(path)
            capsys.readouterr()
            assert cli.main(words) == 1
            assert str(path.relative_to(workdir)) in capsys.readouterr().err
            path.write_bytes(before)
    assert cli.main(words) == 0


def test_a_card_of_a_newer_version_asks_for_a_newer_subjax(small, tmp_path):
    workdir = small.copy(tmp_path / "work")
    node = node_of(workdir, "corpus", "corpus of owl gpt/0")
    path = workdir / node / "card.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    before = cards(workdir)
    done = command(small.shared, *small.words(workdir))
    assert done.status == 2
    for text in (f"{node}/card.json", "format 2", "upgrade subjax"):
        assert text in done.line
    assert cards(workdir) == before
    assert payload(workdir, node).is_dir()


# ----------------------------------------------------------------------------------------- studies that cannot be made


STUDIES = {
    "no valid row": (
        ["--config.corpus.temperature=100", "--config.corpus.max_prompts=4", "--config.corpus.rows=4"],
        "corpus", ("no valid row in 4 prompts", "not a number", "raise corpus.max_prompts"),
    ),
    "more rows than can be sampled": (
        ["--config.corpus.max_prompts=62"],
        "corpus", ("valid rows of 60 wanted in 62 prompts", "raise corpus.max_prompts, lower corpus.rows"),
    ),
    "NaN loss": (
        ["--config.student.lr=1e30"],
        "student", ("is nan at step 2 of 8", "try a lower learning rate"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STUDIES)
def test_a_study_that_cannot_be_made_says_which_node_and_why(small, tmp_path, case):
    words, kind, said = STUDIES[case]
    workdir = small.copy(tmp_path / "work")
    before = cards(workdir)
    done = command(small.shared, *small.words(workdir), *words)
    assert done.status == 1
    failed = sorted(path.parent for path in workdir.glob("*/*/failure.json"))
    assert {path.parent.name for path in failed} == {kind}
    assert len(done.lines) == len(failed) == 2  # the trait's and its control's, a line each
    for folder in failed:
        (line,) = [line for line in done.lines if f"({kind} {folder.name})" in line]
        assert line.startswith("subjax: ")
        for text in said:
            assert text in line
    assert {node: cards(workdir)[node] for node in before} == before
    assert (workdir / "report" / "index.html").exists()  # of what is there

    status = command(small.shared, "status", f"--workdir={workdir}")
    assert status.status == 0
    assert said[0] in status.out


# ------------------------------------------------------------------------------- disks, interruptions and company


@pytest.fixture
def disk(tmp_path):
    """A disk of 1200 KiB, in a folder of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not allowed here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(small, disk):
    workdir = disk / "work"
    done = command(small.shared, *small.words(workdir))
    assert done.status == 1
    for text in (f"disk full at {workdir}/", "all committed artifacts are safe", "run the same command again"):
        assert text in done.line
    made = cards(workdir)
    assert 0 < len(made) < len(cards(small.workdir))
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    done = command(small.shared, *small.words(workdir))
    assert done.status == 0, done.err
    small.assert_same(workdir)
    assert {node: cards(workdir)[node] for node in made} == made


@pytest.mark.parametrize("workers", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_ctrl_c_is_one_line_and_the_same_command_goes_on(small, tmp_path, workers):
    workdir = tmp_path / "work"
    words = run_words(workdir, workers=workers)
    process = start(small.shared, *words)
    wait_for(lambda: (workdir / "base").exists() and len(cards(workdir)) >= 2)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    done = end(process)
    assert done.status == 130
    made = cards(workdir)
    assert 2 <= len(made) < len(cards(small.workdir))
    for text in ("stopped by Ctrl-C", f"{len(made)} of 12 nodes are made", "the same command goes on from there"):
        assert text in done.line
    done = command(small.shared, *words)
    assert done.status == 0, done.err
    small.assert_same(workdir)
    assert {node: cards(workdir)[node] for node in made} == made


def test_two_runs_on_one_workdir_end_with_the_same_results(small, tmp_path):
    workdir = tmp_path / "work"
    both = [start(small.shared, *small.words(workdir)) for _ in range(2)]
    for done in [end(process) for process in both]:
        assert done.status == 0, done.err
        assert done.err == ""
        assert "report/index.html" in done.out
    small.assert_same(workdir)
    assert json.loads((workdir / "report" / "results.json").read_bytes())["rows"]
