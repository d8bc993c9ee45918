"""What would make a program fit: cheap changes, estimated by hand, the first promising ones asked of the compiler."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from subjax.errors import UsageError
from subjax.models import costs, quantized
from subjax.models.network import network
from subjax.parallel.axes import shown
from subjax.parallel.topology import Topology, described_mesh, larger
from subjax.rehearsal.arrays import Rows
from subjax.rehearsal.figures import Figures, figures, room_of
from subjax.rehearsal.made_up import Chats
from subjax.rehearsal.programs import Sampling, Spec, Training
from subjax.stages import text_tuning

Sizes = tuple[int, int, int]  # of (replica, fsdp, tensor)
ASKED = 3  # refusals of the compiler before it is asked no more
_LARGER = 4  # how often a topology is doubled in search


@dataclasses.dataclass(frozen=True)
class Remedy:
    """What would fit, in words that name the flag or key; `needed` bytes a device, and whether the compiler says so."""

    words: str
    needed: int
    verified: bool


@dataclasses.dataclass(frozen=True)
class _Candidate:
    words: str
    spec: Spec
    topology: Topology
    sizes: Sizes


def what_would_fit(spec: Spec, topology: Topology, sizes: Sizes, programs: Sequence[Figures]) -> Remedy | None:
    """The first of some changes that is predicted to fit and that the compiler then accepts.

    Tried in this order, the cheapest for a study first: another mesh over the same devices (weights and state over
    more of them); less kept for gradients, and smaller cohorts, which change no study; fewer rows at a time, tensor
    parallelism, more devices. What the compiler needed beyond an estimate is added to those that follow: a part that no
    change so far has moved. After `ASKED` refusals the first that is still predicted to fit stands, unasked. None where
    nothing helped.
    """
    failed = next(one for one in programs if not one.fits)
    room = failed.room or room_of(topology)
    refusals, missed = 0, 0
    for candidate in _candidates(spec, topology, sizes):
        needed = missed + estimate(candidate.spec, candidate.sizes, spec, sizes, failed, topology)
        if needed > room:
            continue
        if refusals == ASKED:
            return Remedy(candidate.words, needed, False)
        try:
            tried = figures(candidate.spec, candidate.topology, described_mesh(candidate.topology, candidate.sizes))
        except UsageError:
            continue
        most = max(one.needed for one in tried)
        if all(one.fits for one in tried):
            return Remedy(candidate.words, most, True)
        refusals, missed = refusals + 1, missed + max(0, most - needed)
    return None


def _candidates(spec: Spec, topology: Topology, sizes: Sizes) -> Iterator[_Candidate]:
    size, slices = topology.size, topology.slices
    # A sampler keeps its weights whole along fsdp, so there only `tensor` shares them out.
    if isinstance(spec, Training):
        meshes = [(slices, size // slices, 1)]
    else:
        meshes = [(size // t, 1, t) for t in _powers(size)]
    for mesh in meshes:
        if mesh != sizes:
            yield _Candidate(f"--mesh={shown(mesh)}", spec, topology, mesh)
    for words, thrifty in _thrifty(spec, topology):
        yield _Candidate(words, thrifty, topology, sizes)
        for mesh in meshes:
            if mesh != sizes:
                yield _Candidate(f"--mesh={shown(mesh)} {words}", thrifty, topology, mesh)
    for fewer in _fewer(spec, sizes[0] * sizes[1]):
        yield _Candidate(_rows_words(fewer), fewer, topology, sizes)
        for mesh in meshes:
            if mesh != sizes:
                yield _Candidate(f"--mesh={shown(mesh)} and {_rows_words(fewer)}", fewer, topology, mesh)
    if isinstance(spec, Training):
        for tensor in _powers(size // slices):
            yield _Candidate(
                f"--mesh={shown((slices, size // slices // tensor, tensor))}", spec, topology,
                (slices, size // slices // tensor, tensor),
            )  # fmt: skip
    wider = topology
    for _ in range(_LARGER):
        wider = larger(wider)
        apart = wider.slices
        mesh = (apart, wider.size // apart, 1) if isinstance(spec, Training) else (apart, 1, wider.size // apart)
        for kept in (spec, *_fewer(spec, 1)):
            words = f"--topology={wider} --mesh={shown(mesh)}"
            yield _Candidate(words if kept is spec else f"{words} and {_rows_words(kept)}", kept, wider, mesh)


def _thrifty(spec: Spec, topology: Topology) -> Iterator[tuple[str, Spec]]:
    """The same study with less kept for gradients, or with fewer students at once."""
    if not isinstance(spec, Training) or not any(isinstance(t, Chats) for t in spec.terms):
        return
    full = dataclasses.replace(spec.compute, remat="full")
    recomputed = ("--config.compute.remat=full", dataclasses.replace(spec, compute=full))
    if spec.compute.remat != "full":
        yield recomputed
    budget = text_tuning.activations(spec.compute, room_of(topology) or None) / text_tuning.GIB
    for part in (2, 4, 8):
        for words, base in (("", spec), recomputed):
            compute = dataclasses.replace(base.compute, activations_gib=round(budget / part, 2))
            flag = f"--config.compute.activations_gib={compute.activations_gib:g}"
            yield f"{words} {flag}".strip(), dataclasses.replace(base, compute=compute)
    members = (spec.members or 1) // 2
    while members:
        fewer = dataclasses.replace(recomputed[1], members=members if members > 1 else None)
        yield f"{recomputed[0]} --config.compute.cohort={members}", fewer
        members //= 2


def _powers(most: int) -> list[int]:
    return [2**i for i in range(1, most.bit_length()) if most % 2**i == 0]


def _rows_of(spec: Spec) -> int:
    if isinstance(spec, Sampling):
        return spec.rows
    return spec.terms[0].batch if isinstance(spec.terms[0], Chats) else spec.terms[0].rows


def _rows_words(spec: Spec) -> str:
    if isinstance(spec, Sampling):
        return f"corpus.batch={spec.rows} (the corpus does not depend on it)"
    return f"batch={_rows_of(spec)} rows a step (another study: the batch is part of it)"


def _fewer(spec: Spec, data: int) -> Iterator[Spec]:
    """The same with a half, a quarter, ... of the rows, as long as every device that shares them has one."""
    rows = _rows_of(spec) // 2
    while rows >= max(data, 1):
        yield with_rows(spec, rows)
        rows //= 2


def with_rows(spec: Spec, rows: int) -> Spec:
    """A spec with other rows at a time; of an objective with several terms, all in the same proportion."""
    if isinstance(spec, Sampling):
        return dataclasses.replace(spec, rows=rows)
    before = _rows_of(spec)
    terms: list[Rows | Chats] = []
    for term in spec.terms:
        if isinstance(term, Chats):
            terms.append(dataclasses.replace(term, batch=rows))
            continue
        count, at = term.rows, term.loss.axes.index("batch") if "batch" in term.loss.axes else None
        if at is not None:
            count = max(1, term.rows * rows // before)
        arrays = tuple((n, (*s[:at], count, *s[at + 1 :]) if at is not None else s, d) for n, s, d in term.arrays)
        terms.append(dataclasses.replace(term, rows=count, arrays=arrays))
    return dataclasses.replace(spec, terms=tuple(terms))


def estimate(spec: Spec, sizes: Sizes, before: Spec, before_sizes: Sizes, failed: Figures, topology: Topology) -> int:
    """Bytes a device that a changed program would need, from what the compiler said of the one that did not fit.

    Weights, state and caches are counted; gradients too. The rest of its temporaries is taken for activations, which
    go with the rows that a device has at a time and what is kept of their tokens, and, for the part that is split
    there, with `tensor`.
    """
    held, grads = _held(spec, sizes)
    held_before, grads_before = _held(before, before_sizes)
    said = failed.needed or held_before + grads_before
    activations = max(0.0, said - held_before - grads_before)
    share = _kept_on_a_device(spec, sizes, topology) / _kept_on_a_device(before, before_sizes, topology)
    split = (1 + before_sizes[2] / sizes[2]) / 2  # about half of a layer's activations are split along tensor
    return int(held + grads + activations * share * (split if sizes[2] > before_sizes[2] else 1.0))


def _kept_on_a_device(spec: Spec, sizes: Sizes, topology: Topology) -> float:
    """Of packed chats what is kept for gradients at a time, before it is split along tensor; else rows."""
    if isinstance(spec, Training) and any(isinstance(t, Chats) for t in spec.terms):
        laid = spec.laid(sizes, room_of(topology) or None)
        each = math.ceil((spec.members or 1) / sizes[0])
        return sum(each * t.length * spec.config.kept_bytes(spec.compute.remat, 0) for t in laid.rows if t.packing)
    data, rows = sizes[0] * sizes[1], _rows_of(spec)
    return rows / data if rows % data == 0 else rows  # rows that a mesh does not divide are kept whole


def _held(spec: Spec, sizes: Sizes) -> tuple[float, float]:
    """(bytes of weights, state and cache, bytes of gradients) on one device, matrices taken to split evenly."""
    config = spec.config
    parameters = network(config).parameters
    width = 2 if spec.weights_dtype == "bfloat16" else 4
    replica, fsdp, tensor = sizes
    if isinstance(spec, Sampling):
        slots = spec.sampling.prompt + spec.sampling.completion
        entry = quantized.bytes_a_number(spec.sampling.cache_dtype, config.head_dim)
        keys = config.kv_heads / (tensor if config.kv_heads % tensor == 0 else 1)
        rows = max(1, math.ceil(spec.rows / (replica * fsdp)))
        return parameters * width / tensor + 2.0 * config.layers * rows * slots * keys * config.head_dim * entry, 0.0
    shared = fsdp * tensor
    if spec.tuning.kind == "full":
        return parameters * (12 + width) / shared, 4 * parameters / shared  # masters and two moments, and the base
    tuned = sum(costs.lora_matrices(config, spec.tuning.rank, spec.tuning.targets).values()) * config.layers
    tuned *= math.ceil((spec.members or 1) / replica) * (spec.tuning.kind == "lora")
    # A LoRA's pairs are split along one of their two sides, in part.
    return parameters * width / shared + 12.0 * tuned, 4.0 * tuned
