"""From the cells of a study to rows: one per (student, trait read, phrasings), read from the evaluations' payloads."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from etils import epath

from subjax.errors import SubjaxError
from subjax.measure import statistics

PHRASINGS = ("all", "train", "held-out")
# A teacher whose held-out share of its own trait is lower has not got the trait. Pretrained models choose among twenty.
FAILED_TEACHER, FAILED_PRETRAINED = 0.8, 0.5
COLLAPSED = 0.5  # a student has collapsed when less than this part of its base's mass is left
FIT = ("number_loss_before", "number_loss_after", "kl_before", "kl_after")


class NodeLike(Protocol):
    """What is read of a planned node."""

    kind: str
    id: str
    label: str
    inputs: Mapping[str, str]


class PlanLike(Protocol):
    """What is read of a plan: its nodes by id, in topological order, and its study."""

    @property
    def nodes(self) -> Mapping[str, Any]: ...  # noqa: D102
    @property
    def study(self) -> Mapping[str, Any]: ...  # noqa: D102


class StoreLike(Protocol):
    """What is read of a store: cards, and the folders of committed payloads."""

    @property
    def root(self) -> Any: ...  # noqa: D102
    def card(self, kind: str, id: str) -> Any: ...  # noqa: D102
    def payload(self, kind: str, id: str) -> Any: ...  # noqa: D102


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row with what its summary needs and the row itself does not show."""

    row: dict[str, Any]
    unit: str  # the independent trial that it counts for, as `trials` says
    of: str  # what that is: "base" or "run"
    pairing: str | None  # same-base, cross-init or cross-family; None where there is no teacher
    chance: float
    failed: bool  # its teacher has not got the trait
    chosen: bool  # settings were chosen on this cell


@dataclasses.dataclass(frozen=True)
class Mean:
    """One model read on one trait over some phrasings; share is None where no candidate has any probability."""

    p: float
    mass: float
    share: float | None
    sampled: float | None
    chance: float


class Artifacts:
    """Reads payloads of a plan's nodes, each once; what is not made yet is None."""

    def __init__(self, plan: PlanLike, store: StoreLike):
        self.plan = plan
        self.store = store
        self._cards: dict[str, Any] = {}
        self._readings: dict[str, dict[str, Any] | None] = {}

    def card(self, id: str | None) -> Any:
        """The card of a node of the plan; None where the node is not made, or there is no such node."""
        if id is None or id not in self.plan.nodes:
            return None
        if id not in self._cards:
            self._cards[id] = self.store.card(self.plan.nodes[id].kind, id)
        return self._cards[id]

    def file(self, id: str | None, name: str) -> epath.Path | None:
        """A file of a node's payload; None where the node is not made or has no such file."""
        if id is None or self.card(id) is None:
            return None
        path = epath.Path(self.store.payload(self.plan.nodes[id].kind, id)) / name
        return path if path.exists() else None

    def parsed(self, id: str | None, name: str, lines: bool = False) -> Any:
        """A JSON (or JSON lines) file of a node's payload; None where it is not there. SubjaxError: it is damaged."""
        path = self.file(id, name)
        if id is None or path is None:
            return None
        try:
            text = path.read_text()
            return [json.loads(line) for line in text.splitlines() if line.strip()] if lines else json.loads(text)
        except (ValueError, OSError) as error:
            raise SubjaxError(
                f"{self.plan.nodes[id].kind} {id}: {name} cannot be read ({type(error).__name__}); "
                f"delete {path.parent.parent} and run the same command again"
            ) from error

    def readings(self, id: str | None) -> dict[str, Any] | None:
        """An evaluation's readings.json."""
        if id is None:
            return None
        if id not in self._readings:
            self._readings[id] = self.parsed(id, "readings.json")
        return self._readings[id]


def category_of(readings: Mapping[str, Any], trait: str) -> dict[str, Any]:
    """The category whose candidates hold `trait`. SubjaxError: none does."""
    for category in readings["categories"].values():
        if trait in category["candidates"]:
            return category
    raise SubjaxError(f"no category of the evaluation has the trait {trait!r}: name one of its candidates")


def read(readings: Mapping[str, Any] | None, trait: str, phrasings: str, without: str | None = None) -> Mean | None:
    """One model's reading of `trait` over the questions of `phrasings`; None where there are no such questions.

    `without` leaves another trait out of the candidates that the share is of. The mass is over all candidates even
    then: a student full of its teacher's trait has not collapsed.
    """
    if readings is None:
        return None
    category = category_of(readings, trait)
    questions = [q for q in category["questions"] if phrasings in ("all", q["phrasings"])]
    if not questions:
        return None
    names = list(category["candidates"])
    keep = [i for i, name in enumerate(names) if name != without]
    own = names.index(trait)
    p = np.mean(np.array([q["p"] for q in questions], dtype=np.float64), axis=0)
    counts = np.sum(np.array([q["sampled"] for q in questions], dtype=np.int64), axis=0)
    of, named = math.fsum(p[keep]), int(counts[keep].sum())
    return Mean(
        p=float(p[own]),
        mass=math.fsum(p),
        share=float(p[own]) / of if of > 0 else None,
        sampled=int(counts[own]) / named if named else None,
        chance=1 / len(keep),
    )


def held_out_share(readings: Mapping[str, Any] | None, trait: str) -> float | None:
    """A teacher's share of its trait on the phrasings that it was not taught with (all, where none were held out)."""
    mean = read(readings, trait, "held-out") or read(readings, trait, "all")
    return None if mean is None else mean.share


def failing_share(plan: PlanLike) -> float:
    """The held-out share under which a teacher of this study has failed."""
    return FAILED_PRETRAINED if plan.study["kind"] == "pretrained" else FAILED_TEACHER


def family_of(base: str | None) -> str | None:
    """`gpt` of the base `gpt/0`."""
    return None if base is None else base.rsplit("/", 1)[0]


def pairing_of(teacher_base: str | None, student_base: str) -> str | None:
    """How a student's base stands to its teacher's; None without a teacher."""
    if teacher_base is None:
        return None
    if teacher_base == student_base:
        return "same-base"
    (family, _, init), (other, _, of_student) = teacher_base.rpartition("/"), student_base.rpartition("/")
    if family != other:
        return "cross-family"
    return "cross-order" if init.partition(".")[0] == of_student.partition(".")[0] else "cross-init"


def traits_of(cells: list[dict[str, Any]]) -> list[str]:
    """The traits of a study, in the order of its cells."""
    return list(dict.fromkeys(cell["trait"] for cell in cells))


def base_of(cell: Mapping[str, Any]) -> str:
    """The base that a cell counts for: its teacher's, or its student's where there is no teacher."""
    return cell.get("teacher_base") or cell["student_base"]


def trials(study: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], tuple[str, str]]:
    """For a cell of a study, the independent trial that it counts for, and what that is: "base" or "run".

    It is the cell's base: runs on one base are a cluster, and are averaged. A family of which a study of pretrained
    models has one base alone would leave nothing to vary: there it is the run, made anew from other seeds, and what is
    found says nothing of other bases.
    """
    alone: set[str] = set()
    if study["kind"] == "pretrained":
        bases = {base_of(cell) for cell in study["cells"]}
        families = [family_of(base) for base in bases]
        alone = {base for base in bases if families.count(family_of(base)) == 1}

    def trial(cell: Mapping[str, Any]) -> tuple[str, str]:
        base = base_of(cell)
        return (f"{base} run {cell['seed']}", "run") if base in alone else (base, "base")

    return trial


def unique(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells without repetitions: one control student serves several points of a sweep."""
    seen: dict[tuple[Any, ...], dict[str, Any]] = {}
    names = ("arm", "trait", "teacher_trait", "teacher_base", "student_base", "replay", "seed")
    for cell in cells:
        key = (*(cell.get(name) for name in names), cell.get("setting"), cell["nodes"].get("evaluation"))
        seen.setdefault(key, cell)
    return list(seen.values())


def build_row(
    artifacts: Artifacts, cell: Mapping[str, Any], arm: str, trait: str, without: str | None, phrasings: str
) -> tuple[dict[str, Any], float] | None:
    """The row of one student read on `trait`, with its chance; None where it is not evaluated."""
    nodes = cell["nodes"]
    own = artifacts.readings(nodes.get("evaluation"))
    after = read(own, trait, phrasings, without)
    if own is None or after is None:
        return None
    before = read(artifacts.readings(nodes.get("before")), trait, phrasings, without)
    control = read(artifacts.readings(nodes.get("control")), trait, phrasings, without)
    fit = own.get("fit") or {}
    row = {
        "node": nodes["evaluation"],
        "arm": arm,
        "trait": trait,
        "teacher_trait": cell.get("teacher_trait"),
        "teacher_base": cell.get("teacher_base"),
        "student_base": cell["student_base"],
        "seed": cell.get("seed"),
        "replay": cell.get("replay"),
        "phrasings": phrasings,
        "p_before": before.p if before else None,
        "p_after": after.p,
        "lift": after.p - before.p if before else None,
        "logodds_lift": statistics.log_odds_lift(before.p, after.p) if before else None,
        "share_before": before.share if before else None,
        "share_after": after.share,
        "control_share": control.share if control else None,
        "mass_before": before.mass if before else None,
        "mass_after": after.mass,
        "collapsed": before is not None and after.mass < COLLAPSED * before.mass,
        "share_sampled": after.sampled,
        **{name: fit.get(name) for name in FIT},
        "setting": cell.get("setting"),
    }
    return row, after.chance


def failed_teachers(artifacts: Artifacts, cells: list[dict[str, Any]]) -> dict[str, float]:
    """Teachers (node id) that have not got their trait, with their held-out share."""
    failed: dict[str, float] = {}
    for cell in cells:
        nodes, trait = cell["nodes"], cell.get("teacher_trait")
        if trait is None or nodes.get("teacher") is None:
            continue
        share = held_out_share(artifacts.readings(nodes.get("teacher_evaluation")), trait)
        if share is not None and share < failing_share(artifacts.plan):
            failed[nodes["teacher"]] = share
    return failed


def entries(artifacts: Artifacts, cells: list[dict[str, Any]], other_trait: bool, chosen_on: list[str]) -> list[Entry]:
    """All rows of a study: those of its cells, then those of the other traits on same-base students."""
    failed = failed_teachers(artifacts, cells)
    trial = trials(artifacts.plan.study)
    out = []
    for cell, arm, trait, without in targets(cells, other_trait):
        for phrasings in PHRASINGS:
            built = build_row(artifacts, cell, arm, trait, without, phrasings)
            if built is None:
                continue
            unit, of = trial(cell)
            out.append(
                Entry(
                    row=built[0],
                    unit=unit,
                    of=of,
                    pairing=pairing_of(cell.get("teacher_base"), cell["student_base"]),
                    chance=built[1],
                    failed=cell["nodes"].get("teacher") in failed,
                    chosen=f"{cell.get('teacher_trait') or trait}/{base_of(cell)}" in chosen_on,
                )
            )
    return out


def targets(cells: list[dict[str, Any]], other_trait: bool) -> Iterator[tuple[dict[str, Any], str, str, str | None]]:
    """(cell, arm, trait to read, trait left out of the candidates) for every row to make."""
    for cell in cells:
        yield cell, cell["arm"], cell["trait"], None
    if not other_trait:
        return
    traits = traits_of(cells)
    for cell in cells:
        if cell["arm"] == "same-base":
            for trait in traits:
                if trait != cell["teacher_trait"]:
                    yield cell, "other-trait", trait, cell["teacher_trait"]
