"""What one program costs on described hardware: bytes a device, the compiler's word, FLOPs, collectives, a roofline."""

import dataclasses
import math
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from subjax.errors import SubjaxError, one_line
from subjax.models import costs, flash
from subjax.models.network import network
from subjax.parallel.axes import AXES
from subjax.parallel.collectives import by_kind, collectives, received
from subjax.parallel.topology import Topology, islands_of
from subjax.rehearsal.arrays import bytes_of
from subjax.rehearsal.programs import Program, Spec, Training, sampling, training
from subjax.roofline import Roofline, Work, roofline

# JAX takes this part of a GPU's memory when it starts (its XLA_PYTHON_CLIENT_MEM_FRACTION), so there is no more.
GPU_FRACTION = 0.75
# Tile sizes of products in Triton are found by trying them on a device; where there is none they may not be found.
_OPTIONS: dict[str, Any] = {"cuda": {"xla_gpu_enable_triton_gemm": False}}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Figures:
    """What is known of one compiled program.

    Attributes:
        name: "step", "share", "prefill" or "decode".
        parts: bytes a device: weights, adapters, optimizer, batch and cache as they are laid out; `padding` is what the
            device adds to them; `temporaries` (activations, gradients, gathered weights) and `code` as the compiler
            has them; `beside` what a run keeps there that the program does not take. Empty where `needed` is all that
            the compiler said.
        needed: their sum. room: bytes that a device has for them.
        compiled: whether the compiler made the program. refusal: else its words, on one line.
        flops: of one call of the whole program, in matrix products, on all devices, counted once.
        kinds: collectives of one call by kind: how many, and bytes on a device.
        unbounded: whether some of them stand in a loop whose length is not known, and count once.
        roof: of one call; None where the peaks are not known. seconds: that compiling took.
        notes: what could not be shared, a line each. often: calls for one batch of rows; of a step 1.
    """

    name: str
    parts: dict[str, int]
    needed: int
    room: int
    compiled: bool
    refusal: str
    flops: float
    kinds: dict[str, tuple[int, float]]
    unbounded: bool
    roof: Roofline | None
    seconds: float
    notes: tuple[str, ...]
    often: float = 1.0

    @property
    def fits(self) -> bool:
        """Whether the program was made, and what lies beside it has room too."""
        return self.compiled and (not self.room or self.needed <= self.room)


def figures(spec: Spec, topology: Topology, mesh: Mesh) -> list[Figures]:
    """Compile the programs of a spec for a mesh of described devices, up to the first one that cannot be.

    A step; or the prefix of all prompts where they have one, a prefill and a decoding loop.

    Raises:
        UsageError: the attention asked for does not run on such devices.
    """
    islands = islands_of(topology, mesh)
    if isinstance(spec, Training):
        laid, notes = laid_for(spec, topology, mesh)
        found = _measured(training(laid, mesh), laid, topology, islands)
        return [dataclasses.replace(found, notes=(*notes, *found.notes))]
    all_found = []
    for program in sampling(spec, mesh, limit_of(topology)):
        all_found.append(_measured(program, spec, topology, islands))
        if not all_found[-1].compiled:
            break
    return all_found


def laid_for(spec: Training, topology: Topology, mesh: Mesh) -> tuple[Training, list[str]]:
    """A step with its chats packed for a mesh, and what has to be said of it.

    Raises:
        UsageError: the attention asked for does not run on such devices.
    """
    notes: list[str] = []
    flash.require(spec.config, topology.chip.platform)
    if spec.config.attention == "cudnn":
        notes = ["numerics.attention=cudnn cannot be compiled without cuDNN; rehearsed with numerics.attention=xla"]
        spec = dataclasses.replace(spec, config=dataclasses.replace(spec.config, attention="xla"))
    replica, fsdp, tensor = (mesh.shape[axis] for axis in AXES)
    return spec.laid((replica, fsdp, tensor), limit_of(topology)), notes


def limit_of(topology: Topology) -> int | None:
    """`room_of`, as far as programs are laid out by it: None on CPU, whose memory is not a device's own."""
    return None if topology.chip.platform == "cpu" else room_of(topology)


def room_of(topology: Topology) -> int:
    """Bytes that programs may take of a device."""
    return topology.chip.hbm if topology.chip.platform == "tpu" else int(topology.chip.hbm * GPU_FRACTION)


def _measured(program: Program, spec: Spec, topology: Topology, islands: list[int]) -> Figures:
    """Compile one program and read it."""
    held = {part: bytes_of(arrays) for part, arrays in program.held.items() if arrays}
    beside = bytes_of(program.beside)
    started = time.monotonic()
    try:
        compiled = program.lowered.compile(compiler_options=_OPTIONS.get(topology.chip.platform))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            said = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise SubjaxError(
                f"{program.name}: the compiler for {topology} failed, not for want of memory: {said}"
            ) from error
        taken, room = refused(str(error))
        needed, room = taken + beside if taken else 0, room or room_of(topology)
        words = one_line(error)
        parts = held | ({"temporaries": needed - sum(held.values()) - beside} if needed else {})
        parts |= {"beside": beside} if beside else {}
        flops = _sum(program.work)
        return Figures(
            program.name, parts, needed, room, False, words, flops, {}, False, None, time.monotonic() - started,
            tuple(program.notes), program.often,
        )  # fmt: skip
    seconds = time.monotonic() - started
    memory: Any = compiled.memory_analysis()
    arguments = sum(held.values())
    parts = held | {
        "padding": max(0, memory.argument_size_in_bytes - arguments),
        "temporaries": memory.temp_size_in_bytes + max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
        "code": memory.generated_code_size_in_bytes,
        "beside": beside,
    }
    parts = {part: size for part, size in parts.items() if size}
    found = collectives(compiled.as_text() or "")
    fast, slow = (size / program.steps for size in received(found, islands))
    fetched = sum(one.times * one.bytes for one in found if one.kind in ("all-gather", "collective-permute"))
    work, flops = _work(program, spec, fast, slow, fetched / program.steps)
    room = room_of(topology)
    roof = roofline(work, topology, spec.config.dtype, spec.config.matmul_precision)
    return Figures(
        program.name, parts, sum(parts.values()), room, True, "", flops, _a_step(by_kind(found), program.steps),
        any(not one.bounded for one in found), roof, seconds, tuple(program.notes), program.often,
    )  # fmt: skip


def _a_step(kinds: dict[str, tuple[int, float]], steps: int) -> dict[str, tuple[int, float]]:
    return {kind: (math.ceil(count / steps), size / steps) for kind, (count, size) in kinds.items()}


_REFUSALS = (
    r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
    r"[Uu]sed ([\d.]+)([KMGT]?)i?B? of ([\d.]+)([KMGT]?)i?B? hbm",
)


def refused(message: str) -> tuple[int, int]:
    """(bytes that the program needs, bytes there) of a compiler that ran out of memory; 0 for what it does not say.

    A TPU's says "the total memory required for HLO temporaries (104.79G) exceeds available HBM (15.75G)", or
    "Used 159.94G of 15.75G hbm". Both hold the arguments, whatever the first one's words (a test asks the compiler).
    """
    for words in _REFUSALS:
        if found := re.search(words, message):
            return int(float(found[1]) * _UNITS[found[2]]), int(float(found[3]) * _UNITS[found[4]])
    return 0, 0


def _sum(terms: Iterable[costs.Flops]) -> float:
    return sum(sum(part.values()) for part in terms)


def _work(program: Program, spec: Spec, fast: float, slow: float, fetched: float) -> tuple[Work, float]:
    """What one device does in one call, and the model FLOPs of the call on all devices; `fetched`: see `_traffic`."""
    whole = _sum(program.work)
    shared = sum(
        flops / data / program.tensor.get(part, 1)
        for part_flops, data in zip(program.done, program.data, strict=True)
        for part, flops in part_flops.items()
    )
    devices = program_mesh(program).size
    return Work(shared, whole / devices, _traffic(program, spec, fetched), fast, slow), whole


def program_mesh(program: Program) -> Mesh:
    """The mesh that a program was lowered for."""
    first = next(array for arrays in program.held.values() for array in arrays)
    mesh: Mesh = first.sharding.mesh
    return mesh


def _traffic(program: Program, spec: Spec, fetched: float) -> float:
    """Bytes that one device must at least read or write in its memory in one call (of decoding: in one token).

    Weights are read in the compute dtype by each pass over them, of a training at least the device's own share and what
    it fetched (bytes of all gathers and permutations), and at most all (but for `tensor`'s share); what is trained and
    its moments are read and written; a cache is read whole. Activations are left out.
    """
    net, config = network(spec.config), spec.config
    width = jnp.dtype(config.dtype).itemsize
    table = math.prod(net.declarations["embed"].shape) / program.tensor["head"]
    layers = sum(config.layers * n / program.tensor.get(p, 1) for p, n in costs.layer_matrices(config).items())
    if not isinstance(spec, Training):
        total = width * (layers + (table if program.name != "share" else 0.0))
    else:
        turns, passes = max(t.turns for t in spec.rows), 3 if spec.tuning.kind == "full" else 2
        again = spec.compute.remat == "full" and any(t.packing for t in spec.rows)
        whole = turns * width * (passes * (layers + table) + again * layers)
        total = min(whole, whole / program_mesh(program).shape["fsdp"] + fetched)
        moved: list[str] = [part for part in ("adapters", "tuned", "optimizer") if part in program.held]
        moved += ["weights"] if spec.tuning.kind == "full" else []
        total += 2 * sum(bytes_of(program.held[part]) for part in moved)
    return total + bytes_of(program.held.get("cache", []))


def total_time(found: Mapping[str, Figures]) -> float | None:
    """Least seconds of one step, or of one batch of rows (its prefill and all its tokens); None where not known."""
    if any(one.roof is None for one in found.values()):
        return None
    return sum(one.roof.time * one.often for one in found.values() if one.roof is not None)
