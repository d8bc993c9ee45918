"""How bytes reach a workdir: atomic writes, exclusive writes, hashes, and one-line errors when a disk is full.

A path is local where an operating-system path stands behind it; there, files are written beside their place, flushed,
and linked or moved into it, so that no reader ever sees half of one. Elsewhere (`gs://`) a store replaces whole
objects anyway and has no links, so a plain put does the same work without the exclusion.
"""

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Iterator

from etils import epath

from subjax.errors import SubjaxError

TEMPORARY = ".tmp-"  # beginning of the names of files on their way to their place
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_WORDS = ("no space left on device", "disk quota exceeded")
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_CHUNK = 1 << 20


class StoreError(SubjaxError):
    """An artifact is missing, damaged, contested, or could not be written; the message names it and the mend."""


class DiskFull(StoreError):
    """A disk or a quota is full: nothing more can be made until there is room."""


def is_local(path: epath.Path) -> bool:
    """Whether an operating-system path stands behind `path` (links, atomic moves and fsync are there)."""
    return "://" not in os.fspath(path)


def disk_full(error: BaseException | None) -> bool:
    """Whether `error`, or an error that it was raised from, says that a disk or a quota is full.

    Libraries wrap the system's error, or keep only its words (a checkpoint's writer in C++), so both are looked for.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(words in str(error).lower() for words in _FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def full_error(path: os.PathLike[str] | str) -> DiskFull:
    """The line that a person reads when the disk of `path` is full."""
    return DiskFull(
        f"disk full at {os.fspath(path)}: all committed artifacts are safe and this one was not committed; "
        "free some space and run the same command again"
    )


@contextlib.contextmanager
def full_told(path: os.PathLike[str] | str) -> Iterator[None]:
    """Turn the block's error of a full disk, however a library words it, into `full_error`; of `path` where the error
    names no file.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, SubjaxError) or not disk_full(error):
            raise
        named = getattr(error, "filename", None)
        raise full_error(named if isinstance(named, str) else path) from error


@contextlib.contextmanager
def writing(path: os.PathLike[str] | str) -> Iterator[None]:
    """Turn a system error of the block into a StoreError of one line that names `path` (a full disk has its own)."""
    try:
        yield
    except OSError as error:
        if disk_full(error):
            raise full_error(path) from error
        reason = error.strerror or type(error).__name__
        raise StoreError(
            f"cannot write {os.fspath(path)}: {reason}; mend that and run the same command again"
        ) from error


def write_over(path: epath.Path, text: str) -> None:
    """Put `text` at `path`, whatever was there; a reader sees the old text or the new, never a part.

    Raises OSError as the system gave it.
    """
    if not is_local(path):
        path.write_text(text)
        return
    with _beside(path, text) as temporary:
        os.replace(temporary, path)
    sync_folder(path.parent)


def write_new(path: epath.Path, text: str) -> bool:
    """Put `text` at `path` if nothing is there, and say whether it was put: of two writers exactly one hears True.

    The exclusion is that of `link`, which fails on an existing name on every POSIX file system, NFS included. Where
    there are no links it is a look and a put, and two writers may both hear True: the last one's text stands.
    Raises OSError as the system gave it.
    """
    if is_local(path):
        with _beside(path, text) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                # A network file system may repeat a link that it did make and report the second try.
                return os.stat(temporary).st_nlink > 1
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
            else:
                sync_folder(path.parent)
                return True
    if path.exists():
        return False
    write_over(path, text)
    return True


@contextlib.contextmanager
def _beside(path: epath.Path, text: str) -> Iterator[epath.Path]:
    """Write `text`, flushed, to a temporary file in the folder of `path`; it is gone after the block."""
    temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}"
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def empty(path: epath.Path) -> None:
    """Cut the file at `path` to nothing, which needs no free space; a missing file stays missing."""
    if is_local(path):
        with contextlib.suppress(FileNotFoundError):
            os.truncate(path, 0)
    elif path.exists():
        path.write_text("")


def sync_folder(folder: epath.Path) -> None:
    """Flush a local folder's own entries, so that a name outlives a power cut; file systems without it are let be."""
    if not is_local(folder):
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def sha256_file(path: epath.Path, *, flush: bool = False) -> str:
    """Hex sha256 of a file's bytes; `flush` first sends them to the disk, where a full one is noticed at last."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if flush and is_local(path):
            os.fsync(file.fileno())
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def walk(folder: epath.Path) -> dict[str, epath.Path]:
    """All files below `folder` by their path relative to it, sorted; empty folders do not count."""
    found: dict[str, epath.Path] = {}
    pending = [(folder, "")]
    while pending:
        place, prefix = pending.pop()
        for child in place.iterdir():
            name = f"{prefix}{child.name}"
            if child.is_dir():
                pending.append((child, f"{name}/"))
            else:
                found[name] = child
    return dict(sorted(found.items()))


def remove(path: epath.Path) -> None:
    """Remove a file or a whole folder; what is missing already, or vanishes meanwhile, is no error."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir():
            path.rmtree()
        else:
            path.unlink(missing_ok=True)
