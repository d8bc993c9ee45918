"""The programs that nodes of a plan run, with arrays that are only described: shapes, dtypes and where they lie.

`training` and `sampling` call the same makers as a run does (`trainer.program`, `sampler.program`), with the same
sharding rules. A change of what those take is a change here, and nowhere else in the rehearsal.
"""

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from subjax.models import adapters
from subjax.models.architecture import DecoderConfig
from subjax.models.network import Network, network
from subjax.parallel.mesh import replicated
from subjax.parallel.rules import BATCH, TRAIN, shardings
from subjax.sample import sampler
from subjax.schema import Optimizer, Tuning
from subjax.train import trainer
from subjax.train.losses import Loss

Array = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Rows:
    """One term of an objective: its loss, and the batch of one step, array name -> (shape, dtype).

    `rows`, `length` and `tail` are what goes through the model: tokens that go in, and those whose logits come out.
    """

    name: str
    weight: float
    loss: Loss
    arrays: tuple[tuple[str, tuple[int, ...], str], ...]
    rows: int
    length: int
    tail: int


@dataclasses.dataclass(frozen=True)
class Training:
    """A training step. `members` is the size of a cohort that trains together; one is a student by itself."""

    config: DecoderConfig
    weights_dtype: str
    tuning: Tuning
    optimizer: Optimizer
    terms: tuple[Rows, ...]
    members: int = 1


@dataclasses.dataclass(frozen=True)
class Sampling:
    """A prefill and a decoding loop of `rows` rows; `tuning` where a LoRA lies beside the weights."""

    config: DecoderConfig
    weights_dtype: str
    sampling: sampler.Sampling
    rows: int
    tuning: Tuning | None = None


Spec = Training | Sampling


@dataclasses.dataclass(frozen=True)
class Program:
    """One program, not yet compiled.

    Attributes:
        name: "step", "prefill" or "decode".
        lowered: what `.compile()` takes for the described devices.
        held: arguments by part (weights, adapters, optimizer state, batch, cache): arrays with their shardings.
        beside: arrays that lie on the devices while it runs and are none of its arguments.
        steps: how many steps one call takes.
        data: devices that share its rows, for each term of an objective.
        tensor: devices that share each part of its FLOPs, by the names of `subjax.models.costs`.
        notes: what could not be shared as the rules wanted, a line each.
    """

    name: str
    lowered: jax.stages.Lowered
    held: dict[str, list[Array]]
    beside: list[Array]
    steps: int
    data: tuple[int, ...]
    tensor: dict[str, int]
    notes: list[str]


def bytes_of(arrays: Iterable[Array]) -> int:
    """Bytes of described arrays on one device, the device with most."""
    return sum(math.prod(a.sharding.shard_shape(a.shape) if a.sharding else a.shape) * _width(a.dtype) for a in arrays)


def _width(dtype: Any) -> int:
    return dtype.itemsize if hasattr(dtype, "itemsize") else jnp.dtype(dtype).itemsize


class _Notes(logging.Handler):
    """Collects what the sharding rules log: dimensions that a mesh does not divide."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.lines[record.getMessage()] = None

    def __enter__(self) -> "_Notes":
        self._log = logging.getLogger("subjax.parallel.rules")
        self._before = self._log.propagate
        self._log.propagate = False
        self._log.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._log.removeHandler(self)
        self._log.propagate = self._before


def ways(sharding: NamedSharding, dimension: int, only: str | None = None) -> int:
    """Devices over which a dimension is split, those along the mesh axis `only` where it is given."""
    spec = sharding.spec[dimension] if dimension < len(sharding.spec) else None
    names = () if spec is None else (spec,) if isinstance(spec, str) else spec
    return math.prod(sharding.mesh.shape[n] for n in names if only in (None, n))


def _tensor_ways(net: Network, placed: Mapping[str, NamedSharding]) -> dict[str, int]:
    """Devices along `tensor` that share each part of a pass, by how its matrix is split."""

    def along(sharding: NamedSharding) -> int:
        return math.prod(ways(sharding, i, "tensor") for i in range(len(sharding.spec)))

    found = {}
    for name, sharding in placed.items():
        if name.startswith("blocks/") and name.endswith("/kernel"):
            found[name.split("/")[-2]] = along(sharding)
        elif name.startswith("lora/"):
            found[name.removeprefix("lora/")] = along(sharding)
    table = "embed" if net.config.tied else "head"
    return found | {"head": along(placed[table]), "scores": found["q"]}


def _described(shapes: Mapping[str, Any], dtype: Any, placed: Mapping[str, Any]) -> dict[str, Array]:
    return {name: Array(shape, dtype, sharding=placed[name]) for name, shape in shapes.items()}


def training(spec: Training, mesh: Mesh, steps: int = 1000) -> Program:
    """The step of a fit, as `trainer.fit` calls it, for a schedule over `steps` steps."""
    if spec.members != 1:
        raise NotImplementedError("cohorts are rehearsed once the trainer has them")
    net = network(spec.config)
    parts = tuple((t.name, t.weight, t.loss) for t in spec.terms)
    with _Notes() as notes:
        made = trainer.program(net, spec.tuning, spec.optimizer, steps, parts, mesh)
        placed = shardings(TRAIN, mesh, {n: (d.shape, d.axes) for n, d in net.declarations.items()})
        tokens = sum(math.prod(shape) for t in spec.terms for name, shape, _ in t.arrays if name == "valid")
        block = trainer.dispatched(net.parameters, tokens, 0, steps)
        batch = {
            t.name: {
                name: Array(
                    (block, *shape),
                    jnp.dtype(dtype),
                    sharding=TRAIN.sharding(
                        mesh, (block, *shape), ("step", t.loss.axis, *("length",) * (len(shape) - 1)), f"batch {name}"
                    ),
                )
                for name, shape, dtype in t.arrays
            }
            for t in spec.terms
        }
    shapes = {n: shape for n, (shape, _) in adapters.tuned_axes(net, spec.tuning).items()}
    tuned = _described(shapes, jnp.float32, made.tuned_shardings)
    state = jax.tree.map(
        lambda a, s: Array(a.shape, a.dtype, sharding=s), jax.eval_shape(made.start, tuned), made.state_shardings
    )
    weights = jnp.dtype(spec.weights_dtype)
    frozen = _described({n: net.declarations[n].shape for n in made.frozen_shardings}, weights, made.frozen_shardings)
    # What is tuned is a copy, because the step donates it: a fit keeps its base beside.
    base = [Array(net.declarations[n].shape, weights, sharding=placed[n]) for n in tuned if n in placed]
    take: Any = made.take  # jitted, which its type does not say
    data = tuple(ways(batch[t.name]["valid"].sharding, 1) for t in spec.terms)
    own = {n: s for n, s in made.tuned_shardings.items() if n.startswith("lora/")}
    held = {{"full": "weights", "lora": "adapters"}.get(spec.tuning.kind, "tuned"): list(tuned.values())}
    held |= {"weights": held.get("weights", []) + list(frozen.values()), "optimizer": jax.tree.leaves(state)}
    return Program(
        "step", take.lower(tuned, state, frozen, batch), held | {"batch": jax.tree.leaves(batch)}, base,
        block, data, _tensor_ways(net, {**placed, **own}), list(notes.lines),
    )  # fmt: skip


def _adapter(net: Network, tuning: Tuning | None, mesh: Mesh) -> Any:
    """LoRA pairs beside the weights, whole on every device, as the sampler puts them."""
    if tuning is None:
        return None
    whole = replicated(mesh)
    shapes = {n: Array(shape, jnp.float32) for n, (shape, _) in adapters.tuned_axes(net, tuning).items()}
    return jax.tree.map(
        lambda a: Array(a.shape, a.dtype, sharding=whole),
        jax.eval_shape(lambda tuned: adapters.join(tuning, tuned, {})[1], shapes),
    )


def sampling(spec: Sampling, mesh: Mesh) -> tuple[Program, Any]:
    """The prefill, and what makes the decoding loop's program of the prefill's compiled form."""
    net = network(spec.config)
    with _Notes() as notes:
        prefill, decode, placed = sampler.program(net, spec.sampling, mesh)
    rows = NamedSharding(mesh, PartitionSpec(BATCH))
    params = _described({n: d.shape for n, d in net.declarations.items()}, jnp.dtype(spec.weights_dtype), placed)
    # As `sampler.sample` rounds a batch to what the mesh divides.
    data = mesh.shape["replica"] * mesh.shape["fsdp"]
    count = max(data, spec.rows // data * data)
    tokens = Array((count, spec.sampling.prompt), jnp.int32, sharding=rows)
    valid = Array(tokens.shape, jnp.bool_, sharding=rows)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))
    keys = Array(keys.shape, keys.dtype, sharding=rows)
    adapter = _adapter(net, spec.tuning, mesh)
    held = {"weights": list(params.values()), "adapters": jax.tree.leaves(adapter), "batch": [tokens, valid]}
    tensor = _tensor_ways(net, placed) | {name: 1 for name in _lora_parts(spec, net)}
    # Jitted again, because what is jitted stands behind a plain function; the inner one's shardings hold.
    first = jax.jit(lambda *given: prefill(*given)).lower(params, tokens, valid, keys, adapter)
    begun = Program("prefill", first, held, [], 1, (data,), tensor, list(notes.lines))

    def behind(compiled: jax.stages.Compiled) -> Program:
        shapes = jax.eval_shape(prefill, params, tokens, valid, keys, adapter)
        state, cache = jax.tree.map(
            lambda a, s: Array(a.shape, a.dtype, sharding=s), shapes, tuple(compiled.output_shardings)
        )
        loop = jax.jit(lambda *given: decode(*given), donate_argnums=(2,))
        lowered = loop.lower(params, state, cache, keys, adapter)
        parts = {"weights": held["weights"], "adapters": held["adapters"], "cache": jax.tree.leaves(cache)}
        return Program(
            "decode", lowered, parts | {"batch": jax.tree.leaves(state)}, [], 1, (data,), tensor, list(notes.lines)
        )

    return begun, behind


def _lora_parts(spec: Sampling, net: Network) -> list[str]:
    return [n.removeprefix("lora/") for n in adapters.tuned_axes(net, spec.tuning)] if spec.tuning else []
