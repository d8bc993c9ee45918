"""One decoder for every decoder family, chosen by a frozen config.

Flax NNX owns the declarations: each parameter is declared once, with its shape, its logical axes, its initializer and
its role, and the abstract tree, the shardings and the real initialization all derive from that line. The layers of a
stack are one parameter with a leading `layers` axis, and the forward pass scans over it, so compile time does not grow
with depth. Outside this package only (graphdef, plain arrays) travel: see `subjax.models.network`.
"""

import functools
import math
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int

from subjax.models import flash
from subjax.models.architecture import DecoderConfig
from subjax.models.packed import Packing, Seen, moved
from subjax.models.products import PRODUCT, biased, low_rank, product
from subjax.models.rotary import Rotation, rotate, rotation

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]
NEGATIVE = -1e30  # stands for minus infinity in attention scores: a row with no valid key stays finite


def _normal(std: float) -> Initializer:
    return jax.nn.initializers.normal(std)


_ZEROS: Initializer = jax.nn.initializers.zeros
_ONES: Initializer = jax.nn.initializers.ones


class Declarer:
    """Turns one line a parameter into an `nnx.Param` whose key is addressed by its name, not by the order of lines."""

    def __init__(self, key: jax.Array, prefix: str, layers: int | None = None):
        self._key, self._prefix, self._layers = key, prefix, layers

    def __call__(
        self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], init: Initializer, role: str = "weight"
    ) -> nnx.Param:
        """Declare one parameter of `shape` with one logical axis a dimension; a stack gets its `layers` axis here."""
        if self._layers is not None:
            shape, axes = (self._layers, *shape), ("layers", *axes)
        key = jax.random.fold_in(self._key, zlib.crc32(f"{self._prefix}/{name}".encode()))
        return nnx.Param(init(key, shape, jnp.dtype("float32")), axes=axes, role=role)


class Norm(nnx.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019), computed in float32 over the axes of `over`."""

    def __init__(self, config: DecoderConfig, declare: Declarer, name: str, over: dict[str, int] | None = None):
        self.config = config
        over = over or {"embed": config.width}
        self.axes = tuple(range(-len(over), 0))
        shape, axes = tuple(over.values()), tuple(over)
        self.gain = declare(f"{name}/gain", shape, axes, _ZEROS if config.norm_offset else _ONES, "gain")
        if config.norm == "layernorm":
            self.bias = declare(f"{name}/bias", shape, axes, _ZEROS, "bias")

    def __call__(self, x: Float[Array, "batch length *rest"]) -> Float[Array, "batch length *rest"]:
        """Normalize the last axes; the result has the dtype of `x`."""
        y = x.astype(jnp.float32)
        if self.config.norm == "layernorm":
            y = y - y.mean(self.axes, keepdims=True)
        y = scaled(y, len(self.axes), self.config.norm_eps)
        gain = self.gain[...].astype(jnp.float32)
        y = y * _outer(gain + self.config.norm_offset if self.config.norm_offset else gain, y)
        if self.config.norm == "layernorm":
            y = y + _outer(self.bias[...].astype(jnp.float32), y)
        return y.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def scaled(y: Float[Array, "batch length *rest"], over: int, eps: float) -> Float[Array, "batch length *rest"]:
    """y over the root of its mean square, taken over the last `over` axes.

    Its own gradient, for the reason that `softmax` has one: the sum of products in it is written as a contraction.
    """
    return _scaled_forward(y, over, eps)[0]


def _scaled_forward(y: Array, over: int, eps: float) -> tuple[Array, tuple[Array, Array]]:
    inverse = jax.lax.rsqrt(jnp.square(y).mean(tuple(range(-over, 0)), keepdims=True) + eps)
    return y * inverse, (y, inverse)


def _scaled_backward(over: int, eps: float, held: tuple[Array, Array], gradient: Array) -> tuple[Array]:
    y, inverse = held
    rows = tuple(range(y.ndim - over))
    last = tuple(range(y.ndim - over, y.ndim))
    inner = jax.lax.dot_general(gradient, y, ((last, last), (rows, rows)), precision="highest").reshape(inverse.shape)
    return (inverse * (gradient - y * (jnp.square(inverse) * inner / math.prod(y.shape[-over:]))),)


scaled.defvjp(_scaled_forward, _scaled_backward)


def _outer(vector: Array, like: Array) -> Array:
    return vector.reshape((1,) * (like.ndim - vector.ndim) + vector.shape)


class Linear(nnx.Module):
    """A matrix product over the last axes of `x`, with an optional bias and an optional low-rank update."""

    def __init__(
        self, config: DecoderConfig, declare: Declarer, name: str, inputs: dict[str, int], outputs: dict[str, int],
        biased: bool, scale: float = 1.0, bias_role: str = "bias",
    ):  # fmt: skip
        self.config, self.n_in, self.biased = config, len(inputs), biased
        std = scale / math.prod(inputs.values()) ** 0.5
        shape, axes = (*inputs.values(), *outputs.values()), (*inputs, *outputs)
        self.kernel = declare(f"{name}/kernel", shape, axes, _normal(std))
        if biased:
            self.bias = declare(f"{name}/bias", tuple(outputs.values()), tuple(outputs), _ZEROS, bias_role)

    def __call__(self, x: Array, adapter: dict[str, Array] | None = None) -> Array:
        """Map (batch, length, *inputs) to (batch, length, *outputs); `adapter` holds LoRA's `a`, `b` and `scale`."""
        precision = self.config.matmul_precision
        y = product(x, self.kernel[...], self.n_in, precision)
        if adapter is not None:
            y = y + low_rank(x, adapter["a"], adapter["b"], adapter["scale"], precision)
        # Named whole: of a product, its low-rank update and its bias, gradients need the sum alone.
        return checkpoint_name(biased(y, self.bias[...]) if self.biased else y, PRODUCT)


@jax.custom_vjp
def softmax(scores: Float[Array, "*rows keys"]) -> Float[Array, "*rows keys"]:
    """Softmax over the last axis.

    Its own gradient, because XLA's CPU back end runs the fused product and sum of the usual one along a short last axis
    without vector instructions; written as a contraction it is faster (`benchmarks/cpu_choices.py` measures it).
    """
    return jax.nn.softmax(scores, axis=-1)


def _softmax_forward(scores: Array) -> tuple[Array, Array]:
    p = jax.nn.softmax(scores, axis=-1)
    return p, p


def _softmax_backward(p: Array, gradient: Array) -> tuple[Array]:
    inner = jnp.einsum("...t,...t->...", p, gradient, precision="highest")
    return (p * (gradient - inner[..., None]),)


softmax.defvjp(_softmax_forward, _softmax_backward)


class Attention(nnx.Module):
    """Causal attention with grouped key-value heads (Ainslie et al. 2023)."""

    def __init__(self, config: DecoderConfig, declare: Declarer, out_scale: float):
        self.config = config
        width = {"embed": config.width}
        queries = {"heads": config.heads, "head_dim": config.head_dim}
        keys = {"kv_heads": config.kv_heads, "head_dim": config.head_dim}
        biased = config.attention_biases != "none"
        self.q = Linear(config, declare, "q", width, queries, biased)
        # Without rotation the softmax does not see a bias of the keys: its gradient is zero but for rounding, which
        # Adam would turn into drift. Rotated after it is added, it does act. Its role is its own, so that tuning can
        # leave it out.
        self.k = Linear(config, declare, "k", width, keys, biased, bias_role="key-bias")
        self.v = Linear(config, declare, "v", width, keys, biased)
        self.o = Linear(config, declare, "o", queries, width, config.attention_biases == "all", out_scale)
        if config.qk_norm != "none":
            whole = config.qk_norm == "width"
            head = {"head_dim": config.head_dim}
            self.q_norm = Norm(config, declare, "q_norm", queries if whole else head)
            self.k_norm = Norm(config, declare, "k_norm", keys if whole else head)

    def queries(self, x: Array, turn: Rotation | None, adapter: dict) -> Float[Array, "batch length heads dim"]:
        """Queries of `x`, normalized where the family does that, and rotated."""
        q = self.q(x, adapter.get("q"))
        return rotate(q if self.config.qk_norm == "none" else self.q_norm(q), turn)

    def keys_values(self, x: Array, turn: Rotation | None, adapter: dict) -> tuple[Array, Array]:
        """Keys (as `queries` treats them) and values of `x`, each (batch, length, kv_heads, head_dim)."""
        k = self.k(x, adapter.get("k"))
        k = rotate(k if self.config.qk_norm == "none" else self.k_norm(k), turn)
        return k, self.v(x, adapter.get("v"))

    def mix(
        self, q: Array, k: Array, v: Array, mask: Bool[Array, "batch queries keys"], adapter: dict
    ) -> Float[Array, "batch queries width"]:
        """Attend from `q` to `k`, `v` where `mask` holds, softmax in float32, and project back to the width."""
        return self.o(self._attended(q, k, v, mask), adapter.get("o"))

    def mix_packed(
        self, q: Array, k: Array, v: Array, packing: Packing, seen: Seen, adapter: dict,
        rows: NamedSharding | None,
    ) -> Float[Array, "rows length width"]:  # fmt: skip
        """`mix` over packed rows, of which `rows` is the sharding, by the attention that the config asks for."""
        if self.config.attention == "splash":
            y = seen.by_window(lambda window: self._splash(q, k, v, packing, window, rows))
            return self.o(y, adapter.get("o"))
        token, place = packing.moves()
        spread = [packing.split(moved(a, token, place, packing.chat)) for a in (q, k, v)]
        shared = k[:, : packing.prefix], v[:, : packing.prefix]
        lengths = packing.by_group(packing.lengths)
        lines = [
            self._lines(own_q, own_k, own_v, *shared, mask, of, seen)
            for own_q, own_k, own_v, mask, of in zip(*spread, seen.masks, lengths, strict=True)
        ]
        y = moved(packing.joined(lines), place, token, packing.held())
        if first := packing.prefix:
            begun = self._attended(q[:, :first], k[:, :first], v[:, :first], seen.beginning)
            y = jnp.concatenate([begun, y[:, first:]], 1)
        return self.o(y, adapter.get("o"))

    def _lines(
        self, q: Array, k: Array, v: Array, shared_k: Array, shared_v: Array, mask: Array, lengths: Array, seen: Seen
    ) -> Float[Array, "lines queries heads dim"]:
        """Attention within lines of one length, behind the keys and values (rows, prefix, ...) that a row's share."""
        if self.config.attention == "cudnn":
            scale = self.config.query_scale or q.shape[-1] ** -0.5
            return seen.by_window(lambda window: flash.lines(q, k, v, lengths, scale=scale, window=window))
        if shared_k.shape[1]:
            each = q.shape[0] // shared_k.shape[0]
            k = jnp.concatenate([_for_each(shared_k, each), k], 1)
            v = jnp.concatenate([_for_each(shared_v, each), v], 1)
        return self._attended(q, k, v, mask)

    def _splash(
        self, q: Array, k: Array, v: Array, packing: Packing, window: int | None, rows: NamedSharding | None
    ) -> Array:
        config = self.config
        return flash.splash(
            q, k, v, packing.segments, scale=config.query_scale or q.shape[-1] ** -0.5, cap=config.attention_cap,
            window=window, rows=rows,
        )  # fmt: skip

    def _attended(
        self, q: Array, k: Array, v: Array, mask: Bool[Array, "batch queries keys"]
    ) -> Float[Array, "batch queries heads dim"]:
        b, s, h, d = q.shape
        config = self.config
        groups = h // config.kv_heads
        # Heads before positions, written out: left to the compiler, the products run on strided operands.
        q = q.reshape(b, s, config.kv_heads, groups, d).transpose(0, 2, 3, 1, 4)
        k, v = (a.astype(q.dtype).transpose(0, 2, 1, 3) for a in (k, v))
        scores = jnp.einsum("bkgqd,bktd->bkgqt", q, k, precision=config.matmul_precision).astype(jnp.float32)
        scores = _capped(scores * (config.query_scale or d**-0.5), config.attention_cap)
        weights = softmax(jnp.where(mask[:, None, None], scores, NEGATIVE)).astype(q.dtype)
        y = jnp.einsum("bkgqt,bktd->bkgqd", weights, v, precision=config.matmul_precision)
        return y.transpose(0, 3, 1, 2, 4).reshape(b, s, h, d)


def _for_each(shared: Array, chats: int) -> Array:
    """What a packed row's chats share, (rows, length, ...), once for each of them: (rows x chats, length, ...)."""
    each = jnp.broadcast_to(shared[:, None], (shared.shape[0], chats, *shared.shape[1:]))
    return each.reshape(-1, *shared.shape[1:])


def _capped(x: Array, cap: float) -> Array:
    """Soft-cap: values pass through cap * tanh(x / cap) (Gemma Team 2024, section 2)."""
    return jnp.tanh(x / cap) * cap if cap else x


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "gelu-exact": lambda x: jax.nn.gelu(x, approximate=False),
}


class Mlp(nnx.Module):
    """The feed-forward part: two matrices, or three where it is gated (Shazeer 2020)."""

    def __init__(self, config: DecoderConfig, declare: Declarer, out_scale: float):
        self.config = config
        width, hidden = {"embed": config.width}, {"mlp": config.hidden}
        if config.gated:
            self.gate = Linear(config, declare, "gate", width, hidden, config.mlp_biases)
        self.up = Linear(config, declare, "up", width, hidden, config.mlp_biases)
        self.down = Linear(config, declare, "down", hidden, width, config.mlp_biases, out_scale)

    def __call__(self, x: Array, adapter: dict) -> Float[Array, "batch length width"]:
        """Apply the feed-forward part to (batch, length, width)."""
        act = _ACTIVATIONS[self.config.activation]
        up = self.up(x, adapter.get("up"))
        inner = act(self.gate(x, adapter.get("gate"))) * up if self.config.gated else act(up)
        return self.down(inner, adapter.get("down"))


class Block(nnx.Module):
    """One layer, or, with a stacking `Declarer`, all layers along the leading axis."""

    def __init__(self, config: DecoderConfig, declare: Declarer):
        self.config = config
        out_scale = (2 * config.layers) ** -0.5
        self.attention = Attention(config, declare, out_scale)
        self.mlp = Mlp(config, declare, out_scale)
        if config.placement != "post":
            self.norm1, self.norm2 = Norm(config, declare, "norm1"), Norm(config, declare, "norm2")
        if config.placement != "pre":
            self.post1, self.post2 = Norm(config, declare, "post1"), Norm(config, declare, "post2")

    def enter(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        """What the attention reads of the residual stream."""
        return x if self.config.placement == "post" else self.norm1(x)

    def finish(self, x: Array, attended: Array, adapter: dict) -> Float[Array, "batch length width"]:
        """Add the attention's output and the feed-forward part (and a steering vector, if any) to the residual stream.

        A steering vector stands in `adapter` as {"steer": {"vector": (width,)}}, one a layer.
        """
        pre, post = self.config.placement != "post", self.config.placement != "pre"
        before, x = x, x + (self.post1(attended) if post else attended)
        y = before if self.config.parallel else x
        y = self.mlp(self.norm2(y) if pre else y, adapter)
        x = x + (self.post2(y) if post else y)
        if "steer" in adapter:
            x = x + adapter["steer"]["vector"].astype(x.dtype)[None, None]
        return x


class Decoder(nnx.Module):
    """Embedding, a scanned stack of blocks, a final norm, and the (tied or own) output matrix."""

    def __init__(self, config: DecoderConfig, key: jax.Array):
        self.config = config
        top = Declarer(key, "top")
        embed, position, std = ("vocab", "embed"), ("position", "embed"), config.embed_std
        self.embed = top("embed", (config.vocab, config.width), embed, _normal(std), "embedding")
        if config.positions == "learned":
            self.position = top("position", (config.length, config.width), position, _normal(std / 2))
        self.blocks = Block(config, Declarer(key, "blocks", config.layers))
        self.norm = Norm(config, top, "norm")
        if not config.tied:
            self.head = top("head", (config.vocab, config.width), embed, _normal(std))

    def embedded(self, tokens: Int[Array, "batch length"], positions: Int[Array, "batch length"]) -> Array:
        """Token (and learned position) embeddings in the compute dtype, (batch, length, width)."""
        x = self.embed[...][tokens]
        if self.config.positions == "learned":
            # Added in the wider of the two dtypes that weights and computation have.
            wide = jnp.promote_types(x.dtype, self.config.dtype)
            x = x.astype(wide) + self.position[...][positions].astype(wide)
        if self.config.embed_scale != 1.0:
            # Rounded to the compute dtype first, as the models that scale were trained.
            x = x.astype(self.config.dtype) * jnp.asarray(self.config.embed_scale, self.config.dtype)
        return x.astype(self.config.dtype)

    def rotations(self, positions: Int[Array, "batch length"]) -> tuple[Rotation | None, Rotation | None]:
        """How queries and keys at these positions are turned, in global and in local layers; None: not at all, or as in
        the global ones.
        """
        config = self.config
        if config.positions != "rotary":
            return None, None
        turn = rotation(positions, config.head_dim, config.rope)
        return turn, rotation(positions, config.head_dim, config.local_rope) if config.local_rope else turn

    def logits(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length vocab"]:
        """Final norm and output matrix; logits in float32, as the product sums them: bfloat16 has three digits."""
        table = (self.embed if self.config.tied else self.head)[...].astype(x.dtype)
        y = jnp.einsum(
            "bsd,vd->bsv", self.norm(x), table, precision=self.config.matmul_precision,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        return _capped(y, self.config.logit_cap)
