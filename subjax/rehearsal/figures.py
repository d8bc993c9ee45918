"""What one program costs on described hardware: bytes a device, the compiler's word, FLOPs, collectives, a roofline."""

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from subjax.errors import SubjaxError
from subjax.models import costs
from subjax.models.network import network
from subjax.parallel.collectives import by_kind, collectives, received
from subjax.parallel.topology import Topology, islands_of
from subjax.rehearsal.programs import Program, Sampling, Spec, Training, bytes_of, sampling, training
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
        name: "step", "prefill" or "decode".
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
        notes: what could not be shared, a line each.
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

    @property
    def fits(self) -> bool:
        """Whether the program was made, and what lies beside it has room too."""
        return self.compiled and (not self.room or self.needed <= self.room)


def figures(spec: Spec, topology: Topology, mesh: Mesh) -> list[Figures]:
    """Compile the programs of a spec for a mesh of described devices: a step; or a prefill and a decoding loop."""
    islands = islands_of(topology, mesh)
    if isinstance(spec, Training):
        return [_measured(training(spec, mesh), spec, topology, islands)[0]]
    first, behind = sampling(spec, mesh)
    begun, compiled = _measured(first, spec, topology, islands)
    if compiled is None:
        return [begun]
    return [begun, _measured(behind(compiled), spec, topology, islands)[0]]


def _measured(
    program: Program, spec: Spec, topology: Topology, islands: list[int]
) -> tuple[Figures, jax.stages.Compiled | None]:
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
        needed, room = refused(str(error), sum(held.values()) + beside)
        room = room or topology.chip.hbm
        words = " ".join(str(error).split())
        parts = held | ({"temporaries": needed - sum(held.values()) - beside} if needed else {})
        parts |= {"beside": beside} if beside else {}
        flops = sum(sum(part.values()) for part in model_flops(spec, program.name))
        return Figures(
            program.name, parts, needed, room, False, words, flops, {}, False, None, time.monotonic() - started,
            tuple(program.notes),
        ), None  # fmt: skip
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
    work, flops = _work(program, spec, fast, slow)
    room = topology.chip.hbm if topology.chip.platform == "tpu" else int(topology.chip.hbm * GPU_FRACTION)
    roof = roofline(work, topology, spec.config.dtype, spec.config.matmul_precision)
    return Figures(
        program.name, parts, sum(parts.values()), room, True, "", flops, _a_step(by_kind(found), program.steps),
        any(not one.bounded for one in found), roof, seconds, tuple(program.notes),
    ), compiled  # fmt: skip


def _a_step(kinds: dict[str, tuple[int, float]], steps: int) -> dict[str, tuple[int, float]]:
    return {kind: (math.ceil(count / steps), size / steps) for kind, (count, size) in kinds.items()}


def refused(message: str, arguments: int) -> tuple[int, int]:
    """(bytes needed, bytes there) of a compiler that ran out of memory; 0 for what it does not say.

    A TPU's says "the total memory required for HLO temporaries (104.79G) exceeds available HBM (15.75G)", to which the
    arguments come, or "Used 159.94G of 15.75G hbm", which holds them.
    """
    if found := re.search(r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", message):
        return int(float(found[1]) * _UNITS[found[2]]) + arguments, int(float(found[3]) * _UNITS[found[4]])
    if found := re.search(r"[Uu]sed ([\d.]+)([KMGT]?)i?B? of ([\d.]+)([KMGT]?)i?B? hbm", message):
        return int(float(found[1]) * _UNITS[found[2]]), int(float(found[3]) * _UNITS[found[4]])
    return 0, 0


def model_flops(spec: Spec, name: str) -> list[costs.Flops]:
    """FLOPs of one call by part, for each term of an objective; of a decoding loop, of one token a row."""
    config = spec.config
    if isinstance(spec, Training):
        kind, rank, targets = spec.tuning.kind, spec.tuning.rank, spec.tuning.targets
        return [costs.training(config, t.rows, t.length, t.tail, kind, rank, targets) for t in spec.terms]
    lora = costs.lora_matrices(config, spec.tuning.rank, spec.tuning.targets) if spec.tuning else {}
    if name == "prefill":
        return [costs.prefill(config, spec.rows, spec.sampling.prompt, lora)]
    return [costs.decode(config, spec.rows, spec.sampling.prompt + spec.sampling.completion, lora)]


def _work(program: Program, spec: Spec, fast: float, slow: float) -> tuple[Work, float]:
    """What one device does in one call, and the FLOPs of the call on all devices."""
    terms = model_flops(spec, program.name)
    whole = sum(sum(part.values()) for part in terms)
    shared = sum(
        flops / data / program.tensor.get(part, 1)
        for part_flops, data in zip(terms, program.data, strict=True)
        for part, flops in part_flops.items()
    )
    devices = program_devices(program)
    return Work(shared, whole / devices, _traffic(program, spec), fast, slow), whole


def program_devices(program: Program) -> int:
    """Devices of the mesh that a program was lowered for."""
    first = next(array for arrays in program.held.values() for array in arrays)
    return first.sharding.mesh.size


def _traffic(program: Program, spec: Spec) -> float:
    """Bytes that one device must at least read or write in its memory in one call (of decoding: in one token).

    Weights are read in the compute dtype by each pass over them (a gathered one whole, but for its share of `tensor`);
    what is trained and its moments are read and written; a cache is read whole. Activations are left out.
    """
    net, config = network(spec.config), spec.config
    width = jnp.dtype(config.dtype).itemsize
    table = math.prod(net.declarations["embed"].shape) / program.tensor["head"]
    layers = sum(config.layers * n / program.tensor.get(p, 1) for p, n in costs.layer_matrices(config).items())
    passes = (3 if spec.tuning.kind == "full" else 2) if isinstance(spec, Training) else 1
    total = passes * width * (layers + table)
    if isinstance(spec, Training):
        moved: list[str] = [part for part in ("adapters", "tuned", "optimizer") if part in program.held]
        moved += ["weights"] if spec.tuning.kind == "full" else []
        total += 2 * sum(bytes_of(program.held[part]) for part in moved)
    return total + bytes_of(program.held.get("cache", []))


def total_time(spec: Spec, found: Mapping[str, Figures]) -> float | None:
    """Least seconds of one step, or of one batch of rows (its prefill and all its tokens); None where not known."""
    if any(one.roof is None for one in found.values()):
        return None
    times = {name: one.roof.time for name, one in found.items() if one.roof is not None}
    if isinstance(spec, Training):
        return times["step"]
    assert isinstance(spec, Sampling)
    return times["prefill"] + times.get("decode", 0.0) * (spec.sampling.completion - 1)
