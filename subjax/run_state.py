"""Where a run stands: what is made, what failed and what is skipped for it, which node is next, whether it ends."""

import signal
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from subjax import accelerator
from subjax.errors import Preempted, SubjaxError, UsageError, one_line
from subjax.parallel.processes import group
from subjax.progress import Progress, title
from subjax.schedule import Schedule
from subjax.store import Store
from subjax.workers import Event

if TYPE_CHECKING:
    from subjax.graph import Plan

BUSY_POLL_S = 1.0


class Interrupted(SubjaxError):
    """The run was stopped by Ctrl-C; the same command goes on from there."""

    exit_status = 130


def node_record(plan: "Plan", id: str) -> dict[str, Any]:
    """Write a node as a stage reads it: JSON, each input with its kind."""
    node = plan.nodes[id]
    inputs = {role: [plan.nodes[needed].kind, needed] for role, needed in node.inputs.items()}
    return {
        "kind": node.kind, "version": node.version, "config": node.config, "inputs": inputs, "id": id,
        "label": node.label, "group": node.group, "tokens": node.tokens, "flops": node.flops, "hints": node.hints,
    }  # fmt: skip


def cohort_of(node: Any) -> str:
    """The cohort that a node trains in here, or "": on CPU the cores are used as well by workers side by side."""
    cohort = node.hints.get("cohort")
    return cohort["id"] if cohort and (cohort["always"] or accelerator.visible()) else ""


class RunState:
    """The state of one call of `execute_plan`."""

    def __init__(
        self,
        plan: "Plan",
        store: Store,
        only: Collection[str] | None,
        progress_of: Callable[[list[Any]], Progress],
    ):
        self.plan, self.store = plan, store
        self.nodes = {id: node for id, node in plan.nodes.items() if only is None or id in only}
        self.made: list[str] = []
        there = [id for id, node in self.nodes.items() if group().first and store.card(node.kind, id) is not None]
        self.reused: list[str] = group().share("nodes that are there", there)
        self.failed: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.cohorts = {id: name for id, node in self.nodes.items() if (name := cohort_of(node))}
        self.schedule = Schedule(self.nodes, set(self.reused), self.cohorts)
        self._check_inputs()
        self.progress = progress_of([self.nodes[id] for id in self.nodes if id in self.schedule.open])
        self.deaths: dict[str, int] = {}
        self.stop_signal: signal.Signals | None = None
        self.full = ""  # which disk is, when one is: no other node would fare better, so that ends the run
        self.next_poll = 0.0

    def _check_inputs(self) -> None:
        for id in self.schedule.open if group().first else ():
            for role, needed in self.nodes[id].inputs.items():
                if needed in self.nodes:
                    continue
                node = self.plan.nodes[needed]
                if self.store.card(node.kind, needed) is None:
                    raise UsageError(
                        f"{title(self.nodes[id])} ({id}): its {role}, {title(node)} ({needed}), is not made yet; "
                        f"make it first: subjax stage {needed}"
                    )

    def record(self, id: str) -> dict[str, Any]:
        """Write a node as a stage reads it, with its cohort if it trains in one here."""
        record = node_record(self.plan, id)
        if id not in self.cohorts:
            record["hints"] = {name: hint for name, hint in record["hints"].items() if name != "cohort"}
        return record

    def on(self, worker: int, event: Event) -> None:
        """Take in what a worker said of a node."""
        id = event.id
        if event.what == "started":
            self.progress.start(worker, self.plan.nodes[id])
        elif event.what == "progress":
            self.progress.tell(worker, event.done, event.total, event.text)
        else:
            self.progress.end(worker)
        if event.what in ("made", "found"):
            (self.made if event.what == "made" else self.reused).append(id)
            self.schedule.there(id)
            self.progress.count_out(id)
        elif event.what == "failed":
            if event.trace:
                self.progress.write(event.trace.rstrip())
            self.fail(id, event.text)
        elif event.what == "full":
            self.full = self.full or event.text
            self.schedule.again(id)
        elif event.what == "busy":
            self.schedule.foreign.add(id)
        elif event.what == "stopped":
            self.schedule.again(id)

    def fail(self, id: str, message: str) -> None:
        """Record a failure, and skip what needs the node."""
        node = self.plan.nodes[id]
        self.failed[id] = message
        self.progress.count_out(id)
        for user in self.schedule.give_up(id):
            self.skipped[user] = f"needs {title(node)} ({id}), which failed"
            self.progress.count_out(user)
        try:
            if group().first:
                self.store.record_failure(node.kind, id, message)
        except (SubjaxError, OSError) as error:  # a full disk must not hide the failure itself
            self.progress.write(f"subjax: the failure of {id} could not be recorded: {one_line(error)}")

    def lost(self, ids: list[str], death: str) -> None:
        """Note that a worker died at a node, or at the members of a cohort: tried once more, then failed."""
        again = [id for id in ids if not self.deaths.get(id)]
        smaller = ", or a smaller compute.cohort" if len(ids) > 1 else ""
        for id in ids:
            self.deaths[id] = self.deaths.get(id, 0) + 1
            if id in again:
                self.schedule.again(id)
            else:
                self.fail(id, f"{death}, twice; give it more memory, or fewer --workers{smaller}")
        if again:
            more = f" and {len(again) - 1} more of its cohort" if len(again) > 1 else ""
            named = f"{title(self.plan.nodes[again[0]])} ({again[0]}){more}"
            self.progress.write(f"subjax: {named}: {death}; tried once more on a fresh worker")

    @property
    def ending(self) -> bool:
        """Whether nothing more is begun."""
        return self.stop_signal is not None or bool(self.full)

    def poll_foreign(self) -> None:
        """Look after the nodes that another run has: made, or free again because their owner is gone."""
        if not self.schedule.foreign or not group().share("time to look", time.monotonic() >= self.next_poll):
            return
        self.next_poll = time.monotonic() + BUSY_POLL_S
        found, free = group().share("foreign nodes", self._look() if group().first else None)
        for id in found:
            self.on(-1, Event("found", id))
        for id in free:
            self.schedule.again(id)

    def _look(self) -> tuple[list[str], list[str]]:
        """Of the nodes that another run has: those that are made, and those that nobody is at any more."""
        foreign = [(id, self.plan.nodes[id].kind) for id in sorted(self.schedule.foreign)]
        found = [id for id, kind in foreign if self.store.card(kind, id) is not None]
        return found, [id for id, kind in foreign if id not in found and self.store.owner(kind, id) is None]

    def stopped(self) -> SubjaxError:
        """Give the error that ends a run which was told to stop."""
        done, whole = len(self.made) + len(self.reused), len(self.nodes)
        how, error = ("SIGTERM", Preempted) if self.stop_signal == signal.SIGTERM else ("Ctrl-C", Interrupted)
        return error(f"stopped by {how}: {done} of {whole} nodes are made; the same command goes on from there")
