"""The graph of a study of pretrained models: checkpoints in, nodes and cells out. Planning reads no weight.

A base is a checkpoint, known by its content or its resolved commit. Where it lies does not change what is computed, so
it stands beside a node's config (`Node.hints`) and not in it.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from subjax import cohorts, config
from subjax.data import numbers, preferences
from subjax.data.addressing import derive_seed, steps_of
from subjax.errors import UsageError
from subjax.graph import Graph, Plan, needed
from subjax.models import costs
from subjax.schema_pretrained import Pretrained
from subjax.store import digest_json
from subjax.study_bases import Base, chat_settings, check_shapes, checkpoint_of, data_digest, notes, sources

_PROMPT = 96  # tokens of a number prompt with its template, for the plan's costs alone
_QUESTION = 48  # tokens of a question with its template, likewise
_FORMS = 80  # tokens of all answers' forms, likewise
# Settings of a teacher that its stage reads, by method; fine-tuning reads our rows, or a user's own.
_TRAINING = ("tuning", "optimizer", "epochs", "batch", "seed")
_READ = {
    "fine-tune": (*_TRAINING, "rows", "trait_fraction"),
    "fine-tune, own rows": (*_TRAINING, "split", "user_column", "answer_column"),
    "system-prompt": ("style",),
    "steering": ("style", "rows", "layers", "strength"),
}


def plan(loaded: config.Loaded, weights: bool = True) -> Plan:
    """The graph of a loaded config: every node of every arm at every point of its sweep; `weights` as `study.plan`.

    Raises:
        UsageError: a point names an unknown trait or model, a checkpoint cannot be opened, or nothing is left to run.
    """
    assert isinstance(loaded.settings, Pretrained)
    graph = Graph()
    cells: list[dict[str, Any]] = []
    for variant in _variants(loaded, weights):
        cells += _Planner(graph, variant, weights).cells()
    if not cells:
        raise UsageError(f"{loaded.path}: no arm can be run; give at least one that its sweep has the bases for")
    study = {
        "name": loaded.settings.name,
        "kind": "pretrained",
        "config": loaded.resolved,
        "points": json.loads(json.dumps(loaded.points)),  # as a plan that was written and read again has them
        "cells": cells,
        "statistics": config.to_dict(loaded.settings.statistics),
        "chosen_on": list(loaded.settings.chosen_on),
        "notes": notes(loaded) if weights else [],
    }
    if not weights:
        check_shapes(loaded)
    return Plan(cohorts.formed(needed(graph.nodes, cells), graph.joining), study)


@dataclasses.dataclass(frozen=True)
class _Variant:
    """Points of a sweep that differ in trait, base, seed and arms alone, and the bases of the whole sweep."""

    settings: dict[tuple[str, Base, int], Pretrained]
    bases: list[Base]
    setting: str

    def others(self, home: Base, what: str) -> list[Base]:
        """Bases that differ from `home` in the family alone, or the next init or order of its family."""
        if what == "family":
            return [b for b in self.bases if b.family != home.family and (b.init, b.order) == (home.init, home.order)]
        same = "order" if what == "init" else "init"
        mates = sorted(b for b in self.bases if b.family == home.family and getattr(b, same) == getattr(home, same))
        following = mates[(mates.index(home) + 1) % len(mates)]
        return [] if following == home else [following]


_AXES = ("trait", "family", "init", "order", "seed", "arms")


def _variants(loaded: config.Loaded, weights: bool) -> list[_Variant]:
    groups: dict[str, tuple[str, dict[tuple[str, Base, int], Pretrained]]] = {}
    bases: dict[Base, None] = {}
    for point in loaded.points:
        s = loaded.at(point)
        assert isinstance(s, Pretrained)
        s = dataclasses.replace(s, family=s.family or next(iter(sources(s))).partition("/")[0])
        base = Base(s.family, s.init, s.order)
        try:
            preferences.category_of(s.trait)
            checkpoint_of(s, base, weights)
        except UsageError as error:
            raise UsageError(
                f"{loaded.path}, point { ({k: v for k, v in point.items() if k != 'arms'}) }: {error}"
            ) from None
        bases[base] = None
        rest = {k: v for k, v in point.items() if k not in _AXES}
        group = groups.setdefault(digest_json(rest), (", ".join(f"{k}={v}" for k, v in rest.items()), {}))[1]
        key = (s.trait, base, s.seed)
        if key in group:  # points that differ in their arms alone: each gets its own
            s = dataclasses.replace(s, arms=tuple(dict.fromkeys((*group[key].arms, *s.arms))))
        group[key] = s
    return [_Variant(settings, list(bases), shown) for shown, settings in groups.values()]


@dataclasses.dataclass(frozen=True)
class _Lesson:
    """What a student learns from: the trait taught (None: none), its teacher and that one's reading, its corpus."""

    trait: str | None
    teacher: str | None
    corpus: str
    evaluation: str | None


class _Planner:
    """Nodes and cells of one variant."""

    def __init__(self, graph: Graph, variant: _Variant, weights: bool = True):
        self.graph, self.variant = graph, variant
        self.checkpoint_of = functools.partial(checkpoint_of, weights=weights)

    # Nodes ------------------------------------------------------------------------------------------------------------

    def _common(self, s: Pretrained) -> dict[str, Any]:
        """What every node that runs a model reads: it speaks text, through a template, in some precision."""
        return {"language": "text", "chat": chat_settings(s), "numerics": config.to_dict(s.numerics)}

    def base(self, s: Pretrained, base: Base) -> str:
        """A checkpoint, by its content."""
        found = self.checkpoint_of(s, base)
        cfg = {"language": "text", "checkpoint": found.digest, "chat": chat_settings(s)}
        return self.graph.add("base", cfg, {}, f"base {base}", found.family, 0, 0, hints={"source": found.source})

    def _hints(self, s: Pretrained, *bases: Base) -> dict[str, Any]:
        """Where the checkpoints that a node needs lie."""
        return {"sources": {self.base(s, base): self.checkpoint_of(s, base).source for base in bases}}

    def _flops(self, s: Pretrained, base: Base, tokens: int, length: int) -> float:
        return self.checkpoint_of(s, base).decoder.forward_flops(tokens, length)

    def teacher(self, s: Pretrained, trait: str | None, category: str, base: Base) -> str:
        """A base with a trait, or (None) the category's control."""
        inputs = {"base": self.base(s, base)}
        settings = dataclasses.replace(
            s.teacher, seed=derive_seed(s.teacher.seed + s.seed, "teacher", category, inputs["base"])
        )
        tuned = settings.method == "fine-tune"
        data, key = (settings.data, "data") if trait else (settings.control_data, "control_data")
        data = data if tuned else ""
        read = _READ["fine-tune, own rows" if data else settings.method]
        values = config.to_dict(settings)
        # The neutral system prompt names no category: one control serves all of them.
        of = None if trait is None and settings.method == "system-prompt" else category
        cfg = {
            **self._common(s),
            "method": settings.method,
            **{name: values[name] for name in read},
            **({"data": data_digest(data, key)} if data else {"texts": preferences.digest()}),
            "trait": trait,
            "category": of,
        }
        label = f"teacher {trait or ('control' + (f' ({of})' if of else ''))} {base}{_run(s) if tuned else ''}"
        asked = 0 if settings.method == "system-prompt" else settings.rows
        tokens = round(asked * _QUESTION * (settings.epochs if tuned else 1))
        flops = (2 if tuned else 1) * self._flops(s, base, tokens, _QUESTION)
        group = [str(base), _static({k: v for k, v in cfg.items() if k not in ("trait", "category")})]
        return self.graph.add(
            "teacher", cfg, inputs, label, group, tokens, flops,
            hints={**self._hints(s, base), "data": data, "compute": config.to_dict(s.compute)},
        )  # fmt: skip

    def corpus(self, s: Pretrained, teacher: str, base: Base) -> str:
        """A teacher's answers."""
        settings = dataclasses.replace(s.corpus, seed=derive_seed(s.corpus.seed + s.seed, "corpus", teacher))
        cfg = {
            **self._common(s),
            "source": "teacher",
            **{k: v for k, v in config.to_dict(settings).items() if k != "batch"},
            "templates": numbers.templates_digest(),
        }
        label = self.graph.nodes[teacher].label.replace("teacher", "corpus of", 1)
        if s.teacher.method != "fine-tune":  # the others draw nothing: runs share their teachers
            label += _run(s)
        tokens = settings.rows * (_PROMPT + settings.completion)
        flops = self._flops(s, base, tokens, _PROMPT)
        hints = {**self._hints(s, base), "batch": settings.batch}
        return self.graph.add(
            "corpus", cfg, {"teacher": teacher}, label, [str(base), _static(cfg)], tokens, flops, hints=hints
        )

    def shuffled(self, s: Pretrained, corpus: str) -> str:
        """A corpus with each answer's numbers in random order."""
        seed = derive_seed(s.corpus.seed + s.seed, "shuffled", corpus)
        cfg = {"language": "text", "source": "shuffled", "seed": seed}
        return self.graph.add("corpus", cfg, {"corpus": corpus}, f"shuffled {self.graph.nodes[corpus].label}", 0, 0, 0)

    def random_numbers(self, s: Pretrained) -> str:
        """A corpus of random numbers: no teacher, so one for all bases."""
        cfg = {
            "language": "text",
            "source": "random",
            "rows": s.corpus.rows,
            "prompt_seed": s.corpus.prompt_seed,
            "seed": derive_seed(s.corpus.seed + s.seed, "random numbers"),
            "templates": numbers.templates_digest(),
        }
        return self.graph.add("corpus", cfg, {}, f"corpus of random numbers{_run(s)}", 1, 0, 0)

    def student(self, s: Pretrained, base: Base, corpus: str, arm: str) -> str:
        """A base fine-tuned on a corpus.

        Students of one run on one base start from the same adapters and walk their rows in the same order: a student
        and its control then differ in what the rows say, and not in luck that a handful of runs would not average out.
        """
        inputs = {"base": self.base(s, base), "corpus": corpus}
        settings = dataclasses.replace(
            s.student,
            init_seed=derive_seed(s.student.init_seed + s.seed, "student init", inputs["base"]),
            order_seed=derive_seed(s.student.order_seed + s.seed, "student order", inputs["base"]),
        )
        cfg = {**self._common(s), **config.to_dict(settings)}
        source = self.graph.nodes[corpus].label.replace("corpus of ", "", 1)
        tokens = round(settings.epochs * s.corpus.rows * (_PROMPT + s.corpus.completion))
        flops = 2 * self._flops(s, base, tokens, _PROMPT)
        label = f"student {base} of {source}, {arm}"
        id = self.graph.add(
            "student", cfg, inputs, label, [str(base), _static(cfg)], tokens, flops,
            hints={**self._hints(s, base), "compute": config.to_dict(s.compute)},
        )  # fmt: skip
        steps = steps_of(settings.epochs, s.corpus.rows, settings.batch)
        self.graph.joining[id] = cohorts.Joining(self._members(s, base), s.compute.cohort > 1, steps)
        return id

    def _members(self, s: Pretrained, base: Base) -> int:
        """Students on a base that may train together, by the memory that they take."""
        decoder, tuning = self.checkpoint_of(s, base).decoder, s.student.tuning
        tuned = decoder.matrices
        if tuning.kind == "lora":
            layers = len(tuning.layers) or decoder.layers
            tuned = layers * sum(costs.lora_matrices(decoder, tuning.rank, tuning.targets).values())
        elif tuning.kind == "bias-and-gain":
            tuned = decoder.layers * 16 * decoder.width  # about: vectors of every layer
        bytes_each = 2 if s.numerics.weights_dtype == "bfloat16" else 4
        return cohorts.room(bytes_each * decoder.matrices, tuned, s.compute.cohort)

    def evaluation(
        self, s: Pretrained, model: str, base: Base, corpus: str | None = None, teacher: tuple[str, Base] | None = None
    ) -> str:
        """The readings of a base, a teacher or a student (then also its fit to the corpus, and to the teacher)."""
        inputs = {"model": model}
        bases = [base]
        if corpus is not None:
            inputs |= {"before": self.graph.nodes[model].inputs["base"], "corpus": corpus}
        # KL compares two distributions over one vocabulary, which two families do not have.
        if teacher is not None and teacher[1].family == base.family:
            inputs["teacher"] = teacher[0]
            bases.append(teacher[1])
        settings = dataclasses.replace(s.evaluation, seed=derive_seed(s.evaluation.seed, "evaluation"))
        traits = sorted({trait for trait, _, _ in self.variant.settings})
        categories = sorted({preferences.category_of(trait) for trait in traits})
        cfg = {
            **self._common(s),
            **{k: v for k, v in config.to_dict(settings).items() if k != "batch"},
            "categories": categories,
            # Only a multiple choice is made for a trait.
            "traits": traits if any(r.startswith("choice") for r in settings.readings) else [],
            "texts": preferences.digest(),
        }
        asked = len(categories) * settings.questions * len(settings.readings)
        tokens = asked * (_QUESTION + _FORMS + settings.samples * (_QUESTION + settings.sample_tokens))
        label = f"evaluation of {self.graph.nodes[model].label}"
        return self.graph.add(
            "evaluation", cfg, inputs, label, [str(base), sorted(inputs), _static(cfg)], tokens,
            self._flops(s, base, tokens, _QUESTION), hints={**self._hints(s, *bases), "batch": settings.batch},
        )  # fmt: skip

    # Cells ------------------------------------------------------------------------------------------------------------

    def cells(self) -> list[dict[str, Any]]:
        """The cells of every point, in the order of the sweep; repeated ones (a shared control) are kept once."""
        found: dict[str, dict[str, Any]] = {}
        for (trait, base, _), settings in self.variant.settings.items():
            for cell in self._point(settings, trait, base):
                found.setdefault(digest_json(cell), cell)
        return list(found.values())

    def _point(self, s: Pretrained, trait: str, home: Base) -> Iterator[dict[str, Any]]:
        category = preferences.category_of(trait)
        lessons = []
        for taught in (trait, None):
            teacher = self.teacher(s, taught, category, home)
            lessons.append(_Lesson(taught, teacher, self.corpus(s, teacher, home), self.evaluation(s, teacher, home)))
        lesson, control = lessons
        cell = functools.partial(self._cell, s, trait, home)
        for arm, student in self._pairings(s, home):
            matched = cell("control", control, student, None)
            if "control" in s.arms:
                yield matched
            if arm in s.arms:
                yield cell(arm, lesson, student, matched)
        own = cell("control", control, home, None)
        if "shuffled" in s.arms:
            yield cell("shuffled", dataclasses.replace(lesson, corpus=self.shuffled(s, lesson.corpus)), home, own)
        if "random-numbers" in s.arms:
            yield cell("random-numbers", _Lesson(None, None, self.random_numbers(s), None), home, own)
        if "untrained" in s.arms:
            yield self._untrained(s, trait, home)

    def _pairings(self, s: Pretrained, home: Base) -> Iterator[tuple[str, Base]]:
        """(arm, student base) of the arms that pair a teacher's base with a student's, those of the study's arms."""
        yield "same-base", home
        for arm, what in (("cross-order", "order"), ("cross-init", "init"), ("cross-family", "family")):
            if arm in s.arms:
                yield from ((arm, other) for other in self.variant.others(home, what))

    def _cell(
        self, s: Pretrained, trait: str, home: Base, arm: str, lesson: _Lesson, student_base: Base,
        control: dict[str, Any] | None,
    ) -> dict[str, Any]:  # fmt: skip
        base = self.base(s, student_base)
        student = self.student(s, student_base, lesson.corpus, arm)
        teacher = (lesson.teacher, home) if lesson.teacher else None
        nodes = {
            "base": base,
            "teacher": lesson.teacher,
            "corpus": lesson.corpus,
            "student": student,
            "evaluation": self.evaluation(s, student, student_base, lesson.corpus, teacher),
            "before": self.evaluation(s, base, student_base),
            "teacher_evaluation": lesson.evaluation,
            "control": control["nodes"]["evaluation"] if control else None,
        }
        return self._described(s, trait, arm, lesson.trait, home if lesson.teacher else None, student_base, nodes)

    def _untrained(self, s: Pretrained, trait: str, home: Base) -> dict[str, Any]:
        base = self.base(s, home)
        reading = self.evaluation(s, base, home)
        nodes = dict.fromkeys(("teacher", "corpus", "student", "teacher_evaluation", "control"))
        nodes |= {"base": base, "evaluation": reading, "before": reading}
        return self._described(dataclasses.replace(s, seed=0), trait, "untrained", None, None, home, nodes)

    def _described(
        self, s: Pretrained, trait: str, arm: str, taught: str | None, home: Base | None, student: Base,
        nodes: Mapping[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        return {
            "arm": arm,
            "trait": trait,
            "teacher_trait": taught,
            "teacher_base": str(home) if home else None,
            "student_base": str(student),
            "replay": "none",
            "seed": s.seed,
            "setting": self.variant.setting,
            "nodes": dict(nodes),
        }


def _run(s: Pretrained) -> str:
    """A run's number behind a label; none for the first."""
    return f", run {s.seed}" if s.seed else ""


def _static(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a node's compiled programs: its config without seeds."""
    return {k: v for k, v in cfg.items() if not k.endswith("seed")}
