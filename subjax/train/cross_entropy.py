"""Cross-entropy in chunks of tokens, so that a large vocabulary's logits are never whole.

The gradient is taken while a chunk's logits are there: what is kept is one vector a token, and nothing is computed
twice. The idea is that of fused linear cross-entropy (Hsu et al. 2024, arXiv 2410.10989, section 3.2).

On a mesh the output matrix is made whole once, before the chunks, and each device adds up its own rows' part of the
matrix's gradient, of which the sum over devices is taken once, behind them. Left to the compiler, each chunk does both.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

# Logits of one packed row that are there at a time: on a CPU what its caches hold; on other devices enough that the
# products, which read the output matrix for each chunk, are bound by arithmetic.
CPU_CHUNK, DEVICE_CHUNK = 2**23, 2**27


@dataclasses.dataclass(frozen=True)
class Head:
    """How logits come of states and the output matrix: the soft-cap (0: none), the precision of the product; on a mesh
    the sharding of the residual stream; and how many logits of a packed row are there at a time.
    """

    cap: float
    precision: str
    rows: NamedSharding | None = None
    chunk: int = CPU_CHUNK

    def ways(self, rows: int) -> int:
        """Devices that share so many packed rows, each of which adds up a gradient of its own."""
        if self.rows is None:
            return 1
        axes = self.rows.spec[0] or ()
        ways = math.prod(self.rows.mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
        return ways if rows % ways == 0 else 1

    def gathered(self, matrix: Array) -> Array:
        """The output matrix, whole but for its vocabulary, which may be split over `tensor`."""
        return self._held(matrix, PartitionSpec.UNCONSTRAINED, None)

    def by_device(self, gradient: Array) -> Array:
        """Gradients of the matrix (ways, vocab, width), each where its rows are."""
        rows = self.rows.spec[0] if self.rows is not None and gradient.shape[0] > 1 else None
        return self._held(gradient, rows, PartitionSpec.UNCONSTRAINED, None)

    def _held(self, a: Array, *parts: Any) -> Array:
        if self.rows is None:
            return a
        return jax.lax.with_sharding_constraint(a, NamedSharding(self.rows.mesh, PartitionSpec(*parts)))


def logits_at_a_time(platform: str, members: int = 1) -> int:
    """Logits of one packed row that are there at a time on a platform, where a cohort's members share the memory."""
    return CPU_CHUNK if platform == "cpu" else max(CPU_CHUNK, DEVICE_CHUNK // members)


def chunk_of(vocab: int, tokens: int, logits: int = CPU_CHUNK) -> int:
    """Tokens of a packed row whose logits are computed at a time: as many in each chunk, so that few are padding."""
    chunks = -(-tokens // max(16, logits // vocab // 16 * 16))
    return -(-tokens // chunks // 16) * 16 if chunks > 1 else tokens


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    states: Float[Array, "rows tokens width"],
    matrix: Float[Array, "vocab width"],
    targets: Int[Array, "rows tokens"],
    weights: Float[Array, "rows tokens"],
    head: Head,
) -> Float[Array, ""]:
    """Sum over tokens of weight x minus the log-probability of the target, in float32."""
    loss, _ = _over_chunks(states, matrix, targets, weights, head, want=())
    return loss


def _cut(a: Array, count: int, size: int) -> Array:
    """(rows, tokens, ...) as (count, rows, size, ...), filled up with zeros."""
    a = jnp.pad(a, ((0, 0), (0, count * size - a.shape[1]), *((0, 0),) * (a.ndim - 2)))
    return jnp.moveaxis(a.reshape(a.shape[0], count, size, *a.shape[2:]), 1, 0)


def _over_chunks(states: Array, matrix: Array, targets: Array, weights: Array, head: Head, want: tuple[str, ...]):
    """The loss, and its gradients by what is wanted: `states`, `matrix`."""
    rows, tokens, width = states.shape
    size = chunk_of(matrix.shape[0], tokens, head.chunk)
    count = -(-tokens // size)
    chunks = tuple(_cut(a, count, size) for a in (states, targets, weights))
    table = head.gathered(matrix.astype(states.dtype))
    ways = head.ways(rows)

    def once(carry, chunk):
        loss, by_matrix = carry
        x, target, weight = chunk
        part, by_logits = _loss_and_gradient(x, table, target, weight, head)
        by_logits = by_logits.astype(x.dtype)
        by_states = None
        if "states" in want:
            by_states = jnp.einsum("rtv,vd->rtd", by_logits, table, precision=head.precision)
        if "matrix" in want:
            of = (a.reshape(ways, -1, *a.shape[1:]) for a in (by_logits, x))
            by_matrix = by_matrix + jnp.einsum(
                "wrtv,wrtd->wvd", *of, precision=head.precision, preferred_element_type=jnp.float32
            )
            by_matrix = head.by_device(by_matrix)
        return (loss + part, by_matrix), by_states

    begun = head.by_device(jnp.zeros((ways, *matrix.shape), jnp.float32)) if "matrix" in want else None
    (loss, by_matrix), by_states = jax.lax.scan(once, (jnp.zeros((), jnp.float32), begun), chunks)
    by_matrix = None if by_matrix is None else by_matrix.sum(0)
    if by_states is not None:
        by_states = jnp.moveaxis(by_states, 0, 1).reshape(rows, count * size, width)[:, :tokens]
    return loss, (by_states, by_matrix)


def _loss_and_gradient(x: Array, table: Array, target: Array, weight: Array, head: Head) -> tuple[Array, Array]:
    """The loss of a chunk, and its gradient by the logits, (rows, chunk, vocab), float32."""
    logits = jnp.einsum("rtd,vd->rtv", x, table, precision=head.precision, preferred_element_type=jnp.float32)
    bent = jnp.tanh(logits / head.cap) if head.cap else None
    logits = logits if bent is None else bent * head.cap
    # Compared with, not gathered: the vocabulary may be split over devices.
    hit = jnp.arange(table.shape[0], dtype=target.dtype)[None, None] == target[..., None]
    whole = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.where(hit, logits, 0).sum(-1)
    gradient = (jnp.exp(logits - whole[..., None]) - hit) * weight[..., None]
    return (weight * (whole - picked)).sum(), gradient if bent is None else gradient * (1 - jnp.square(bent))


def _forward(states: Any, matrix: Any, targets: Any, weights: Any, head: Head):
    """The loss with its gradients. JAX says of each argument whether a gradient by it is wanted (`perturbed`)."""
    want = tuple(name for name, given in (("states", states), ("matrix", matrix)) if given.perturbed)
    loss, gradients = _over_chunks(states.value, matrix.value, targets.value, weights.value, head, want)
    held = jnp.zeros((), matrix.value.dtype)
    return loss, (gradients, held)


def _backward(head: Head, kept: Any, by_loss: Array):
    (by_states, by_matrix), held = kept
    by_states = None if by_states is None else (by_states * by_loss).astype(by_states.dtype)
    by_matrix = None if by_matrix is None else (by_matrix * by_loss).astype(held.dtype)
    return by_states, by_matrix, None, None


cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)
