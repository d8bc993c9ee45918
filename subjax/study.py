"""The study graph: settings and a sweep in, nodes with their identities out.

A node is what must be computed; a cell is what it is computed for (an arm at a point of the sweep). Many cells share
nodes: a base, a control teacher or a corpus is planned once, whoever asks for it, because its id is a hash of what it
is made from. Planning touches no device and needs no JAX.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from subjax import cohorts, config, schema, schema_pretrained
from subjax.data import world
from subjax.data.addressing import derive_seed
from subjax.errors import UsageError
from subjax.graph import Graph, Plan, needed
from subjax.models.architecture import DecoderConfig
from subjax.models.families import decoder_config
from subjax.store import digest_json


def plan(loaded: config.Loaded, weights: bool = True) -> Plan:
    """The graph of a loaded config: every node of every arm at every point of its sweep.

    Args:
        loaded: the config and its sweep.
        weights: whether checkpoints are opened. Without, only their architectures are asked for, which may be known
            where no weights are; the ids are then those of no run.

    Raises:
        UsageError: a point names an unknown trait or family, or nothing is left to run.
    """
    if isinstance(loaded.settings, schema.Images):
        from subjax import study_images

        return study_images.plan(loaded)
    if isinstance(loaded.settings, schema_pretrained.Pretrained):
        from subjax import study_pretrained

        return study_pretrained.plan(loaded, weights)
    graph = Graph()
    cells: list[dict[str, Any]] = []
    for variant in _variants(loaded):
        cells += _Planner(graph, variant).cells()
    if not cells:
        raise UsageError(f"{loaded.path}: no arm can be run; give at least one that its sweep has the bases for")
    study = {
        "name": loaded.settings.name,
        "kind": "traits",
        "config": loaded.resolved,
        "points": json.loads(json.dumps(loaded.points)),  # as a plan that was written and read again has them
        "cells": cells,
        "statistics": config.to_dict(loaded.settings.statistics),
        "chosen_on": list(loaded.settings.chosen_on),
    }
    return Plan(cohorts.formed(needed(graph.nodes, cells), graph.joining), study)


@dataclasses.dataclass(frozen=True)
class Variant:
    """Points of a sweep that differ in trait, family, init, the student's seed and arms alone, and the bases of the
    whole sweep.
    """

    settings: dict[tuple[str, str, int, int], schema.Study]  # by trait, family, init, seed
    bases: list[tuple[str, int]]  # (family, init) of every point, of this variant or another: cross arms pair them
    setting: str  # what else this variant sets, for people and for the results: runs of two variants do not mix

    def next_init(self, family: str, init: int) -> int | None:
        """The next init of the family, modulo their number; None where there is one alone."""
        inits = sorted(i for f, i in self.bases if f == family)
        return inits[(inits.index(init) + 1) % len(inits)] if len(inits) > 1 else None

    def other_families(self, family: str, init: int) -> list[str]:
        """Other families of the sweep that have the same init."""
        return [f for f, i in self.bases if f != family and i == init]


_AXES = ("trait", "family", "init", "student.seed", "arms")


def _variants(loaded: config.Loaded) -> list[Variant]:
    groups: dict[str, tuple[str, dict[tuple[str, str, int, int], schema.Study]]] = {}
    bases: dict[tuple[str, int], None] = {}  # a set that keeps its order
    for point in loaded.points:
        settings = loaded.at(point)
        assert isinstance(settings, schema.Study)
        try:
            world.category_of(settings.trait)
            decoder_of(settings, settings.family)
        except UsageError as error:
            at = {k: v for k, v in point.items() if k != "arms"}  # the arms are long, and not to blame
            raise UsageError(f"{loaded.path}, point {at}: {error}") from None
        bases[settings.family, settings.init] = None
        rest = {k: v for k, v in point.items() if k not in _AXES}
        shown = ", ".join(f"{k}={v}" for k, v in rest.items() if k != "student.replay")
        group = groups.setdefault(digest_json(rest), (shown, {}))[1]
        key = (settings.trait, settings.family, settings.init, settings.student.seed)
        if key in group:  # points that differ in their arms alone: each gets its own
            arms = tuple(dict.fromkeys((*group[key].arms, *settings.arms)))
            settings = dataclasses.replace(settings, arms=arms)
        group[key] = settings
    return [Variant(settings, list(bases), shown) for shown, settings in groups.values()]


def decoder_of(settings: schema.Study, family: str) -> DecoderConfig:
    """The architecture of a family at the study's size, over the synthetic world."""
    return decoder_config(
        family, settings.base.size, vocab=len(world.VOCABULARY), length=world.LENGTH, numerics=settings.numerics
    )


class _Planner:
    """Nodes and cells of one variant."""

    def __init__(self, graph: Graph, variant: Variant):
        self.graph, self.variant = graph, variant

    # Nodes ------------------------------------------------------------------------------------------------------------

    def base(self, s: schema.Study, family: str, init: int) -> str:
        """A base by (family, size, init_seed, order_seed); init n moves both seeds by n."""
        settings = dataclasses.replace(
            s.base, family=family, init_seed=s.base.init_seed + init, order_seed=s.base.order_seed + init
        )
        cfg = {**config.to_dict(settings), "world_digest": world.digest(), "numerics": config.to_dict(s.numerics)}
        tokens = settings.steps * settings.batch * world.LENGTH
        flops = 3 * decoder_of(s, family).forward_flops(tokens, world.LENGTH)
        return self.graph.add("base", cfg, {}, f"base {family}/{init}", _static(cfg), tokens, flops)

    def teacher(self, s: schema.Study, trait: str | None, category: str, family: str, init: int) -> str:
        """A base tuned towards a trait, or (None) the category's control."""
        base = self.base(s, family, init)
        settings = dataclasses.replace(s.teacher, seed=derive_seed(s.teacher.seed, "teacher", trait, base))
        cfg = {
            **config.to_dict(settings),
            "trait": trait,
            "category": category,
            "numerics": config.to_dict(s.numerics),
        }
        label = f"teacher {trait or f'control ({category})'} {family}/{init}"
        tokens = settings.steps * (settings.batch + settings.numbers_batch) * world.LENGTH
        flops = 2 * decoder_of(s, family).forward_flops(tokens, world.LENGTH)
        group = [family, s.base.size, _static({k: v for k, v in cfg.items() if k not in ("trait", "category")})]
        return self.graph.add("teacher", cfg, {"base": base}, label, group, tokens, flops)

    def corpus(self, s: schema.Study, teacher: str, family: str) -> str:
        """A teacher's answers."""
        settings = dataclasses.replace(s.corpus, seed=derive_seed(s.corpus.seed, "corpus", teacher))
        cfg = {
            "source": "teacher",
            **config.to_dict(settings),
            "numerics": config.to_dict(s.numerics),
            "bucket": [world.PROMPT, world.ANSWER],
        }
        label = self.graph.nodes[teacher].label.replace("teacher", "corpus of", 1)
        tokens = settings.rows * world.LENGTH
        flops = decoder_of(s, family).forward_flops(tokens, world.LENGTH)
        return self.graph.add("corpus", cfg, {"teacher": teacher}, label, [family, _static(cfg)], tokens, flops)

    def shuffled(self, s: schema.Study, corpus: str) -> str:
        """A corpus with each answer's numbers in random order."""
        cfg = {"source": "shuffled", "seed": derive_seed(s.corpus.seed, "shuffled", corpus)}
        return self.graph.add("corpus", cfg, {"corpus": corpus}, f"shuffled {self.graph.nodes[corpus].label}", 0, 0, 0)

    def random_numbers(self, s: schema.Study) -> str:
        """A corpus of random numbers: no teacher, so one for all bases."""
        cfg = {
            "source": "random",
            "rows": s.corpus.rows,
            "prompt_seed": s.corpus.prompt_seed,
            "seed": derive_seed(s.corpus.seed, "random numbers"),
            "world_digest": world.digest(),
        }
        return self.graph.add("corpus", cfg, {}, "corpus of random numbers", 1, 0, 0)

    def student(
        self, s: schema.Study, family: str, init: int, corpus: str, arm: str, teacher: str | None, objective: str
    ) -> str:
        """A base fine-tuned on a corpus; `teacher` is an input only where its logits are the objective."""
        inputs = {"base": self.base(s, family, init), "corpus": corpus}
        if objective != "numbers":
            assert teacher is not None
            inputs["teacher"] = teacher
        settings = dataclasses.replace(
            s.student, seed=derive_seed(s.student.seed, "student", objective, *inputs.values())
        )
        cfg = {
            **config.to_dict(settings),
            "objective": objective,
            "numerics": config.to_dict(s.numerics),
            "world_digest": world.digest(),
        }
        source = self.graph.nodes[corpus].label.replace("corpus of ", "", 1)
        # A control has students for each objective, which their labels must tell apart.
        purpose = arm if objective in ("numbers", arm) else f"{arm} for {objective}"
        label = f"student {family}/{init} of {source}, {purpose}{' (no replay)' if settings.replay == 'none' else ''}"
        architecture = decoder_of(s, family)
        tokens = settings.steps * settings.batch * world.LENGTH
        flops = (2 if objective == "numbers" else 3) * architecture.forward_flops(tokens, world.LENGTH)
        group = [family, s.base.size, _static(cfg)]
        id = self.graph.add("student", cfg, inputs, label, group, tokens, flops)
        if objective == "numbers":  # the others compare with a teacher of their own
            most = cohorts.room(4 * architecture.matrices, architecture.matrices, s.compute.cohort)
            self.graph.joining[id] = cohorts.Joining(most, s.compute.cohort > 1, settings.steps)
        return id

    def evaluation(
        self, s: schema.Study, model: str, family: str, corpus: str | None = None, teacher: str | None = None
    ) -> str:
        """The readings of a base, a teacher or a student (then also its fit to the corpus, and to the teacher)."""
        node = self.graph.nodes[model]
        inputs = {"model": model}
        if corpus is not None:
            inputs |= {"before": node.inputs["base"], "corpus": corpus}
        if teacher is not None:
            inputs["teacher"] = teacher
        settings = dataclasses.replace(s.evaluation, seed=derive_seed(s.evaluation.seed, "evaluation", model))
        cfg = {
            **config.to_dict(settings),
            "questions": world.digest(),
            "numerics": config.to_dict(s.numerics),
        }
        questions = len(world.CATEGORIES) * len(world.TEMPLATES)
        tokens = questions * (1 + settings.samples) * world.PROMPT
        flops = decoder_of(s, family).forward_flops(tokens, world.PROMPT)
        label = f"evaluation of {node.label}"
        return self.graph.add(
            "evaluation", cfg, inputs, label, [family, s.base.size, sorted(inputs), _static(cfg)], tokens, flops
        )

    # Cells ------------------------------------------------------------------------------------------------------------

    def cells(self) -> list[dict[str, Any]]:
        """The cells of every point, in the order of the sweep; repeated ones (a shared control) are kept once."""
        found: dict[str, dict[str, Any]] = {}
        for (trait, family, init, _), settings in self.variant.settings.items():
            for cell in self._point(settings, trait, family, init):
                found.setdefault(digest_json(cell), cell)
        return list(found.values())

    def _point(self, s: schema.Study, trait: str, family: str, init: int) -> Iterator[dict[str, Any]]:
        category = world.category_of(trait)
        teacher = self.teacher(s, trait, category, family, init)
        neutral = self.teacher(s, None, category, family, init)
        corpus, neutral_corpus = self.corpus(s, teacher, family), self.corpus(s, neutral, family)
        taught = _Lesson(trait, teacher, corpus, self.evaluation(s, teacher, family))
        control = _Lesson(None, neutral, neutral_corpus, self.evaluation(s, neutral, family))
        cell = functools.partial(self._cell, s, trait, (family, init))
        for arm, student in self._pairings(s, family, init):
            matched = cell("control", control, student, None)
            if "control" in s.arms:
                yield matched
            if arm in s.arms:
                yield cell(arm, taught, student, matched)
        home = (family, init)
        own = cell("control", control, home, None)
        if "shuffled" in s.arms:
            lesson = dataclasses.replace(taught, corpus=self.shuffled(s, corpus))
            yield cell("shuffled", lesson, home, own)
        if "random-numbers" in s.arms:
            yield cell("random-numbers", _Lesson(None, None, self.random_numbers(s), None), home, own)
        for arm in ("logits", "logits-leak"):
            if arm in s.arms:
                # Its own control: the control teacher's logits, over the same tokens.
                yield cell(arm, taught, home, cell("control", control, home, None, objective=arm), objective=arm)
        if "untrained" in s.arms:
            yield self._untrained(s, trait, home)

    def _pairings(self, s: schema.Study, family: str, init: int) -> Iterator[tuple[str, tuple[str, int]]]:
        """(arm, student base) of the arms that pair a teacher's base with a student's, those of the study's arms."""
        yield "same-base", (family, init)
        other = self.variant.next_init(family, init)
        if "cross-init" in s.arms and other is not None:
            yield "cross-init", (family, other)
        if "cross-family" in s.arms:
            yield from (("cross-family", (f, init)) for f in self.variant.other_families(family, init))

    def _cell(
        self, s: schema.Study, trait: str, home: tuple[str, int], arm: str, lesson: "_Lesson",
        student_base: tuple[str, int], control: dict[str, Any] | None, *, objective: str = "numbers",
    ) -> dict[str, Any]:  # fmt: skip
        family, init = student_base
        base = self.base(s, family, init)
        student = self.student(s, family, init, lesson.corpus, arm, lesson.teacher, objective)
        nodes = {
            "base": base,
            "teacher": lesson.teacher,
            "corpus": lesson.corpus,
            "student": student,
            "evaluation": self.evaluation(s, student, family, lesson.corpus, lesson.teacher),
            "before": self.evaluation(s, base, family),
            "teacher_evaluation": lesson.evaluation,
            "control": control["nodes"]["evaluation"] if control else None,
        }
        return {
            "arm": arm,
            "trait": trait,
            "teacher_trait": lesson.trait,
            "teacher_base": _name(home) if lesson.teacher else None,
            "student_base": _name(student_base),
            "replay": s.student.replay,
            "seed": s.student.seed,
            "setting": self.variant.setting,
            "nodes": nodes,
        }

    def _untrained(self, s: schema.Study, trait: str, home: tuple[str, int]) -> dict[str, Any]:
        base = self.base(s, *home)
        reading = self.evaluation(s, base, home[0])
        nodes = dict.fromkeys(("teacher", "corpus", "student", "teacher_evaluation", "control"))
        return {
            "arm": "untrained",
            "trait": trait,
            "teacher_trait": None,
            "teacher_base": None,
            "student_base": _name(home),
            "replay": None,
            "seed": s.student.seed,
            "setting": self.variant.setting,
            "nodes": {**nodes, "base": base, "evaluation": reading, "before": reading},
        }


@dataclasses.dataclass(frozen=True)
class _Lesson:
    """What a student learns from: the trait taught (None: none), its teacher and that one's reading, its corpus."""

    trait: str | None
    teacher: str | None
    corpus: str
    evaluation: str | None


def _name(base: tuple[str, int]) -> str:
    return f"{base[0]}/{base[1]}"


def _static(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a node's compiled programs: its config without seeds."""
    return {k: v for k, v in cfg.items() if not k.endswith("seed")}
