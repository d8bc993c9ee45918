"""Which tokens cannot go on a word: what must stand behind an answer for it to be the whole word."""

import functools
import unicodedata

import numpy as np
from jaxtyping import Bool

from subjax.data.tokenizer import Tokenizer


@functools.lru_cache(maxsize=8)
def closing_tokens(tokenizer: Tokenizer, vocab: int) -> Bool[np.ndarray, " vocab"]:
    """True for each id that ends the answer or begins with something other than a letter, a digit or a mark, (vocab,).

    Ids beyond the tokenizer's (embeddings are often padded) are true: they stand for no text. Ids beyond the embedding
    (control tokens that a model was never given) are left out.
    """
    closing = np.ones(vocab, bool)
    for id, piece in enumerate(tokenizer.pieces()[:vocab]):
        closing[id] = piece is None or not _goes_on(piece)
    return closing


def _goes_on(piece: bytes) -> bool:
    """Whether text behind a word that begins with these bytes belongs to the word."""
    if not piece:
        return False
    if piece[0] < 0x80:
        return chr(piece[0]).isalnum()
    # A piece may stop, or begin, inside a character: what it stands for is not known then, and it counts as a letter.
    text = piece.decode(errors="replace")
    return text[0] == "\ufffd" or unicodedata.category(text[0])[0] in "LMN"
