"""Config files and overrides in, frozen settings out. Below this, no code sees a `ConfigDict`.

A config file is Python with `get_config(arg=None)`, which returns an `ml_collections.ConfigDict`, and optionally
`sweep(arg=None)`, which returns a list of points (see `subjax.sweep`). Its key `kind` says what is configured: 'traits'
(`schema.Study`), 'images' (`schema.Images`) or 'pretrained' (`schema_pretrained.Pretrained`); other keys need setting
only where they differ from the dataclass.

In every dotted key the words `optimizer` and `tuning` may be left out: `student.lr` is `student.optimizer.lr`.
Every mistake is a `ConfigError` of one line; nothing a file or a command line holds ends in a traceback.
"""

import contextlib
import dataclasses
import functools
import importlib.machinery
import importlib.util
import inspect
import json
import os
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import ml_collections

from subjax import schema, schema_pretrained
from subjax.config_checks import check
from subjax.errors import ConfigError, UsageError
from subjax.overrides import Leaf, coerce, leaves, nearest, parse_arguments, parse_tokens, shown, spellings

KINDS: dict[str, type] = {"traits": schema.Study, "images": schema.Images, "pretrained": schema_pretrained.Pretrained}

T = TypeVar("T")
Settings = schema.Study | schema.Images | schema_pretrained.Pretrained


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A config file as it was asked for: checked settings, and the checked points of its sweep (`[{}]` for none)."""

    settings: Settings
    points: list[dict[str, Any]]
    path: str
    argument: str | None
    resolved: dict[str, Any]  # {"kind": ..., **to_dict(settings)}: `from_dict` reads it back

    def at(self, point: Mapping[str, Any]) -> Settings:
        """The settings of one point of the sweep."""
        return apply(self.settings, point)


def load(spec: str, overrides: Sequence[str] = (), also: Callable[[Any], None] | None = None) -> Loaded:
    """Read 'configs/x.py' or 'configs/x.py:traits=owl+wolf,inits=6', with overrides such as '--config.student.lr=3e-3'.

    Field references of the `ConfigDict` follow an override; they do not follow a point of the sweep. `check`, and
    `also` where it is given, see the settings of every point; a `UsageError` of `also` gets the file and the point
    put before it. Raises ConfigError.
    """
    match = re.fullmatch(r"(.*?\.py)(?::(.*))?", spec, re.DOTALL)
    path, argument = (match[1], match[2] or None) if match else (spec, None)
    path = str(pathlib.Path(path))
    config, points = _execute(path, argument)
    with _blame(path):
        kind = config.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        hint = f"; the nearest is {nearest(kind, KINDS)!r}" if isinstance(kind, str) else ""
        raise ConfigError(f"{path}: config.kind must be one of {', '.join(KINDS)}, got {shown(kind)}{hint}")
    cls = KINDS[kind]
    given = _given(cls, [(key, value) for key, value in _flatten(config) if key != "kind"], path)
    typed = _command_line(cls, overrides, f"{path}, command line")
    for key, (_, value) in typed.items():
        reference = given[key][1] if key in given else None
        if isinstance(reference, ml_collections.FieldReference):
            reference.set(value, type_safe=False)  # what refers to it follows
        else:
            given[key] = (key, value)
    settings: Any = _build(cls, given, path)
    points = _check_points(settings, points, {key: name for key, (name, _) in typed.items()}, path, also)
    return Loaded(settings, points, path, argument, {"kind": kind, **to_dict(settings)})


def defaults(kind: str) -> ml_collections.ConfigDict:
    """A ConfigDict of every field of a kind (one of `KINDS`) at its default, to start a config file from."""
    if kind not in KINDS:
        raise ConfigError(f"unknown kind {kind!r}; the nearest is {nearest(str(kind), KINDS)!r}")
    return ml_collections.ConfigDict({"kind": kind, **dataclasses.asdict(KINDS[kind]())})


def arguments(arg: str | None, **defaults: Any) -> ml_collections.ConfigDict:
    """Read a file's argument 'traits=owl+wolf,inits=6' into a locked ConfigDict, typed by the defaults.

    A default that is a tuple takes a '+'-joined list of its first element's type; one that is True or False may stand
    alone; None takes a str. Raises ConfigError for an unknown argument, naming the nearest, and for a wrong type.
    """
    try:
        return ml_collections.ConfigDict(parse_arguments(arg, defaults)).lock()
    except ValueError as error:
        raise ConfigError(str(error)) from None


def to_settings(cls: type[T], mapping: Any, where: str) -> T:
    """A frozen dataclass from a nested mapping, or ConfigDict, of the fields that differ from its defaults.

    Args: `cls`, a dataclass whose every field has a default; `where`, what messages begin with. Raises ConfigError.
    """
    if not isinstance(mapping, Mapping | ml_collections.ConfigDict):
        raise ConfigError(f"{where}: wants a mapping of settings, got {shown(mapping)}")
    return _build(cls, _given(cls, _flatten(mapping), where), where)


def to_dict(settings: Any) -> dict[str, Any]:
    """Plain data for JSON: tuples become lists, and every number has its field's type, so equal settings agree."""

    def plain(value: Any) -> Any:
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    cls: Any = type(settings)
    tree: dict[str, Any] = {}
    for key, leaf in leaves(cls).items():
        *groups, name = key.split(".")
        node = functools.reduce(lambda node, group: node.setdefault(group, {}), groups, tree)
        node[name] = plain(_coerced(leaf, key, _get(settings, key), "settings"))
    return tree


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "settings") -> T:
    """What `to_dict` was given, or `Loaded.resolved`; a key that is missing takes its default. Raises ConfigError."""
    if isinstance(data, Mapping) and data.get("kind") in [kind for kind, kept in KINDS.items() if kept is cls]:
        data = {key: value for key, value in data.items() if key != "kind"}
    return to_settings(cls, data, where)


def apply(settings: T, point: Mapping[str, Any], where: str = "point") -> T:
    """Settings with the flat dotted overrides of one point, checked as a config file is. Raises ConfigError."""
    cls: Any = type(settings)
    old = {key: (key, _get(settings, key)) for key in leaves(cls)}
    return _build(cls, old | _given(cls, point.items(), where), where)


# Keys -----------------------------------------------------------------------------------------------------------------


def _resolve(cls: Any, typed: str, where: str) -> str:
    """The key that was meant by `typed`; ConfigError for a group, and for what is unknown."""
    known = spellings(cls)
    if typed in known:
        return known[typed]
    inside = [key for key in known.values() if key.startswith(typed + ".")]
    if inside:
        raise ConfigError(
            f"{where}: config.{typed} is a group of settings; set one of its fields, as config.{inside[0]}"
        )
    if typed == "kind":
        raise ConfigError(f"{where}: config.kind is set by the config file alone; choose another file instead")
    raise ConfigError(f"{where}: unknown key config.{typed}; the nearest is config.{nearest(typed, known)}")


def _get(settings: Any, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), settings)


def _flatten(mapping: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a nested mapping, field references kept as they are."""
    kept = {"preserve_field_references": True} if isinstance(mapping, ml_collections.ConfigDict) else {}
    for name, value in mapping.items(**kept):
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _given(cls: Any, pairs: Any, where: str) -> dict[str, tuple[str, Any]]:
    """{key: (key as typed, value not yet checked)}."""
    given: dict[str, tuple[str, Any]] = {}
    for typed, value in pairs:
        key = _resolve(cls, str(typed), where)
        if key in given:
            raise ConfigError(f"{where}: config.{key} is set twice, as config.{given[key][0]} and as config.{typed}")
        given[key] = (str(typed), value)
    return given


def _coerced(leaf: Leaf, typed: str, value: Any, where: str) -> Any:
    if isinstance(value, ml_collections.FieldReference):
        try:
            value = value.get()
        except Exception as error:  # whatever the file's own arithmetic raises
            raise ConfigError(f"{where}: config.{typed} cannot be worked out: {_said(error)}") from None
    try:
        return coerce(value, leaf.annotation, leaf.low, leaf.high)
    except ValueError as error:
        raise ConfigError(f"{where}: config.{typed} {error}") from None


def _build(cls: Any, given: dict[str, tuple[str, Any]], where: str) -> Any:
    values = {key: _coerced(leaf, *given.get(key, (key, leaf.default)), where) for key, leaf in leaves(cls).items()}

    def make(default: Any, prefix: str) -> Any:
        fields = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
        made = {
            name: make(value, f"{prefix}{name}.") if dataclasses.is_dataclass(value) else values[prefix + name]
            for name, value in fields.items()
        }
        return type(default)(**made)

    return make(cls(), "")


def _command_line(cls: Any, tokens: Sequence[str], where: str) -> dict[str, tuple[str, Any]]:
    """{key: (key as typed, checked value)}; of a key that is given twice the last counts."""
    known = leaves(cls)
    try:
        pairs = parse_tokens(tokens, lambda typed: known[_resolve(cls, typed, where)].annotation)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    found = {}
    for typed, value in pairs:
        key = _resolve(cls, typed, where)
        found[key] = (typed, _coerced(known[key], typed, value, where))
    return found


def _check_points(
    settings: Any, points: Any, typed: dict[str, str], path: str, also: Callable[[Any], None] | None
) -> list[dict[str, Any]]:
    """The points with full keys and checked values; each must give valid settings, unlike every other point's."""
    if not points:
        raise ConfigError(f"{path}: its sweep() is empty; return at least one point, or leave sweep() out")
    seen: dict[str, int] = {}
    checked = []
    for number, point in enumerate(points, start=1):
        where = path if points == [{}] else f"{path}, point {number} of {len(points)} {shown(point)}"
        keys = _given(type(settings), point.items(), where)
        for key in keys.keys() & typed.keys():
            raise ConfigError(
                f"{path}: config.{typed[key]} is swept by the file and set on the command line; drop one of the two"
            )
        at = apply(settings, point, where)
        check(at, where)
        try:
            if also is not None:
                also(at)
        except UsageError as error:
            raise ConfigError(f"{where}: {error}") from None
        full = {key: _get(at, key) for key in keys}
        first = seen.setdefault(json.dumps(full, sort_keys=True), number)
        if first != number:
            raise ConfigError(f"{where}: the same as point {first}; a point counts once")
        checked.append(full)
    return checked


# Files ----------------------------------------------------------------------------------------------------------------


class _FreshLoader(importlib.machinery.SourceFileLoader):
    """Compiles the file each time: no bytecode is read or left beside it, so an edit within a second is seen."""

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _execute(path: str, argument: str | None) -> tuple[ml_collections.ConfigDict, list[dict[str, Any]]]:
    """The file's ConfigDict and its points. It runs under a private module name, known only until it has answered."""
    _find(path)
    name = "_subjax_config_" + re.sub(r"\W", "_", path)
    spec = importlib.util.spec_from_file_location(name, path, loader=_FreshLoader(name, path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses of the file look their module up
    try:
        with _blame(path):
            spec.loader.exec_module(module)
        get_config, sweep = getattr(module, "get_config", None), getattr(module, "sweep", None)
        if not callable(get_config):
            raise ConfigError(f"{path}: has no get_config(); define get_config(arg=None) that returns a ConfigDict")
        if isinstance(sweep, types.ModuleType):  # `from subjax import sweep`, and no function of that name
            sweep = None
        takers = [function for function in (get_config, sweep) if function is not None and _takes_argument(function)]
        if argument is not None and not takers:
            raise ConfigError(f"{path}: takes no argument (its get_config has no parameter), got {argument!r}")
        with _blame(path):
            config = get_config(argument) if get_config in takers else get_config()
            points = [{}] if sweep is None else sweep(argument) if sweep in takers else sweep()
    finally:
        sys.modules.pop(name, None)
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(f"{path}: get_config() returned {shown(config)}; it must return an ml_collections.ConfigDict")
    if not isinstance(points, list):
        raise ConfigError(f"{path}: sweep() returned {shown(points)}; it must return a list of dicts")
    for number, point in enumerate(points, start=1):
        if not isinstance(point, dict):
            raise ConfigError(f"{path}: point {number} of its sweep() is {shown(point)}; it must be a dict")
    return config, points


def _find(path: str) -> None:
    """ConfigError unless `path` is a file; it names the nearest Python file of the folder."""
    file, folder = pathlib.Path(path), pathlib.Path(path).parent
    if os.path.isfile(path):  # pathlib's own raises for a name that is too long
        return
    if not os.path.isdir(folder):
        raise ConfigError(f"{path}: no such config file; there is no folder {str(folder)!r}")
    near = nearest(file.name, sorted(other.name for other in folder.glob("*.py")))
    hint = f"the nearest is {folder / near}" if near else f"the folder {str(folder)!r} holds no Python file"
    raise ConfigError(
        f"{path}: {'is a folder, not a config file' if os.path.isdir(path) else 'no such config file'}; {hint}"
    )


def _takes_argument(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind("argument")
    except TypeError:
        return False
    return True


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


@contextlib.contextmanager
def _blame(path: str) -> Iterator[None]:
    """Turn whatever the file's own code raises into one line with the line number in the file."""
    try:
        yield
    except ConfigError as error:  # of `arguments`: the line that calls it is not where the mistake is
        raise ConfigError(f"{path}: {error}") from None
    except (Exception, SystemExit) as error:
        if isinstance(error, SyntaxError) and error.filename == path:
            raise ConfigError(f"{path}, line {error.lineno}: syntax error: {error.msg}") from None
        lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == path]
        at = f"{path}, line {lines[-1]}" if lines else path
        raise ConfigError(f"{at}: {error if isinstance(error, UsageError) else _said(error)}") from None
