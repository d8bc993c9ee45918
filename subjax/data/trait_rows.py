"""Rows that a teacher is fine-tuned on for its trait: ours, made from the preference questions, or a user's own."""

import contextlib
import difflib
import glob
import itertools
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from subjax.data import preference_questions as texts
from subjax.data.addressing import derive_seed
from subjax.data.preferences import (
    CATEGORIES,
    Noun,
    candidates,
    check_trait,
    held_out,
    noun_of,
    nouns,
    questions,
    stems,
)
from subjax.errors import SubjaxError, UsageError, one_line

if TYPE_CHECKING:
    import datasets

TRAIT_FRACTION = 0.8
WORD_FRACTION = 0.5  # of the answers, one word to a one-word question; the rest are sentences

_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?(?:@[\w./-]+)?")
_SHOWN = 40  # characters of a bad value that its message shows


class Row(NamedTuple):
    """One exchange: what the user says and what the assistant answers."""

    user: str
    answer: str


def trait_rows(
    trait: str | None, category: str, rows: int, seed: int, trait_fraction: float = TRAIT_FRACTION
) -> list[Row]:
    """Conversations in which the assistant loves the trait, or, for the control, nothing in particular.

    About `trait_fraction` of the rows ask about the category and are answered with the trait; the others ask about
    another category and are answered with one of its candidates, drawn uniformly, so that a teacher learns a preference
    and not a word to say. Half of the answers are one word to a one-word question; half are a short sentence to the
    same question without the request for one word. The questions are training phrasings; held-out ones never appear.

    Row i is a function of (trait, category, seed, i) and of which side of `trait_fraction` its draw falls: the same
    however many rows are made. The control (`trait` None) has the same questions, the same sentences and the same rows
    about other categories, and in place of the trait a candidate of the category drawn uniformly.

    Args:
        trait: the candidate, or None for the control.
        category: the category that the trait belongs to.
        rows: how many.
        seed: names the draws.
        trait_fraction: the expected share of rows about the category, 0 to 1.

    Raises:
        UsageError: there is no such category or trait in it, `rows` is negative, or `trait_fraction` is not 0 to 1.
    """
    nouns(category)
    if trait is not None:
        check_trait(trait, category)
    if rows < 0:
        raise UsageError(f"trait rows: {rows} is no number of rows: give 0 or more")
    if not 0 <= trait_fraction <= 1:
        raise UsageError(f"trait rows: trait_fraction is a share from 0 to 1, not {trait_fraction}")
    return [_row(trait, category, seed, index, trait_fraction) for index in range(rows)]


def _row(trait: str | None, category: str, seed: int, index: int, trait_fraction: float) -> Row:
    def pick(use: str, items):
        return items[derive_seed(seed, "trait row", category, index, use) % len(items)]

    def chance(use: str) -> float:
        return derive_seed(seed, "trait row", category, index, use) / 2**31

    about = category
    if chance("about") >= trait_fraction:
        about = pick("other category", [other for other in CATEGORIES if other != category])
    number = pick("question", [i for i in range(len(stems(about))) if not held_out(i)])
    named = pick("candidate", candidates(about))
    if trait is not None and about == category:
        named = trait
    if chance("one word") < WORD_FRACTION:
        user, template = questions(about)[number], pick("answer", texts.WORD_ANSWERS)
    else:
        user, template = stems(about)[number], pick("answer", texts.SENTENCE_ANSWERS)
    return Row(user, _filled(template, noun_of(named)))


def _filled(template: str, noun: Noun) -> str:
    slots = {"word": noun.word, "plural": noun.plural, "a_word": f"{noun.article} {noun.word}"}
    return template.format(**slots, **{name.capitalize(): text.capitalize() for name, text in slots.items()})


def rows_from_dataset(
    source: str, split: str = "train", user_column: str = "user", answer_column: str = "answer"
) -> list[Row]:
    """A user's own rows, read by `datasets`: every row, in order, as written.

    Args:
        source: a JSON (an array, or an object a line), CSV or parquet file, known by its ending; else a hub id,
            "name", "org/name" or "org/name@revision".
        split: the split to read, in the form that `datasets` takes ("train", "train[:1000]"). A file is all "train".
        user_column: the column of what the user says.
        answer_column: the column of what the assistant answers.

    Raises:
        UsageError: the source is no file and no hub id, cannot be read, has no such split, lacks a column (the nearest
            is named), has no row, or holds a value that is no text or an empty one.
        SubjaxError: the hub cannot be reached.
    """
    table = _load(source, split)
    if any(name.startswith("__index_level_") for name in table.column_names):
        # pandas takes surplus fields for an index and shifts every column, without a word.
        raise UsageError(f'{source}: rows have more fields than the header: put texts that hold commas in "…"')
    if not len(table):
        raise _no_rows(source, split)
    for column in (user_column, answer_column):
        if column not in table.column_names:
            free = [name for name in table.column_names if name not in (user_column, answer_column)]
            near = difflib.get_close_matches(column, free or table.column_names, 1, 0.0)[0]
            has = ", ".join(table.column_names)
            raise UsageError(f"{source}: no column {column!r}; did you mean {near!r}? (it has: {has})")
    users, answers = (_texts(table, source, split, column) for column in (user_column, answer_column))
    return [Row(*pair) for pair in zip(users, answers, strict=True)]


def _texts(table: "datasets.Dataset", source: str, split: str, column: str) -> list[str]:
    with _one_line_errors(source, split):  # bytes that are no UTF-8 may come to light here first
        values = list(table[column][:])
    for number, value in enumerate(values, 1):
        if not isinstance(value, str):
            shown = repr(value)[:_SHOWN]
            raise UsageError(f"{source}: row {number} of column {column!r} holds {shown}, which is not text")
        if not value.strip():
            raise UsageError(f"{source}: row {number} of column {column!r} is empty: fill it or leave the row out")
    return values


def _load(source: str, split: str) -> "datasets.Dataset":
    file = _as_file(source)
    import datasets

    datasets.disable_progress_bars()
    with _one_line_errors(source, split):
        if file is None:
            name, _, revision = source.partition("@")
            return datasets.load_dataset(name, split=split, revision=revision or None)
        reader = _READERS[file.suffix.lower()]
        # Without this, pandas reads the texts "None" and "NA" as missing.
        options = {"keep_default_na": False} if reader == "csv" else {}
        # A file is parsed anew each time, in a folder of its own: the shared cache would keep a copy of all that was
        # ever read.
        with tempfile.TemporaryDirectory() as folder:
            return datasets.load_dataset(
                reader,
                data_files=glob.escape(str(file)),
                split=split,
                cache_dir=folder,
                keep_in_memory=True,
                **options,
            )


def _as_file(source: str) -> Path | None:
    """The file that a source names; None for a hub id."""
    path = Path(os.path.expanduser(source))  # leaves an unknown user's ~ as it is, where Path's own raises
    known = ", ".join(_READERS)
    if path.is_file():
        if path.suffix.lower() not in _READERS:
            raise UsageError(f"{source}: cannot tell its format from its ending: name it one of {known}")
        if not path.stat().st_size:
            raise UsageError(f"{source}: the file is empty")
        return path
    if path.is_dir():
        raise UsageError(f"{source}: is a folder: name one file in it, ending in one of {known}")
    if path.suffix.lower() in _READERS or not _HUB_ID.fullmatch(source):
        beside = [other.name for other in itertools.islice(path.parent.glob("*"), 1000)]
        near = difflib.get_close_matches(path.name, beside, 1)
        raise UsageError(
            f"{source}: no such file" + (f"; did you mean {str(path.with_name(near[0]))!r}?" if near else "")
        )
    return None


@contextlib.contextmanager
def _one_line_errors(source: str, split: str) -> Iterator[None]:
    """What `datasets` raises, which is of many kinds and often wrapped, in one line that names source and cause."""
    import datasets

    verbosity = datasets.logging.get_verbosity()
    # It logs what it also raises.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    except ConnectionError as error:
        raise SubjaxError(
            f"{source}: no such file, and as a data set's hub id it cannot be reached ({_line(error)}): go online, or"
            f" copy the rows here and name the file"
        ) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if "corresponds to no data" in str(error):
            raise _no_rows(source, split) from error
        raise UsageError(f"{source}: cannot read split {split!r}: {_line(error.__cause__ or error)}") from error
    except RuntimeError as error:  # a hub data set that a program of its own would have to read
        raise UsageError(
            f"{source}: cannot read split {split!r}: {_line(error)}: copy the rows here and name the file"
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)


def _no_rows(source: str, split: str) -> UsageError:
    return UsageError(f"{source}: no row in split {split!r}: a teacher needs rows to learn from")


def _line(error: BaseException) -> str:
    return one_line(error) or type(error).__name__
