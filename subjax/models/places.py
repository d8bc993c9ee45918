"""Where a checkpoint lies that was not given by its path: on the hub, or inside an installed Python package."""

import contextlib
import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import pathlib
import pkgutil
import re
import secrets
import time
from collections.abc import Callable, Iterable
from types import ModuleType

from etils import epath

from subjax import files
from subjax.errors import SubjaxError, UsageError, one_line

# What is fetched: no pickles, and no second copies of the weights (in subfolders, or in Mistral's own layout).
WEIGHTS = "*.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",  # for the ids that end an answer, and for nothing else
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_FETCHED = ["config.json", WEIGHTS, INDEX, *TOKENIZER_FILES]
_NOT_FETCHED = ["*/*", "consolidated*"]
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # of which a tokenizer has one
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+(@\S+)?", re.ASCII)
_ANSWER_S = 5.0  # the hub answers in a fraction of it; a network that drops packets would keep us for minutes
_STALE_S = 3600.0  # an assembly takes seconds; one that has lain for an hour was killed


def nearest(path: epath.Path) -> str:
    """What to add to "no such file": the first part of `path` that is missing, and the sibling most like it."""
    while not path.parent.exists():
        path = path.parent
    siblings = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
    return f": {str(path.parent)!r} has no {path.name!r}{_alike(path.name, siblings)}"


def _alike(name: str, names: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(names), n=1)
    return f", did you mean {found[0]!r}?" if found else ""


def is_hub_id(model: str) -> bool:
    """Whether `model` has the form "org/name" or "org/name@revision", and not that of a file."""
    return _HUB_ID.fullmatch(model) is not None and not model.lower().endswith(".gguf")


def hub_folder(model: str) -> epath.Path:
    """The local folder of a hub id's snapshot, named by its commit; what the cache holds whole is not asked for again.

    Raises:
        UsageError: there is no such model or revision, it is gated, or it is not in the cache and cannot be fetched.
        SubjaxError: the disk is full.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    name, _, revision = model.partition("@")
    snapshot = functools.partial(
        huggingface_hub.snapshot_download,
        name,
        revision=revision or None,
        allow_patterns=_FETCHED,
        ignore_patterns=_NOT_FETCHED,
    )
    cached: epath.Path | None = None
    try:
        with contextlib.suppress(errors.LocalEntryNotFoundError):
            cached = epath.Path(snapshot(local_files_only=True))
        if cached is not None and _has_weights(cached) and any((cached / file).exists() for file in VOCABULARIES):
            return cached
        # snapshot_download has no limit of its own on its first question; this asks the same with one.
        huggingface_hub.HfApi().model_info(name, revision=revision or None, timeout=_ANSWER_S)
        return epath.Path(snapshot(etag_timeout=_ANSWER_S))
    except Exception as error:  # the hub's, its HTTP library's and the system's errors are of many kinds
        if files.disk_full(error):
            raise files.full_error(constants.HF_HUB_CACHE) from error
        if cached is not None and (_has_weights(cached) or _has_pickles(cached)):
            return cached  # it may lack a tokenizer; or it tells better than the hub why it is of no use
        raise UsageError(_hub_problem(model, error)) from error


def cached_config(model: str) -> pathlib.Path | None:
    """The config.json of a hub id in the local cache, where it is there; the hub is not asked."""
    import huggingface_hub

    name, _, revision = model.partition("@")
    found = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision or None)
    return pathlib.Path(found) if isinstance(found, str) else None


def _has_weights(folder: epath.Path) -> bool:
    from subjax.models import safetensors_folder

    return (folder / "config.json").exists() and safetensors_folder.has_weights(folder)


def _has_pickles(folder: epath.Path) -> bool:
    return (folder / "config.json").exists() and any(folder.glob("*.bin"))


def _hub_problem(model: str, error: Exception) -> str:
    """The line for an error of the hub's client."""
    from huggingface_hub import errors

    name, _, revision = model.partition("@")
    command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    match error:
        case errors.HFValidationError():
            return f"model {model!r}: not a hub id ({_first_line(error)}); give 'org/name' or 'org/name@revision'"
        case errors.GatedRepoError():
            return (
                f"model {model!r}: gated on the hub; accept its terms at https://huggingface.co/{name} and log in with "
                f"`hf auth login`, or give the folder of a copy"
            )
        case errors.RevisionNotFoundError():
            return f"model {model!r}: the hub has {name!r}, but no revision {revision!r}; give a branch, tag or commit"
        case errors.RepositoryNotFoundError():
            return (
                f"model {model!r}: the hub has no such model, or it is private; check the id, or log in with "
                "`hf auth login`"
            )
        case errors.HfHubHTTPError():
            return (
                f"model {model!r}: not whole in the local cache, and the hub refused ({_first_line(error)}); try again "
                f"later or log in with `hf auth login`"
            )
    return (
        f"model {model!r}: not whole in the local cache, and there is no network ({_cause(error)}); download it "
        f"elsewhere with `{command}` and give the folder"
    )


def _cause(error: BaseException) -> str:
    """What kept the hub's client from the hub."""
    from huggingface_hub import errors

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, errors.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set"
        error, seen = seen, seen.__cause__ or seen.__context__
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (one_line(error) or type(error).__name__)[:120]


def package_file(name: str) -> epath.Path:
    """The .gguf of an installed Python package: "NAME", or "NAME/file.gguf" where it holds several.

    A package that holds none but has a function `assemble(path)`, which writes one from parts, is asked to do so once;
    the file stays in the user's cache ($XDG_CACHE_HOME or ~/.cache, under subjax/).

    Raises:
        UsageError: the package is not installed, or has no such file, or several to choose from, or is damaged.
        SubjaxError: the file cannot be written into the cache.
    """
    package, _, wanted = name.partition("/")
    module = package.replace("-", "_")
    where = f"model 'package:{name}'"
    if not module.isidentifier():
        raise UsageError(f"{where}: not the name of a package; give package:NAME or package:NAME/file.gguf")
    held = _held(where, module)
    if wanted in held:
        return held[wanted]
    if wanted:
        raise UsageError(f"{where}: the package holds no {wanted!r}{_alike(wanted, held)}; it has {_listed(held)}")
    if len(held) > 1:
        raise UsageError(f"{where}: the package holds {_listed(held)}; choose one as package:{package}/FILE")
    if held:
        return next(iter(held.values()))
    return _assembled(where, module)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "no .gguf of its own"


def _held(where: str, module: str) -> dict[str, epath.Path]:
    """The .gguf files of an installed package by their path inside it; the package is found, not imported."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # ValueError: a module without a spec, such as __main__
        spec = None
    if spec is None:
        alike = _alike(module, (found.name for found in pkgutil.iter_modules()))
        raise UsageError(
            f"{where}: no Python package {module!r} is installed{alike}; pip install {module.replace('_', '-')}"
        )
    roots = [pathlib.Path(root) for root in spec.submodule_search_locations or ()]
    found = ((root, path) for root in roots for path in sorted(root.rglob("*.gguf")))
    return {path.relative_to(root).as_posix(): epath.Path(path) for root, path in found}


def _assembled(where: str, module: str) -> epath.Path:
    """The file that the package's `assemble` writes, made once per version of the package."""
    try:
        version = importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        version = "unversioned"
    home = epath.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    target = home / "subjax" / "packages" / f"{module}-{version}.gguf"
    if target.exists():
        return target
    reinstall = f"pip install --force-reinstall {module.replace('_', '-')}"
    assemble = getattr(_imported(where, module, reinstall), "assemble", None)
    if not callable(assemble):
        raise UsageError(f"{where}: the package holds no .gguf file; give one that does, or the path of a .gguf")
    with files.writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in target.parent.glob(f"{files.TEMPORARY}*"):
            if time.time() - old.stat().mtime > _STALE_S:
                files.remove(old)
    scratch = target.parent / f"{files.TEMPORARY}{secrets.token_hex(4)}-{target.name}"
    try:
        _assemble(where, assemble, scratch, reinstall)
        with files.writing(target):
            files.sha256_file(scratch, flush=True)
            scratch.replace(target)
            files.sync_folder(target.parent)
    finally:
        files.remove(scratch)
    return target


def _imported(where: str, module: str, reinstall: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except Exception as error:  # importing runs the package's code, which can fail in any way
        raise UsageError(f"{where}: the package cannot be imported ({_first_line(error)}); {reinstall}") from error


def _assemble(where: str, assemble: Callable[[pathlib.Path], object], path: epath.Path, reinstall: str) -> None:
    try:
        assemble(pathlib.Path(path))
    except ModuleNotFoundError as error:
        part = (error.name or "").partition(".")[0].replace("_", "-")
        raise UsageError(f"{where}: its part {part!r} is not installed; pip install {part}") from error
    except Exception as error:  # whatever the package raises for parts that are missing or damaged
        if files.disk_full(error):
            raise files.full_error(path.parent) from error
        raise UsageError(
            f"{where}: the package cannot assemble its file ({_first_line(error)}); {reinstall}"
        ) from error
    if not path.exists():
        raise SubjaxError(f"{where}: the package's assemble(path) wrote nothing at its path; give a .gguf by its path")
