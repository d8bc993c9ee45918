"""The programs that nodes of a plan run, over arrays that are only described.

`training` and `sampling` call the same makers as a run does (`step.program`, `slots.programs`), with the same sharding
rules. A change of what those take is a change here, and nowhere else in the rehearsal.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from subjax.models import adapters, costs
from subjax.models.architecture import DecoderConfig
from subjax.models.network import Network, network
from subjax.parallel.mesh import replicated
from subjax.parallel.rules import COHORT, TRAIN, Rules, shardings
from subjax.rehearsal.arrays import Array, Rows, described, put, ways
from subjax.rehearsal.made_up import Chats, Prompts, packed
from subjax.sample import reading, sampler, slots
from subjax.sample.prefixes import padded
from subjax.schema import Optimizer, Tuning
from subjax.schema_pretrained import Compute
from subjax.train import step, trainer

_KEPT = Compute(remat="none")  # of fixed layouts, whose backward passes compute nothing again


@dataclasses.dataclass(frozen=True)
class Training:
    """A training step.

    Attributes:
        terms: of the objective; `Chats` are packed as the mesh and `compute` want it.
        members: size of a cohort that trains together; None for one model alone.
        compute: what backward passes compute again, and the memory of what gradients need.
    """

    config: DecoderConfig
    weights_dtype: str
    tuning: Tuning
    optimizer: Optimizer
    terms: tuple[Rows | Chats, ...]
    members: int | None = None
    compute: Compute = _KEPT

    def laid(self, mesh: tuple[int, int, int], limit: float | None) -> "Training":
        """With the chats packed for a mesh, whose devices have `limit` bytes (None on CPU).

        Raises:
            UsageError: a chat is longer than the model's context.
        """
        terms = tuple(
            packed(t, self.config, self.compute, mesh, limit, self.members) if isinstance(t, Chats) else t
            for t in self.terms
        )
        return dataclasses.replace(self, terms=terms)

    @property
    def rows(self) -> tuple[Rows, ...]:
        """The terms, packed."""
        assert all(isinstance(t, Rows) for t in self.terms)
        return tuple(t for t in self.terms if isinstance(t, Rows))


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The sampler's programs for `rows` rows at a time; `tuning` where a LoRA lies beside the weights."""

    config: DecoderConfig
    weights_dtype: str
    sampling: sampler.Sampling
    rows: int
    prompts: Prompts
    tuning: Tuning | None = None


Spec = Training | Sampling


@dataclasses.dataclass(frozen=True)
class Program:
    """One program, not yet compiled.

    Attributes:
        name: "step", "share", "prefill" or "decode".
        lowered: what `.compile()` takes for the described devices.
        held: arguments by part (weights, adapters, optimizer state, batch, cache): arrays with their shardings.
        beside: arrays that lie on the devices while it runs and are none of its arguments.
        steps: how many steps one call takes. often: calls for one batch of rows; of a step 1.
        work: model FLOPs of one step, or of one call, by part, for each term of an objective; `done` with what is made
            twice.
        data: devices that share its rows, for each term of an objective.
        tensor: devices that share each part of its FLOPs, by the names of `subjax.models.costs`.
        notes: what could not be shared as the rules wanted, a line each.
    """

    name: str
    lowered: jax.stages.Lowered
    held: dict[str, list[Array]]
    beside: list[Array]
    steps: int
    often: float
    work: list[costs.Flops]
    done: list[costs.Flops]
    data: tuple[int, ...]
    tensor: dict[str, int]
    notes: list[str]


class _Notes(logging.Filter):
    """Keeps to itself what the sharding rules log meanwhile: dimensions that a mesh does not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, None] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Take a record, and let it go no further."""
        self.lines[record.getMessage()] = None
        return False

    def __enter__(self) -> "_Notes":
        logging.getLogger("subjax.parallel.rules").addFilter(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("subjax.parallel.rules").removeFilter(self)


def _tensor_ways(net: Network, placed: Mapping[str, NamedSharding]) -> dict[str, int]:
    """Devices along `tensor` that share each part of a pass, by how its matrix is split."""

    found = {}
    for name, sharding in placed.items():
        if name.startswith("blocks/") and name.endswith("/kernel"):
            found[name.split("/")[-2]] = ways(sharding, "tensor")
        elif name.startswith("lora/"):
            found[name.removeprefix("lora/")] = ways(sharding, "tensor")
    table = "embed" if net.config.tied else "head"
    return found | {"head": ways(placed[table], "tensor"), "scores": found["q"]}


def work(spec: Training, made_twice: bool) -> list[costs.Flops]:
    """FLOPs of one step by part, for each term; without what is made twice, or with it."""
    config, tuning = spec.config, spec.tuning
    found = []
    for term in spec.rows:
        if term.packing is None:
            rows = term.rows * (spec.members or 1)
            found.append(costs.training(config, rows, term.length, term.tail, tuning.kind, tuning.rank, tuning.targets))
            continue
        whole = config.attention == "splash"
        prefix, lines = (0, ((1, term.length),)) if whole else (term.packing.prefix, term.packing.lines)
        flops = costs.packed(
            config, term.rows, term.length, lines, term.tail, tuning.kind, prefix=prefix, rank=tuning.rank,
            lora_targets=tuning.targets, remat=spec.compute.remat if made_twice else "none",
        )  # fmt: skip
        if whole:  # its blocks above the diagonal are left out
            flops["scores"] /= 2
        found.append(flops)
    return found


def training(spec: Training, mesh: Mesh, steps: int = 1000) -> Program:
    """The step of a fit, as `trainer.fit` and `cohort.fit_cohort` call it, for a schedule over `steps` steps.

    `spec` is laid out for the mesh (`Training.laid`).
    """
    net, members = network(spec.config), spec.members
    rules = TRAIN if members is None else COHORT
    parts = tuple((t.name, t.weight, t.loss) for t in spec.rows)
    with _Notes() as notes:
        made = step.program(net, spec.tuning, spec.optimizer, steps, parts, mesh, spec.compute.remat, members)
        placed = shardings(rules, mesh, {n: (d.shape, d.axes) for n, d in net.declarations.items()})
        tokens = sum(math.prod(t.shape("tokens")) for t in spec.rows)
        block = trainer.dispatched(net.parameters, tokens, 0, steps)
        batch = {t.name: _batch(t, block, mesh, rules) for t in spec.rows}
    shapes = {n: shape for n, (shape, _) in adapters.tuned_axes(net, spec.tuning).items()}
    if members is not None:
        shapes = {n: (members, *shape) for n, shape in shapes.items()}
    tuned = described(shapes, jnp.float32, made.tuned_shardings)
    state = put(jax.eval_shape(made.start, tuned), made.state_shardings)
    weights = jnp.dtype(spec.weights_dtype)
    frozen = described({n: net.declarations[n].shape for n in made.frozen_shardings}, weights, made.frozen_shardings)
    # What is tuned is a copy, because the step donates it: a fit keeps its base beside.
    base = [Array(net.declarations[n].shape, weights, sharding=placed[n]) for n in tuned if n in placed]
    take: Any = made.take  # jitted, which its type does not say
    rates = () if members is None else (Array((members,), jnp.float32),)
    data = tuple(ways(batch[t.name]["tokens"].sharding) for t in spec.rows)
    own = {n: s for n, s in made.tuned_shardings.items() if n.startswith("lora/")}
    held = {{"full": "weights", "lora": "adapters"}.get(spec.tuning.kind, "tuned"): list(tuned.values())}
    held |= {"weights": held.get("weights", []) + list(frozen.values()), "optimizer": jax.tree.leaves(state)}
    return Program(
        "step", take.lower(tuned, state, frozen, batch, *rates), held | {"batch": jax.tree.leaves(batch)}, base,
        block, 1.0, work(spec, False), work(spec, True), data, _tensor_ways(net, {**placed, **own}), list(notes.lines),
    )  # fmt: skip


def _batch(term: Rows, block: int, mesh: Mesh, rules: Rules) -> dict[str, Array]:
    """The batches of a block of steps, as `step.place` lays them out."""
    axes = ("step", *term.loss.axes)
    return {
        name: Array(
            (block, *shape),
            jnp.dtype(dtype),
            sharding=rules.sharding(mesh, (block, *shape), (*axes, *("length",) * (1 + len(shape) - len(axes))), name),
        )
        for name, shape, dtype in term.arrays
    }


def _adapter(net: Network, tuning: Tuning | None, mesh: Mesh) -> Any:
    """LoRA pairs beside the weights, whole on every device, as the sampler puts them."""
    if tuning is None:
        return None
    shapes = {n: Array(shape, jnp.float32) for n, (shape, _) in adapters.tuned_axes(net, tuning).items()}
    return put(jax.eval_shape(lambda tuned: adapters.join(tuning, tuned, {})[1], shapes), replicated(mesh))


def sampling(spec: Sampling, mesh: Mesh, limit: float | None) -> Iterator[Program]:
    """What the sampler runs, one program after another: the prefix of all prompts where they have one, a prefill and
    the decoding loop. `limit`: bytes of a device's memory; None on CPU.
    """
    net, ways_of_rows = network(spec.config), mesh.shape["replica"] * mesh.shape["fsdp"]
    all_lanes = spec.prompts.plan(spec.sampling, spec.rows, ways_of_rows, limit is None)
    layout, *others = reading.lanes(all_lanes, reading.at_once(mesh))
    lanes = 1 + len(others)
    calls = lanes * layout.slots / sum(len(chunk.rows) for chunk in all_lanes.chunks)
    bytes_each = jnp.dtype(spec.weights_dtype).itemsize
    apart = slots.apart(mesh, net.parameters * bytes_each / mesh.shape["tensor"], limit)
    with _Notes() as notes:
        made: Any = slots.programs(net, spec.sampling, mesh, bool(layout.prefix), apart)
    params = described({n: d.shape for n, d in net.declarations.items()}, jnp.dtype(spec.weights_dtype), made.params)
    adapter, whole = _adapter(net, spec.tuning, mesh), replicated(mesh)
    lora = costs.lora_matrices(spec.config, spec.tuning.rank, spec.tuning.targets) if spec.tuning else {}
    tensor = _tensor_ways(net, made.params) | dict.fromkeys(lora, 1)
    weights = {"weights": list(params.values()), "adapters": jax.tree.leaves(adapter)}
    held = put(jax.eval_shape(functools.partial(made.begin, layout.slots, layout.columns)), made.held)
    prefix, columns = None, 0

    def program(name, function, given, parts, beside, often, flops, data):
        parts = weights | {part: jax.tree.leaves(arrays) for part, arrays in parts.items()}
        lowered = function.lower(*given)
        return Program(
            name, lowered, parts, jax.tree.leaves(beside), 1, often, [flops], [flops], (data,), tensor,
            list(notes.lines),
        )  # fmt: skip

    if layout.prefix:
        columns = len(padded(layout.prefix, spec.sampling.pad)[0])
        given = (params, *put((Array((columns,), jnp.int32), Array((), jnp.int32)), whole), adapter)
        prefix = put(jax.eval_shape(made.share, *given), made.prefix)
        flops = costs.prefill(spec.config, 1, columns, lora, asked=False)
        yield program("share", made.share, given, {"batch": given[1]}, [held] * lanes, calls, flops, 1)
    width = reading.width_of(layout.chunks[0], spec.sampling)
    tokens, valid = (Array((layout.read, width), dtype, sharding=whole) for dtype in (jnp.int32, jnp.bool_))
    flops = costs.prefill(spec.config, layout.read, width, lora, columns)
    given, reads = (params, prefix, tokens, valid, adapter), len(all_lanes.chunks) * calls
    parts = {"batch": (tokens, valid), "prefix": prefix}
    yield program("prefill", made.prefill, given, parts, [held] * lanes, reads, flops, ways_of_rows)
    state, cache = held
    until = Array((), jnp.int32, sharding=whole)
    read = columns + cache.prompts + cache.drawn.shape[1]
    flops = costs.decode(spec.config, layout.slots, read, lora)
    layers: Any = params
    if apart:  # a copy: prefills read the stacked ones
        layers = put(jax.eval_shape(made.layers, params), made.decoded)
    beside, often = [params if apart else (), [held] * len(others)], lanes * (spec.sampling.completion - 1)
    yield program(
        "decode", made.decode, (layers, prefix, state, cache, until, adapter, None),
        {"batch": state, "cache": cache, "prefix": prefix}, beside, often, flops, ways_of_rows,
    )  # fmt: skip
