"""Which dotted keys settings have, and how text and plain values become what a key's type allows.

Nothing here knows of files. A value that cannot be had raises `ValueError` with half a
sentence ("wants an int, got '3.5'"); `subjax.config` puts the file and the key before it.
"""

import ast
import dataclasses
import difflib
import functools
import math
import numbers
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

from subjax.errors import one_line

_WORDS = {"true": True, "t": True, "1": True, "yes": True, "false": False, "f": False, "0": False, "no": False}
_TOKEN = re.compile(r"--(no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)
_MAY_BE_LEFT_OUT = ("optimizer", "tuning")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A field that is no group of settings: its type, its closed range, its default."""

    annotation: Any
    low: float | None
    high: float | None
    default: Any


@functools.cache
def leaves(cls: Any) -> dict[str, Leaf]:
    """Every field below `cls` that is no group, by its dotted key."""

    def walk(group: Any, prefix: str) -> Iterator[tuple[str, Leaf]]:
        hints = typing.get_type_hints(type(group))
        for field in dataclasses.fields(group):
            value, key = getattr(group, field.name), prefix + field.name
            if dataclasses.is_dataclass(value):
                yield from walk(value, key + ".")
            else:
                yield key, Leaf(hints[field.name], field.metadata.get("low"), field.metadata.get("high"), value)

    return dict(walk(cls(), ""))


@functools.cache
def spellings(cls: Any) -> dict[str, str]:
    """What may be typed for each key: itself, and itself without the words that may be left out, where unambiguous."""
    short: dict[str, list[str]] = {}
    for key in leaves(cls):
        parts = key.split(".")
        if len(parts) > 1 and parts[-2] in _MAY_BE_LEFT_OUT:
            short.setdefault(".".join([*parts[:-2], parts[-1]]), []).append(key)
    unique = {name: keys[0] for name, keys in short.items() if len(keys) == 1}
    return unique | {key: key for key in leaves(cls)}


def nearest(word: str, choices: Iterable[str]) -> str:
    """The choice most like `word`, '' where there is none; the last part of a dotted key counts twice."""

    def likeness(choice: str) -> float:
        pairs = ((word, choice), (word.rpartition(".")[2], choice.rpartition(".")[2]))
        return sum(difflib.SequenceMatcher(None, a.lower(), b.lower(), autojunk=False).ratio() for a, b in pairs)

    return max(choices, key=likeness, default="")


def shown(value: Any) -> str:
    """`repr` of a value on one line of at most 80 characters, for messages."""
    try:
        text = one_line(repr(value))
    except Exception:  # a repr of the file's own that fails, or an int of thousands of digits
        text = f"an object of type {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def coerce(value: Any, annotation: Any, low: float | None = None, high: float | None = None) -> Any:
    """Give `value` the type that a field declares: 1 becomes 1.0 for a float, a list becomes a tuple.

    Knows bool, int, float, str, `Literal`, `tuple[X, ...]` and unions of them. Raises ValueError for another type
    (a bool is never a number), for NaN, infinities and ints beyond 64 bits, and for a number outside the closed range
    [low, high].
    """
    try:
        result = _convert(value, annotation)
    except TypeError:
        near = nearest(value, _choices(annotation)) if isinstance(value, str) else ""
        hint = f"; the nearest is {near!r}" if near else ""
        raise ValueError(f"wants {_describe(annotation)}, got {shown(value)}{hint}") from None
    for number in result if isinstance(result, tuple) else (result,):
        if isinstance(number, int | float) and not isinstance(number, bool):
            _check_range(number, low, high)
    return result


def parse_value(text: str, annotation: Any) -> Any:
    """Read one value off the command line as `annotation` wants it; text that does not fit comes back as it is.

    A string is taken as typed, or without its quotes where it is a whole Python string; a tuple is '(1, 2)', '1,2',
    or bare words joined by ',' or '+'.
    """
    members = _members(annotation)
    if types.NoneType in members and text == "None":
        return None
    if bool in members and text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        if kind in members:
            try:
                return kind(text)
            except ValueError:
                continue
    for member in members:
        if typing.get_origin(member) is Literal:
            for choice in typing.get_args(member):
                if text == str(choice):
                    return choice
    if any(typing.get_origin(member) is tuple for member in members):
        return _parse_tuple(text)
    literal = _literal(text) if text[:1] in ("'", '"') else None
    return literal if isinstance(literal, str) else text


def parse_tokens(tokens: Sequence[str], annotation_of: Callable[[str], Any]) -> list[tuple[str, Any]]:
    """Split command-line tokens into (dotted key as typed, value), in their order.

    Takes '--config.key=value', '--config.key', 'value', and for a bool '--config.key' and '--noconfig.key' alone.
    `annotation_of(key)` gives a key's type, and raises for a key that does not exist. Raises ValueError for a token
    that is none of these and for a missing value.
    """
    rest = list(tokens)
    found: list[tuple[str, Any]] = []
    while rest:
        token = rest.pop(0)
        match = _TOKEN.fullmatch(token)
        if match is None:
            raise ValueError(f"unknown argument {shown(token)}; an override looks like --config.key=value")
        negated, key, text = match.groups()
        annotation = annotation_of(key)
        flag = bool in _members(annotation)
        if negated:
            if not flag or text is not None:
                raise ValueError(f"--noconfig.{key} is for a bool, and takes no value")
            found.append((key, False))
        elif text is not None:
            found.append((key, parse_value(text, annotation)))
        elif flag and not (rest and rest[0].lower() in _WORDS):
            found.append((key, True))
        elif rest and not rest[0].startswith("--"):
            found.append((key, parse_value(rest.pop(0), annotation)))
        else:
            raise ValueError(f"config.{key} has no value; write --config.{key}=value")
    return found


def parse_arguments(text: str | None, defaults: dict[str, Any]) -> dict[str, Any]:
    """Read 'traits=owl+wolf,inits=6' into a copy of `defaults`, typed by them; see `subjax.config.arguments`."""
    values = dict(defaults)
    given: set[str] = set()
    for piece in text.split(",") if text else ():
        name, equals, value = piece.partition("=")
        if name not in defaults:
            near = nearest(name, defaults)
            hint = f"the nearest is {near!r} (of {', '.join(defaults)})" if near else "the file takes none"
            raise ValueError(f"unknown argument {name!r}; {hint}")
        if name in given:
            raise ValueError(f"argument {name!r} is given twice")
        given.add(name)
        if not equals and not isinstance(defaults[name], bool):
            raise ValueError(f"argument {name!r} has no value; write {name}=value")
        try:
            values[name] = _argument(value if equals else "true", defaults[name])
        except ValueError as error:
            raise ValueError(f"argument {name!r} {error}") from None
    return values


def _argument(text: str, default: Any) -> Any:
    if isinstance(default, tuple):
        part = type(default[0]) if default else str
        if "" in text.split("+"):
            raise ValueError(f"has an empty part in {shown(text)}; join values by '+'")
        return tuple(coerce(parse_value(word, part), part) for word in text.split("+"))
    kind = str | None if default is None else type(default)
    return coerce(parse_value(text, kind), kind)


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union; a type that is none is its own only member."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def _choices(annotation: Any) -> list[str]:
    literals = [member for member in _members(annotation) if typing.get_origin(member) is Literal]
    return [choice for member in literals for choice in typing.get_args(member) if isinstance(choice, str)]


def _describe(annotation: Any) -> str:
    if len(_members(annotation)) > 1:
        return " or ".join(_describe(member) for member in _members(annotation))
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        part = typing.get_args(annotation)[0]
        return f"a tuple of {part.__name__ if isinstance(part, type) else _describe(part)}"
    words = {bool: "a bool (True or False)", int: "an int", float: "a float", str: "a str", types.NoneType: "None"}
    return words.get(annotation, str(annotation))


def _convert(value: Any, annotation: Any) -> Any:
    """`value` in the type of `annotation`; TypeError where it has another."""
    members = _members(annotation)
    if len(members) > 1:
        for member in members:
            try:
                return _convert(value, member)
            except TypeError:
                continue
    origin = typing.get_origin(annotation)
    if origin is Literal:
        for choice in typing.get_args(annotation):
            if type(value) is type(choice) and value == choice:  # 1 == True, but they are different choices
                return choice
    elif origin is tuple:
        part, *more = typing.get_args(annotation)
        if more == [...] and isinstance(value, list | tuple):
            return tuple(_convert(item, part) for item in value)
    elif annotation is types.NoneType and value is None:
        return None
    elif annotation is str and isinstance(value, str):
        return str(value)
    elif annotation is bool and isinstance(value, bool):
        return value
    elif annotation is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    elif annotation is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            return float(value) + 0.0  # -0.0 becomes 0.0, so that equal settings have equal JSON
        except OverflowError:
            return math.inf
    raise TypeError(annotation)


def _check_range(number: float, low: float | None, high: float | None) -> None:
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(f"must be a finite number, got {number}")
    if isinstance(number, int) and not -(2**63) <= number < 2**63:
        raise ValueError(f"must fit 64 bits, got {shown(number)}")
    if (low is not None and number < low) or (high is not None and number > high):
        limits = {"at least": low, "at most": high}
        wanted = " and ".join(f"{words} {limit:g}" for words, limit in limits.items() if limit is not None)
        raise ValueError(f"is out of range: it must be {wanted}, got {shown(number)}")


def _literal(text: str) -> Any:
    """The Python literal that `text` spells, or None."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _parse_tuple(text: str) -> Any:
    literal = _literal(text)
    if literal is not None:
        return tuple(literal) if isinstance(literal, list | tuple) else (literal,)
    inner = text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text
    words = [word.strip() for word in re.split(r"[,+]", inner.removesuffix(","))]
    if any(not re.fullmatch(r"[^\s'\"()\[\]{}]+", word) for word in words):
        return text  # a broken literal, not bare words: the type check shows it as it was typed
    return tuple(words)
