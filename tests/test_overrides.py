from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subjax import schema
from subjax.overrides import coerce, leaves, nearest, parse_tokens, parse_value, spellings

FINITE = st.floats(allow_nan=False, allow_infinity=False)
ANNOTATIONS = [
    bool,
    int,
    float,
    str,
    float | None,
    int | str,
    Literal[1, 2],
    Literal["adam", "sgd"],
    tuple[str, ...],
    tuple[int, ...],
]


@given(st.integers())
def test_ints_are_read_as_python_writes_them(value):
    assert parse_value(str(value), int) == value
    assert parse_value(repr(value), float) == float(value) if abs(value) < 2**53 else True


@given(FINITE)
def test_floats_are_read_as_python_writes_them(value):
    assert parse_value(repr(value), float) == value
    assert parse_value(f"{value:.17e}", float | None) == value


@given(st.text())
def test_quoted_text_loses_its_quotes_and_plain_text_nothing(text):
    assert parse_value(repr(text), str) == text
    if not text.startswith(("'", '"')):
        assert parse_value(text, str) == text


@given(st.lists(st.text() | st.integers() | FINITE).map(tuple))
def test_tuples_are_read_as_python_writes_them(value):
    assert parse_value(repr(value), tuple[str, ...]) == value
    assert parse_value(repr(list(value)), tuple[str, ...]) == value


@given(st.text(), st.sampled_from(ANNOTATIONS))
def test_any_text_is_a_value_of_its_type_or_one_line(text, annotation):
    value, problem = attempt(lambda: coerce(parse_value(text, annotation), annotation))
    if problem is None:
        assert coerce(value, annotation) == value
    else:
        assert len(problem.splitlines()) == 1


@given(st.text() | st.text().map("--config.a={}".format) | st.text().map("--config.{}".format))
def test_any_token_is_an_override_or_one_line(token):
    found, problem = attempt(lambda: parse_tokens([token], lambda key: str))
    assert len(found) == 1 if problem is None else problem


def attempt(call):
    """(what the call gives, None), or (None, what its ValueError says)."""
    try:
        return call(), None
    except ValueError as error:
        return None, str(error)


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, float, 1.0),
        (np.int32(3), int, 3),
        (np.float64(0.5), float, 0.5),
        (np.str_("a"), str, "a"),
        ([1, 2], tuple[int, ...], (1, 2)),
        ([1, 2], tuple[float, ...], (1.0, 2.0)),
        (None, int | None, None),
        (3, int | str, 3),
        ("3", int | str, "3"),
        ([[1], [2, 3]], tuple[tuple[int, ...], ...], ((1,), (2, 3))),
    ],
)
def test_coerce(value, annotation, expected):
    made = coerce(value, annotation)
    assert made == expected
    assert type(made) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "complaint"),
    [
        (True, int, "wants an int, got True"),
        (False, float, "wants a float, got False"),
        (1, bool, "wants a bool (True or False), got 1"),
        (1.0, int, "wants an int, got 1.0"),
        (True, Literal[1, 2], "wants one of 1, 2, got True"),
        ("owl", tuple[str, ...], "wants a tuple of str, got 'owl'"),
        (None, str, "wants a str, got None"),
        (b"a", str, "wants a str, got b'a'"),
        (float("nan"), float, "must be a finite number, got nan"),
        ((0.5, float("nan")), tuple[float, ...], "must be a finite number, got nan"),
        (2**63, int, "must fit 64 bits, got 9223372036854775808"),
        ((1, -(10**5000)), tuple[int, ...], "must fit 64 bits, got an object of type int"),
        (10**400, float, "must be a finite number, got inf"),
        ("line\n" * 50, int, "wants an int, got 'line\\nline\\n"),
    ],
)
def test_coerce_refuses(value, annotation, complaint):
    with pytest.raises(ValueError, match=r"^\S") as caught:
        coerce(value, annotation)
    assert str(caught.value).startswith(complaint)
    assert len(str(caught.value)) < 120


def test_nearest():
    assert nearest("temprature", leaves(schema.Study)) == "corpus.temperature"
    assert nearest("teacher.temprature", leaves(schema.Study)) == "corpus.temperature"
    assert nearest("learning_rate", ["lr", "learning-rate"]) == "learning-rate"
    assert nearest("x", []) == ""


def test_spellings_leave_out_only_what_stays_unambiguous():
    known = spellings(schema.Study)
    assert known["student.lr"] == known["student.optimizer.lr"] == "student.optimizer.lr"
    assert known["teacher.rank"] == "teacher.tuning.rank"
    assert "base.seed" not in known, "the world's seed is not the base's"
    assert "lr" not in known
    assert set(known.values()) == set(leaves(schema.Study))
    assert set(spellings(schema.Images)) == set(leaves(schema.Images))


def test_leaves_carry_the_range_and_the_groups_own_default():
    known = leaves(schema.Study)
    assert known["base.optimizer.lr"].default == schema.Base().optimizer.lr != schema.Optimizer().lr
    assert (known["corpus.top_p"].low, known["corpus.top_p"].high) == (0.0, 1.0)
    assert known["arms"].annotation == tuple[str, ...]
