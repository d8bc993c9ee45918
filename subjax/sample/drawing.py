"""How a token is drawn: at a temperature, within top-k and top-p, among the tokens that a constraint leaves.

Row `i` draws its token `t` with fold_in(fold_in(key, i), t), whatever stands beside it; only a near-tie (two tokens
whose perturbed logits differ by less than rounding) can fall otherwise, and is counted. Two things are not counted: an
int8 cache turns a rounding into a step of its code, seldom; and a rounding settles who is in at the edge of top-k and
top-p.

A constraint (`subjax.sample.constraint`) leaves only tokens with which an answer can still end in an accepted text, and
within the room there is. Its mask comes before everything else: temperature, top-k and top-p work on what it leaves, so
a token is drawn from the model's distribution renormalized over the allowed ones, step by step (which is not the
model's distribution over whole rows given that they are accepted). The noise of such a draw is still a function of
(key, row, place), but of one value a column of the constraint and not one a token of the vocabulary: constrained rows
are another corpus than unconstrained ones, and another vocabulary or grammar changes which value falls to which token.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from subjax.errors import UsageError
from subjax.sample.constraint import Constraint
from subjax.sample.noise import gumbel

BLOCK = 512  # scores of a row whose largest is taken first, where that is faster
NEAR_TIE = 1e-4  # margin of the two best perturbed logits, at temperature 1, under which rounding may choose otherwise


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Everything is explicit; nothing is inherited from a checkpoint's own defaults.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 are off. `prompt` is the padded prompt length (the bucket) and
    `completion` the most tokens an answer may have, the end token included; `end` (one id, or several) ends an answer
    and `pad` fills what follows. An `end` of -1 is no token: every answer fills its room.
    """

    prompt: int
    completion: int
    end: int | tuple[int, ...]
    pad: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    cache_dtype: str = "float32"

    def __post_init__(self):
        if not self.temperature >= 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise UsageError(
                f"sampling: temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k}:"
                " want temperature >= 0, 0 < top_p <= 1, top_k >= 0"
            )
        if self.prompt < 1 or self.completion < 1:
            raise UsageError(
                f"sampling: a prompt of {self.prompt} and a completion of {self.completion} tokens;"
                " want at least one of each"
            )

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return self.end if isinstance(self.end, tuple) else (self.end,)


def restrict(logits: Float[Array, "batch vocab"], sampling: Sampling) -> Float[Array, "batch vocab"]:
    """Logits at the sampling temperature, with tokens outside top-k and top-p at minus infinity.

    Top-p (Holtzman et al. 2020, section 3.1) keeps the smallest set of likeliest tokens whose mass reaches `top_p`;
    both keep what ties with the last that they keep. Sorts the vocabulary only where one of them is asked for.
    """
    if sampling.temperature == 0:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        ranked = -jnp.sort(-logits, axis=-1)
        before = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1) - jax.nn.softmax(ranked, axis=-1)
        least = jnp.where(before < sampling.top_p, ranked, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def draw(
    logits: Float[Array, "batch vocab"], keys: Array, index: Int[Array, "..."], sampling: Sampling,
    in_blocks: bool = False,
) -> tuple[Int[Array, " batch"], Bool[Array, " batch"]]:  # fmt: skip
    """One token a row by the Gumbel-max trick with key fold_in(row key, index), and whether it was a near-tie.

    `index` is one for all rows, or one for each. `in_blocks` looks for the largest scores among those of blocks first,
    which finds the same ones: faster on a CPU, and not to be done where the vocabulary is split over devices.
    """
    scores = restrict(logits, sampling)
    if sampling.temperature > 0:
        scores = scores + gumbel(keys, index, scores.shape[1])
    token, best, second = _largest_by_blocks(scores) if in_blocks else _largest(scores)
    # Below temperature 1 the logits' rounding is scaled up with them.
    margin = NEAR_TIE / min(sampling.temperature or 1.0, 1.0)
    return token, best - second < margin


def _largest(scores: Float[Array, "batch n"]) -> tuple[Int[Array, " batch"], Array, Array]:
    """The first place of a row's largest score, that score, and the largest at any other place.

    Three plain reductions: on CPU top_k sorts the whole vocabulary (`benchmarks/cpu_choices.py` measures both).
    """
    ids = jnp.arange(scores.shape[1], dtype=jnp.int32)[None]
    best = scores.max(-1, keepdims=True)
    place = jnp.where(scores == best, ids, scores.shape[1] - 1).min(-1)
    return place, best[:, 0], jnp.where(ids == place[:, None], -jnp.inf, scores).max(-1)


def _largest_by_blocks(scores: Float[Array, "batch n"]) -> tuple[Int[Array, " batch"], Array, Array]:
    """`_largest`, in one pass over the scores: of each block the largest, of these the best one, and within its block.

    XLA's CPU back end writes down what each of three reductions over a vocabulary reads.
    """
    rows, n = scores.shape
    blocks = -(-n // BLOCK)
    filled = jnp.pad(scores, ((0, 0), (0, blocks * BLOCK - n)), constant_values=-jnp.inf)
    filled = filled.reshape(rows, blocks, BLOCK)
    block, best, other = _largest(filled.max(-1))
    within, _, second = _largest(jnp.take_along_axis(filled, block[:, None, None], axis=1)[:, 0])
    return block * BLOCK + within, best, jnp.maximum(other, second)


def draw_allowed(
    logits: Float[Array, "batch vocab"],
    keys: Array,
    index: Int[Array, " batch"],
    sampling: Sampling,
    constraint: Constraint | None,
    at: Int[Array, " batch"] | None,
    in_blocks: bool = False,
) -> tuple[Int[Array, " batch"], Bool[Array, " batch"], Int[Array, " batch"] | None]:
    """`draw` among the tokens that the constraint allows in the states `at`, and the states behind what was drawn.

    A token is allowed where an answer can end behind it in the places that are left. One such token there always is, if
    there was room at the start.
    """
    if constraint is None:
        return *draw(logits, keys, index, sampling, in_blocks), None
    behind = constraint.next[at].astype(jnp.int32)
    room = sampling.completion - 1 - index
    allowed = (behind >= 0) & (constraint.distance[behind] <= room[:, None])
    column, tie = draw(jnp.where(allowed, logits[:, constraint.tokens], -jnp.inf), keys, index, sampling)
    return constraint.tokens[column], tie, jnp.take_along_axis(behind, column[:, None], axis=1)[:, 0]


def ended(token: Int[Array, " batch"], sampling: Sampling) -> Bool[Array, " batch"]:
    """Which tokens end an answer."""
    return (token[:, None] == jnp.array(sampling.ends, jnp.int32)[None]).any(1)
