"""Cards, canonical JSON and the digests that artifacts are known by.

Three different hashes meet here. A node's id says what was asked for; a file's sha256 says that its bytes are still
those that were written; the canonical digest says that two payloads hold equal arrays or rows, whatever their bytes.
"""

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

from subjax.errors import UsageError
from subjax.files import StoreError

CARD_FORMAT = 1  # raised when a card's fields change their meaning
CARD = "card.json"
PAYLOAD = "payload-"  # beginning of the names of payload folders; the attempt's token follows
ID_LENGTH = 16


def plain(value: Any, where: str = "value") -> Any:
    """`value` as JSON knows it: mappings with text keys, lists, text, numbers, booleans and None.

    Tuples become lists, and NumPy scalars and arrays become numbers and lists, so that what is hashed before it is
    written equals what is read back. Raises StoreError, naming the place, for anything else and for NaN and infinities.
    """
    if value is None or isinstance(value, bool | str):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist(), where)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise StoreError(f"{where} is {value}, which JSON cannot hold: give a finite number or null")
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise StoreError(f"{where} has the key {key!r}, and JSON's keys are text: name it as a string")
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{place}]") for place, item in enumerate(value)]
    raise StoreError(f"{where} is a {type(value).__name__}, which JSON cannot hold: turn it into text or numbers first")


def canonical_json(value: Any) -> str:
    """The one JSON text of `value`: keys sorted, no white space, ASCII. Raises StoreError as `plain` does."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_json(value: Any) -> str:
    """Hex sha256 over the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def digest_rows(rows: Iterable[Mapping[str, Any]]) -> str:
    """Hex sha256 over `rows`, one line of canonical JSON each: their order counts, the order of their columns not."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(canonical_json(row).encode() + b"\n")
    return digest.hexdigest()


def digest_arrays(tree: Any) -> str:
    """Hex sha256 over the leaves of a pytree of arrays: for each its path, dtype, shape and bytes in C order.

    Leaves are taken in the order of their paths, and a path is the list of its keys as text, so a tree that comes back
    from a checkpoint with lists for tuples, or in another order, has the same digest. Bytes are little-endian. A leaf
    must be wholly on this process (of one that is spread over several, `checkpoints.digest` reads what was saved).
    Raises StoreError for a leaf that is no array of numbers.
    """
    import jax  # here and not above: `plan` and `status` need cards, and not the half second that JAX takes to import

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = sorted(((_names(path), leaf) for path, leaf in leaves), key=lambda pair: pair[0])
    arrays = ((names, _numbers(leaf, "/".join(names))) for names, leaf in named)
    return digest_pieces((names, array.dtype.name, array.shape, [array]) for names, array in arrays)


def digest_pieces(arrays: Iterable[tuple[list[str], str, tuple[int, ...], Iterable[np.ndarray]]]) -> str:
    """`digest_arrays` of arrays that are given in pieces, each array as (path, dtype, shape, pieces), in path order.

    The pieces of an array, little-endian and one behind the other in C order, are all of its numbers.
    """
    digest = hashlib.sha256()
    for names, dtype, shape, pieces in arrays:
        header = json.dumps([names, dtype, list(shape)]).encode()
        digest.update(len(header).to_bytes(8, "little") + header)
        for piece in pieces:
            # Seen as bytes, because the buffer protocol does not know bfloat16.
            digest.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _numbers(leaf: Any, where: str) -> np.ndarray:
    """A leaf as a little-endian NumPy array of numbers."""
    try:
        array = np.asarray(leaf)
    except TypeError as error:  # a typed PRNG key
        raise StoreError(f"leaf {where} cannot be read as numbers ({error}): store its numbers instead") from error
    if array.dtype.kind in "OUSMm":
        raise StoreError(f"leaf {where} has dtype {array.dtype}, which has no digest: store numbers only")
    order = array.dtype.byteorder
    if order == ">" or (order == "=" and sys.byteorder == "big"):
        array = array.astype(array.dtype.newbyteorder("<"))
    return array


def _names(path: tuple[Any, ...]) -> list[str]:
    """A pytree path as text keys, the same for a dict's key, a sequence's place and an attribute."""
    return [
        str(next(getattr(entry, field) for field in ("key", "idx", "name") if hasattr(entry, field))) for entry in path
    ]


def node_id(kind: str, version: int, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The id of a node: 16 hex digits over its kind, the kind's version, the config it reads and its inputs' ids.

    `inputs` maps a role ("base", "corpus") to the id of the node that fills it.
    """
    content = {"kind": kind, "version": version, "config": config, "inputs": inputs}
    return digest_json(content)[:ID_LENGTH]


@dataclasses.dataclass(frozen=True)
class Card:
    """How an artifact was made. `files`, `payload` and `format` are filled in by the commit, whatever they hold before.

    `files` maps a payload file's relative path to its sha256; `payload` names the payload's folder; `digest` is the
    canonical digest of the arrays or rows; `inputs` maps a role to {"kind", "id", "digest"}; `wall_s` is in seconds.
    """

    format: int
    kind: str
    id: str
    version: int
    config: dict[str, Any]
    inputs: dict[str, dict[str, str]]
    seeds: dict[str, Any]
    packages: dict[str, Any]
    profile: dict[str, Any]
    wall_s: float
    tokens: int
    metrics: dict[str, Any]
    files: dict[str, str]
    digest: str
    payload: str
    made_at: str
    extra: dict[str, Any]


_TYPES: dict[str, tuple[type, ...]] = {
    "format": (int,), "kind": (str,), "id": (str,), "version": (int,), "config": (dict,), "inputs": (dict,),
    "seeds": (dict,), "packages": (dict,), "profile": (dict,), "wall_s": (int, float), "tokens": (int,),
    "metrics": (dict,), "files": (dict,), "digest": (str,), "payload": (str,), "made_at": (str,), "extra": (dict,),
}  # fmt: skip


def render_card(card: Card) -> str:
    """The text of `card.json`: the fields, and last a checksum over them, so that the card vouches for itself.

    Raises StoreError, naming the field, for a value that JSON cannot hold.
    """
    fields = {name: plain(getattr(card, name), f"card of {card.kind}/{card.id}: {name}") for name in _TYPES}
    return _render(fields)


def _render(fields: dict[str, Any]) -> str:
    return json.dumps({**fields, "checksum": digest_json(fields)}, indent=2) + "\n"


def parse_card(text: bytes, path: epath.Path) -> tuple[Card | None, str]:
    """Read a card's bytes: (card, "") if all is well, else (the card as far as it can be read, or None; what is wrong).

    The bytes must be exactly those that `render_card` gives, so that a flipped byte is seen wherever it falls.
    Raises UsageError for a card of a newer format: the bytes may be well, and this program cannot tell.
    """
    try:
        fields = json.loads(text, parse_constant=_no_constant)
    except ValueError:  # of JSON and of UTF-8
        return None, "is not valid JSON (truncated or damaged)"
    if not isinstance(fields, dict):
        return None, "holds no card"
    found = fields.get("format")
    if isinstance(found, int) and found > CARD_FORMAT:
        raise UsageError(
            f"{path} has card format {found} and this subjax reads up to format {CARD_FORMAT}: upgrade subjax, "
            "or choose another --workdir"
        )
    fields.pop("checksum", None)
    if not _well_formed(fields):
        return None, "lacks fields of a card, or has others (damaged)"
    card = Card(**fields)
    try:
        same = _render(fields).encode() == text  # the checksum is part of it
    except StoreError:  # a number that a flipped exponent made infinite
        same = False
    if not same:
        return card, "does not match its own checksum (damaged)"
    return card, ""


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _well_formed(fields: dict[str, Any]) -> bool:
    """Whether the fields are a card's, with their types: a damaged card may be read on only if they are."""
    if set(fields) != set(_TYPES) or not all(isinstance(fields[name], types) for name, types in _TYPES.items()):
        return False
    return all(
        isinstance(given, dict) and all(isinstance(given.get(key), str) for key in ("kind", "id", "digest"))
        for given in fields["inputs"].values()
    )


def read_card(folder: epath.Path) -> Card | None:
    """The card in a node's folder, or None where there is none.

    Raises StoreError, naming the file and the mend, for a truncated or damaged card, UsageError for a newer format.
    """
    path = folder / CARD
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    card, wrong = parse_card(text, path)
    if wrong or card is None:
        raise StoreError(f"{path} {wrong}: delete the folder {folder} and run the same command; the node is made again")
    return card


def inputs_of(card: Card) -> dict[str, str]:
    """Role to id of a card's inputs: what `node_id` takes."""
    return {role: given["id"] for role, given in card.inputs.items()}
