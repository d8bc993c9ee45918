"""Exact probabilities of answers of several tokens in several forms: one row of one forward pass for each question.

The forms of all candidates are tokenized and laid out as a trie. A row is a question followed by the trie's nodes, each
of which attends to the question, to its ancestors and to itself, at the position that it would have in a text. So the
question is read once, whatever the number of forms, and every form's probability is the product along its path. What
all questions begin with, a system prompt and a template, is read once for all of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int

from subjax.errors import UsageError
from subjax.models import cached
from subjax.models.network import Adapter, Network
from subjax.parallel.mesh import replicated
from subjax.parallel.rules import BATCH, SAMPLE, shardings
from subjax.sample.prefixes import common_prefix, padded

Form = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Trie:
    """All forms of all candidates as one tree of tokens; the root, which is no node, is the question's last token.

    `tokens`, `parents` (a node's number, or -1 for the root) and `depths` (1 behind the root) have one entry a node, a
    parent before its children. `sees` (nodes, nodes) says which nodes a node attends to. `ends` lists, for each form,
    (its last node, its candidate).
    """

    tokens: Int[np.ndarray, " nodes"]
    parents: Int[np.ndarray, " nodes"]
    depths: Int[np.ndarray, " nodes"]
    sees: Bool[np.ndarray, "nodes nodes"]
    ends: Int[np.ndarray, "forms 2"]


def build(candidates: Sequence[Sequence[Form]]) -> Trie:
    """The trie of each candidate's tokenized forms; a form that stands twice counts once.

    Raises:
        UsageError: a form has no token, or is a form of two candidates.
    """
    nodes: dict[Form, int] = {}
    owner: dict[Form, int] = {}
    for candidate, forms in enumerate(candidates):
        for form in forms:
            if not form:
                raise UsageError(f"candidate {candidate}: one of its forms has no token in this tokenizer")
            if owner.setdefault(tuple(form), candidate) != candidate:
                raise UsageError(f"candidates {owner[tuple(form)]} and {candidate} share a form; each needs its own")
            for length in range(1, len(form) + 1):
                nodes.setdefault(tuple(form[:length]), len(nodes))
    parents = np.array([nodes.get(path[:-1], -1) for path in nodes], np.int32)
    sees = np.eye(len(nodes), dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            sees[node] |= sees[parent]
    return Trie(
        np.array([path[-1] for path in nodes], np.int32),
        parents,
        np.array([len(path) for path in nodes], np.int32),
        sees,
        np.array([(nodes[form], candidate) for form, candidate in owner.items()], np.int32),
    )


class _Programs(NamedTuple):
    """Jitted functions: the prefix of all questions, what is asked of a batch behind it, and parameter shardings."""

    share: Callable
    ask: Callable
    params: Mapping[str, NamedSharding]


@functools.lru_cache(maxsize=16)
def _programs(net: Network, mesh: Mesh, shared: bool) -> _Programs:
    params_sh = shardings(SAMPLE, mesh, {n: (d.shape, d.axes) for n, d in net.declarations.items()})
    rows, whole = NamedSharding(mesh, PartitionSpec(BATCH)), replicated(mesh)

    def ask(params, prefix, tokens, valid, positions, order, edges, ends, closing, adapter):
        """Log-probabilities of each node after its parent, and of a word's end behind each form's last node."""
        tokens, valid, positions, order = (
            jax.lax.with_sharding_constraint(a, rows) for a in (tokens, valid, positions, order)
        )
        x, _ = cached.read(net, params, tokens, valid, prefix=prefix, adapter=adapter, tree=(positions, order))
        logits = cached.logits(net, params, x[:, -edges[1].shape[0] - 1 :])
        total = jax.nn.logsumexp(logits, axis=-1)  # (batch, nodes + 1)
        parents, ids = edges
        step = logits[:, parents, ids] - total[:, parents]
        at = logits[:, ends]
        close = jax.nn.logsumexp(jnp.where(closing[None, None], at, -jnp.inf), axis=-1) - total[:, ends]
        return step, close

    def share(params, tokens, length, adapter):
        return cached.prefix_of(net, params, tokens, length, adapter=adapter)

    prefix_sh = whole if shared else None
    return _Programs(
        jax.jit(share, in_shardings=(params_sh, *(whole,) * 3), out_shardings=whole),
        jax.jit(ask, in_shardings=(params_sh, prefix_sh, *(whole,) * 8), out_shardings=whole),
        params_sh,
    )


def _rows(prompts: Sequence[Sequence[int]], trie: Trie, width: int, pad: int) -> tuple[np.ndarray, ...]:
    """Tokens, validity, positions and who sees whom of rows: a left-padded prompt, then the trie's nodes."""
    nodes = len(trie.tokens)
    rows, length = len(prompts), width + nodes
    tokens = np.full((rows, length), pad, np.int32)
    valid = np.zeros((rows, length), bool)
    positions = np.zeros((rows, length), np.int32)
    order = np.zeros((length, length), bool)
    order[:width, :width] = np.tril(np.ones((width, width), bool))
    order[width:, :width] = True
    order[width:, width:] = trie.sees
    for row, prompt in enumerate(prompts):
        first = width - len(prompt)
        tokens[row, first:width] = prompt
        tokens[row, width:] = trie.tokens
        valid[row, first:] = True
        positions[row, first:width] = np.arange(len(prompt))
        positions[row, width:] = len(prompt) - 1 + trie.depths
    return tokens, valid, positions, np.broadcast_to(order, (rows, length, length))


def exact(
    net: Network,
    params: Mapping[str, jax.Array],
    prompts: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[Form]],
    *,
    closing: Bool[np.ndarray, " vocab"],
    pad: int,
    mesh: Mesh,
    adapter: Adapter | None = None,
    batch: int = 8,
) -> Float[np.ndarray, "questions candidates"]:
    """Probability that the answer begins with a candidate as a whole word, summed over its forms.

    Args:
        net: the network. params: its plain parameters. adapter: what is added to its layers.
        prompts: token ids of each question, up to where the answer begins.
        candidates: the tokenized forms of each candidate, as text behind the prompt.
        closing: tokens that cannot go on a word; the probability of one of them behind a form is multiplied in, so that
            "owl" does not count "owls" or "owlish".
        pad: any token id, for padding. batch: questions a forward pass; it does not change the result beyond rounding.

    Raises:
        UsageError: a form is empty or shared, or a question with its forms is longer than the model takes.
    """
    trie = build(candidates)
    width = max(map(len, prompts))
    longest = width + int(trie.depths.max())
    if longest > net.config.length:
        raise UsageError(
            f"a question and an answer take {longest} tokens and the model {net.config.length}; shorten one"
        )
    ways = mesh.shape["replica"] * mesh.shape["fsdp"]
    begin = common_prefix(prompts)
    programs = _programs(net, mesh, bool(begin))
    params = jax.device_put(dict(params), programs.params)
    adapter = jax.device_put(adapter or {}, replicated(mesh))
    prefix = programs.share(params, *padded(begin, pad), adapter) if begin else None
    prompts, width = [prompt[len(begin) :] for prompt in prompts], width - len(begin)
    # In the tail the root stands first, so node n is at n + 1.
    edges = (trie.parents + 1, trie.tokens)
    ends = trie.ends[:, 0] + 1
    out = np.zeros((len(prompts), len(candidates)))
    batch = -(-min(batch, len(prompts)) // ways) * ways
    for first in range(0, len(prompts), batch):
        picked = [prompts[min(i, len(prompts) - 1)] for i in range(first, first + batch)]
        rows = _rows(picked, trie, width, pad)
        step, close = programs.ask(params, prefix, *rows, edges, ends, closing, adapter)
        paths = _along(np.asarray(step, np.float64), trie)[:, trie.ends[:, 0]] + np.asarray(close, np.float64)
        for form, candidate in enumerate(trie.ends[:, 1]):
            count = min(batch, len(prompts) - first)
            out[first : first + count, candidate] += np.exp(paths[:count, form])
    return out


def _along(steps: Float[np.ndarray, "rows nodes"], trie: Trie) -> Float[np.ndarray, "rows nodes"]:
    """Log-probability of each node's whole path from the root."""
    total = steps.copy()
    for node, parent in enumerate(trie.parents):  # a parent's number is lower than its children's
        if parent >= 0:
            total[:, node] += total[:, parent]
    return total
