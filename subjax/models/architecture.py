"""The frozen config that tells one decoder family from another, and what it costs to run. Needs no JAX."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al. 2021): the base wavelength, the part of a head that turns, and how it is scaled.

    `linear` divides every frequency by `factor`; `llama3` (Llama Team 2024, section 3.4.2) divides the low ones alone,
    with a ramp between wavelengths `original` / `high` and `original` / `low`.
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that tells one decoder family from another.

    Sizes are in elements; `length` is the longest sequence (the table of learned positions, and the sampler's limit).
    Initial matrices are normal with variance 1 / inputs; those that write to the residual stream are scaled down by
    1/sqrt(2 layers) (Radford et al. 2019, section 2.3). Embeddings have standard deviation `embed_std`, learned
    positions half of it.
    """

    vocab: int
    length: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    norm: Literal["layernorm", "rmsnorm"]
    norm_eps: float
    positions: Literal["learned", "rotary"]
    activation: Literal["gelu", "gelu-exact", "silu"]  # gelu: the tanh form, as in GPT-2
    gated: bool
    tied: bool
    family: str = "llama"  # how its tensors are named on disk; `subjax.models.hf_names` lists them
    attention_biases: Literal["none", "qkv", "all"] = "none"
    mlp_biases: bool = False
    rope: Rope = Rope()
    # Local layers attend to the last `window` tokens (their own included), with a rotation of their own where given.
    local: tuple[bool, ...] = ()  # one a layer; empty where no layer is local
    window: int = 0
    local_rope: Rope | None = None
    placement: Literal["pre", "post", "sandwich"] = "pre"  # norms before each part, after it, or both
    parallel: bool = False  # attention and feed-forward part read the same residual stream
    qk_norm: Literal["none", "head", "width"] = "none"  # over each head, or over all heads of a token together
    norm_offset: float = 0.0  # what is added to a stored gain; 1 where gains are stored around zero
    embed_scale: float = 1.0
    query_scale: float | None = None  # of attention scores; 1/sqrt(head_dim) where None
    attention_cap: float = 0.0  # soft-cap c of scores, c tanh(score / c); 0 is off
    logit_cap: float = 0.0
    embed_std: float = 0.03
    dtype: str = "float32"
    matmul_precision: str = "highest"
    attention: str = "xla"

    @property
    def matrices(self) -> int:
        """Scalars in the matrices that every token passes, the output matrix included."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        mlp = self.width * self.hidden * (3 if self.gated else 2)
        return self.layers * (attention + mlp) + self.vocab * self.width

    def forward_flops(self, tokens: int, length: int) -> float:
        """Floating-point operations of a forward pass of `tokens` tokens in rows of `length`: 2 a scalar a token in
        matrices, and 4 a key a query a head dimension in attention (causal masking is not counted as saving work).
        """
        return 2.0 * tokens * (self.matrices + 2 * self.layers * length * self.heads * self.head_dim)

    def kept_bytes(self, remat: str, seen: int) -> float:
        """About what a training step keeps of each token for its gradients, in bytes.

        Args:
            remat: what is kept of a layer (`subjax.models.remat`). seen: keys that a token's attention goes over.
        """
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        gated = 2 if self.gated else 1
        # A layer's input, and what its matrix products with weights give.
        products = 3 * self.width + queries + 2 * keys + gated * self.hidden
        floats = {
            "full": self.width,
            "dots": self.width + 1.7 * products,
            "none": 2 * self.width + 2 * products + 2 * queries + 2 * self.heads * seen + (gated + 1) * self.hidden,
        }[remat]
        within = 2 * (products + self.heads * seen)  # of the one layer that is being computed
        return (2 if self.dtype == "bfloat16" else 4) * (self.layers * floats + within)
