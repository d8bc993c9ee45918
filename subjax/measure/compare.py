"""Two computations of one model compared: their distributions token by token, and their greedy answers."""

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Int

from subjax.errors import SubjaxError

NEAR_TIE = 1e-3  # lead of a reference's best logit under which rounding may choose the second
_AT_A_TIME = 16  # tokens compared at a time, in float64: a vocabulary may have 262,144 entries


@dataclasses.dataclass(frozen=True)
class Bounds:
    """How far apart two computations of one model in float32 may be."""

    mean_kl: float = 1e-5  # nats a token, at most
    top1: float = 0.995  # share of tokens with the same likeliest one, at least


@dataclasses.dataclass(frozen=True)
class Distributions:
    """How far two sets of logits are apart, over `tokens` tokens.

    KL is of ours from the reference's distribution, KL(theirs || ours), in nats a token; `max_logit` is the largest
    difference of any logit; `top1` the share of tokens at which both have the same likeliest token.
    """

    tokens: int
    mean_kl: float
    max_kl: float
    max_logit: float
    top1: float


@dataclasses.dataclass(frozen=True)
class Parting:
    """Where a greedy answer leaves the reference's: text and token, from 0, and the lead of its best logit there."""

    text: int
    token: int
    lead: float

    @property
    def tie(self) -> bool:
        """Whether the reference itself hardly preferred its token."""
        return self.lead < NEAR_TIE


@dataclasses.dataclass(frozen=True)
class Answers:
    """How far greedy answers agree: `same` of `tokens` tokens in all stand before any parting."""

    texts: int
    tokens: int
    same: int
    partings: tuple[Parting, ...]

    @property
    def ties(self) -> tuple[Parting, ...]:
        """Partings at a near-tie, which say nothing against either side."""
        return tuple(parting for parting in self.partings if parting.tie)

    @property
    def faults(self) -> tuple[Parting, ...]:
        """The other partings."""
        return tuple(parting for parting in self.partings if not parting.tie)


def compare_distributions(
    pairs: Iterable[tuple[Float[np.ndarray, "tokens vocab"], Float[np.ndarray, "tokens vocab"]]],
) -> Distributions:
    """Compare logits, given as (ours, theirs) a text at a time, so that no more than one text's need be held.

    Raises:
        SubjaxError: the two have different shapes.
    """
    kl: list[np.ndarray] = []
    same, farthest = 0, 0.0
    for ours, theirs in pairs:
        if ours.shape != theirs.shape:
            raise SubjaxError(f"logits of shape {ours.shape} here and {theirs.shape} in the reference: not one model")
        for first in range(0, len(ours), _AT_A_TIME):
            mine, other = (a[first : first + _AT_A_TIME].astype(np.float64) for a in (ours, theirs))
            kl.append(_kl(other, mine))
            same += int((mine.argmax(-1) == other.argmax(-1)).sum())
            farthest = np.maximum(farthest, np.abs(mine - other).max())  # NaN stays NaN, unlike with max()
    each = np.concatenate(kl)
    return Distributions(len(each), float(each.mean()), float(each.max()), float(farthest), same / len(each))


def _kl(p: Float[np.ndarray, "tokens vocab"], q: Float[np.ndarray, "tokens vocab"]) -> Float[np.ndarray, " tokens"]:
    """KL(p || q) of two sets of logits, in nats; rounding below zero is zero."""
    log_p, log_q = _log_softmax(p), _log_softmax(q)
    return np.maximum((np.exp(log_p) * (log_p - log_q)).sum(-1), 0.0)


def _log_softmax(logits: Float[np.ndarray, "tokens vocab"]) -> Float[np.ndarray, "tokens vocab"]:
    below = logits - logits.max(-1, keepdims=True)
    return below - np.log(np.exp(below).sum(-1, keepdims=True))


def compare_answers(
    ours: Int[np.ndarray, "texts tokens"],
    theirs: Int[np.ndarray, "texts tokens"],
    leads: Float[np.ndarray, "texts tokens"],
) -> Answers:
    """Compare greedy answers; `leads` is by how much the reference's best logit is above its second at each token.

    Behind the first difference two answers are of different texts, so only what stands before it is compared.
    """
    partings = []
    for text, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if len(apart := np.flatnonzero(mine != other)):
            partings.append(Parting(text, int(apart[0]), float(leads[text, apart[0]])))
    lost = sum(ours.shape[1] - parting.token for parting in partings)
    return Answers(len(ours), ours.size, ours.size - lost, tuple(partings))


def failures(distributions: Distributions, answers: Answers, bounds: Bounds) -> list[str]:
    """What is out of bounds, a phrase each; none where the two computations agree."""
    found = []
    if not distributions.mean_kl <= bounds.mean_kl:  # so that NaN fails
        found.append(f"mean KL is {distributions.mean_kl:.3g} nats a token, and at most {bounds.mean_kl:g} is allowed")
    if not distributions.top1 >= bounds.top1:
        found.append(f"top-1 agreement is {distributions.top1:.2%}, and at least {bounds.top1:.1%} is wanted")
    if answers.faults:
        first = answers.faults[0]
        found.append(
            f"{len(answers.faults)} of {answers.texts} greedy answers part without a tie (text {first.text + 1} at"
            f" token {first.token + 1}, where the reference's best logit leads by {first.lead:.3g})"
        )
    return found
