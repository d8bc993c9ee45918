"""Attention over packed rows: each chat sees the shared beginning and its own tokens, and nothing else.

The matrix products of a layer run over a packed row's tokens, of which none is padding. Attention alone is computed
chat by chat: a row's queries, keys and values are spread out into one line a chat, and its outputs folded back.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
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
        prefix: tokens of the shared beginning.
        lines: the chats in their order, in groups: how many chats, and the places each is given for its own tokens.
    """

    positions: Int[Array, "rows length"]
    segments: Int[Array, "rows length"]
    starts: Int[Array, "rows chats"]
    lengths: Int[Array, "rows chats"]
    prefix: int = dataclasses.field(metadata={"static": True})
    lines: tuple[tuple[int, int], ...] = dataclasses.field(metadata={"static": True})

    @property
    def chat(self) -> Bool[Array, "rows length"]:
        """Which tokens are a chat's own."""
        return (self.segments > 0) & (self.segments <= self.starts.shape[1])

    def _places(self) -> tuple[Int[np.ndarray, " places"], Int[np.ndarray, " places"]]:
        """The chat of each place of a row's lines, which follow one another, and which of its line it is."""
        lengths = np.repeat([places for _, places in self.lines], [chats for chats, _ in self.lines])
        return np.repeat(np.arange(len(lengths)), lengths), np.concatenate([np.arange(n) for n in lengths])

    def moves(self) -> tuple[Int[Array, "rows places"], Int[Array, "rows length"]]:
        """The token at each place of a row's lines, and the place of each token; some other one where there is none."""
        chat, within = self._places()
        token = jnp.minimum(self.starts[:, chat] + within[None], self.positions.shape[1] - 1)
        first = jnp.asarray(np.flatnonzero(within == 0))
        own = first[jnp.clip(self.segments - 1, 0, len(first) - 1)] + self.positions - self.prefix
        return token, jnp.where(self.chat, own, 0)

    def held(self) -> Bool[Array, "rows places"]:
        """Which places of the lines hold a token."""
        chat, within = self._places()
        return jnp.asarray(within)[None] < self.lengths[:, chat]

    def split(self, lines: Float[Array, "rows places *rest"]) -> list[Float[Array, "lines queries *rest"]]:
        """What stands at the places of rows' lines, one line after another, group by group."""
        rows, _, *rest = lines.shape
        groups = jnp.split(lines, list(itertools.accumulate(n * places for n, places in self.lines))[:-1], axis=1)
        return [
            group.reshape(rows * chats, places, *rest)
            for group, (chats, places) in zip(groups, self.lines, strict=True)
        ]

    def joined(self, groups: Sequence[Float[Array, "lines queries *rest"]]) -> Float[Array, "rows places *rest"]:
        """The inverse of `split`."""
        rows = self.starts.shape[0]
        return jnp.concatenate([group.reshape(rows, -1, *group.shape[2:]) for group in groups], axis=1)

    def by_group(self, chats: Array) -> list[Array]:
        """What each chat of the rows has, (rows, chats), group by group, each (lines,)."""
        ends = list(itertools.accumulate(n for n, _ in self.lines))[:-1]
        return [group.reshape(-1) for group in jnp.split(chats, ends, axis=1)]

    def masks(self, window: int | None = None) -> tuple[Bool[Array, "lines queries keys"], ...]:
        """Which keys places of a group's lines see: the shared beginning, and their chat up to them, in a window."""
        found = []
        for (_, places), lengths in zip(self.lines, self.by_group(self.lengths), strict=True):
            query, key = self.prefix + np.arange(places), np.arange(self.prefix + places)
            causal = key[None] <= query[:, None]
            if window is not None:
                causal &= query[:, None] - key[None] < window
            found.append(jnp.asarray(causal)[None] & (key[None, None] < self.prefix + lengths[:, None, None]))
        return tuple(found)


def beginning_mask(prefix: int, window: int | None = None) -> Bool[np.ndarray, "1 queries keys"]:
    """Which keys the tokens of the shared beginning see."""
    order = np.tril(np.ones((prefix, prefix), bool))
    return (order if window is None else order & ~np.tril(order, -window))[None]


class Seen(NamedTuple):
    """What one layer of packed rows sees: masks of the shared beginning and of the chats' lines, and by what window.

    `window` is the model's, and `local` says whether this layer is held to it; None where the model has no such layers.
    """

    beginning: Bool[Array, "1 queries keys"]
    masks: tuple[Bool[Array, "lines queries keys"], ...]
    window: int | None
    local: Bool[Array, ""] | None

    def by_window(self, attend: Callable[[int | None], Array]) -> Array:
        """What `attend` gives for this layer's window, which it must know before it is compiled."""
        if self.local is None:
            return attend(None)
        return jax.lax.cond(self.local, lambda: attend(self.window), lambda: attend(None))


class Views(NamedTuple):
    """Masks of global layers, and of local ones where there are any."""

    whole: tuple[Array, tuple[Array, ...]]
    near: tuple[Array, tuple[Array, ...]] | None
    window: int | None

    @classmethod
    def of(cls, packing: Packing, window: int | None) -> "Views":
        """The masks of packed rows; `window` is that of the local layers, or None."""
        masks = lambda w: (jnp.asarray(beginning_mask(packing.prefix, w)), packing.masks(w))  # noqa: E731
        return cls(masks(None), None if window is None else masks(window), window)

    def layer(self, local: Bool[Array, ""] | None) -> Seen:
        """What a layer sees."""
        if local is None or self.near is None:
            return Seen(*self.whole, None, None)
        beginning, masks = jax.tree.map(lambda mine, other: jnp.where(local, mine, other), self.near, self.whole)
        return Seen(beginning, masks, self.window, local)


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
