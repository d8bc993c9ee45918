"""The words behind a command taken apart: flags in both spellings, and what a command is about (NODEs, or a MODEL)."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Sequence
from typing import get_args

from subjax.errors import UsageError
from subjax.models.forms import Dtype, Form

SWITCHES = ("quiet", "all")
REQUIRED = ("config", "workdir", "to")
_LEAST = {
    "workers": 0,
    "tokens": 1,
    "processes": 1,
    "process": 0,
    "init-timeout": 1,
}  # of flags that take a whole number
_CHOICES = {"form": get_args(Form), "dtype": get_args(Dtype)}


@dataclasses.dataclass
class Arguments:
    """The command line, taken apart; `operands` are its NODEs or its MODEL."""

    operands: list[str] = dataclasses.field(default_factory=list)
    config: str = ""
    overrides: list[str] = dataclasses.field(default_factory=list)
    workdir: str = ""
    workers: int | None = None
    mesh: str = ""
    coordinator: str = ""
    processes: int | None = None
    process: int | None = None
    init_timeout: int = 300
    quiet: bool = False
    all: bool = False
    prompts: str = ""
    tokens: int = 64
    bound: float | None = None
    to: str = ""
    form: Form | None = None
    dtype: Dtype | None = None
    topology: str = ""


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: what does it, its flags, how many operands it takes, and what to say where there are too few."""

    do: Callable[[Arguments], int]
    flags: tuple[str, ...] = ("workdir",)
    operands: tuple[int, int] = (0, 0)
    required: tuple[str, ...] = REQUIRED  # of its flags
    missing: str = "which node? subjax {name} NODE --workdir=DIR; subjax status lists them"


def nearest(word: str, known: Sequence[str], prefix: str = "") -> str:
    """What to say of a word that is not known: the nearest that is, or all of them; each is shown behind a prefix."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(prefix + name for name in known)}"


def parse(name: str, command: Command, words: Sequence[str]) -> Arguments:
    """Take apart what follows the command `name`; UsageError names what is wrong and the nearest right one."""
    given, rest = Arguments(), list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            given.operands.append(word)
            continue
        flag, equals, value = word.lstrip("-").partition("=")
        if flag.startswith(("config.", "noconfig.")) and "config" in command.flags:
            given.overrides.append(word)
            if not equals and rest and not rest[0].startswith("--"):
                given.overrides.append(rest.pop(0))  # config knows which keys may stand alone
            continue
        if flag not in command.flags or not word.startswith("--"):
            like = nearest(flag, command.flags, "--") if command.flags else "this command takes none"
            raise UsageError(f"{name}: unknown flag {word.partition('=')[0]}: {like}")
        if flag in SWITCHES:
            if equals:
                raise UsageError(f"{name}: --{flag} takes no value")
            setattr(given, flag, True)
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UsageError(f"{name}: --{flag} needs a value: --{flag}=...")
            value = rest.pop(0)
        setattr(given, flag.replace("-", "_"), _value(name, flag, value))
    _check(given, name, command)
    return given


def _value(name: str, flag: str, value: str) -> str | int | float:
    """The value of a flag, as its kind wants it."""
    if flag in _LEAST:
        if not value.isascii() or not value.isdigit() or int(value) < _LEAST[flag]:
            raise UsageError(f"{name}: --{flag}={value}: give a whole number, {_LEAST[flag]} or more")
        return int(value)
    if not value:
        raise UsageError(f"{name}: --{flag} is empty: --{flag}=...")
    if flag == "bound":
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise UsageError(f"{name}: --bound={value}: give nats a token, a number above 0 such as 1e-5")
        return number
    if flag in _CHOICES and value not in _CHOICES[flag]:
        raise UsageError(f"{name}: --{flag}={value}: {nearest(value, _CHOICES[flag])}")
    return value


def _check(given: Arguments, name: str, command: Command) -> None:
    least, most = command.operands
    if len(given.operands) > most:
        raise UsageError(f"{name}: unexpected {given.operands[most]!r}: flags are written --flag=value")
    if len(given.operands) < least:
        raise UsageError(f"{name}: {command.missing.format(name=name)}")
    for flag in command.required:
        if flag in command.flags and not getattr(given, flag):
            raise UsageError(f"{name}: --{flag} is missing; subjax --help shows examples")
