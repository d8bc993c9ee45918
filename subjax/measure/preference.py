"""Readings of a model's preferences: the exact probability of each candidate answer, and a sampled second reading.

Exact means teacher-forced: the probability of a candidate is the sum over its tokenizations of the product of its
tokens' probabilities. One forward pass over every context that is needed gives all questions and candidates at once.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from subjax.data.questions import QuestionSet
from subjax.errors import UsageError
from subjax.models.network import Adapter, Network
from subjax.parallel.mesh import replicated
from subjax.parallel.rules import BATCH, SAMPLE, shardings
from subjax.sample.sampler import Sampling, sample


@functools.lru_cache(maxsize=32)
def _next_token(net: Network, mesh: Mesh):
    """Log-probabilities of the next token behind contexts, jitted, and the parameters' shardings."""
    params_sh = shardings(SAMPLE, mesh, {n: (d.shape, d.axes) for n, d in net.declarations.items()})
    rows, whole = NamedSharding(mesh, PartitionSpec(BATCH)), replicated(mesh)

    def log_probabilities(params, tokens, valid) -> Float[Array, "contexts vocab"]:
        tokens, valid = (jax.lax.with_sharding_constraint(a, rows) for a in (tokens, valid))
        return jax.nn.log_softmax(net.forward(params, tokens, valid, tail=1)[:, 0])

    return jax.jit(log_probabilities, in_shardings=(params_sh, whole, whole), out_shardings=whole), params_sh


def _contexts(questions: QuestionSet, end: int | None) -> tuple[np.ndarray, dict[tuple[int, tuple[int, ...]], int]]:
    """Every (question, prefix of a tokenization) that is followed by a token to score, as left-padded rows."""
    prefixes = {t[:n] for forms in questions.candidates for t in forms for n in range(len(t) + (end is not None))}
    longest = max(map(len, prefixes))
    rows: list[list[int]] = []
    where: dict[tuple[int, tuple[int, ...]], int] = {}
    for q, prompt in enumerate(questions.prompts):
        for prefix in sorted(prefixes):
            where[q, prefix] = len(rows)
            rows.append([questions.pad] * (longest - len(prefix)) + [*prompt, *prefix])
    return np.array(rows, np.int32), where


def _disjoint(forms: tuple[tuple[int, ...], ...], end: int | None) -> list[tuple[int, ...]]:
    """The tokenizations whose probabilities add up: each once and, where no end token must follow, none that begins
    with another (an answer that begins with the longer one begins with the shorter one, and is counted there).
    """
    begins = lambda form, other: len(other) < len(form) and form[: len(other)] == other  # noqa: E731
    return [f for f in dict.fromkeys(forms) if end is not None or not any(begins(f, o) for o in forms)]


def exact(
    net: Network, params: Mapping[str, jax.Array], questions: QuestionSet, *, mesh: Mesh, end: int | None = None
) -> np.ndarray:
    """Probability of each candidate as the answer, (questions, candidates).

    Args:
        net: the network; `params`: its plain parameters.
        questions: the question set. mesh: where it runs.
        end: where given, the answer must also end there: the token's probability after the candidate is multiplied in.
            Without it the number is the probability of an answer that begins with the candidate.

    Raises:
        UsageError: a tokenization is empty, or a candidate stands behind a context longer than the model takes.
    """
    if any(not form for forms in questions.candidates for form in forms):
        raise UsageError(f"category {questions.category!r}: a candidate has an empty tokenization")
    rows, where = _contexts(questions, end)
    if rows.shape[1] > net.config.length:
        raise UsageError(
            f"category {questions.category!r}: a question and a candidate take {rows.shape[1]} tokens and the model"
            f" {net.config.length}; shorten one"
        )
    ways = mesh.shape["replica"] * mesh.shape["fsdp"]
    rows = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % ways, axis=0)])  # filled up with the last one
    program, params_sh = _next_token(net, mesh)
    placed = jax.device_put(dict(params), params_sh)
    scores = np.asarray(program(placed, rows, rows != questions.pad), np.float64)
    out = np.zeros((len(questions.prompts), len(questions.candidates)))
    for q in range(len(questions.prompts)):
        for c, forms in enumerate(questions.candidates):
            for form in _disjoint(forms, end):
                path = (*form, end) if end is not None else form
                out[q, c] += np.exp(sum(scores[where[q, path[:n]], token] for n, token in enumerate(path)))
    return out


def sampled(
    net: Network,
    params: Mapping[str, jax.Array],
    questions: QuestionSet,
    *,
    samples: int,
    key: jax.Array,
    mesh: Mesh,
    end: int | None = None,
) -> np.ndarray:
    """Counts of each candidate among `samples` answers a question at temperature 1, (questions, candidates), int.

    The same event as in `exact`: the answer begins with a tokenization of the candidate, token by token (whole words,
    not substrings), and, where `end` is given, ends there.
    """
    longest = max(len(form) for forms in questions.candidates for form in forms)
    room = longest + (end is not None)
    # No token ends an answer early where the end is not asked for: -1 is no token.
    sampling = Sampling(questions.prompts.shape[1], room, -1 if end is None else end, questions.pad)
    prompts = np.repeat(questions.prompts, samples, axis=0)
    answers = sample(net, params, prompts, sampling=sampling, key=key, mesh=mesh).tokens
    answers = answers.reshape(len(questions.prompts), samples, room)
    counts = np.zeros((len(questions.prompts), len(questions.candidates)), int)
    for c, forms in enumerate(questions.candidates):
        for form in _disjoint(forms, end):
            path = np.array((*form, end) if end is not None else form)
            counts[:, c] += (answers[..., : len(path)] == path[None, None]).all(-1).sum(-1)
    return counts


def log_likelihoods(
    net: Network,
    params: Mapping[str, jax.Array],
    tokens: np.ndarray,
    valid: np.ndarray,
    completion: int,
    adapter: Adapter | None = None,
) -> Float[Array, "rows completion vocab"]:
    """Log-probabilities of the vocabulary at each completion position of whole rows, float32."""
    return _completion(net, completion)(dict(params), jnp.asarray(tokens), jnp.asarray(valid), adapter or {})


@functools.lru_cache(maxsize=32)
def _completion(net: Network, completion: int):
    def run(params, tokens, valid, adapter):
        logits = net.forward(params, tokens[:, :-1], valid[:, :-1], tail=completion, adapter=adapter)
        return jax.nn.log_softmax(logits)

    return jax.jit(run)
