"""What would make a program fit: cheap changes, estimated by hand, the first promising ones asked of the compiler."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from subjax.errors import UsageError
from subjax.models.network import network
from subjax.parallel.mesh import AXES
from subjax.parallel.topology import Topology, described_mesh, larger
from subjax.rehearsal.figures import Figures, figures
from subjax.rehearsal.programs import Sampling, Spec, Training

ASKED = 3  # candidates that the compiler is asked of
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
    sizes: tuple[int, int, int]


def what_would_fit(
    spec: Spec, topology: Topology, sizes: tuple[int, int, int], programs: Sequence[Figures]
) -> Remedy | None:
    """The first of some changes that is predicted to fit and that the compiler then accepts.

    Tried in this order, the cheapest for a study first: another mesh over the same devices (weights and state over
    more of them), fewer rows at a time, tensor parallelism, more devices. None where nothing helped.
    """
    failed = next(one for one in programs if not one.fits)
    room = failed.room or topology.chip.hbm
    asked, guess = 0, None
    for candidate in _candidates(spec, topology, sizes):
        if estimate(candidate.spec, candidate.sizes, spec, sizes, failed) > room:
            continue
        guess = guess or Remedy(candidate.words, estimate(candidate.spec, candidate.sizes, spec, sizes, failed), False)
        if asked == ASKED:
            break
        asked += 1
        try:
            tried = figures(candidate.spec, candidate.topology, described_mesh(candidate.topology, candidate.sizes))
        except UsageError:
            continue
        if all(one.fits for one in tried):
            return Remedy(candidate.words, max(one.needed for one in tried), True)
    return guess


def _named(sizes: tuple[int, int, int]) -> str:
    return ",".join(f"{a}:{s}" for a, s in zip(AXES, sizes, strict=True) if s > 1) or "fsdp:1"


def _candidates(spec: Spec, topology: Topology, sizes: tuple[int, int, int]) -> Iterator[_Candidate]:
    size, slices = topology.size, topology.slices
    # A sampler keeps its weights whole along fsdp, so there only `tensor` shares them out.
    if isinstance(spec, Training):
        meshes = [(slices, size // slices, 1)]
    else:
        meshes = [(size // t, 1, t) for t in _powers(size)]
    for mesh in meshes:
        if mesh != sizes:
            yield _Candidate(f"--mesh={_named(mesh)}", spec, topology, mesh)
    for fewer in _fewer(spec, sizes[0] * sizes[1]):
        yield _Candidate(_rows_words(fewer), fewer, topology, sizes)
        for mesh in meshes:
            if mesh != sizes:
                yield _Candidate(f"--mesh={_named(mesh)} and {_rows_words(fewer)}", fewer, topology, mesh)
    if isinstance(spec, Training):
        for tensor in _powers(size // slices):
            yield _Candidate(
                f"--mesh={_named((slices, size // slices // tensor, tensor))}", spec, topology,
                (slices, size // slices // tensor, tensor),
            )  # fmt: skip
    wider = topology
    for _ in range(_LARGER):
        wider = larger(wider)
        mesh = (slices, wider.size // slices, 1) if isinstance(spec, Training) else (1, 1, wider.size)
        for kept in (spec, *_fewer(spec, 1)):
            words = f"--topology={wider} --mesh={_named(mesh)}"
            yield _Candidate(words if kept is spec else f"{words} and {_rows_words(kept)}", kept, wider, mesh)


def _powers(most: int) -> list[int]:
    return [2**i for i in range(1, most.bit_length()) if most % 2**i == 0]


def _rows_of(spec: Spec) -> int:
    return spec.rows if isinstance(spec, Sampling) else spec.terms[0].rows


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
    terms = []
    for term in spec.terms:
        count = max(1, term.rows * rows // before) if term.loss.axis == "batch" else term.rows
        arrays = tuple((n, (count, *shape[1:]), dtype) for n, shape, dtype in term.arrays)
        terms.append(dataclasses.replace(term, rows=count, arrays=arrays))
    return dataclasses.replace(spec, terms=tuple(terms))


def estimate(
    spec: Spec, sizes: tuple[int, int, int], before: Spec, before_sizes: tuple[int, int, int], failed: Figures
) -> int:
    """Bytes a device that a changed program would need, from what the compiler said of the one that did not fit.

    Weights, state and caches are counted; gradients too. The rest of its temporaries is taken for activations, which
    go with the rows that a device has, and, for the part that is split there, with `tensor`.
    """
    held, grads = _held(spec, sizes)
    held_before, grads_before = _held(before, before_sizes)
    said = failed.needed or held_before + grads_before
    activations = max(0.0, said - held_before - grads_before)
    share = _rows_on_a_device(spec, sizes) / _rows_on_a_device(before, before_sizes)
    split = (1 + before_sizes[2] / sizes[2]) / 2  # about half of a layer's activations are split along tensor
    return int(held + grads + activations * share * (split if sizes[2] > before_sizes[2] else 1.0))


def _rows_on_a_device(spec: Spec, sizes: tuple[int, int, int]) -> float:
    data, rows = sizes[0] * sizes[1], _rows_of(spec)
    return rows / data if rows % data == 0 else rows  # rows that a mesh does not divide are kept whole


def _held(spec: Spec, sizes: tuple[int, int, int]) -> tuple[float, float]:
    """(bytes of weights, state and cache, bytes of gradients) on one device, matrices taken to split evenly."""
    config = spec.config
    parameters = network(config).parameters
    width = 2 if spec.weights_dtype == "bfloat16" else 4
    replica, fsdp, tensor = sizes
    if isinstance(spec, Sampling):
        slots = spec.sampling.prompt + spec.sampling.completion
        entry = 2 if spec.sampling.cache_dtype == "bfloat16" else 4
        keys = config.kv_heads / (tensor if config.kv_heads % tensor == 0 else 1)
        rows = max(1, math.ceil(spec.rows / (replica * fsdp)))
        return parameters * width / tensor + 2.0 * config.layers * rows * slots * keys * config.head_dim * entry, 0.0
    shared = fsdp * tensor
    if spec.tuning.kind == "full":
        return parameters * (12 + width) / shared, 4 * parameters / shared  # masters and two moments, and the base
    return parameters * width / shared, 0.0
