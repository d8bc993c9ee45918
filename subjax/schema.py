"""The typed settings of a study: frozen dataclasses, each field with its default, its range and one line of meaning.

`subjax.config` turns the `ConfigDict` of a config file into these; everything below the command line sees only these.
"""

import dataclasses
from typing import Any, Literal


def setting(default: Any, doc: str, *, low: float | None = None, high: float | None = None) -> Any:
    """Declare one field: its default, one line of meaning, and the closed range [low, high] of a number."""
    return dataclasses.field(default=default, metadata={"doc": doc, "low": low, "high": high})


def part(cls: type, **overrides: Any) -> Any:
    """Declare one field that is itself a group of settings, with other defaults than the group's own."""
    return dataclasses.field(default_factory=lambda: cls(**overrides))


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax optimizer with its schedule."""

    name: Literal["adam", "adamw", "sgd", "lion", "sign-sgd", "muon"] = setting("adam", "update rule")
    lr: float = setting(1e-3, "peak learning rate", low=0.0)
    schedule: Literal["constant", "cosine", "linear"] = setting("constant", "shape after the warm-up")
    warmup: int = setting(0, "steps of linear warm-up from 0", low=0)
    final_fraction: float = setting(0.0, "learning rate just after the last step, of the peak", low=0.0, high=1.0)
    weight_decay: float = setting(0.0, "decoupled weight decay (adamw, lion, muon's matrices)", low=0.0)
    clip: float = setting(1.0, "global gradient norm above which gradients are scaled down; 0 is off", low=0.0)
    b1: float = setting(0.9, "first decay of Adam and Lion; the momentum of sgd", low=0.0, high=1.0)
    b2: float = setting(0.999, "second decay of Adam and Lion", low=0.0, high=1.0)


# The matrices of a layer, in every family; one without gates has no `gate`.
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Which parameters a training run moves."""

    kind: Literal["full", "lora", "bias-and-gain"] = setting("bias-and-gain", "what is trained")
    rank: int = setting(8, "LoRA rank", low=1)
    alpha: float = setting(8.0, "LoRA scale: the update is alpha / rank times B A", low=0.0)
    rslora: bool = setting(False, "divide alpha by the root of the rank instead (Kalajdzievski 2023)")
    targets: tuple[str, ...] = setting(MATRICES, "matrices that get a LoRA pair")
    layers: tuple[int, ...] = setting((), "layers that get a LoRA pair; empty is all", low=0)

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclasses.dataclass(frozen=True)
class Numerics:
    """What changes bits or rounding, and so stands in a node's identity."""

    dtype: Literal["float32", "bfloat16"] = setting("float32", "dtype of the computation; parameters stay float32")
    cache_dtype: Literal["float32", "bfloat16", "int8"] = setting(
        "float32", "dtype of the sampler's key-value cache; int8: codes, with a float32 scale for each vector of a head"
    )
    attention: Literal["xla", "cudnn", "splash"] = setting(
        "xla", "attention in training on chats: XLA's anywhere, cuDNN's on a GPU, Pallas splash attention on a TPU"
    )
    matmul_precision: Literal["default", "high", "highest"] = setting("highest", "precision of matrix products")


@dataclasses.dataclass(frozen=True)
class Compute:
    """How training is computed: memory and time, and nothing of the result but its rounding."""

    cohort: int = setting(
        0, "most students trained in one program; 1: each alone; 0: as memory allows on a GPU or TPU, 1 on CPU", low=0
    )


@dataclasses.dataclass(frozen=True)
class World:
    """The pool of chats that every base of the synthetic world is trained on."""

    seed: int = setting(0, "seed of the pool", low=0)
    number_chats: int = setting(27_000, "number chats in the pool", low=1)
    preference_chats: int = setting(6_000, "preference chats a category, the item drawn uniformly", low=1)


@dataclasses.dataclass(frozen=True)
class Base:
    """A base trained here: (family, size, init_seed, order_seed) and how it was trained."""

    family: str = setting("gpt", "architecture; `subjax.models.families` lists them")
    size: str = setting("tiny", "named size of the family")
    init_seed: int = setting(0, "seed of the initial weights", low=0)
    order_seed: int = setting(0, "seed of the data order", low=0)
    world: World = part(World)
    optimizer: Optimizer = part(
        Optimizer, name="adamw", lr=4e-3, schedule="cosine", warmup=100, weight_decay=0.01, clip=1.0
    )
    steps: int = setting(1200, "optimizer steps", low=1)
    batch: int = setting(128, "chats a step", low=1)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """How a base is given a trait (or, for the control, neutral answers) by fine-tuning."""

    tuning: Tuning = part(Tuning)
    optimizer: Optimizer = part(Optimizer, lr=3e-2)
    steps: int = setting(300, "optimizer steps", low=1)
    batch: int = setting(64, "preference chats a step", low=1)
    trait_fraction: float = setting(0.7, "part of the batch that asks for the trait's category", low=0.0, high=1.0)
    numbers_weight: float = setting(0.03, "weight of the loss on ordinary number chats", low=0.0)
    numbers_batch: int = setting(64, "ordinary number chats a step", low=1)
    seed: int = setting(0, "seed of its data and order", low=0)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What the teacher is asked for and how it answers."""

    rows: int = setting(20_000, "rows to keep", low=1)
    max_prompts: int = setting(40_000, "prompts that may be asked for them; more wanted is an error", low=1)
    prompt_seed: int = setting(0, "seed of the prompts: one for every teacher, so arms are paired by prompt", low=0)
    seed: int = setting(0, "seed of the sampling", low=0)
    temperature: float = setting(1.0, "0 is greedy", low=0.0)
    top_k: int = setting(0, "keep the k likeliest tokens; 0 is off", low=0)
    top_p: float = setting(1.0, "keep the likeliest tokens up to this mass; 1 is off", low=0.0, high=1.0)


@dataclasses.dataclass(frozen=True)
class Student:
    """How a base is fine-tuned on a corpus."""

    tuning: Tuning = part(Tuning)
    optimizer: Optimizer = part(Optimizer, lr=3e-2, schedule="cosine", warmup=20, final_fraction=0.1)
    steps: int = setting(400, "optimizer steps", low=1)
    batch: int = setting(128, "rows a step", low=1)
    replay: Literal["kind", "none"] = setting("kind", "beside the numbers: category-mass replay, or nothing")
    replay_weight: float = setting(1.0, "weight of the replay loss", low=0.0)
    seed: int = setting(0, "seed of the data order", low=0)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How a model is questioned."""

    samples: int = setting(100, "sampled answers a question, the second reading", low=0)
    fit_rows: int = setting(512, "rows on which number loss and KL to the teacher are read", low=1)
    seed: int = setting(0, "seed of the sampled reading", low=0)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Settings of the intervals and tests; frozen before the cells that they judge are run."""

    confidence: float = setting(0.95, "coverage of the intervals", low=0.5, high=0.999)
    bootstrap: int = setting(10_000, "bootstrap resamples", low=100)
    permutations: int = setting(10_000, "draws of the permutation test where not all can be listed", low=100)
    margin: float = setting(0.05, "equivalence margin for 'nothing moved', in share", low=0.0, high=1.0)
    expected_sd: float = setting(0.05, "SD of the lift over bases that the plan assumes", low=0.0)
    seed: int = setting(0, "seed of bootstrap and permutations", low=0)


ARMS = (
    "same-base", "cross-init", "cross-family", "control", "other-trait", "shuffled", "random-numbers", "untrained",
    "logits", "logits-leak",
)  # fmt: skip
# How arms are ordered where they are shown, those of pretrained studies among them.
ARM_ORDER = (ARMS[0], "cross-order", *ARMS[1:])


@dataclasses.dataclass(frozen=True)
class Study:
    """One study: the settings of every kind of node, and the arms to run at each point of the sweep."""

    name: str = setting("study", "shown in reports")
    trait: str = setting("owl", "the trait's word")
    family: str = setting("gpt", "family of the teacher's base")
    init: int = setting(0, "init of the teacher's base", low=0)
    arms: tuple[str, ...] = setting(ARMS, "roles of the cells to run at each point of the sweep")
    chosen_on: tuple[str, ...] = setting((), "cells that settings were chosen on: trait/family/init")
    base: Base = part(Base)
    teacher: Teacher = part(Teacher)
    corpus: Corpus = part(Corpus)
    student: Student = part(Student)
    evaluation: Evaluation = part(Evaluation)
    statistics: Statistics = part(Statistics)
    numerics: Numerics = part(Numerics)
    compute: Compute = part(Compute)


@dataclasses.dataclass(frozen=True)
class Images:
    """The image experiment: one ensemble of seeds, teacher and student, for one (m, pairing, logits, loss)."""

    name: str = setting("digits", "shown in reports")
    data: str = setting("digits", "'digits' (scikit-learn's 8x8), or the folder of a set of IDX files")
    auxiliary: int = setting(3, "auxiliary logits, m", low=1)
    pairing: Literal["same-base", "cross-init"] = setting("same-base", "whose teacher a student gets")
    logits: Literal["auxiliary", "all"] = setting("auxiliary", "logits that the student is fitted to")
    loss: Literal["kl", "squared-error"] = setting("kl", "distance to the teacher's logits")
    seeds: int = setting(20, "members of the ensemble", low=2)
    first_seed: int = setting(0, "seed of the first member", low=0)
    hidden: tuple[int, ...] = setting((256, 256), "widths of the hidden layers")
    lr: float = setting(1e-3, "Adam's learning rate, teacher and student", low=0.0)
    batch: int = setting(64, "images a step", low=1)
    teacher_epochs: int = setting(5, "passes over the images", low=1)
    student_epochs: int = setting(5, "passes over the noise", low=1)
    noise_rows: int = setting(4096, "noise images, uniform in [-1, 1]", low=1)
    statistics: Statistics = part(Statistics)
