"""The frozen config that tells one decoder family from another, and what it costs to run. Needs no JAX."""

import dataclasses
from typing import Literal


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
    rope_theta: float
    activation: Literal["gelu", "silu"]
    gated: bool
    biases: bool
    tied: bool
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
