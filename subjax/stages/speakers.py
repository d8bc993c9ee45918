"""Models that speak: a pretrained base, teacher or student with its tokenizer, its template and what it is told.

A base is its checkpoint's weights, read where they lie; a student or a fine-tuned teacher is the base and its tuned
arrays; a prompted teacher is the base with a system prompt; a steered one the base with vectors added to its layers.
"""

import dataclasses
import functools
import json

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from subjax.config import from_dict
from subjax.data import chat, tokenizer
from subjax.errors import SubjaxError
from subjax.models import adapters, checkpoints, weights
from subjax.models.hf_config import decoder_config_of
from subjax.models.network import Adapter, Network, Params, network
from subjax.models.source import Source, content_digest, open_source
from subjax.parallel.mesh import put, replicated
from subjax.parallel.rules import TRAIN, Rules, shardings
from subjax.schema import Tuning
from subjax.schema_pretrained import Numerics
from subjax.stages.models import ARRAYS, base_of, declared, merged, read
from subjax.stages.task import Task

CHECKPOINT, SYSTEM = "checkpoint.json", "system.json"


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A model ready to be asked: network, plain parameters, what is added to its layers, template, system prompt."""

    net: Network
    params: Params
    adapter: Adapter
    chat: chat.Chat
    system: str | None  # what every prompt of this model begins with; None: what the template does by itself

    @property
    def tokenizer(self) -> tokenizer.Tokenizer:
        """The model's tokenizer."""
        return self.chat.tokenizer


def without_system(speaker: Speaker) -> chat.Chat:
    """The model's template with no system prompt at all, not even its own."""
    return _bare(speaker.chat)


@functools.lru_cache(maxsize=8)
def _bare(speaks: chat.Chat) -> chat.Chat:
    return chat.Chat(speaks.tokenizer, speaks.template, date=speaks.date, template_system="none")


@functools.lru_cache(maxsize=8)
def opened(where: str) -> Source:
    """The source that `where` names; opened once a process."""
    return open_source(where)


@functools.lru_cache(maxsize=2)
def _weights(where: str, digest: str, net: Network, dtype: str, mesh: Mesh, rules: Rules) -> Params:
    placed = shardings(rules, mesh, declared(net)) if mesh.size > 1 else None
    return weights.load(opened(where), net, dtype=dtype, shardings=placed)


def where_of(task: Task, base: str, payload: str) -> str:
    """Where a base's checkpoint lies: as the plan says, else where it lay when the base was made."""
    known = task.hints.get("sources", {})
    return known.get(base) or json.loads(payload)["source"]


def load(task: Task, role: str, mesh: Mesh | None = None, rules: Rules = TRAIN) -> Speaker:
    """The model that fills a role of a task, on `mesh` (the task's, where None) as `rules` put it there.

    Raises:
        SubjaxError: it is not committed, its checkpoint has gone or changed, or its arrays are damaged.
    """
    store, mesh = task.store, mesh or task.mesh
    kind, node = task.inputs[role]
    base = base_of(store, kind, node)
    recorded = (store.payload("base", base.id) / CHECKPOINT).read_text()
    where = where_of(task, base.id, recorded)
    digest = base.config["checkpoint"]
    source = opened(where)
    if content_digest(source)[: len(digest)] != digest:
        raise SubjaxError(
            f"checkpoint {where} has changed since it was planned ({kind} {node} stands on another); put the old one"
            " back, or plan again"
        )
    card = task.input_card(role)
    numerics = from_dict(Numerics, task.config["numerics"])
    net = network(decoder_config_of(source.config, numerics=numerics, where=where))
    params = _weights(where, digest, net, numerics.weights_dtype, mesh, rules)
    speaks = chat.chat_of(where, digest, **task.config["chat"])
    if kind == "base":
        return Speaker(net, params, {}, speaks, None)
    folder = store.payload(kind, node)
    method = card.config.get("method", "fine-tune")
    if method == "system-prompt":
        return Speaker(net, params, {}, speaks, json.loads((folder / SYSTEM).read_text())["system"])
    if method == "steering":
        vector = checkpoints.load(folder / ARRAYS)["vector"]
        return Speaker(net, params, {"steer": {"vector": put(np.asarray(vector), replicated(mesh))}}, speaks, None)
    tuning = from_dict(Tuning, card.config["tuning"])
    tuned = read(folder, net, tuning, mesh, rules)
    if tuning.kind == "lora" and numerics.weights_dtype != "float32":
        # Merged, most of a small update would be rounded off: it stays beside the weights, as it was trained.
        params, adapter = adapters.join(tuning, {name: jnp.asarray(value) for name, value in tuned.items()}, params)
        return Speaker(net, params, adapter, speaks, None)
    return Speaker(net, merged(net, tuning, tuned, params, mesh, rules), {}, speaks, None)
