"""What a training run moves: all parameters, LoRA pairs, or only biases and gains. One trainer serves all three.

A run's parameters are two flat dicts, `tuned` and `frozen`; `join` makes of them what the network wants.
"""

import math
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from subjax.errors import UsageError
from subjax.models.network import Adapter, Network, Params
from subjax.schema import MATRICES, Tuning

_LORA = "lora/"
# For each matrix its (input axes, output axes), by parameter name; what is not named is no matrix.
MatrixAxes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]


def _lora_targets(net: Network, tuning: Tuning) -> dict[str, str]:
    """Kernels that get a LoRA pair: matrix name -> parameter name."""
    beyond = [layer for layer in tuning.layers if layer >= net.config.layers]
    if beyond:
        raise UsageError(f"tuning.layers: there is no layer {beyond[0]}; the model has {net.config.layers}, from 0 on")
    kernels = {n.split("/")[-2]: n for n in net.declarations if n.startswith("blocks/") and n.endswith("/kernel")}
    known = set(MATRICES)
    unknown = [t for t in tuning.targets if t not in known]
    if unknown:
        raise UsageError(f"tuning.targets: unknown matrix {unknown[0]!r}; known: {', '.join(sorted(known))}")
    # `gate` is a known name that an ungated family does not have: one list of targets serves every family.
    targets = {t: kernels[t] for t in tuning.targets if t in kernels}
    if not targets:
        raise UsageError(
            f"tuning.targets: none of {list(tuning.targets)} is a matrix of this family, so nothing would be trained;"
            f" it has {', '.join(sorted(known & set(kernels)))}"
        )
    return targets


def tuned_axes(net: Network, tuning: Tuning) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shape and logical axes of every tuned array, by name.

    Raises:
        UsageError: LoRA names a matrix that no family has, or none that this one has, or a layer that is not there.
    """
    if tuning.kind == "full":
        return {n: (d.shape, d.axes) for n, d in net.declarations.items()}
    if tuning.kind == "bias-and-gain":
        # Not the key biases: with learned positions their gradient is zero, and Adam would turn rounding noise into
        # drift. (Rotated ones have a gradient; they are left out too, so that families have a like tunable part.)
        return {n: (d.shape, d.axes) for n, d in net.declarations.items() if d.role in ("bias", "gain")}
    out = {}
    for target, name in _lora_targets(net, tuning).items():
        d = net.declarations[name]
        n_in = 2 if target == "o" else 1
        layers, inputs, outputs = d.shape[0], d.shape[1 : 1 + n_in], d.shape[1 + n_in :]
        in_axes, out_axes = d.axes[1 : 1 + n_in], d.axes[1 + n_in :]
        out[f"{_LORA}{target}/a"] = ((layers, *inputs, tuning.rank), ("layers", *in_axes, "rank"))
        out[f"{_LORA}{target}/b"] = ((layers, tuning.rank, *outputs), ("layers", "rank", *out_axes))
    return out


def init_tuned(net: Network, tuning: Tuning, base: Mapping[str, jax.Array], key: jax.Array) -> Params:
    """The tuned arrays at the start of a run: the base's own, or LoRA pairs with A random and B zero (Hu et al. 2021).

    Each A is drawn from (key, its name), uniform in ±1/sqrt(inputs), as the reference implementation's is.
    """
    if tuning.kind != "lora":
        # What is trained is float32, whatever a checkpoint's weights are held in: small steps vanish in bfloat16.
        start = {name: base[name] for name in tuned_axes(net, tuning)}
        return {name: v if v.dtype == jnp.float32 else v.astype(jnp.float32) for name, v in start.items()}
    out: Params = {}
    for name, (shape, _) in tuned_axes(net, tuning).items():
        if name.endswith("/b"):
            out[name] = jnp.zeros(shape, jnp.float32)
        else:
            bound = float(math.prod(shape[1:-1])) ** -0.5
            seed = jax.random.fold_in(key, zlib.crc32(name.encode()))
            out[name] = jax.random.uniform(seed, shape, jnp.float32, -bound, bound)
    return out


def frozen_part(net: Network, tuning: Tuning, base: Mapping[str, jax.Array]) -> Params:
    """The arrays of the base that the run does not move."""
    tuned = tuned_axes(net, tuning)
    return {name: value for name, value in base.items() if name not in tuned}


def join(tuning: Tuning, tuned: Mapping[str, jax.Array], frozen: Mapping[str, jax.Array]) -> tuple[Params, Adapter]:
    """(params, adapter) that `Network` takes, from the two parts."""
    if tuning.kind != "lora":
        return {**frozen, **tuned}, {}
    adapter: Adapter = {}
    for name, value in tuned.items():
        target, part = name.removeprefix(_LORA).split("/")
        adapter.setdefault(target, {})[part] = value
    for pair in adapter.values():
        pair["scale"] = layer_scales(tuning, pair["a"].shape[0])
    return dict(frozen), adapter


def layer_scales(tuning: Tuning, layers: int) -> jax.Array:
    """What each layer's B A is multiplied by, (layers,); 0 in layers outside `tuning.layers`, which then never move."""
    chosen = np.zeros(layers, np.float32)
    chosen[list(tuning.layers) or slice(None)] = tuning.scale
    return jnp.asarray(chosen)


def matrix_axes(net: Network, tuning: Tuning) -> MatrixAxes:
    """Input and output axes of every tuned matrix, by name; vectors and embeddings are left out."""
    out = {}
    for name, (shape, axes) in tuned_axes(net, tuning).items():
        if name.startswith(_LORA):
            inputs = len(shape) - 2 if name.endswith("/a") else 1
        elif name.endswith("/kernel"):
            inputs = 2 if axes[1] == "heads" else 1
        else:
            continue
        out[name] = (tuple(range(1, 1 + inputs)), tuple(range(1 + inputs, len(shape))))
    return out


def merge(net: Network, tuning: Tuning, tuned: Mapping[str, jax.Array], base: Mapping[str, jax.Array]) -> Params:
    """Plain parameters of the tuned model: LoRA pairs multiplied out and added to their matrices."""
    if tuning.kind != "lora":
        return {**base, **tuned}
    out = dict(base)
    for target, name in _lora_targets(net, tuning).items():
        a, b = tuned[f"{_LORA}{target}/a"], tuned[f"{_LORA}{target}/b"]
        flat_a = a.reshape(a.shape[0], -1, tuning.rank)
        flat_b = b.reshape(b.shape[0], tuning.rank, -1)
        scale = layer_scales(tuning, a.shape[0])[:, None, None]
        update = jnp.einsum("lir,lro->lio", flat_a, flat_b, precision="highest") * scale
        out[name] = (base[name] + update.reshape(base[name].shape)).astype(base[name].dtype)
    return out
