"""Models of the store: a base is its own arrays; a teacher or student is its base's arrays and the tuned ones."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from subjax.config import from_dict
from subjax.data import world
from subjax.errors import SubjaxError
from subjax.models import adapters, checkpoints
from subjax.models.families import decoder_config
from subjax.models.network import Network, Params, network
from subjax.parallel.rules import TRAIN, Rules, shardings
from subjax.schema import Numerics, Tuning
from subjax.stages.task import ARRAYS
from subjax.store import Card, Store


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


def load(store: Store, kind: str, node: str, mesh: Mesh | None = None, rules: Rules = TRAIN) -> tuple[Network, Params]:
    """The network and the plain parameters (adapters merged) of a committed base, teacher or student.

    They are read straight to where `rules` put them on `mesh`; host arrays where it is None or of one device.

    Raises:
        SubjaxError: it is not committed, or its checkpoint is damaged.
    """
    card, base = _card(store, kind, node), base_of(store, kind, node)
    net = world_network(base.config["family"], base.config["size"], card.config["numerics"])
    root, tuning = str(store.root), None if kind == "base" else from_dict(Tuning, card.config["tuning"])
    if mesh is not None and mesh.size > 1:
        arrays = _placed(root, "base", base.id, base.payload, net, None, mesh, rules)
    else:
        arrays = _arrays(root, "base", base.id, base.payload)
    missing = set(net.declarations) - set(arrays)
    if missing:
        raise SubjaxError(f"base {base.id}: its checkpoint lacks {min(missing)}; delete its folder and run again")
    if tuning is None:
        return net, dict(arrays)
    if mesh is not None and mesh.size > 1:
        tuned = _placed(root, kind, node, card.payload, net, tuning, mesh, rules)
    else:
        tuned = _arrays(root, kind, node, card.payload)
    return net, merged(net, tuning, tuned, arrays, mesh, rules)


@functools.lru_cache(maxsize=8)
def _placed(
    root: str, kind: str, node: str, payload: str, net: Network, tuning: Tuning | None, mesh: Mesh, rules: Rules
) -> Params:
    return read(Store(root).payload(kind, node), net, tuning, mesh, rules)


def read(payload: epath.Path, net: Network, tuning: Tuning | None, mesh: Mesh | None, rules: Rules = TRAIN) -> Params:
    """The arrays of a payload: a base's where `tuning` is None, else the tuned ones; on the mesh as `load` puts them.

    Raises:
        SubjaxError: the checkpoint is damaged.
    """
    if mesh is None or mesh.size == 1:
        return checkpoints.load(payload / ARRAYS)
    return checkpoints.load(payload / ARRAYS, shardings(rules, mesh, declared(net, tuning)))


def declared(net: Network, tuning: Tuning | None = None) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shape and logical axes, by name, of a network's parameters, or of what a tuning moves."""
    if tuning is not None:
        return adapters.tuned_axes(net, tuning)
    return {name: (d.shape, d.axes) for name, d in net.declarations.items()}


def initial(net: Network, key: jax.Array, mesh: Mesh) -> Params:
    """A network's initial parameters, each made where the training rules put it: never whole on one device."""
    return jax.jit(net.init, out_shardings=shardings(TRAIN, mesh, declared(net)))(key)


def merged(
    net: Network, tuning: Tuning, tuned: Params, base: Params, mesh: Mesh | None = None, rules: Rules = TRAIN
) -> Params:
    """`adapters.merge`, on a mesh with each matrix where the rules put it."""
    if mesh is None or mesh.size == 1:
        return adapters.merge(net, tuning, tuned, base)
    return _merger(net, tuning, mesh, rules)(tuned, base)


@functools.lru_cache(maxsize=8)
def _merger(net: Network, tuning: Tuning, mesh: Mesh, rules: Rules):
    placed = shardings(rules, mesh, declared(net))
    return jax.jit(functools.partial(adapters.merge, net, tuning), out_shardings=placed)
