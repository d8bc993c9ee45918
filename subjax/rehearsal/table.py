"""A rehearsal in words: one table, what lies on a device, which collectives run, and what the sweep would take."""

import jax

from subjax.overview import quantity
from subjax.parallel.axes import shown
from subjax.parallel.topology import compiler_version
from subjax.rehearsal.arrays import Rows
from subjax.rehearsal.figures import Figures
from subjax.rehearsal.plans import REALISTIC, Rehearsal, Rehearsed
from subjax.rehearsal.programs import Sampling, Training

_HEAD = (
    f"{'node':<9}{'nodes':>6}{'calls':>9}  {'program':<8}{'fits':<5}{'a device':>11}{'FLOPs':>9}{'at least':>11}"
    f"  {'bound':<8}{'MFU to':>7}{'device-hours':>13}"
)


def describe(found: Rehearsal) -> str:
    """The rehearsal as `subjax plan --topology` prints it."""
    topology = found.topology
    devices = f"{topology.size} devices" if topology.size > 1 else "one device"
    lines = [
        f"on {topology} ({devices}), mesh {shown(found.mesh)}; jax {jax.__version__},"
        f" {compiler_version(topology)}; weights are abstract",
        "",
        _HEAD,
    ]
    for one in found.jobs:
        lines += _rows(one, topology.size)
    for at, one in enumerate(found.jobs, 1):
        lines += ["", f"[{at}] {_title(one)}", *_details(one)]
    return "\n".join([*lines, "", *_sweep(found)])


def _title(one: Rehearsed) -> str:
    spec = one.job.spec
    named = f"{one.job.kind}: {one.job.label}" + (f", and {one.job.nodes - 1} more" if one.job.nodes > 1 else "")
    if isinstance(spec, Training):
        what: str = "LoRA" if spec.tuning.kind == "lora" else spec.tuning.kind
        what += f" of {spec.members} together" if spec.members else ""
        terms = (_packed(t) if t.packing else f"{t.rows} rows of {t.length} tokens" for t in spec.rows)
        shape = f"{what}, {' and '.join(terms)}"
        if any(t.packing for t in spec.rows):
            shape += f", remat {spec.compute.remat}"
    else:
        assert isinstance(spec, Sampling)
        shape = f"{spec.rows} rows of {spec.sampling.prompt} + {spec.sampling.completion} tokens"
    return f"{named}; {shape}" + (f" (assumed: {one.job.assumed})" if one.job.assumed else "")


def _packed(term: Rows) -> str:
    turns, each = term.turns, term.rows // term.turns
    packed = f"{each} packed row{'s' if each > 1 else ''} of {term.length} tokens"
    return packed if turns == 1 else f"{turns} turns of {packed}"


def _rows(one: Rehearsed, devices: int) -> list[str]:
    hours = one.seconds * one.job.calls * devices / 3600 if one.seconds is not None else None
    lines = []
    for at, program in enumerate(one.programs):
        first, last = at == 0, at == len(one.programs) - 1
        name = f"{one.job.kind:<9}{one.job.nodes:>6}{one.job.calls:>9}" if first else " " * 24
        least, bound, mfu = "–", "–", "–"
        if roof := program.roof:
            least, bound, mfu = _seconds(roof.time), roof.bound, f"{roof.mfu:.0%}"
        size = gib(program.needed) if program.needed else "?"
        spent = "" if not last else "–" if hours is None else f"{hours:,.2f}"
        lines.append(
            f"{name}  {program.name:<8}{'yes' if program.fits else 'NO':<5}{size:>11}"
            f"{quantity(program.flops).strip():>9}{least:>11}  {bound:<8}{mfu:>7}{spent:>13}"
        )
    return lines


def _details(one: Rehearsed) -> list[str]:
    lines = []
    for program in one.programs:
        lines.append(f"    {program.name}: {_memory(program)}")
        if program.compiled:
            lines.append(f"    {program.name}: {_network(program)}")
        if program.roof:
            roof = program.roof
            lines.append(
                f"    {program.name}: at least {_seconds(roof.compute)} of products, {_seconds(roof.memory)} of memory,"
                f" {_seconds(roof.network)} of network"
            )
    # Both programs of a sampler say the same of its weights.
    for note in dict.fromkeys(note for program in one.programs for note in program.notes):
        lines.append(f"    note: {note}")
    if not one.fits:
        lines.append(f"    {unfit(one)}")
    return lines


def _memory(program: Figures) -> str:
    parts = ", ".join(f"{name} {gib(size)}" for name, size in program.parts.items() if size)
    if program.fits:
        return f"{gib(program.needed)} a device{f' of {gib(program.room)}' if program.room else ''}: {parts}"
    return f"{gib(program.needed) if program.needed else '?'} a device needed, {gib(program.room)} there: {parts}"


def _network(program: Figures) -> str:
    if not program.kinds:
        return "no collectives"
    each = {"decode": "a token", "step": "a step", "share": "a prefix"}.get(program.name, "a reading")
    kinds = ", ".join(f"{kind} {count} ({gib(size)})" for kind, (count, size) in program.kinds.items())
    return f"collectives {each}: {kinds}"


def unfit(one: Rehearsed) -> str:
    """The line for a job that does not fit: bytes needed against bytes there, and what would fit."""
    program = next(p for p in one.programs if not p.fits)
    needs = f"needs {gib(program.needed)} a device" if program.needed else "runs out of memory"
    who = "" if program.compiled else " (the compiler's word)"
    line = f"does not fit: the {program.name} {needs} and there are {gib(program.room)}{who}"
    if one.remedy is None:
        return f"{line}; nothing that was tried would fit, up to sixteen times the devices"
    sure = "compiles" if one.remedy.verified else "is predicted to fit, not compiled"
    return f"{line}; what would fit: {one.remedy.words}, {gib(one.remedy.needed)} a device ({sure})"


def _sweep(found: Rehearsal) -> list[str]:
    if not found.fits:
        return ["sweep: no device-hours, because something does not fit"]
    if any(one.seconds is None for one in found.jobs):
        return [f"sweep: no device-hours, because the peaks of {found.topology.chip.name} are not known"]
    made = sum((one.seconds or 0.0) * one.job.calls for one in found.jobs) * found.topology.size / 3600
    first = found.jobs[0].job.spec.config if found.jobs else None
    read = found.read / found.topology.chip.peak(first.dtype, first.matmul_precision) / 3600 if first else 0.0
    total = made + read
    return [
        f"sweep: at least {total:,.2f} device-hours, at the roofline ({made:,.2f} of training and sampling,"
        f" {read:,.2f} of evaluations by their FLOPs alone); {total / REALISTIC:,.2f} at {REALISTIC:.0%} of it",
    ]


def gib(size: float) -> str:
    """Bytes in a unit that leaves three figures."""
    for unit, worth in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= worth:
            return f"{size / worth:.3g} {unit}" if size / worth < 999.5 else f"{size / worth:,.0f} {unit}"
    return f"{size:.0f} B"


def _seconds(value: float) -> str:
    for unit, worth in (("h", 3600.0), ("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= worth:
            return f"{value / worth:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"
