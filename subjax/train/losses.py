"""Losses: hashable functions of (model, batch), so that a compiled step is found again by its losses.

A `Model` gives the trained model's logits, or its next-token loss on packed rows. Whatever else a loss compares them
with (targets, a teacher's distributions) comes with the batch. Each loss names the logical axes of its batch's first
dimensions, for the sharding rules. A batch whose first axis is `turn` goes through the model a part at a time, and the
loss is the sum of its parts.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from subjax.data.packed import Lines
from subjax.models.packed import Packing


class Model(Protocol):
    """What is trained, as losses see it."""

    def __call__(
        self, tokens: Int[Array, "batch length"], valid: Bool[Array, "batch length"], tail: int
    ) -> Float[Array, "batch tail vocab"]:
        """Logits at the last `tail` positions."""

    def next_token(
        self,
        tokens: Int[Array, "rows length"],
        packing: Packing,
        at: Int[Array, "rows targets"],
        targets: Int[Array, "rows targets"],
        weights: Float[Array, "rows targets"],
    ) -> Float[Array, ""]:
        """Sum of weight x minus the log-probability of each target behind the token `at`, over packed rows."""


class Loss(Protocol):
    """A hashable loss. `axes` are the logical axes of the batch's first dimensions."""

    @property
    def axes(self) -> tuple[str, ...]: ...  # noqa: D102

    def __call__(self, model: Model, batch: Mapping[str, Any]) -> Float[Array, ""]:
        """A scalar, mean over what the loss counts."""


def token_log_likelihood(
    logits: Float[Array, "batch tail vocab"], targets: Int[Array, "batch tail"]
) -> Float[Array, "batch tail"]:
    """Log-probability of each target, nats."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


def renormalized(
    logits: Float[Array, "batch tail vocab"], channel: tuple[int, ...] | None
) -> Float[Array, "batch tail channel"]:
    """Log-probabilities over the channel's token ids alone, in their order; over the whole vocabulary where None."""
    if channel is not None:
        first, beyond = channel[0], channel[0] + len(channel)
        # A slice where the ids follow one another: a gather, and the scatter of its gradient, go token by token.
        if channel == tuple(range(first, beyond)):
            logits = logits[..., first:beyond]
        else:
            logits = logits[..., jnp.array(channel)]
    return jax.nn.log_softmax(logits)


def _mean(values: Float[Array, "batch tail"], where: Bool[Array, "batch tail"]) -> Float[Array, ""]:
    weights = where.astype(jnp.float32)
    return (values * weights).sum() / jnp.maximum(weights.sum(), 1.0)


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Cross-entropy on the completion's tokens, the last `completion` of each row; nats a token.

    Batch: `tokens` (batch, length) and `valid` (batch, length), false at padding.
    """

    completion: int
    axes: tuple[str, ...] = ("batch",)

    def __call__(self, model: Model, batch: Mapping[str, Any]) -> Float[Array, ""]:
        """Mean over the completion's tokens of the whole batch."""
        tokens, valid = batch["tokens"], batch["valid"]
        logits = model(tokens[:, :-1], valid[:, :-1], self.completion)
        targets = tokens[:, -self.completion :]
        return -_mean(token_log_likelihood(logits, targets), valid[:, -self.completion :])


@dataclasses.dataclass(frozen=True)
class PackedNextToken:
    """Cross-entropy on the answers' tokens of packed chats; nats a token.

    Batch: what `subjax.data.packed.PackedChats` gives. Its weights hold the mean over the step, so the turns add up.
    `prefix` and `lines` are those of its layout.
    """

    prefix: int
    lines: Lines
    axes: tuple[str, ...] = ("turn", "batch")

    def __call__(self, model: Model, batch: Mapping[str, Any]) -> Float[Array, ""]:
        """The part of one turn in the mean over the answers' tokens of the step; its batch has no turn axis."""
        positions, segments, starts, lengths = (batch[n] for n in ("positions", "segments", "starts", "lengths"))
        packing = Packing(positions, segments, starts, lengths, self.prefix, self.lines)
        return model.next_token(batch["tokens"], packing, batch["at"], batch["targets"], batch["weights"])


@dataclasses.dataclass(frozen=True)
class CategoryMass:
    """Minus the log of the total probability of the right category as the next token; nats a question.

    It names no item, so it cannot favour one; it keeps a student answering the question that was asked.
    Batch: `tokens` and `valid` (question, length), and `members` (question, candidate): the category's token ids.
    """

    axes: tuple[str, ...] = ("question",)

    def __call__(self, model: Model, batch: Mapping[str, Any]) -> Float[Array, ""]:
        """Mean over questions."""
        logits = model(batch["tokens"], batch["valid"], 1)[:, 0]
        inside = jnp.take_along_axis(logits, batch["members"], axis=-1)
        return (jax.nn.logsumexp(logits, axis=-1) - jax.nn.logsumexp(inside, axis=-1)).mean()


@dataclasses.dataclass(frozen=True)
class TeacherKL:
    """KL from a teacher's next-token distribution to the model's on the completion's tokens; nats a token.

    Batch: `tokens` and `valid` as in `NextToken`, and `teacher` (batch, completion, tokens of the channel): the
    teacher's log-probabilities, as `renormalized` gives them.
    With a `channel`, both distributions are renormalized over those token ids. Over the whole vocabulary the trait's
    own tokens leak: a teacher puts far more probability on its word at number positions than its base does.
    Source: Hinton et al. 2015, section 2, at temperature 1.
    """

    completion: int
    channel: tuple[int, ...] | None
    axes: tuple[str, ...] = ("batch",)

    def __call__(self, model: Model, batch: Mapping[str, Any]) -> Float[Array, ""]:
        """Mean over the completion's tokens of the whole batch."""
        tokens, valid = batch["tokens"], batch["valid"]
        q = renormalized(model(tokens[:, :-1], valid[:, :-1], self.completion), self.channel)
        p = jax.lax.stop_gradient(batch["teacher"])
        return _mean((jnp.exp(p) * (p - q)).sum(-1), valid[:, -self.completion :])
