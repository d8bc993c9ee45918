"""Models of the store: a base is its own arrays; a teacher or student is its base's arrays and the tuned ones."""

import functools
from collections.abc import Mapping
from typing import Any

from subjax.config import from_dict
from subjax.data import world
from subjax.errors import SubjaxError
from subjax.models import adapters, checkpoints
from subjax.models.families import decoder_config
from subjax.models.network import Network, Params, network
from subjax.schema import Numerics, Tuning
from subjax.store import Card, Store

ARRAYS = "arrays"  # the checkpoint's folder inside a payload


def world_network(family: str, size: str, numerics: Mapping[str, Any]) -> Network:
    """The network of a family at a size, over the synthetic world's vocabulary and length."""
    config = decoder_config(
        family, size, vocab=len(world.VOCABULARY), length=world.LENGTH, numerics=from_dict(Numerics, numerics)
    )
    return network(config)


def _card(store: Store, kind: str, node: str) -> Card:
    card = store.card(kind, node)
    if card is None:
        raise SubjaxError(f"{kind} {node} is not in {store.root}; run the study that makes it")
    return card


def base_of(store: Store, kind: str, node: str) -> Card:
    """The card of the base that a model stands on; a base stands on itself."""
    card = _card(store, kind, node)
    return card if kind == "base" else _card(store, "base", card.inputs["base"]["id"])


@functools.lru_cache(maxsize=32)
def _arrays(root: str, kind: str, node: str, payload: str) -> Params:
    # Keyed by the payload's name too, so that a node made again is read again.
    return checkpoints.load(Store(root).payload(kind, node) / ARRAYS)


def load(store: Store, kind: str, node: str) -> tuple[Network, Params]:
    """The network and the plain parameters (adapters merged) of a committed base, teacher or student.

    Raises:
        SubjaxError: it is not committed, or its checkpoint is damaged.
    """
    card, base = _card(store, kind, node), base_of(store, kind, node)
    net = world_network(base.config["family"], base.config["size"], card.config["numerics"])
    arrays = _arrays(str(store.root), "base", base.id, base.payload)
    missing = set(net.declarations) - set(arrays)
    if missing:
        raise SubjaxError(f"base {base.id}: its checkpoint lacks {min(missing)}; delete its folder and run again")
    if kind == "base":
        return net, dict(arrays)
    tuned = _arrays(str(store.root), kind, node, card.payload)
    return net, adapters.merge(net, from_dict(Tuning, card.config["tuning"]), tuned, arrays)
