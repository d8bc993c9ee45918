"""The rows that the strict filter keeps, as an automaton over bytes, for a sampler that must not leave them.

It accepts what `subjax.data.numbers.parse_numbers` accepts, with two limits that make it finite: the separator is one
of a list, and a number has at most three digits ("007" and "0", but not "0007").
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from subjax.data.numbers import COUNT_MAX
from subjax.errors import UsageError

DIGITS = 3  # most digits of a number: every number of so many passes the filter's default limit of 999

# Those of the layouts that prompts ask for, and a list with a comma at the end of each of its lines.
SEPARATORS: tuple[str, ...] = (", ", ",", ",\n", "; ", ";", " ", "\n")

_DIGITS = b"0123456789"
_BRACKETS = {b"[": b"]", b"(": b")"}


@dataclasses.dataclass(frozen=True, eq=False)
class Automaton:
    """A deterministic automaton over bytes; it starts in state 0, and from every state some text is accepted.

    Attributes:
        next: (states, 256), the state after a byte, or -1 where no accepted text goes on so.
        accepting: (states,), where the text so far is accepted.
    """

    next: np.ndarray
    accepting: np.ndarray

    @property
    def alphabet(self) -> bytes:
        """The bytes that occur in accepted texts, rising."""
        return bytes(np.flatnonzero((self.next >= 0).any(0)).tolist())

    def walk(self, text: bytes, states: np.ndarray) -> np.ndarray:
        """Where each of `states` gets to by reading `text`: a state, or -1."""
        for byte in text:
            states = np.where(states >= 0, self.next[states, byte], -1)
        return states

    def behind(self, lead: str) -> "Automaton":
        """The automaton of the same texts, each behind `lead`."""
        first = np.frombuffer(lead.encode(), np.uint8)
        ahead = np.full((len(first), 256), -1, self.next.dtype)
        ahead[np.arange(len(first)), first] = np.arange(len(first)) + 1  # the last leads to where this one starts
        moved = np.where(self.next >= 0, self.next + len(first), -1)
        return Automaton(np.concatenate([ahead, moved]), np.append(np.zeros(len(first), bool), self.accepting))

    def accepts(self, text: str) -> bool:
        """Whether the whole text is a row."""
        state = self.walk(text.encode(), np.zeros(1, int))[0]
        return bool(state >= 0 and self.accepting[state])


class _Place(NamedTuple):
    """A place within a row. What may follow depends on nothing else of what has been read."""

    opening: bytes = b""  # the bracket that the row began with
    separator: bytes | None = None  # known from the second number on
    numbers: int = 0  # begun so far
    digits: int = 0  # of the number that is being read; 0 outside numbers
    between: bytes = b""  # what has been read of the separator
    closing: str = ""  # how the row was closed, where it was


_START = _Place()
_BRACKETED = _Place(closing="by its bracket")  # a dot may follow
_DOTTED = _Place(closing="by a dot")


def _onward(at: _Place, count_max: int, separators: tuple[bytes, ...]) -> Iterator[tuple[bytes, _Place]]:
    """Each byte that may follow, and the place behind it; a byte may be told twice, with one place."""
    if at == _START:
        for bracket in _BRACKETS:
            yield bracket, _Place(opening=bracket)
    if at == _BRACKETED or (at.digits and not at.opening):
        yield b".", _DOTTED
    if at.digits and at.opening:
        yield _BRACKETS[at.opening], _BRACKETED
    if at.closing:
        return
    known = separators if at.separator is None else (at.separator,)
    if 0 < at.digits < DIGITS:
        for digit in _DIGITS:
            yield bytes([digit]), at._replace(digits=at.digits + 1)
    elif not at.numbers or at.between in known:
        for digit in _DIGITS:
            yield bytes([digit]), _Place(at.opening, at.between or None, at.numbers + 1, 1)
    if at.between or (at.digits and at.numbers < count_max):
        for separator in known:
            if separator.startswith(at.between) and separator != at.between:
                between = separator[: len(at.between) + 1]
                yield between[-1:], at._replace(digits=0, between=between)


@functools.lru_cache(maxsize=8)
def number_grammar(count_max: int = COUNT_MAX, separators: tuple[str, ...] = SEPARATORS) -> Automaton:
    """The automaton of rows of 1 to `count_max` numbers.

    A row is an opening "[" or "(" or neither, numbers of one to three digits with the same separator between all of
    them, the bracket that closes the one that was opened, and an optional ".".

    Raises:
        UsageError: `count_max` is under 1, or a separator is one that the strict filter does not know.
    """
    if count_max < 1:
        raise UsageError(f"number grammar: at most {count_max} numbers in a row; want at least 1")
    for separator in separators:
        if not separator or separator.strip() not in ("", ",", ";"):
            raise UsageError(
                f"number grammar: separator {separator!r} is dropped by the number filter; want white space, a comma"
                " or a semicolon, with or without white space around it"
            )
    as_bytes = tuple(dict.fromkeys(separator.encode() for separator in separators))
    numbered = {_START: 0}
    edges: list[tuple[int, int, int]] = []
    places = [_START]
    for place in places:  # it grows while it is walked through
        for byte, after in _onward(place, count_max, as_bytes):
            if after not in numbered:
                numbered[after] = len(places)
                places.append(after)
            edges.append((numbered[place], byte[0], numbered[after]))
    table = np.full((len(places), 256), -1, np.int32)
    sources, read, targets = np.array(edges).T
    table[sources, read] = targets
    accepting = np.array([bool(place.closing) or (place.digits > 0 and not place.opening) for place in places])
    return Automaton(table, accepting)
