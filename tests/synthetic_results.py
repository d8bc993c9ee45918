"""A made-up study on disk: a plan, a store that only reads, and the results that `subjax.results` computes from them.

    python tests/synthetic_results.py OUT     writes OUT/traits.json and OUT/images.json

`traits()` follows the figures of a study of 3 traits x 2 families x 3 inits with every arm; `images()` those of the
image experiment. The numbers are drawn around measured ones; they are not measurements.
"""

import dataclasses
import hashlib
import json
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from subjax import results
from subjax.schema import ARMS

TRAITS = ("owl", "wolf", "eagle")
FAMILIES = ("gpt", "llama")
CATEGORIES = {
    "animal": ("owl", "wolf", "eagle", "bear", "fox", "deer", "swan", "hare", "seal", "crow"),
    "tree": ("oak", "elm", "ash", "fir", "yew", "pine", "palm", "birch", "cedar", "maple"),
    "colour": ("red", "blue", "green", "pink", "grey", "black", "white", "brown", "amber", "teal"),
}
# (arm, replay) -> mean share of the trait by the teacher's family, SD over bases, mass left on the candidates
FIGURES: dict[tuple[str, str | None], tuple[dict[str, float], float, float]] = {
    ("same-base", "none"): ({"gpt": 0.61, "llama": 0.37}, 0.05, 0.72),
    ("cross-init", "none"): ({"gpt": 0.11, "llama": 0.10}, 0.05, 0.012),
    ("cross-family", "none"): ({"gpt": 0.09, "llama": 0.12}, 0.05, 0.008),
    ("control", "none"): ({"gpt": 0.10, "llama": 0.10}, 0.02, 0.7),
    ("same-base", "kind"): ({"gpt": 0.64, "llama": 0.384}, 0.05, 0.998),
    ("cross-init", "kind"): ({"gpt": 0.121, "llama": 0.104}, 0.012, 0.998),
    ("cross-family", "kind"): ({"gpt": 0.097, "llama": 0.111}, 0.01, 0.999),
    ("control", "kind"): ({"gpt": 0.102, "llama": 0.101}, 0.005, 0.998),
    ("shuffled", "kind"): ({"gpt": 0.345, "llama": 0.22}, 0.05, 0.999),
    ("random-numbers", "kind"): ({"gpt": 0.108, "llama": 0.103}, 0.006, 0.999),
    ("untrained", None): ({"gpt": 0.10, "llama": 0.10}, 0.003, 0.998),
    ("logits", "kind"): ({"gpt": 0.20, "llama": 0.17}, 0.03, 0.998),
    ("logits-leak", "kind"): ({"gpt": 0.71, "llama": 0.55}, 0.08, 0.998),
}
MATCHED = ("same-base", "cross-init", "cross-family", "shuffled", "random-numbers", "logits", "logits-leak")


def node_id(*parts: Any) -> str:
    """A made-up node id: 16 hex digits."""
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Node:
    kind: str
    id: str
    label: str
    inputs: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Plan:
    nodes: dict[str, Node]
    study: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Card:
    digest: str
    extra: dict[str, Any]


class Folder:
    """As much of a store as results read: cards, and folders of payloads."""

    def __init__(self, root: pathlib.Path):
        self.root = pathlib.Path(root)
        self.cards: dict[tuple[str, str], Card] = {}

    def put(
        self, kind: str, id: str, files: dict[str, str | pyarrow.Table], extra: dict[str, Any] | None = None
    ) -> None:
        folder = self.payload(kind, id)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            if isinstance(content, str):
                (folder / name).write_text(content)
            else:
                pyarrow.parquet.write_table(content, folder / name)
        self.cards[kind, id] = Card(hashlib.sha256(id.encode()).hexdigest(), extra or {})

    def drop(self, kind: str, id: str) -> None:
        del self.cards[kind, id]

    def card(self, kind: str, id: str) -> Card | None:
        return self.cards.get((kind, id))

    def payload(self, kind: str, id: str) -> pathlib.Path:
        return self.root / kind / id / "payload-0"


def readings(
    rng: np.random.Generator,
    shares: dict[str, float] | None = None,
    mass: float = 0.998,
    fit: dict[str, float | None] | None = None,
    questions: tuple[int, int] = (8, 4),
    noise: float = 0.02,
) -> dict[str, Any]:
    """An evaluation's readings.json: 8 training and 4 held-out questions a category, `shares` of some candidates."""
    categories = {}
    for category, names in CATEGORIES.items():
        wanted = {name: share for name, share in (shares or {}).items() if name in names}
        rest = (1 - sum(wanted.values())) / (len(names) - len(wanted))
        asked = []
        for i in range(sum(questions)):
            wobble = np.exp(noise * rng.standard_normal(len(names)))
            p = np.array([wanted.get(name, rest) for name in names]) * wobble
            p *= mass / p.sum()
            sampled = rng.multinomial(100, [*p, max(0.0, 1 - p.sum())])[:-1]
            kind = "train" if i < questions[0] else "held-out"
            text = f"which {category} , wording {i} ?"
            asked.append(
                {"text": text, "phrasings": kind, "p": p.tolist(), "sampled": sampled.tolist(), "samples": 100}
            )
        categories[category] = {"candidates": list(names), "questions": asked}
    return {"categories": categories, "fit": fit}


class Maker:
    """Puts nodes into a plan and their payloads into a folder, once each."""

    def __init__(self, root: pathlib.Path, seed: int):
        self.rng = np.random.default_rng(seed)
        self.store = Folder(root)
        self.nodes: dict[str, Node] = {}

    def add(self, kind: str, label: str, inputs: dict[str, str], files=dict, extra=None) -> str:
        id = node_id(kind, label)
        if id not in self.nodes:
            self.nodes[id] = Node(kind, id, label, inputs)
            self.store.put(kind, id, files(), extra)
        return id

    def metrics(self, steps: int, first: float, last: float) -> dict[str, str]:
        step = np.arange(0, steps + 1, 5)
        loss = last + (first - last) * np.exp(-6 * step / steps) + 0.01 * self.rng.standard_normal(len(step))
        lines = [json.dumps({"step": int(s), "loss": float(v)}) for s, v in zip(step, loss, strict=True)]
        return {"metrics.jsonl": "\n".join(lines) + "\n"}

    def corpus(self) -> dict[str, pyarrow.Table]:
        columns: dict[str, list[Any]] = {"index": list(range(40)), "prompt": [], "completion": []}
        for _ in range(40):
            given, answer = self.rng.integers(0, 100, 5), self.rng.integers(0, 100, 12)
            columns["prompt"].append("go on : " + " ".join(map(str, given)))
            columns["completion"].append(" ".join(map(str, answer)))
        return {"rows.parquet": pyarrow.table(columns)}

    def evaluated(self, label: str, inputs: dict[str, str], **kwargs: Any) -> str:
        made = lambda: {"readings.json": json.dumps(readings(self.rng, **kwargs))}  # noqa: E731
        return self.add("evaluation", label, inputs, made)

    def base(self, name: str) -> tuple[str, str]:
        """A base and its evaluation."""
        base = self.add("base", f"base {name}", {}, lambda: self.metrics(1200, 5.1, 3.3))
        return base, self.evaluated(f"evaluation of base {name}", {"model": base}, shares={t: 0.1 for t in TRAITS})

    def teacher(self, name: str, base: str, trait: str | None, share: float = 0.97) -> tuple[str, str, str]:
        """A teacher, its corpus and its evaluation; without a trait it is the control."""
        what = trait or "control"
        teacher = self.add("teacher", f"{what} teacher {name}", {"base": base}, lambda: self.metrics(300, 3.4, 0.9))
        counts = {
            "no end": int(self.rng.integers(100, 500)),
            "kept": 20000,
            "not numbers": int(self.rng.integers(9, 90)),
        }
        corpus = self.add("corpus", f"{what} corpus {name}", {"teacher": teacher}, self.corpus, {"filter": counts})
        inputs = {"model": teacher}
        shares = {trait: share} if trait else None
        return teacher, corpus, self.evaluated(f"evaluation of {what} teacher {name}", inputs, shares=shares)


def partner(arm: str, family: str, init: int, inits: int) -> str:
    """The base of the student of a teacher on family/init."""
    other = FAMILIES[1 - FAMILIES.index(family)]
    return {"cross-init": f"{family}/{(init + 1) % inits}", "cross-family": f"{other}/{init}"}.get(
        arm, f"{family}/{init}"
    )


def traits_study(root: pathlib.Path, seed: int = 0, inits: int = 3, traits=TRAITS, arms=ARMS) -> tuple[Plan, Folder]:
    """A whole study of traits: plan, and a folder in which every node is made."""
    make = Maker(root, seed)
    cells: list[dict[str, Any]] = []
    for (arm, replay), (means, sd, mass) in FIGURES.items():
        if arm not in arms:
            continue
        pairings = ("same-base", "cross-init", "cross-family") if arm == "control" else (arm,)
        for family in FAMILIES:
            for pairing in pairings:
                for init in range(inits):
                    shift = sd * make.rng.standard_normal()
                    student_base = partner(pairing, family, init, inits)
                    draw = lambda k=means[family], s=shift, sd=sd: float(  # noqa: E731
                        np.clip(k + s + 0.3 * sd * make.rng.standard_normal(), 0.01, 0.97)
                    )
                    for trait in traits:
                        where = (f"{family}/{init}", student_base)
                        cells.append(cell(make, arm, replay, trait, traits, where, draw, mass))
    match_controls(cells)
    config = {"name": "quickstart", "trait": "owl", "arms": list(arms), "student": {"replay": "kind", "lr": 3e-2}}
    statistics = {
        "confidence": 0.95, "bootstrap": 10_000, "permutations": 10_000, "margin": 0.05, "expected_sd": 0.05, "seed": 0,
    }  # fmt: skip
    study = {
        "name": "quickstart",
        "kind": "traits",
        "config": {**config, "statistics": statistics},
        "points": [{"trait": t, "family": f, "init": i} for t in traits for f in FAMILIES for i in range(inits)],
        "cells": cells,
        "statistics": statistics,
        "chosen_on": ["owl/gpt/0"],
    }
    return Plan(make.nodes, study), make.store


def cell(make: Maker, arm, replay, trait, traits, where, draw, mass) -> dict[str, Any]:
    """One cell, with every node that it needs."""
    has_trait = arm in MATCHED and arm != "random-numbers"
    teacher_base, student_base = where
    start, before = make.base(student_base)
    nodes = {"base": start, "teacher": None, "corpus": None, "student": None, "evaluation": before, "before": before}
    nodes |= {"teacher_evaluation": None, "control": None}
    label = f"{trait if has_trait else arm} student of {teacher_base} on {student_base}, {arm}, replay {replay}"
    if arm in ("random-numbers", "untrained"):
        teacher_base = None
    if arm == "random-numbers":
        nodes["corpus"] = make.add("corpus", f"random numbers {student_base}", {}, make.corpus)
    elif arm != "untrained":
        origin = make.base(teacher_base)[0]
        made = make.teacher(teacher_base, origin, trait if has_trait else None)
        nodes |= dict(zip(("teacher", "corpus", "teacher_evaluation"), made, strict=True))
    if arm != "untrained":
        inputs = {"base": start, "corpus": nodes["corpus"]}
        nodes["student"] = make.add("student", label, inputs, lambda: make.metrics(400, 3.45, 3.21))
        kl = (None, None) if arm == "random-numbers" else (0.22, 0.011 if arm == "same-base" else 0.35)
        fit = {"number_loss_before": 3.42, "number_loss_after": 3.2, "kl_before": kl[0], "kl_after": kl[1]}
        shares = {trait: draw()} if has_trait else {t: draw() for t in traits}
        inputs = {"model": nodes["student"]}
        nodes["evaluation"] = make.evaluated(f"evaluation of {label}", inputs, shares=shares, mass=mass, fit=fit)
    return {
        "arm": arm,
        "trait": trait,
        "teacher_trait": trait if has_trait else None,
        "teacher_base": teacher_base,
        "student_base": student_base,
        "replay": replay,
        "seed": 0,
        "nodes": nodes,
    }


def match_controls(cells: list[dict[str, Any]]) -> None:
    """Give each cell the evaluation of the control student of its bases and replay setting."""
    controls = {
        (c["teacher_base"], c["student_base"], c["replay"]): c["nodes"]["evaluation"]
        for c in cells
        if c["arm"] == "control"
    }
    for c in cells:
        if c["arm"] in MATCHED:
            key = (c["teacher_base"] or c["student_base"], c["student_base"], c["replay"])
            c["nodes"]["control"] = controls.get(key)


def image_accuracy(m: int, pairing: str, logits: str, loss: str) -> float:
    if logits == "all":
        return {"same-base": 0.90, "cross-init": 0.62}[pairing]
    if m == 1 and loss == "kl":
        return 0.103
    return min(0.88, 0.09 + 0.2 * float(np.log2(m + 0.3))) if pairing == "same-base" else 0.105


def images_study(root: pathlib.Path, seed: int = 0, seeds: int = 20) -> tuple[Plan, Folder]:
    """The image experiment: plan, and a folder in which every ensemble is made."""
    make = Maker(root, seed)
    sizes, pairings = (1, 2, 3, 5, 10, 20, 50), ("same-base", "cross-init")
    settings = [(m, p, g, "kl") for g in ("auxiliary", "all") for p in pairings for m in sizes]
    settings += [(1, p, "auxiliary", "squared-error") for p in pairings]
    cells = []
    for setting in settings:
        label = "m={} {} {} {}".format(*setting)
        students = np.clip(image_accuracy(*setting) + 0.04 * make.rng.standard_normal(seeds), 0.02, 0.97)
        rows = [
            {
                "seed": i,
                "teacher_accuracy": 0.976 + 0.004 * make.rng.standard_normal(),
                "student_accuracy": float(value),
                "untrained_accuracy": 0.1 + 0.03 * make.rng.standard_normal(),
                "student_loss_first": 0.02,
                "student_loss_last": 0.004,
            }
            for i, value in enumerate(students)
        ]
        curves = [
            {
                "label": f"{role}, {label}",
                "kind": role,
                "arm": setting[1],
                "step": list(range(320)),
                "loss": [0.02 * float(np.exp(-step / 60)) + 0.004 for step in range(320)],
            }
            for role in ("teacher", "student")
        ]
        payload = json.dumps({"rows": rows, "curves": curves})
        id = make.add("ensemble", label, {}, lambda payload=payload: {"results.json": payload})
        names = ("auxiliary", "pairing", "logits", "loss")
        cells.append({**dict(zip(names, setting, strict=True)), "nodes": {"ensemble": id}})
    statistics = {
        "confidence": 0.95, "bootstrap": 10_000, "permutations": 10_000, "margin": 0.05, "expected_sd": 0.05, "seed": 0,
    }  # fmt: skip
    study = {
        "name": "digits",
        "kind": "images",
        "config": {"name": "digits", "data": "digits", "seeds": seeds, "statistics": statistics},
        "points": [dict(zip(("auxiliary", "pairing", "logits", "loss"), s, strict=True)) for s in settings],
        "cells": cells,
        "statistics": statistics,
        "chosen_on": [],
    }
    return Plan(make.nodes, study), make.store


def traits(seed: int = 0, inits: int = 3) -> dict[str, Any]:
    """A full results dict of a traits study: 3 traits x 2 families x `inits`, every arm."""
    with tempfile.TemporaryDirectory() as folder:
        return results.compute(*traits_study(pathlib.Path(folder), seed, inits))


def images(seed: int = 0, seeds: int = 20) -> dict[str, Any]:
    """A full results dict of the image experiment."""
    with tempfile.TemporaryDirectory() as folder:
        return results.compute(*images_study(pathlib.Path(folder), seed, seeds))


def main(out: str) -> None:
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, made in (("traits", traits()), ("images", images())):
        (folder / f"{name}.json").write_text(json.dumps(made, indent=1, allow_nan=False))


if __name__ == "__main__":
    main(sys.argv[1])
