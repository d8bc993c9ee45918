"""A LoRA (Hu et al. 2021) as an adapter of peft, exact also where a family keeps three matrices in one tensor."""

import functools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from subjax.errors import UsageError
from subjax.models import adapters
from subjax.models.hf_config import text_part
from subjax.models.hf_export import Weight, matrix_of, shape_of
from subjax.models.hf_names import Slot, give, inputs_of, slots
from subjax.models.network import Adapter, Network
from subjax.schema import Tuning


def adapter_config(net: Network, tuning: Tuning, config: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter_config.json, but for the base's name, of the tensors that `adapter_weights` gives.

    Args:
        net: the network. tuning: LoRA settings.
        config: the config.json of the base, which says whether its language model stands inside a larger one.

    Raises:
        UsageError: `tuning` is no LoRA, or names a matrix or a layer that is not there.
    """
    if tuning.kind != "lora":
        raise UsageError(f"tuning.kind={tuning.kind} cannot be a PEFT adapter; export the merged model")
    tuned = _tuned_modules(net, adapters.tuned_axes(net, tuning))
    names = [module.rpartition(".")[2] for module in {_module(slot) for slot in slots(net.config) if matrix_of(slot)}]
    # GPT-2 has two c_proj in a layer: the last part of a name is enough where it is the only one of its kind.
    short = {module: last if names.count(last := module.rpartition(".")[2]) == 1 else module for module in tuned}
    joined = {short[module]: len(members) for module, members in tuned.items() if len(members) > 1}
    before = next(slot.theirs for slot in slots(net.config) if matrix_of(slot)).partition("{i}")[0]
    places: dict[str, Any] = {"target_modules": sorted(short.values()), "layers_to_transform": None}
    if tuning.layers:
        pattern = before.removesuffix(".").rpartition(".")[2]
        places |= {"layers_to_transform": sorted(set(tuning.layers)), "layers_pattern": [pattern]}
    if text_part(config) is not config:
        # The part that reads images has modules of the same names, which only a whole pattern tells apart.
        layers = "|".join(map(str, sorted(set(tuning.layers)))) or r"\d+"
        inside = re.escape(_inside(config, before))
        modules = "|".join(map(re.escape, sorted(tuned)))
        places = {"target_modules": rf"{inside}({layers})\.({modules})"}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": tuning.rank,
        "lora_alpha": tuning.alpha,
        "use_rslora": tuning.rslora,
        "rank_pattern": {module: parts * tuning.rank for module, parts in joined.items()},
        # What B A is multiplied by is alpha over the rank, or its root, and must not change with the rank.
        "alpha_pattern": {m: tuning.alpha * (parts**0.5 if tuning.rslora else parts) for m, parts in joined.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": net.config.family == "gpt2",
        "inference_mode": True,
        **places,
    }


def adapter_weights(
    net: Network, tuning: Tuning, tuned: Mapping[str, jax.Array], config: Mapping[str, Any]
) -> dict[str, Weight]:
    """The tensors of a PEFT adapter that is this LoRA, in float32, of the layers that it moves.

    Where a family keeps queries, keys and values in one matrix, the pairs of those that are tuned become one pair of
    as many times the rank: the A are stacked, and each B fills its own columns in the rows of its own outputs.

    Args:
        net: the network. tuning: LoRA settings. tuned: the pairs, by our names. config: as `adapter_config`.
    """
    _, adapter = adapters.join(tuning, tuned, {})
    out: dict[str, Weight] = {}
    for members in _tuned_modules(net, tuned).values():
        for layer in sorted(set(tuning.layers)) or range(net.config.layers):
            at = _inside(config, members[0].theirs.removesuffix(".weight").format(i=layer))
            inputs, outputs = _sizes(net, members[0])
            rank, parts = tuning.rank * len(members), members[0].parts
            for name, shape, made in (("A", (rank, inputs), _stacked_a), ("B", (parts * outputs, rank), _blocks_of_b)):
                read = functools.partial(made, net, members, adapter, layer)
                out[f"base_model.model.{at}.lora_{name}.weight"] = Weight(shape, "float32", read)
    return out


def _module(slot: Slot) -> str:
    """The name of a matrix's module inside its layer ("self_attn.q_proj")."""
    return slot.theirs.partition("{i}.")[2].removesuffix(".weight")


def _tuned_modules(net: Network, tuned: Collection[str]) -> dict[str, list[Slot]]:
    """The modules that get a pair, and which of our matrices in each have one."""
    out: dict[str, list[Slot]] = {}
    for slot in slots(net.config):
        if f"lora/{matrix_of(slot)}/a" in tuned:
            out.setdefault(_module(slot), []).append(slot)
    return out


def _inside(config: Mapping[str, Any], name: str) -> str:
    """A module's name in transformers, which calls the language model so inside one that reads images."""
    return name if text_part(config) is config else name.replace("model.", "model.language_model.", 1)


def _sizes(net: Network, slot: Slot) -> tuple[int, int]:
    shape, n = shape_of(net, slot), inputs_of(slot.ours)
    return math.prod(shape[:n]), math.prod(shape[n:])


def _stacked_a(net: Network, members: Sequence[Slot], adapter: Adapter, layer: int) -> np.ndarray:
    """(ranks, inputs)."""
    pairs = [np.asarray(adapter[matrix_of(slot)]["a"][layer]) for slot in members]
    return np.concatenate([a.reshape(-1, a.shape[-1]).T for a in pairs])


def _blocks_of_b(net: Network, members: Sequence[Slot], adapter: Adapter, layer: int) -> np.ndarray:
    """(outputs, ranks)."""
    pairs = [np.asarray(adapter[matrix_of(slot)]["b"][layer]) for slot in members]
    if members[0].parts == 1:
        return pairs[0].reshape(len(pairs[0]), -1).T
    rank, outputs = len(pairs[0]), pairs[0].shape[1:]
    # A B is to the ranks what a kernel is to its inputs, so it is joined as kernels are.
    everyone = [slot for slot in slots(net.config) if slot.theirs == members[0].theirs]
    parts = {slot.part: (slot, np.zeros((rank * len(members), *outputs), np.float32)) for slot in everyone}
    for number, (slot, b) in enumerate(zip(members, pairs, strict=True)):
        parts[slot.part][1][number * rank : (number + 1) * rank] = b
    whole = give(parts)
    return whole.T if members[0].layout == "thirds" else whole
