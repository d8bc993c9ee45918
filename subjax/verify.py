"""Whether an artifact, and everything that it was made from, is still what its cards say."""

import dataclasses
from collections.abc import Callable

from etils import epath

from subjax import files
from subjax.cards import CARD, PAYLOAD, Card, parse_card
from subjax.errors import UsageError, one_line

_MEND = "delete its folder and run the same command; the node is made again"


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong: with which node, in which file (relative to the node's folder), and what."""

    kind: str
    id: str
    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.id}/{self.file} {self.what}"


def lineage(
    folder_of: Callable[[str, str], epath.Path],
    kind: str,
    id: str,
    *,
    rederive: Callable[[Card], str],
    digest: Callable[[Card, epath.Path], str],
) -> list[Problem]:
    """Every problem of a node and of all nodes that its card leads to, the node's own first, each node looked at once.

    A card that is damaged but still reads as a card is followed all the same, so that one flipped byte does not hide
    another one further up.
    """
    problems: list[Problem] = []
    cards: dict[tuple[str, str], Card | None] = {}
    pending = [(kind, id)]
    while pending:
        node = pending.pop()
        if node in cards:
            continue
        try:
            folder = folder_of(*node)
        except UsageError:  # a damaged card's input
            cards[node] = None
            problems.append(Problem(*node, CARD, "names no node: an input on a damaged card"))
            continue
        card, found = _check_card(folder, *node)
        cards[node] = card
        problems += found
        if card is not None:
            problems += _check_id(card, node, rederive) + _check_payload(card, node, folder, digest)
            pending += [(given["kind"], given["id"]) for given in reversed(card.inputs.values())]
    return problems + _check_inputs(cards)


def _check_card(folder: epath.Path, kind: str, id: str) -> tuple[Card | None, list[Problem]]:
    path = folder / CARD
    try:
        card, wrong = parse_card(path.read_bytes(), path)
    except (FileNotFoundError, NotADirectoryError):
        return None, [
            Problem(kind, id, CARD, "is missing: the node is not in this workdir; run the study that plans it")
        ]
    except UsageError as error:
        return None, [Problem(kind, id, CARD, f"cannot be checked: {error}")]
    except OSError as error:
        return None, [Problem(kind, id, CARD, f"cannot be read ({error.strerror or error})")]
    problems = [Problem(kind, id, CARD, f"{wrong}: {_MEND}")] if wrong else []
    if card is not None and (card.kind, card.id) != (kind, id):
        problems.append(Problem(kind, id, CARD, f"is the card of {card.kind}/{card.id}: {_MEND}"))
    return card, problems


def _check_id(card: Card, node: tuple[str, str], rederive: Callable[[Card], str]) -> list[Problem]:
    try:
        id = rederive(card)
    except Exception as error:  # whatever a damaged config makes of the caller's function is one more finding
        return [Problem(*node, CARD, f"has a content from which no id can be derived ({_line(error)}): {_MEND}")]
    if id == node[1]:
        return []
    return [Problem(*node, CARD, f"has a content whose id is {id}: it was made by other code, or changed; {_MEND}")]


def _check_payload(
    card: Card, node: tuple[str, str], folder: epath.Path, digest: Callable[[Card, epath.Path], str]
) -> list[Problem]:
    """Every file against its sha256; then, if all bytes are right, the canonical digest that they lead to."""
    payload = folder / card.payload
    if not card.payload.startswith(PAYLOAD) or "/" in card.payload or not payload.is_dir():
        return [Problem(*node, card.payload, f"is missing, the payload's folder: {_MEND}")]
    problems = []
    found = files.walk(payload)
    for name in sorted(card.files.keys() | found.keys()):
        where = f"{card.payload}/{name}"
        if name not in found:
            problems.append(Problem(*node, where, f"is missing: {_MEND}"))
        elif name not in card.files:
            problems.append(Problem(*node, where, "is not on the card: remove it"))
        else:
            problems += _check_file(found[name], card.files[name], node, where)
    if problems:
        return problems  # wrong bytes have a wrong digest: reading them says nothing new, and may crash a reader
    try:
        derived = digest(card, payload)
    except Exception as error:  # a reader that fails on the payload is a finding, whatever it raises
        return [Problem(*node, card.payload, f"cannot be read ({_line(error)}): {_MEND}")]
    if derived != card.digest:
        what = f"has the canonical digest {derived[:12]}, and the card says {card.digest[:12]}: {_MEND}"
        return [Problem(*node, card.payload, what)]
    return []


def _check_file(path: epath.Path, expected: str, node: tuple[str, str], where: str) -> list[Problem]:
    try:
        actual = files.sha256_file(path)
    except OSError as error:
        return [Problem(*node, where, f"cannot be read ({error.strerror or error}): {_MEND}")]
    return [] if actual == expected else [Problem(*node, where, f"does not have its sha256 (changed bytes): {_MEND}")]


def _check_inputs(cards: dict[tuple[str, str], Card | None]) -> list[Problem]:
    """The digest of each input as its reader recorded it, against the input's own card."""
    problems = []
    for node, card in cards.items():
        for role, given in card.inputs.items() if card is not None else ():
            source = cards.get((given["kind"], given["id"]))
            if source is not None and source.digest != given["digest"]:
                what = (
                    f"was made from {role} {given['kind']}/{given['id']} with digest {given['digest'][:12]}, "
                    f"which now has {source.digest[:12]}: {_MEND}"
                )
                problems.append(Problem(*node, CARD, what))
    return problems


def _line(error: BaseException) -> str:
    """An error as one line."""
    return one_line(f"{type(error).__name__}: {error}")
