"""Attention by kernels that never hold all scores: Pallas splash attention on TPU, cuDNN on GPU. Asked for by name.

Splash attention takes packed rows as they are and tells chats apart by segment ids; cuDNN takes one line a chat, with
its length. Neither knows of a beginning that all chats share, so each chat has all of its tokens (no prefix).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as pallas
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from subjax.errors import UsageError
from subjax.models.architecture import DecoderConfig


def require(config: DecoderConfig, platform: str) -> None:
    """Check that the attention asked for runs on a platform ("cpu", "gpu", "tpu"), and with this model.

    Raises:
        UsageError: it does not; the mend is named.
    """
    asked = f"numerics.attention={config.attention}"
    home = {"xla": platform, "cudnn": "gpu", "splash": "tpu"}[config.attention]
    if platform not in (home, {"gpu": "cuda"}.get(home, home)):
        raise UsageError(f"{asked} runs on a {home.upper()}, and this is {platform}; set numerics.attention=xla")
    if config.attention == "cudnn" and config.dtype != "bfloat16":
        raise UsageError(f"{asked} computes in half precision; set numerics.dtype=bfloat16, or numerics.attention=xla")
    if config.attention == "cudnn" and config.attention_cap:
        raise UsageError(f"{asked} cannot cap scores, as this model's family does; set numerics.attention=xla")


def splash(
    q: Float[Array, "rows length heads dim"],
    k: Float[Array, "rows length kv_heads dim"],
    v: Float[Array, "rows length kv_heads dim"],
    segments: Int[Array, "rows length"],
    *,
    scale: float,
    cap: float,
    window: int | None,
    rows: NamedSharding | None = None,
    interpret: bool = False,
) -> Float[Array, "rows length heads dim"]:
    """Causal attention within segments, over the last `window` tokens where it is given. `length`: a multiple of 128.

    The kernel is not split by the compiler: with `rows`, the sharding of the residual stream, it is mapped over the
    mesh, rows over the batch axes and heads over `tensor` where they divide.
    """
    length, heads, kv_heads = q.shape[1], q.shape[2], k.shape[2]
    mesh = None if rows is None else rows.mesh
    ways = 1 if mesh is None else mesh.shape["tensor"]
    ways = ways if kv_heads % ways == 0 else 1

    def local(q: Array, k: Array, v: Array, segments: Array) -> Array:
        kernel = _kernel(length, heads // ways, cap, window, interpret)
        first = lambda a: a.transpose(0, 2, 1, 3)  # noqa: E731
        ids = pallas.SegmentIds(q=segments, kv=segments)
        return first(jax.vmap(kernel)(first(q * jnp.asarray(scale, q.dtype)), first(k), first(v), ids))

    if mesh is None or rows is None:
        return local(q, k, v, segments)
    batch, tensor = rows.spec[0], "tensor" if ways > 1 else None
    of = PartitionSpec(batch, None, tensor, None)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(of, of, of, PartitionSpec(batch, None)), out_specs=of, check_vma=False
    )(q, k, v, segments)


def _kernel(length: int, heads: int, cap: float, window: int | None, interpret: bool):
    shape = (length, length)
    one = pallas.CausalMask(shape) if window is None else pallas.LocalMask(shape, (window - 1, 0), 0)
    block = next(size for size in (512, 256, 128) if length % size == 0)
    return pallas.make_splash_mha(
        pallas.MultiHeadMask([one] * heads),
        block_sizes=pallas.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=cap or None,
        interpret=interpret,
    )


def lines(
    q: Float[Array, "lines length heads dim"],
    k: Float[Array, "lines length kv_heads dim"],
    v: Float[Array, "lines length kv_heads dim"],
    lengths: Int[Array, " lines"],
    *,
    scale: float,
    window: int | None,
    implementation: str = "cudnn",
) -> Float[Array, "lines length heads dim"]:
    """Causal attention in lines of `lengths` tokens, over the last `window` of them where it is given."""
    attend = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
    return attend(
        q, k, v, scale=scale, is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0),
    )  # fmt: skip
