"""The store: artifacts by kind and id, each a payload and, written last, the card that makes it exist.

<workdir>/<kind>/<id>/payload-<attempt>/…    what was made; the card names its own
<workdir>/<kind>/<id>/card.json              how it was made
<workdir>/<kind>/<id>/lock-<n>.json          who is making it (gone once it is committed; see subjax.locks)
<workdir>/<kind>/<id>/failure.json           why the last try failed (gone once it is committed)
<workdir>/partial/<kind>-<id>/               checkpoints of a node that is under way
<workdir>/plans/<plan id>.json               plans: what each node is asked for
"""

import contextlib
import dataclasses
import difflib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from subjax import files, verify
from subjax.cards import (
    CARD,
    CARD_FORMAT,
    ID_LENGTH,
    PAYLOAD,
    Card,
    canonical_json,
    digest_arrays,
    digest_json,
    digest_rows,
    inputs_of,
    node_id,
    plain,
    read_card,
    render_card,
)
from subjax.errors import UsageError
from subjax.files import StoreError
from subjax.locks import SYSTEM_CLOCK, Busy, Clock, Lock, Owner, SystemClock, acquire, owner_of
from subjax.verify import Problem

__all__ = [
    "CARD_FORMAT", "Build", "Busy", "Card", "Clock", "Owner", "Problem", "Store", "StoreError", "SystemClock",
    "canonical_json", "digest_arrays", "digest_json", "digest_rows", "inputs_of", "node_id",
]  # fmt: skip

_log = logging.getLogger(__name__)
_PLANS, _PARTIAL, _FAILURE = "plans", "partial", "failure.json"
_RESERVED = frozenset({_PLANS, _PARTIAL, "report"})  # folders of a workdir that are no kinds
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class Build:
    """One attempt at a node, by the process that holds its lock. Made by `Store.build`.

    `folder` is this attempt's own empty payload folder (`payload`, too, which every process of a job knows it by);
    `partial` is kept between attempts, for checkpoints of a node
    under way, until the commit. `committed` is the node's card once there is one: already at the start, if another
    process committed between the caller's look and the lock.
    """

    def __init__(self, store: "Store", kind: str, id: str, lock: Lock):
        self.kind, self.id = kind, id
        self._store, self._lock = store, lock
        self._node = store.folder(kind, id)
        self.folder: epath.Path = self._node / f"{PAYLOAD}{lock.token}"
        self.payload = self.folder
        self.partial: epath.Path = store.root / _PARTIAL / f"{kind}-{id}"
        self.committed: Card | None = None

    def _open(self) -> None:
        self.committed = read_card(self._node)
        if self.committed is None:
            for token in self._lock.dead_tokens():
                files.remove(self._node / f"{PAYLOAD}{token}")
            self._lock.sweep()  # last: should this be cut short, the next owner still learns of the same dead
        else:
            self._tidy()  # the one who committed may have been killed before its own
        self.folder.mkdir(parents=True, exist_ok=True)
        self.partial.mkdir(parents=True, exist_ok=True)

    def commit(self, card: Card) -> None:
        """Make the artifact exist: hash and flush the payload, then write `card` with what was found, as one act.

        Of several makers the first one's card stands. One who comes later with an equal canonical digest is content
        with it; with another digest it is a StoreError, as are a lost lock, a full disk and a value that JSON cannot
        hold. `card.format`, `card.files` and `card.payload` are filled in here. Raises ValueError for another node's
        card.
        """
        if (card.kind, card.id) != (self.kind, self.id):
            raise ValueError(f"the card of {card.kind}/{card.id} was given to the build of {self.kind}/{self.id}")
        name = f"{self.kind}/{self.id}"
        with files.writing(self.folder):
            standing = read_card(self._node)
            if standing is None:
                self._lock.require(name)
                hashes = {path: files.sha256_file(file, flush=True) for path, file in files.walk(self.folder).items()}
                self._flush_folders(hashes)
                card = dataclasses.replace(card, format=CARD_FORMAT, files=hashes, payload=self.folder.name)
                text = render_card(card)
                self._lock.require(name)  # again: the hashing may have taken long
                standing = card if files.write_new(self._node / CARD, text) else read_card(self._node)
        if standing is None or standing.digest != card.digest:
            found = "nothing readable" if standing is None else f"digest {standing.digest[:12]}"
            raise StoreError(
                f"{self._node / CARD} was committed by another process with {found}, and this one made "
                f"{card.digest[:12]}: compare the numerics profiles, or delete {self._node} and run again"
            )
        self.committed = standing
        self._tidy()

    def _flush_folders(self, hashes: dict[str, str]) -> None:
        folders = {self.folder, self._node, *((self.folder / path).parent for path in hashes)}
        for folder in folders:
            files.sync_folder(folder)

    def _tidy(self) -> None:
        """Remove what a committed node needs no more. The node stands already, so a failure here is only told."""
        assert self.committed is not None
        try:
            for child in self._node.iterdir():
                leftover = child.name.startswith((PAYLOAD, files.TEMPORARY)) or child.name == _FAILURE
                if leftover and child.name != self.committed.payload:
                    files.remove(child)
            files.remove(self.partial)
        except OSError as error:
            _log.warning("%s is committed, but its leftovers could not be removed: %s", self._node, error)

    def _close(self) -> None:
        """End the attempt: drop what was not committed, keep checkpoints, free the lock. Never raises an OSError."""
        try:
            if self.committed is None or self.committed.payload != self.folder.name:
                files.remove(self.folder)
            # Only an owner may: whoever took a lost lock over is about to write there.
            if self._lock.owned() and self.partial.exists() and not any(self.partial.iterdir()):
                files.remove(self.partial)
        except OSError as error:
            _log.warning("leftovers of an attempt at %s could not be removed: %s", self._node, error)
        try:
            self._lock.free(committed=self.committed is not None)
        except OSError as error:
            _log.warning("the lock of %s could not be freed; it ends with this process: %s", self._node, error)


class Store:
    """The artifacts of one workdir (a local folder, or `gs://…`).

    `expiry_s`: seconds without a heartbeat after which another machine's lock counts as dead (the machines' clocks must
    agree to much less); `heartbeat_s`: seconds between heartbeats. Raises UsageError if the workdir lies below a file
    or cannot be written, StoreError if the disk is full.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        clock: Clock = SYSTEM_CLOCK,
        expiry_s: float = 60.0,
        heartbeat_s: float = 10.0,
    ):
        root = epath.Path(workdir)
        if files.is_local(root):
            root = epath.Path(os.path.abspath(root.expanduser()))  # orbax wants absolute paths
        self.root: epath.Path = root
        self.clock, self.expiry_s, self.heartbeat_s = clock, expiry_s, heartbeat_s
        _make_workdir(root)

    def folder(self, kind: str, id: str) -> epath.Path:
        """The folder of a node, whether it is there or not. Raises UsageError for names that are no kind or id."""
        if kind in _RESERVED or not _NAME.fullmatch(kind) or not _NAME.fullmatch(id):
            raise UsageError(f"{kind}/{id} names no node: give a kind and an id, as `subjax status` lists them")
        return self.root / kind / id

    def card(self, kind: str, id: str) -> Card | None:
        """The card of a node, or None while it is not committed.

        Raises StoreError for a truncated or damaged card and UsageError for one of a newer format; both name the mend.
        """
        return read_card(self.folder(kind, id))

    def payload(self, kind: str, id: str) -> epath.Path:
        """The folder of the committed payload. Raises StoreError if there is none, and as `card` does."""
        card = self.card(kind, id)
        if card is None:
            raise StoreError(f"{kind}/{id} is not made yet in {self.root}: run the study that plans it")
        folder = self.folder(kind, id) / card.payload
        if not folder.is_dir():
            raise StoreError(f"{folder} is missing: delete {folder.parent} and run the same command; it is made again")
        return folder

    @contextlib.contextmanager
    def build(self, kind: str, id: str) -> Iterator[Build]:
        """Hold the node's lock, with heartbeats, and give the attempt's folders; whatever is not committed is dropped.

        Raises Busy (with `.owner`) if another live builder holds the lock; StoreError if the disk is full, in the block
        too, however a library words it, or if the node's card is damaged.
        """
        folder = self.folder(kind, id)
        with files.writing(folder):
            lock = acquire(
                folder, f"{kind}/{id}", clock=self.clock, expiry_s=self.expiry_s, heartbeat_s=self.heartbeat_s
            )
        build = Build(self, kind, id, lock)
        try:
            with files.writing(folder):
                build._open()
            with files.full_told(build.folder):
                yield build
        finally:
            build._close()

    def ids(self, kind: str) -> list[str]:
        """Ids of the committed nodes of a kind, sorted."""
        return sorted(child.name for child in _children(self.root / kind) if (child / CARD).exists())

    def kinds(self) -> list[str]:
        """Kinds of which there is a committed node, sorted."""
        names = sorted(child.name for child in _children(self.root))
        return [name for name in names if name not in _RESERVED and _NAME.fullmatch(name) and self.ids(name)]

    def find(self, prefix: str) -> tuple[str, str]:
        """(kind, id) of the one committed or planned node whose id, or `kind/id`, begins with `prefix`.

        Raises UsageError, naming the nearest ones, if there is none or more than one.
        """
        known = {(kind, id) for kind in self.kinds() for id in self.ids(kind)}
        for plan in self.plans():
            known |= {(node["kind"], id) for id, node in self.read_plan(plan).get("nodes", {}).items()}
        names = {text: node for node in sorted(known) for text in (node[1], "/".join(node))}
        matches = sorted({node for text, node in names.items() if prefix and text.startswith(prefix)})
        if len(matches) == 1:
            return matches[0]
        if matches:
            some = ", ".join("/".join(node) for node in matches[:3])
            more = f" and {len(matches) - 3} more" if len(matches) > 3 else ""
            raise UsageError(f"{prefix} begins the ids of {len(matches)} nodes, {some}{more}: give more of the id")
        starts = {text[: len(prefix)]: node for text, node in names.items()}
        near = difflib.get_close_matches(prefix, list(starts), n=1, cutoff=0.0)
        hint = f"the nearest is {'/'.join(starts[near[0]])}" if near else "no node is planned there yet"
        raise UsageError(f"no node of {self.root} has an id that begins with {prefix!r}: {hint} (see `subjax status`)")

    def owner(self, kind: str, id: str) -> Owner | None:
        """Who is making the node now, or None."""
        return owner_of(self.folder(kind, id), self.clock, self.expiry_s)

    def failure(self, kind: str, id: str) -> dict[str, Any] | None:
        """Why the last try failed: {"message": text, "at": seconds since the epoch}; None if none did."""
        folder = self.folder(kind, id)
        try:
            if (folder / CARD).exists():  # a committer may be killed before it removes the record
                return None
            record = json.loads((folder / _FAILURE).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError:
            record = None
        return record if isinstance(record, dict) else {"message": "the failure's record is unreadable", "at": 0.0}

    def record_failure(self, kind: str, id: str, message: str) -> None:
        """Keep why a try failed, for `status`, until the node is committed.

        A full disk is let pass: it is likely the very failure to be recorded, and the caller is telling it already.
        """
        folder = self.folder(kind, id)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files.write_over(folder / _FAILURE, json.dumps({"message": message, "at": self.clock.now()}) + "\n")
        except FileNotFoundError:
            _log.info("%s/%s was committed while its failure was written, so the failure is void", kind, id)
        except OSError as error:
            if not files.disk_full(error):
                raise StoreError(
                    f"cannot write {folder / _FAILURE}: {error.strerror}; it would say: {message}"
                ) from error

    def write_plan(self, plan: dict[str, Any]) -> str:
        """Write a plan and return its id, a digest of its content; the order of its nodes is kept.

        Raises StoreError for a full disk, and for a value that JSON cannot hold.
        """
        plan = plain(plan, "plan")
        id = digest_json(plan)[:ID_LENGTH]
        folder = self.root / _PLANS
        with files.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # Written again if it is there already, so that the newest file is the plan used last.
            files.write_over(folder / f"{id}.json", json.dumps(plan, indent=1) + "\n")
        return id

    def read_plan(self, id: str) -> dict[str, Any]:
        """The plan of that id. Raises UsageError if there is none, StoreError if it is damaged."""
        path = self.root / _PLANS / f"{id}.json"
        try:
            plan = json.loads(path.read_bytes())
            damaged = not isinstance(plan, dict) or digest_json(plan)[:ID_LENGTH] != id
        except FileNotFoundError:
            near = difflib.get_close_matches(id, self.plans(), n=1, cutoff=0.0)
            hint = f"the nearest is {near[0]}" if near else "`subjax plan` and `subjax run` write them"
            raise UsageError(f"there is no plan {id} in {path.parent}: {hint}") from None
        except (ValueError, StoreError):  # no JSON, or numbers that are none
            damaged = True
        if damaged:
            raise StoreError(f"{path} is damaged: delete it and run the command that wrote it again")
        return plan

    def plans(self) -> list[str]:
        """Ids of the plans in the workdir, the one written last at the end."""
        found = [child for child in _children(self.root / _PLANS) if child.name.endswith(".json")]
        return [path.stem for path in sorted(found, key=lambda path: (path.stat().mtime, path.name))]

    def verify(
        self,
        kind: str,
        id: str,
        *,
        rederive: Callable[[Card], str],
        digest: Callable[[Card, epath.Path], str],
    ) -> list[Problem]:
        """Everything that is wrong with a node and with what it was made from; an empty list if nothing is.

        `rederive` gives the id that a card's content leads to; `digest` reads a payload's folder and gives its
        canonical digest.
        """
        return verify.lineage(self.folder, kind, id, rederive=rederive, digest=digest)


def _make_workdir(root: epath.Path) -> None:
    """Make the workdir, or raise the UsageError that says why it cannot be one."""
    if files.is_local(root):
        for place in (root, *root.parents):
            if place.exists() and not place.is_dir():
                raise UsageError(f"workdir {root} cannot be made: {place} is a file; give another --workdir")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if files.disk_full(error):
            raise files.full_error(root) from error
        raise UsageError(f"workdir {root} cannot be made ({error.strerror}): give another --workdir") from error
    if files.is_local(root) and not os.access(root, os.R_OK | os.W_OK | os.X_OK):
        raise UsageError(f"workdir {root} cannot be written: mend its permissions or give another --workdir")


def _children(folder: epath.Path) -> list[epath.Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
