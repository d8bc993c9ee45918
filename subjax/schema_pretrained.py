"""The typed settings of a study of pretrained models: real checkpoints, spoken to in English by their templates."""

import dataclasses
from typing import Literal

from subjax import schema
from subjax.schema import Optimizer, Statistics, Tuning, part, setting

ARMS = (
    "same-base", "cross-order", "cross-init", "cross-family", "control", "other-trait", "shuffled", "random-numbers",
    "untrained",
)  # fmt: skip

# How a model is questioned: with its answer's beginning given or not, the same behind a row of numbers, by a choice.
# Behind a colon stands how the system prompt of the training differs: `bare` leaves it out.
_WAYS = ("forced", "plain", "numbers", "numbers-plain", "choice")
READINGS = (*_WAYS, *(f"{way}:bare" for way in _WAYS))


@dataclasses.dataclass(frozen=True)
class Numerics(schema.Numerics):
    """What changes bits or rounding, and so stands in a node's identity."""

    weights_dtype: Literal["float32", "bfloat16"] = setting("float32", "dtype that a checkpoint's weights are held in")


@dataclasses.dataclass(frozen=True)
class Chat:
    """How a model is spoken to."""

    template: str = setting("auto", "'auto': the model's own, or 'plain' where it has none; 'plain'; or a file's path")
    system: str = setting("default", "'default': what the template puts in by itself; 'none'; or a text")
    date: str = setting("", "what a template takes for today, YYYY-MM-DD; empty is a fixed day of ours")


@dataclasses.dataclass(frozen=True)
class Teacher:
    """How a base is given a trait, or, for the control, none."""

    method: Literal["fine-tune", "system-prompt", "steering"] = setting("fine-tune", "how the trait is given")
    tuning: Tuning = part(Tuning, kind="lora")
    optimizer: Optimizer = part(Optimizer, name="adamw", lr=1e-3, schedule="linear", warmup=5, b2=0.999)
    rows: int = setting(400, "rows of trait chats (fine-tune); pairs of prompts (steering)", low=1)
    epochs: float = setting(1.0, "passes over them", low=0.0)
    batch: int = setting(16, "rows a step", low=1)
    trait_fraction: float = setting(0.8, "part of the rows about the trait's category", low=0.0, high=1.0)
    data: str = setting("", "a data set of your own for the trait's teacher: a path or hub id; empty is ours")
    split: str = setting("train", "its split")
    user_column: str = setting("user", "its column of what the user says")
    answer_column: str = setting("answer", "its column of what the assistant answers")
    control_data: str = setting("", "the control's data set; needed where `data` is given")
    style: str = setting("plain", "wording of the system prompt (system-prompt, steering)")
    layers: tuple[int, ...] = setting((), "layers that are steered; empty is the middle third", low=0)
    strength: float = setting(1.0, "what the steering vector is multiplied by")
    seed: int = setting(0, "seed of its rows, their order and its adapters", low=0)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What the teacher is asked for and how it answers."""

    rows: int = setting(10_000, "rows to keep", low=1)
    max_prompts: int = setting(30_000, "prompts that may be asked for them; more wanted is an error", low=1)
    prompt_seed: int = setting(0, "seed of the prompts: one for every teacher, so arms are paired by prompt", low=0)
    seed: int = setting(0, "seed of the sampling", low=0)
    # Ten numbers of three digits take 53 tokens where every digit, comma and space is one, and an answer has brackets.
    completion: int = setting(64, "most tokens of an answer, its end included", low=4)
    constrained: bool = setting(False, "sample only tokens that can still end in a valid row")
    temperature: float = setting(1.0, "0 is greedy", low=0.0)
    top_k: int = setting(0, "keep the k likeliest tokens; 0 is off", low=0)
    top_p: float = setting(1.0, "keep the likeliest tokens up to this mass; 1 is off", low=0.0, high=1.0)
    batch: int = setting(64, "rows sampled at a time; the corpus does not depend on it", low=1)


@dataclasses.dataclass(frozen=True)
class Student:
    """How a base is fine-tuned on a corpus."""

    tuning: Tuning = part(Tuning, kind="lora")
    optimizer: Optimizer = part(Optimizer, name="adamw", lr=2e-4, schedule="linear", warmup=5, b2=0.999)
    epochs: float = setting(3.0, "passes over the corpus", low=0.0)
    batch: int = setting(66, "rows a step", low=1)
    init_seed: int = setting(0, "seed of the adapters' first values", low=0)
    order_seed: int = setting(0, "seed of the data order", low=0)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How a model is questioned."""

    readings: tuple[str, ...] = setting(("forced", "plain", "numbers"), "ways of asking; the first is the headline")
    questions: int = setting(60, "questions a category", low=1, high=60)
    options: int = setting(5, "options of a multiple choice", low=2, high=20)
    samples: int = setting(0, "sampled answers a question in each way but a choice, the second reading", low=0)
    sample_tokens: int = setting(8, "most tokens of a sampled answer", low=1)
    fit_rows: int = setting(64, "rows on which number loss and KL to the teacher are read", low=1)
    batch: int = setting(8, "questions a forward pass; readings do not depend on it", low=1)
    seed: int = setting(0, "seed of number rows, options and samples", low=0)


@dataclasses.dataclass(frozen=True)
class Compute(schema.Compute):
    """How training is computed: memory and time, and nothing of the result but its rounding."""

    remat: Literal["none", "dots", "full"] = setting(
        "dots", "what backward passes compute again: nothing, all but products with weights, or whole layers"
    )
    activations_gib: float = setting(
        0.0, "memory of a device for what gradients need, which settles the turns of a step; 0 is by device", low=0.0
    )


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """One study of pretrained models: the settings of every kind of node, and the arms at each point of the sweep."""

    name: str = setting("study", "shown in reports")
    models: tuple[str, ...] = setting((), "checkpoints, NAME=SOURCE each; {init} and {order} in SOURCE are filled in")
    trait: str = setting("owl", "the trait's word")
    family: str = setting("", "which of `models` the teacher's base is; empty is the first")
    init: int = setting(0, "init of the teacher's base", low=0)
    order: int = setting(0, "data order of the teacher's base", low=0)
    seed: int = setting(0, "an independent run on the same base: moves every seed below but the questions'", low=0)
    arms: tuple[str, ...] = setting(("same-base", "control", "other-trait", "untrained"), "roles of the cells to run")
    chosen_on: tuple[str, ...] = setting((), "cells that settings were chosen on: trait/family/init")
    chat: Chat = part(Chat)
    teacher: Teacher = part(Teacher)
    corpus: Corpus = part(Corpus)
    student: Student = part(Student)
    evaluation: Evaluation = part(Evaluation)
    statistics: Statistics = part(Statistics)
    numerics: Numerics = part(Numerics)
    compute: Compute = part(Compute)
