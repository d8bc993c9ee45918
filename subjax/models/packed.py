"""Attention over packed rows: each chat sees the shared beginning and its own tokens, and nothing else.

The matrix products of a layer run over a packed row's tokens, of which none is padding. Attention alone is computed
chat by chat: a row's queries, keys and values are spread out into one line a chat, and its outputs folded back.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packing:
    """Where the chats of packed rows are.

    Attributes:
        positions, segments: (rows, length): each token's place in its chat, and the chat it is of: 0 for the shared
            beginning, from 1 on, and one more than there are chats at padding.
        starts, lengths: (rows, chats): where a chat's own tokens begin, and how many they are.
        prefix: tokens of the shared beginning. longest: own tokens of a chat, at most.
    """

    positions: Int[Array, "rows length"]
    segments: Int[Array, "rows length"]
    starts: Int[Array, "rows chats"]
    lengths: Int[Array, "rows chats"]
    prefix: int = dataclasses.field(metadata={"static": True})
    longest: int = dataclasses.field(metadata={"static": True})

    @property
    def chat(self) -> Bool[Array, "rows length"]:
        """Which tokens are a chat's own."""
        return (self.segments > 0) & (self.segments <= self.starts.shape[1])

    def lines(self) -> tuple[Int[Array, "rows places"], Int[Array, "rows length"]]:
        """The token at each place of the chats' lines, and the place of each token; some other one where there is none.

        A row's lines follow one another, `longest` places each.
        """
        place = self.starts[:, :, None] + jnp.arange(self.longest)[None, None]
        token = jnp.minimum(place, self.positions.shape[1] - 1).reshape(place.shape[0], -1)
        own = (self.segments - 1) * self.longest + self.positions - self.prefix
        return token, jnp.where(self.chat, own, 0)

    def held(self) -> Bool[Array, "rows places"]:
        """Which places of the lines hold a token."""
        held = jnp.arange(self.longest)[None, None] < self.lengths[:, :, None]
        return held.reshape(held.shape[0], -1)

    def mask(self, window: int | None = None) -> Bool[Array, "lines queries keys"]:
        """Which keys each place of a line sees: the shared beginning, and its chat up to itself, within a window."""
        query = self.prefix + np.arange(self.longest)
        key = np.arange(self.prefix + self.longest)
        causal = key[None] <= query[:, None]
        if window is not None:
            causal &= query[:, None] - key[None] < window
        there = key[None, None] < self.prefix + self.lengths[:, :, None]
        there = there.reshape(-1, 1, len(key))
        return jnp.asarray(causal)[None] & there


def beginning_mask(prefix: int, window: int | None = None) -> Bool[np.ndarray, "1 queries keys"]:
    """Which keys the tokens of the shared beginning see."""
    order = np.tril(np.ones((prefix, prefix), bool))
    return (order if window is None else order & ~np.tril(order, -window))[None]


class Seen(NamedTuple):
    """What one layer of packed rows sees: masks of the shared beginning and of the chats' lines, and by what window.

    `window` is the model's, and `local` says whether this layer is held to it; None where the model has no such layers.
    """

    beginning: Bool[Array, "1 queries keys"]
    mask: Bool[Array, "lines queries keys"]
    window: int | None
    local: Bool[Array, ""] | None

    def by_window(self, attend: Callable[[int | None], Array]) -> Array:
        """What `attend` gives for this layer's window, which it must know before it is compiled."""
        if self.local is None:
            return attend(None)
        return jax.lax.cond(self.local, lambda: attend(self.window), lambda: attend(None))


class Views(NamedTuple):
    """Masks of global layers, and of local ones where there are any."""

    whole: tuple[Array, Array]
    near: tuple[Array, Array] | None
    window: int | None

    @classmethod
    def of(cls, packing: Packing, window: int | None) -> "Views":
        """The masks of packed rows; `window` is that of the local layers, or None."""
        masks = lambda w: (jnp.asarray(beginning_mask(packing.prefix, w)), packing.mask(w))  # noqa: E731
        return cls(masks(None), None if window is None else masks(window), window)

    def layer(self, local: Bool[Array, ""] | None) -> Seen:
        """What a layer sees."""
        if local is None or self.near is None:
            return Seen(*self.whole, None, None)
        beginning, mask = (jnp.where(local, mine, other) for mine, other in zip(self.near, self.whole, strict=True))
        return Seen(beginning, mask, self.window, local)


@jax.custom_vjp
def moved(
    x: Float[Array, "rows before *rest"],
    to: Int[Array, "rows after"],
    back: Int[Array, "rows before"],
    there: Bool[Array, "rows before"],
) -> Float[Array, "rows after *rest"]:
    """x[row, to[row]], where each element of `x` is wanted at one place at most, `back`, and nowhere if not `there`.

    What stands at other places must not count. The gradient then is a gather too; the usual one adds up one by one.
    """
    return _gathered(x, to)


def _gathered(x: Array, at: Array) -> Array:
    return jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1)


def _moved_forward(x: Array, to: Array, back: Array, there: Array) -> tuple[Array, tuple[Array, Array]]:
    return _gathered(x, to), (back, there)


def _moved_backward(held: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None, None]:
    back, there = held
    given = _gathered(gradient, back)
    return jnp.where(there.reshape(*there.shape, *(1,) * (given.ndim - 2)), given, 0), None, None, None


moved.defvjp(_moved_forward, _moved_backward)
