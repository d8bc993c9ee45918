"""Which tokens may follow: an automaton over bytes, composed with a tokenizer's pieces into one table over tokens.

The sampler walks the table beside its cache and draws among the allowed tokens alone. What it draws from is the model's
distribution renormalized over those, step by step. That is not the model's distribution over whole rows given that the
row is accepted: a token that mostly leads to rejected rows keeps all of its mass here (Park et al. 2024, arXiv
2405.21047, on grammar-aligned decoding). The idea of an index from states to tokens is that of Willard and
Louf 2023, arXiv 2307.09702.

A text may be spelled in several ways, and all of them are allowed, also those that the tokenizer itself would not give.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from subjax.data.number_grammar import Automaton
from subjax.errors import UsageError


class Constraint(NamedTuple):
    """A table of allowed tokens: arrays that compiled programs take as an argument, not a part of their key.

    The last state is that of an ended answer; it alone is reached by the end tokens, and only they follow in it.

    Attributes:
        tokens: (columns,) int32, the ids that are allowed in some state, rising.
        next: (states, columns) int16 or int32, the state behind a token, or -1 where it is not allowed.
        distance: (states,) int32, the fewest tokens in which an answer can end, the end token included.
        start: the state of the empty answer.
    """

    tokens: np.ndarray | jax.Array
    next: np.ndarray | jax.Array
    distance: np.ndarray | jax.Array
    start: int

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end an answer, rising."""
        return tuple(np.asarray(self.tokens)[np.asarray(self.next)[-1] >= 0].tolist())


def compose(automaton: Automaton, pieces: Sequence[bytes | None], ends: Sequence[int]) -> Constraint:
    """The table of an automaton over the tokens of a vocabulary.

    Args:
        automaton: the texts that an answer may be.
        pieces: the bytes that each token id stands for inside a text; None for special tokens, and for any other that
            answers shall not have (a byte token whose byte has a token of its own besides is allowed if it is told).
        ends: the ids that end an answer, allowed where the text so far is accepted; they are no text, whatever their
            pieces are.

    Raises:
        UsageError: no end, an end outside the vocabulary, or a byte of the automaton that has no token of its own (so
            that some accepted texts could not be spelled).
    """
    stops = sorted(set(ends))
    if not stops or stops[0] < 0 or stops[-1] >= len(pieces):
        raise UsageError(
            f"constraint: the end tokens are {stops} and the vocabulary has {len(pieces)}; name at least one of them,"
            " for an answer has to end"
        )
    alphabet = automaton.alphabet
    # Most of a vocabulary is words: one pass that deletes the alphabet's bytes from a piece rules them out.
    spelled = {i: p for i, p in enumerate(pieces) if p and not p.translate(None, alphabet) and i not in stops}
    singles = set(spelled.values())
    missing = [bytes([byte]) for byte in alphabet if bytes([byte]) not in singles]
    if missing:
        raise UsageError(
            f"constraint: the vocabulary has no token of its own for {missing[0].decode('latin-1')!r}, so not every row"
            " can be spelled; set corpus.constrained=False"
        )
    states = np.arange(len(automaton.next))
    columns = {i: automaton.walk(piece, states) for i, piece in spelled.items()}
    columns = {i: column for i, column in columns.items() if (column >= 0).any()}
    ended = len(states)
    columns |= dict.fromkeys(stops, np.where(automaton.accepting, ended, -1))
    tokens = sorted(columns)
    table = np.full((ended + 1, len(tokens)), -1)
    table[:ended] = np.stack([columns[i] for i in tokens], axis=1)
    table[ended, np.isin(tokens, stops)] = ended  # so that no row is ever left without a token
    small = np.int16 if len(table) < 2**15 else np.int32
    return Constraint(np.array(tokens, np.int32), table.astype(small), _distances(table), 0)


def _distances(table: np.ndarray) -> np.ndarray:
    """Fewest tokens from each state of (states, columns) to the last one. From all there is a way: bytes are tokens."""
    distance = np.full(len(table), len(table))
    distance[-1] = 0
    while True:
        nearest = np.where(table >= 0, distance[table], len(table)).min(1) + 1
        closer = np.minimum(distance, nearest)
        if (closer == distance).all():
            return distance.astype(np.int32)
        distance = closer
