"""The sampler: prompts in, answers out, rows addressed by key.

A fixed number of slots decode together in one jitted while-loop over a donated cache. When enough of them have ended,
the loop is left, further prompts are read and put into them, and it goes on. What all prompts begin with is read once;
a prompt that is asked several times is read once; and prompts of like length are read together, so that short ones are
not padded to the longest. On a CPU the slots are in two lanes, each with a loop and a thread of its own: while one is
at a part that fills one core, the other fills the rest. Nothing of this changes an answer: row `i` draws token `t` with
fold_in(fold_in(key, i), t), so a corpus is the same rows for any number of slots, mesh or order; only a near-tie
(`subjax.sample.drawing`) can fall otherwise. Logits are not kept: for a real vocabulary they would be hundreds of times
larger than the tokens.
"""

import functools
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from subjax.errors import UsageError
from subjax.models.network import Adapter, Network
from subjax.parallel.mesh import memory_of, replicated, settle
from subjax.sample.constraint import Constraint
from subjax.sample.drawing import NEAR_TIE, Sampling, draw, restrict
from subjax.sample.prefixes import padded
from subjax.sample.reading import Chunk, Layout, at_once, lanes, plan, width_of
from subjax.sample.slots import Programs, apart, programs
from subjax.threads import side_by_side

__all__ = ["NEAR_TIE", "Drawn", "Sampling", "draw", "restrict", "sample"]


class Drawn(NamedTuple):
    """Sampled rows: tokens (rows, completion), padded after the end token, and which rows met a near-tie."""

    tokens: np.ndarray
    near_tie: np.ndarray


class _Slots:
    """A lane's slots at work: what is in them, on the devices and as the host sees it."""

    def __init__(self, compiled: Programs, layout: Layout, sampling: Sampling, given: Mapping[str, Any]):
        self.compiled, self.layout, self.sampling, self.mesh = compiled, layout, sampling, given["mesh"]
        self.params, self.key, self.first = given["params"], given["key"], given["first"]
        self.adapter, self.constraint = given["adapter"], given["constraint"]
        self.decoder, self.prefix = given["decoder"], given["prefix"]
        self.state, self.cache = compiled.begin(layout.slots, layout.columns)
        self.rows = np.full(layout.slots, -1)  # the row in each slot; -1 where there is none

    def read(self, chunk: Chunk) -> tuple[jax.Array, Any, np.ndarray]:
        """Logits behind a chunk's prompts, their keys and values, and their lengths."""
        width = width_of(chunk, self.sampling)
        tokens = np.full((self.layout.read, width), self.sampling.pad, np.int32)
        valid = np.zeros(tokens.shape, bool)
        lengths = np.ones(self.layout.read, np.int32)
        for place in range(self.layout.read):
            prompt = chunk.prompts[min(place, len(chunk.prompts) - 1)]  # filled up with the last one
            tokens[place, width - len(prompt) :] = prompt
            valid[place, width - len(prompt) :] = True
            lengths[place] = len(prompt)
        return *self.compiled.prefill(self.params, self.prefix, tokens, valid, self.adapter), lengths

    def put(self, read: tuple[jax.Array, Any, np.ndarray], rows: Sequence[int], source: Sequence[int]) -> None:
        """Put rows, each with its prompt among those that were read, into free slots."""
        logits, kv, lengths = read
        group, count = self.layout.group, len(rows)
        slots = np.arange(group, dtype=np.int32) + self.layout.slots  # beyond the last: such a row is left out
        slots[:count] = np.flatnonzero(self.rows < 0)[:count]
        places, numbers = np.zeros(group, np.int32), np.zeros(group, np.int32)
        places[:count], numbers[:count] = source, np.array(rows) + self.first
        self.rows[slots[:count]] = rows
        self.state, self.cache = self.compiled.place(
            self.state, self.cache, logits, kv, lengths, places, slots, numbers, self.key, self.constraint
        )
        settle(self.state, self.mesh)

    def decode(self, until: int, out: Drawn) -> None:
        """Draw until so many slots are done, and write down the rows that have ended."""
        self.state, self.cache, seen = self.compiled.decode(
            self.decoder, self.prefix, self.state, self.cache, np.int32(until), self.adapter, self.constraint
        )
        over = np.asarray(seen.done) & (self.rows >= 0)
        out.tokens[self.rows[over]] = np.asarray(seen.drawn)[over]
        out.near_tie[self.rows[over]] = np.asarray(seen.tie)[over]
        self.rows[over] = -1


def _answer(slots: _Slots, out: Drawn, over: threading.Event) -> None:
    """Write down all rows of a lane, put into slots as they come free; or leave off when it is over."""
    layout = slots.layout
    waiting, read, taken = deque(layout.chunks), None, 0
    while not over.is_set() and (waiting or (slots.rows >= 0).any()):
        while waiting:
            chunk = waiting[0]
            count = min(layout.group, len(chunk.rows) - taken)
            if (slots.rows < 0).sum() < count:
                break
            read = read or slots.read(chunk)
            slots.put(read, chunk.rows[taken : taken + count], chunk.source[taken : taken + count])
            taken += count
            if taken == len(chunk.rows):
                waiting.popleft()
                read, taken = None, 0
        wanted = min(layout.group, len(waiting[0].rows) - taken) if waiting else layout.slots
        slots.decode(wanted, out)


def _check(constraint: Constraint, sampling: Sampling, net: Network) -> None:
    """Raise UsageError where a constraint and what it is used with do not belong together."""
    if constraint.ends != tuple(sorted(set(sampling.ends))):
        raise UsageError(
            f"the constraint ends answers with tokens {list(constraint.ends)} and the sampling with"
            f" {sorted(set(sampling.ends))}; give both the same"
        )
    if constraint.tokens[-1] >= net.config.vocab:
        raise UsageError(
            f"the constraint allows token {constraint.tokens[-1]} and the model's vocabulary has {net.config.vocab};"
            " make the constraint from the tokenizer of this model"
        )
    if sampling.completion < constraint.distance[constraint.start]:
        raise UsageError(
            f"a completion of {sampling.completion} tokens is too short for the constraint, whose shortest answer has"
            f" {constraint.distance[constraint.start]} with its end token; raise it"
        )


def _check_prompts(prompts: Int[np.ndarray, "rows prompt"], sampling: Sampling, net: Network, first: int) -> None:
    """Raise UsageError where prompts do not fit their bucket, or the model."""
    if prompts.shape[1] != sampling.prompt:
        raise UsageError(f"prompts have {prompts.shape[1]} tokens and the bucket is {sampling.prompt}; pad them to it")
    if sampling.prompt + sampling.completion > net.config.length:
        raise UsageError(
            f"a prompt of {sampling.prompt} and a completion of {sampling.completion} tokens exceed the model's"
            f" {net.config.length}; shorten one"
        )
    if (prompts[:, -1] == sampling.pad).any():
        row = first + int((prompts[:, -1] == sampling.pad).argmax())
        raise UsageError(f"prompt {row} ends in padding (token {sampling.pad}); pad prompts on the left")


def sample(
    net: Network,
    params: Mapping[str, jax.Array],
    prompts: Int[np.ndarray, "rows prompt"],
    *,
    sampling: Sampling,
    key: jax.Array,
    mesh: Mesh,
    first: int = 0,
    batch: int = 2048,
    adapter: Adapter | None = None,
    constraint: Constraint | None = None,
) -> Drawn:
    """Answer prompts (left-padded to `sampling.prompt`), rows numbered from `first`.

    Args:
        net: the network; `params`: its plain parameters.
        prompts: token ids; `sampling.pad` marks the padding.
        sampling: how tokens are drawn. key: the node's sampling key. mesh: where it runs, rows over its batch axes.
        batch: slots, rows that are decoded together; it does not change the answers. With more rows than slots, those
            whose answers have ended make room for others.
        adapter: LoRA pairs that are not merged into `params`.
        constraint: leaves only tokens with which an answer can end as the constraint wants it; it then does end, within
            `sampling.completion` tokens.

    Raises:
        UsageError: prompts of another length than the bucket, a bucket longer than the model's context, a prompt that
            ends in padding, or a constraint that does not fit the vocabulary, the end tokens or the room.
    """
    _check_prompts(prompts, sampling, net, first)
    if constraint is not None:
        _check(constraint, sampling, net)
    if not len(prompts):
        return Drawn(np.zeros((0, sampling.completion), np.int32), np.zeros(0, bool))
    ways = mesh.shape["replica"] * mesh.shape["fsdp"]
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    layout = plan([tuple(row[row != sampling.pad].tolist()) for row in prompts], sampling, batch, ways, on_cpu)
    weights = sum(a.nbytes for a in params.values()) / mesh.shape["tensor"]
    compiled = programs(net, sampling, mesh, bool(layout.prefix), apart(mesh, weights, memory_of(mesh)))
    given: dict[str, Any] = {"params": jax.device_put(dict(params), compiled.params), "first": first, "mesh": mesh}
    given["adapter"], given["constraint"] = jax.device_put((adapter, constraint), replicated(mesh))
    given["key"] = np.asarray(jax.random.key_data(key))
    given["decoder"], given["prefix"] = compiled.layers(given["params"]), None
    if layout.prefix:
        shared = padded(layout.prefix, sampling.pad)
        given["prefix"] = compiled.share(given["params"], *shared, given["adapter"])
    tokens = np.full((len(prompts), sampling.completion), sampling.pad, np.int32)
    out, over = Drawn(tokens, np.zeros(len(prompts), bool)), threading.Event()
    works = [
        functools.partial(_answer, _Slots(compiled, lane, sampling, given), out, over)
        for lane in lanes(layout, at_once(mesh))
    ]
    if len(works) == 1:
        works[0]()
    else:
        side_by_side(works, len(works), over.set)
    return out
