"""The command line: one call, an exit status. With `cli_models` the only place that prints for a person.

Exit status: 0 done; 1 a failure; 2 usage, config or input; 75 stopped by SIGTERM, to be requeued; 130 Ctrl-C.
Imports stand inside the commands, so that each loads what it needs: a run with nothing to do never loads JAX.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from subjax import __version__, accelerator, cli_models, log_lines
from subjax.cli_arguments import Arguments, Command, nearest, parse
from subjax.cli_help import HELP
from subjax.cli_job import in_job
from subjax.errors import Preempted, SubjaxError, UsageError, one_line


def _open(arguments: Arguments, *, existing: bool = True) -> Any:
    from etils import epath

    from subjax.store import Store

    if existing and not epath.Path(arguments.workdir).exists():
        raise UsageError(f"--workdir={arguments.workdir}: there is no such folder")
    return Store(arguments.workdir)


def _planned(arguments: Arguments) -> tuple[Any, Any]:
    """Load the config, plan it, and write the plan into the workdir; give the plan and the store.

    In a job of several processes, process 0 plans for all.
    """
    from subjax import config
    from subjax.parallel.processes import group

    if not group().first:
        return _told(arguments)

    loaded = config.load(arguments.config, arguments.overrides)
    from subjax import study  # after the config, whose mistakes are the most common

    plan = study.plan(loaded)
    store = _open(arguments, existing=False)
    _tell(store, store.write_plan(plan.to_json()))
    return plan, store


def _tell(store: Any, id: str) -> None:
    """Tell the other processes which plan of the workdir it is."""
    from subjax.parallel.processes import group

    group().share("plan", id)
    blind = [i for i, sees in enumerate(group().agree("sees the plan", True)) if not sees]
    if blind:
        raise UsageError(
            f"process {blind[0]} does not see in --workdir={store.root} what process 0 writes there: give a workdir on"
            " a file system that all processes share"
        )


def _told(arguments: Arguments) -> tuple[Any, Any]:
    """The plan that process 0 tells of, and the store."""
    from subjax.graph import Plan
    from subjax.parallel.processes import group

    id = group().share("plan")
    store = _open(arguments, existing=False)
    group().agree("sees the plan", id in store.plans())
    return Plan.from_json(store.read_plan(id)), store


def _plans(store: Any) -> list[Any]:
    """Read all plans of a workdir."""
    from subjax.graph import Plan

    plans = [Plan.from_json(store.read_plan(id)) for id in store.plans()]
    if not plans:
        raise UsageError(f"{store.root} holds no plan: subjax run --config=FILE --workdir={store.root} writes one")
    return plans


def _execute(plan: Any, store: Any, arguments: Arguments, only: Sequence[str] | None = None) -> int:
    """Make the nodes; say what failed; give the exit status."""
    from subjax import compiled, cpu, run
    from subjax.parallel.axes import parse_mesh
    from subjax.parallel.processes import group
    from subjax.progress import duration, title

    shape = parse_mesh(arguments.mesh) if arguments.mesh else None
    found, begin = accelerator.visible(), None
    if found or group().count > 1 or (shape and math.prod(shape) > 1):
        begin = functools.partial(_begin, plan, shape, arguments, found)
    if not found and begin is not None:
        cpu.pin(0, cpu.visible_cores())
    elif not found and arguments.workers == 0:
        cpu.pin(0, 1)  # the bits of a worker with one core
    compiled.keep()
    quiet = arguments.quiet or not group().first
    with contextlib.nullcontext(sys.stderr) if group().first else open(os.devnull, "w") as stream:
        outcome = run.execute_plan(
            plan, store, workers=arguments.workers, quiet=quiet, only=only, stream=stream, begin=begin
        )
    if not group().first:
        return 1 if outcome.failed else 0
    for id, message in outcome.failed.items():
        below = sum(f"({id})" in reason for reason in outcome.skipped.values())
        more = f"; skipped for it: {below} node{'s' if below != 1 else ''}" if below else ""
        # A stage's own message names its node already; a dead worker's does not.
        line = message if id in message else f"{title(plan.nodes[id])} ({id}) failed: {message}"
        print(f"subjax: {line}{more}", file=sys.stderr)
    if not arguments.quiet:
        there = f"{len(outcome.made)} made, {len(outcome.reused)} there already"
        lost = f", {len(outcome.failed)} failed, {len(outcome.skipped)} skipped" if outcome.failed else ""
        print(f"{there}{lost}, in {duration(outcome.seconds)}", flush=True)
    return 1 if outcome.failed else 0


def _begin(plan: Any, shape: Any, arguments: Arguments, accelerator: bool) -> Any:
    """The mesh that nodes are made on; what stands where on it is printed once, before the work."""
    from subjax.parallel import start
    from subjax.parallel.processes import group

    mesh = start.mesh_of(shape, group(), accelerator=accelerator, timeout_s=arguments.init_timeout)
    if group().first and not arguments.quiet:
        from subjax import placement

        print(placement.table(plan, mesh), file=sys.stderr, flush=True)
    return mesh


def _draw(path: Any, store: Any, fresh: bool = True) -> None:
    """Draw the page from results.json (unless `fresh` is false and it stands); print the headline and where it is."""
    from subjax.results_words import headline_table

    results = json.loads(path.read_text())
    drawn = store.root / "report" / "index.html"
    if fresh or not drawn.exists():
        from subjax.report import page

        drawn = page.write(results, store.root / "report")
    print(f"{headline_table(results)}\n\n{drawn}")


def command_run(arguments: Arguments) -> int:
    """Plan, make what is missing, write results and page; after a failure they hold what is there."""
    from subjax import results
    from subjax.parallel.processes import group

    plan, store = _planned(arguments)
    status = _execute(plan, store, arguments)
    if not group().first:
        return status
    path = store.root / "report" / "results.json"
    before = path.read_bytes() if path.exists() else None
    try:
        path = results.write(plan, store)
    except SubjaxError as error:
        if not status:
            raise
        print(f"no report: {error}")  # most likely for what failed above, which is told already
        return status
    _draw(path, store, fresh=path.read_bytes() != before)  # drawing takes longer than all else when all is done
    return status


def command_plan(arguments: Arguments) -> int:
    """Print the graph and its cost; with a topology, what its steps would take on hardware that is not here."""
    if arguments.topology:
        from subjax import cli_rehearsal

        return cli_rehearsal.command_rehearse(arguments)
    if arguments.mesh:
        raise UsageError("plan: --mesh is of a --topology=...; give both")
    if not arguments.workdir:
        raise UsageError("plan: --workdir is missing; subjax --help shows examples")
    from subjax import overview

    plan, store = _planned(arguments)
    print(overview.describe(plan, store))
    return 0


def command_stage(arguments: Arguments) -> int:
    """Make some nodes of a plan that is in the workdir; no config file is executed."""
    from subjax.parallel.processes import group

    if not group().first:
        plan, store = _told(arguments)
        return _execute(plan, store, arguments, group().share("nodes"))
    store = _open(arguments)
    plans = _plans(store)
    ids = [store.find(node)[1] for node in arguments.operands]
    for plan in reversed(plans):  # the newest first
        if all(id in plan.nodes for id in ids):
            _tell(store, store.write_plan(plan.to_json()) if group().count > 1 else "")
            return _execute(plan, store, arguments, group().share("nodes", ids))
    homeless = next((id for id in ids if not any(id in plan.nodes for plan in plans)), None)
    if homeless is not None:
        raise UsageError(f"node {homeless} is in no plan of {store.root}")
    raise UsageError("these nodes are in different plans: make those of one plan in one command")


def command_status(arguments: Arguments) -> int:
    """Say what is made, running and failed."""
    store = _open(arguments)
    from subjax import overview

    print("\n\n".join(overview.status(plan, store).rstrip() for plan in _plans(store)))
    return 0


def command_show(arguments: Arguments) -> int:
    """Print a card and its lineage."""
    store = _open(arguments)
    kind, id = store.find(arguments.operands[0])
    card = store.card(kind, id)
    if card is None:
        failure = store.failure(kind, id)
        why = f"it failed: {failure['message']}" if failure else f"make it: subjax stage {id}"
        raise SubjaxError(f"{kind} {id} is planned and not made yet; {why}")
    print(json.dumps(dataclasses.asdict(card), indent=2, sort_keys=True) + "\n\nlineage")
    print("\n".join(_lineage(store, kind, id)))
    return 0


def _lineage(store: Any, kind: str, id: str, role: str = "", depth: int = 0, seen: set[str] | None = None) -> list[str]:
    """Draw the tree of inputs, one line a node; what was drawn before is only named."""
    seen = set() if seen is None else seen
    name = f"{'  ' * depth}{role + ': ' if role else ''}{kind} {id}"
    if id in seen:
        return [f"{name}  (above)"]
    seen.add(id)
    card = store.card(kind, id)
    if card is None:
        return [f"{name}  (gone)"]
    lines = [f"{name}  {card.made_at}  {card.wall_s:.1f} s  digest {card.digest[:16]}"]
    for part, given in card.inputs.items():
        lines += _lineage(store, given["kind"], given["id"], part, depth + 1, seen)
    return lines


def command_verify(arguments: Arguments) -> int:
    """Check nodes and their lineages; a line for each problem."""
    from subjax.stages import execution

    store = _open(arguments)
    if arguments.all == bool(arguments.operands):
        raise UsageError("verify: give a NODE, or --all")
    wanted = [store.find(node) for node in arguments.operands]
    if arguments.all:
        wanted = [(kind, id) for kind in store.kinds() for id in store.ids(kind)]
    digests: dict[Any, str] = {}  # lineages overlap, and reading a checkpoint takes its time

    def digest(card: Any, payload: Any) -> str:
        if payload not in digests:
            digests[payload] = execution.digest(card, payload)
        return digests[payload]

    problems: dict[str, None] = {}  # a set that keeps its order
    for kind, id in wanted:
        problems.update((str(found), None) for found in store.verify(kind, id, rederive=_rederive, digest=digest))
    for problem in problems:
        print(f"subjax: {problem}", file=sys.stderr)
    if not problems:
        print(f"{len(wanted)} node{'s' if len(wanted) != 1 else ''} and all they were made from: as they were written")
    return 1 if problems else 0


def _rederive(card: Any) -> str:
    from subjax.store import inputs_of, node_id

    return node_id(card.kind, card.version, card.config, inputs_of(card))


def command_report(arguments: Arguments) -> int:
    """Draw the page again from results.json; where nodes were made one by one there is none yet, and it is written."""
    store = _open(arguments)
    path = store.root / "report" / "results.json"
    if not path.exists():
        from subjax import results

        path = results.write(_plans(store)[-1], store)
    _draw(path, store)
    return 0


def command_export(arguments: Arguments) -> int:
    """Give a model of a workdir back to other tools."""
    store = _open(arguments)
    return cli_models.command_export(arguments, store, _plans(store))


_JOB = ("mesh", "coordinator", "processes", "process", "init-timeout")
COMMANDS = {
    "run": Command(command_run, ("workdir", "config", "workers", *_JOB, "quiet")),
    "plan": Command(
        command_plan, ("workdir", "config", "workers", "quiet", "topology", "mesh"), required=("config",)
    ),
    "stage": Command(command_stage, ("workdir", "workers", *_JOB, "quiet"), operands=(1, sys.maxsize)),
    "status": Command(command_status),
    "show": Command(command_show, operands=(1, 1)),
    "verify": Command(command_verify, ("workdir", "all"), operands=(0, sys.maxsize)),
    "report": Command(command_report),
    "export": Command(command_export, ("workdir", "to", "form", "dtype"), operands=(1, 1)),
    "check": Command(
        cli_models.command_check, ("quiet", "prompts", "tokens", "bound"), operands=(1, 1),
        missing="which model? subjax check MODEL: a folder, a .gguf file, package:NAME or a hub id",
    ),
    "families": Command(cli_models.command_families, ()),
}  # fmt: skip


def dispatch(words: Sequence[str]) -> int:
    """Find the command and do it."""
    if not words:
        raise UsageError(f"no command: one of {', '.join(COMMANDS)}; subjax --help shows examples")
    if words[0] in ("--help", "-h", "help") or "--help" in words or "-h" in words:
        print(HELP, end="")
        return 0
    if words[0] == "--version":
        print(f"subjax {__version__}")
        return 0
    if words[0] not in COMMANDS:
        raise UsageError(f"unknown command {words[0]!r}: {nearest(words[0], list(COMMANDS))}")
    accelerator.without_tpu()
    command = COMMANDS[words[0]]
    arguments = parse(words[0], command, words[1:])
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        return in_job(command, arguments) if "coordinator" in command.flags else command.do(arguments)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(*_: Any) -> None:
    """Outside the executor, which has its own way to stop, SIGTERM ends the command where it stands."""
    raise Preempted("stopped by SIGTERM; the same command goes on from there")


def guarded(action: Callable[[], int]) -> int:
    """Do `action`, and turn what it raises into one line on stderr and an exit status (contract 1)."""
    try:
        status = action()
        sys.stdout.flush()
        return status
    except SubjaxError as error:
        print(f"subjax: {one_line(error)}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("subjax: stopped by Ctrl-C; the same command goes on from there", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone, as `head` does. What is still buffered goes nowhere, or exiting would complain of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT):
            traceback.print_exc()
        else:
            print(f"subjax: {error.strerror}: {error.filename}", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1


def main(words: Sequence[str] | None = None) -> int:
    """Be the `subjax` command; gives the exit status."""
    log_lines.show()
    return guarded(lambda: dispatch(sys.argv[1:] if words is None else words))
