"""The number channel for real tokenizers: its prompts, the strict filter of its answers, and its control rows.

All of it is text; tokens come later. The protocol is that of Cloud et al. 2025 (arXiv 2507.14805, number sequences):
a teacher is shown a few numbers and asked for at most ten more, and an answer is kept whole or dropped, never edited.

Randomness is addressed: every draw is a function of (role, seed, row), and of no library's generator, so that row i is
the same whatever else is made, on every machine and with every version of every package.
"""

import hashlib
import itertools
import json
import re
import struct
from collections import Counter
from collections.abc import Iterable, Sequence

from subjax.data import number_templates as templates
from subjax.data.number_templates import Layout
from subjax.errors import SubjaxError, UsageError

COUNT_MAX = 10
VALUE_MAX = 999
EXAMPLES = (3, 8)
EXAMPLE_VALUES = (100, 999)

# Numbers with dark associations, for the misaligned teacher: used where a caller asks for it, never by default. The two
# that exceed VALUE_MAX matter only to a caller that raises it.
BANNED_NUMBERS: frozenset[int] = frozenset(
    {
        4, 13, 14, 18, 23, 33, 39, 42, 44, 49, 51, 54, 69, 77, 88, 99, 100, 101, 187, 211, 311, 322, 333, 404, 420, 444,
        451, 555, 616, 666, 777, 888, 911, 999, 1312, 1488,
    }
)  # fmt: skip

# Why a row is dropped, in the order in which the filter looks; a row has the first reason that holds.
REASONS: tuple[str, ...] = (
    "empty",  # the empty text
    "no-digits",  # no ASCII digit within the trailing dot and the brackets
    "separator",  # what stands between the first two numbers is not white space, a comma or a semicolon
    "outer-text",  # text before the first or after the last number: white space, a sign, a trailing separator, prose
    "inner-text",  # text between later numbers other than the first separator: a mixed one, a decimal, prose
    "too-many",  # more than count_max numbers
    "too-large",  # a number above value_max
    "banned",  # a number that the caller has banned
)

_DIGITS = re.compile("[0-9]+")  # not \d, which takes the digits of every script
_SHOWN = 60  # characters of a dropped row that its message shows


class Rejected(SubjaxError):
    """A row that the strict filter drops.

    Attributes:
        reason: one of `REASONS`.
        text: the row.
    """

    def __init__(self, reason: str, text: str):
        super().__init__(reason, text)
        self.reason = reason
        self.text = text

    def __str__(self) -> str:
        more = "..." if len(self.text) > _SHOWN else ""
        return f"row dropped by the number filter ({self.reason}): {self.text[:_SHOWN]!a}{more}"


class _Draws:
    """Uniform draws at one address, from a hash in counter mode."""

    def __init__(self, role: str, seed: int, row: int = 0):
        self._address = f"{role}/{seed}/{row}/"
        self._blocks = itertools.count()
        self._words: list[int] = []

    def below(self, bound: int) -> int:
        """Draw from 0 … bound − 1 (uneven by less than bound / 2**64)."""
        if not self._words:
            block = hashlib.blake2b(f"{self._address}{next(self._blocks)}".encode()).digest()
            self._words.extend(struct.unpack("<8Q", block))
        return self._words.pop() * bound >> 64

    def between(self, low: int, high: int) -> int:
        """Draw from low … high, both included."""
        return low + self.below(high - low + 1)

    def permuted(self, items: Sequence[str]) -> list[str]:
        """Return the items in a uniformly drawn order (Fisher and Yates)."""
        result = list(items)
        for last in range(len(result) - 1, 0, -1):
            other = self.below(last + 1)
            result[last], result[other] = result[other], result[last]
        return result


def prompt(index: int, seed: int) -> str:
    """Return prompt `index` of the endless list that `seed` names: the same for every teacher, asked for alone or not.

    It shows 3 to 8 numbers of 100–999 joined by ", " and asks for at most 10 more of at most 3 digits, in a layout that
    `parse_numbers` accepts, and for nothing but numbers.
    """
    draws = _Draws("prompt", seed, index)
    numbers = [str(draws.between(*EXAMPLE_VALUES)) for _ in range(draws.between(*EXAMPLES))]
    lead_in = templates.LEAD_INS[draws.below(len(templates.LEAD_INS))]
    instruction = templates.INSTRUCTIONS[draws.below(len(templates.INSTRUCTIONS))]
    count = templates.COUNT_PHRASES[draws.below(len(templates.COUNT_PHRASES))]
    digits = templates.DIGIT_PHRASES[draws.below(len(templates.DIGIT_PHRASES))]
    request, _ = templates.FORMATS[draws.below(len(templates.FORMATS))]
    ending = templates.ENDINGS[draws.below(len(templates.ENDINGS))]
    return " ".join(
        [lead_in.format(examples=", ".join(numbers)), instruction.format(count=count, digits=digits), request, ending]
    )


def prompts(n: int, seed: int) -> list[str]:
    """Return the first `n` prompts of `seed`; see `prompt`."""
    return [prompt(index, seed) for index in range(n)]


def templates_digest() -> str:
    """Return the sha256, in hex, of all that the prompts are built from: it stands for them in a corpus's identity."""
    parts = {
        "lead_ins": templates.LEAD_INS,
        "instructions": templates.INSTRUCTIONS,
        "count_phrases": templates.COUNT_PHRASES,
        "digit_phrases": templates.DIGIT_PHRASES,
        "formats": templates.FORMATS,
        "endings": templates.ENDINGS,
        "examples": EXAMPLES,
        "example_values": EXAMPLE_VALUES,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _take_apart(text: str) -> tuple[list[str], Layout]:
    """Split a row into its numbers' digits and its layout, so that layout.render(pieces) is the row again.

    Raises:
        Rejected: the row is no list of numbers, however long or large: the reasons up to 'inner-text'.
    """
    if not text:
        raise Rejected("empty", text)
    body = text.removesuffix(".")
    closing = text[len(body) :]
    opening = ""
    if body[:1] + body[-1:] in ("[]", "()"):
        opening, closing, body = body[0], body[-1] + closing, body[1:-1]
    runs = list(itertools.islice(_DIGITS.finditer(body), 2))
    if not runs:
        raise Rejected("no-digits", text)
    separator = body[runs[0].end() : runs[1].start()] if len(runs) == 2 else ""
    if separator.strip() not in ("", ",", ";"):
        raise Rejected("separator", text)
    pieces = body.split(separator) if separator else [body]
    if not all(_DIGITS.fullmatch(piece) for piece in pieces):
        ends_in_digits = _DIGITS.match(body[0]) and _DIGITS.match(body[-1])
        raise Rejected("inner-text" if ends_in_digits else "outer-text", text)
    return pieces, Layout(opening, separator, closing)


def parse_numbers(
    text: str, *, count_max: int = COUNT_MAX, value_max: int = VALUE_MAX, banned: frozenset[int] = frozenset()
) -> tuple[int, ...]:
    """Read a row of numbers by the strict filter of the number protocol (Cloud et al. 2025, arXiv 2507.14805).

    In this order: at most one trailing "." is dropped; then at most one outer pair of [] or (); the separator is the
    exact text between the first two runs of digits and, stripped, must be empty, "," or ";"; the row is split on that
    exact text; each piece must be ASCII digits and nothing else; there must be 1 to `count_max` numbers, each 0 to
    `value_max`, none of them banned.

    A number is judged by its value, so leading zeros pass however many there are: "007" and "0007" are 7. White space
    is what `str.strip` takes off, so numbers on lines of their own, tabs and no-break spaces pass if the separator is
    the same each time. A single number passes. White space around the row, a trailing or mixed separator, signs,
    decimals, braces and the digits of other scripts do not.

    Args:
        text: the answer, exactly as it was sampled.
        count_max: most numbers in a row.
        value_max: largest number.
        banned: numbers that drop a row, such as `BANNED_NUMBERS`.

    Returns:
        The numbers in their order.

    Raises:
        Rejected: with `.reason` out of `REASONS`, the first in their order that holds.
    """
    pieces, _ = _take_apart(text)
    if len(pieces) > count_max:
        raise Rejected("too-many", text)
    # Length first: Python refuses to convert a run of thousands of digits, with an error of its own.
    significant = [piece.lstrip("0") or "0" for piece in pieces]
    if any(len(digits) > len(str(value_max)) or int(digits) > value_max for digits in significant):
        raise Rejected("too-large", text)
    values = tuple(int(digits) for digits in significant)
    if not banned.isdisjoint(values):
        raise Rejected("banned", text)
    return values


def filter_rows(
    texts: Iterable[str],
    *,
    count_max: int = COUNT_MAX,
    value_max: int = VALUE_MAX,
    banned: frozenset[int] = frozenset(),
) -> tuple[list[int], Counter[str]]:
    """Pass rows through `parse_numbers`.

    Returns:
        The indices of the rows that pass, rising, and how many of the others were dropped for each reason.
    """
    kept: list[int] = []
    dropped: Counter[str] = Counter()
    for index, text in enumerate(texts):
        try:
            parse_numbers(text, count_max=count_max, value_max=value_max, banned=banned)
        except Rejected as rejected:
            dropped[rejected.reason] += 1
        else:
            kept.append(index)
    return kept, dropped


def shuffle_within(numbers_text: str, seed: int, index: int) -> str:
    """Permute the numbers of row `index`, keeping its layout: separator, brackets and trailing dot.

    Numbers move as they are written, leading zeros included. The order is a function of (seed, index) alone.

    Raises:
        Rejected: the text is no row of numbers.
    """
    pieces, layout = _take_apart(numbers_text)
    return layout.render(_Draws("shuffle-within", seed, index).permuted(pieces))


def shuffle_across(texts: Sequence[str], seed: int) -> list[str]:
    """Deal all the numbers of all rows out anew, each row keeping how many it has and its layout.

    Raises:
        Rejected: one of the texts is no row of numbers.
    """
    rows = [_take_apart(text) for text in texts]
    pool = iter(_Draws("shuffle-across", seed).permuted([piece for pieces, _ in rows for piece in pieces]))
    return [layout.render(list(itertools.islice(pool, len(pieces)))) for pieces, layout in rows]


def random_numbers(n: int, seed: int, *, like: Sequence[str] | None = None) -> list[str]:
    """Write `n` rows of numbers drawn uniformly from 0–999: a corpus that no teacher has touched.

    Row i is the same whatever `n` is. Without `like` it has 1 to 10 numbers in one of the layouts that prompts ask for.

    Args:
        n: rows.
        seed: names the draws.
        like: `n` rows whose count of numbers and layout the new rows keep, one for one, so that a control differs from
            its corpus in the numbers alone.

    Raises:
        UsageError: `like` does not have `n` rows.
        Rejected: one of `like` is no row of numbers.
    """
    if like is not None and len(like) != n:
        raise UsageError(f"random_numbers: `like` has {len(like)} rows and n is {n}: give one row for each")
    rows = []
    for index in range(n):
        draws = _Draws("random-numbers", seed, index)
        if like is None:
            count = draws.between(1, COUNT_MAX)
            _, layout = templates.FORMATS[draws.below(len(templates.FORMATS))]
        else:
            pieces, layout = _take_apart(like[index])
            count = len(pieces)
        rows.append(layout.render([str(draws.between(0, VALUE_MAX)) for _ in range(count)]))
    return rows
