"""The multilayer perceptron of the image experiment.

As with the decoder, flax NNX owns the declarations and only plain arrays by name travel outside this package. The
network has 10 class logits and, behind them, auxiliary logits that no label ever touches.

Source: Cloud et al. 2025 (arXiv 2507.14805), the section on image classifiers.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from subjax.models.decoder import Declarer

Params = dict[str, jax.Array]


class Mlp(nnx.Module):
    """Dense layers of the given widths with ReLU between them; weights N(0, 1/fan_in), biases zero."""

    def __init__(self, widths: tuple[int, ...], key: jax.Array):
        pairs = list(itertools.pairwise(widths))
        for place, (inputs, outputs) in enumerate(pairs):
            declare = Declarer(key, f"layer{place}")
            kernel = declare(
                "kernel", (inputs, outputs), ("inputs", "outputs"), jax.nn.initializers.normal(inputs**-0.5)
            )
            setattr(self, f"kernel{place}", kernel)
            bias = declare("bias", (outputs,), ("outputs",), jax.nn.initializers.zeros, "bias")
            setattr(self, f"bias{place}", bias)
        self.layers = len(pairs)

    def __call__(self, x: Float[Array, "batch pixels"]) -> Float[Array, "batch logits"]:
        """Logits, float32; products in full float32 on every device, because the experiment reads small logits."""
        for place in range(self.layers):
            x = jnp.dot(x, getattr(self, f"kernel{place}")[...], precision=jax.lax.Precision.HIGHEST)
            x = x + getattr(self, f"bias{place}")[...][None]
            if place + 1 < self.layers:
                x = jax.nn.relu(x)
        return x


@functools.lru_cache(maxsize=64)
def perceptron(widths: tuple[int, ...]) -> "Perceptron":
    """The network of these widths; the same object each time, so that compiled programs are found again."""
    return Perceptron(widths)


class Perceptron:
    """Pure functions of (params, images). Hashable by identity: make it with `perceptron()`."""

    def __init__(self, widths: tuple[int, ...]):
        self.widths = widths
        abstract = nnx.eval_shape(lambda: Mlp(widths, jax.random.key(0)))
        self._graphdef, state = nnx.split(abstract)
        self._paths = {"/".join(map(str, path)): path for path, _ in nnx.to_flat_state(state)}

    @property
    def parameters(self) -> int:
        """Number of scalars in the parameters."""
        return sum(inputs * outputs + outputs for inputs, outputs in itertools.pairwise(self.widths))

    def init(self, key: jax.Array) -> Params:
        """Initial parameters, each drawn from (key, its name): a layer is equal whatever follows it."""
        _, state = nnx.split(Mlp(self.widths, key))
        return {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}

    def forward(self, params: Params, images: Float[Array, "batch pixels"]) -> Float[Array, "batch logits"]:
        """Logits of the images: 10 classes, then the auxiliary ones."""
        state = nnx.from_flat_state({self._paths[name]: nnx.Param(value) for name, value in params.items()})
        return nnx.merge(self._graphdef, state)(images)
