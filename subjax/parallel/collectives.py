"""The collectives of a compiled program, read from its text: kind, bytes, group, and how often a run executes each.

A scanned layer's collectives stand in the text once, inside a while loop, so they are multiplied by the trip counts of
the loops that hold them. A TPU's compiler spreads one collective over several fusions that overlap with products; these
share a channel, and count as one. Needs no JAX.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_WIDTHS = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "f16": 2,
    "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_COLLECTIVE = re.compile(rf"^(.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|called_computations|true_computation|false_computation)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_WHILE = re.compile(r" while\((.*?)\), condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: one of `KINDS`. dtypes: of its arrays, each once.
        bytes: of the whole arrays, on one device: of an all-gather its result, of a reduce-scatter its operand, of the
            others either.
        groups: devices that take part together, by their place in the mesh: of a permutation its pairs of source and
            target; empty where all do.
        group: devices in a group (0: all of them).
        times: how often one call executes it; loops of unknown length count once.
        bounded: false where such a loop holds it.
        name: where it comes from, as JAX named the operation.
    """

    kind: str
    dtypes: tuple[str, ...]
    bytes: float
    groups: tuple[tuple[int, ...], ...]
    group: int
    times: int
    bounded: bool
    name: str

    def wire(self, devices: int) -> float:
        """Bytes that a device must at least receive in one execution, of a program over so many devices.

        For g devices that share S bytes: S (g-1)/g to gather, to scatter or to exchange; twice that to reduce for all
        (Thakur et al. 2005, section 3); S to permute.
        """
        g = self.group or devices
        if self.kind == "collective-permute":
            return self.bytes
        return self.bytes * (g - 1) / g * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass
class _Computation:
    """Instructions by name, as the text behind "=", and the root's."""

    lines: dict[str, str] = dataclasses.field(default_factory=dict)
    root: str = ""


def _parsed(text: str) -> tuple[dict[str, _Computation], str]:
    """Computations by name, and the name of the entry."""
    found: dict[str, _Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = found[header[2]] = _Computation()
            entry = header[2] if header[1] else entry
        elif current is not None and (instruction := _INSTRUCTION.match(line)):
            current.lines[instruction[2]] = instruction[3]
            if instruction[1]:
                current.root = instruction[3]
    return found, entry


def _operands(text: str) -> list[str]:
    """Names of the operands of an instruction: of "type opcode(%a, %b), attributes"."""
    opened = re.search(r" [\w\-]+\(", text)
    if not opened:
        return []
    depth, end = 1, opened.end()
    while end < len(text) and depth:
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        end += 1
    return re.findall(r"%([\w.\-]+)", text[opened.end() : end - 1])


def _constant(computation: _Computation, name: str) -> int | None:
    """The whole number that an instruction is, through copies; None where it is not a constant."""
    text = computation.lines.get(name, "")
    if number := re.search(r" constant\((-?\d+)\)", text):
        return int(number[1])
    if re.search(r" (?:copy|convert|bitcast)\(", text) and (inputs := _operands(text)):
        return _constant(computation, inputs[0])
    return None


def _trips(text: str, inside: _Computation, found: dict[str, _Computation]) -> int | None:
    """Trip count of a while instruction of the computation `inside`; None where the text does not tell it.

    Where the compiler does not write it down: the loop counts from a constant up to one (`compare(i, n), LT`).
    """
    if known := _TRIPS.search(text):
        return int(known[1])
    loop = _WHILE.search(text)
    if loop is None or loop[2] not in found or loop[3] not in found:
        return None
    condition, body = found[loop[2]], found[loop[3]]
    if " compare(" not in condition.root or "direction=LT" not in condition.root:
        return None
    counter, bound = _operands(condition.root)[:2]
    limit = _constant(condition, bound)
    place = re.search(r"get-tuple-element\(.*\), index=(\d+)", condition.lines.get(counter, ""))
    if limit is None or place is None:
        return None
    at = int(place[1])
    added = _operands(body.lines.get((_operands(body.root) + [""] * (at + 1))[at], ""))
    step = next((value for name in added if (value := _constant(body, name)) is not None), 1)
    outside = _operands(inside.lines.get((_operands(text) or [""])[0], ""))
    first = (_constant(inside, outside[at]) if at < len(outside) else None) or 0
    return max(0, -(-(limit - first) // max(step, 1)))


def _called(text: str) -> Iterator[str]:
    """Computations that an instruction other than a while calls."""
    yield from _CALLED.findall(text)
    if branches := _BRANCHES.search(text):
        yield from re.findall(r"%?([\w.\-]+)", branches[1])


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program's text (`Compiled.as_text()`), in no particular order."""
    found, entry = _parsed(text)
    seen: dict[tuple, Collective] = {}

    def walk(name: str, home: str, times: int, bounded: bool) -> None:
        """Visit a computation; `home` is the loop body, or the entry, that runs it."""
        computation = found[name]
        for label, line in computation.lines.items():
            if loop := _WHILE.search(line):
                trips = _trips(line, computation, found)
                walk(loop[3], loop[3], times * (1 if trips is None else trips), bounded and trips is not None)
                continue
            if match := _COLLECTIVE.match(line):
                one = _collective(match, line, name, times, bounded)
                channel = re.search(r"channel_id=(\d+)", line)
                # Pieces of one chain may lie in loops that it overlaps with: it runs as often as its rarest piece.
                apart = "chain" if "chain_id=" in line else home
                key = (apart, one.kind, one.bytes, channel[1] if channel else (name, label))
                if key not in seen or times < seen[key].times:
                    seen[key] = one
            elif "-done(" not in line.split("metadata=")[0]:
                for called in _called(line):
                    if called in found:
                        walk(called, home, times, bounded)

    walk(entry, entry, 1, True)
    return list(seen.values())


def _collective(match: re.Match, line: str, inside: str, times: int, bounded: bool) -> Collective:
    kind = match[2]
    arrays = [(dtype, dims) for dtype, dims in _ARRAY.findall(match[1]) if dtype in _WIDTHS]
    if match[3] and kind != "all-reduce":  # a started one shows its operands before its results, and flags behind
        arrays = [array for array in arrays if array != ("u32", "")]
        arrays = arrays[len(arrays) // 2 :]
    groups = _groups(line)
    group = len(groups[0]) if groups else 0
    size = sum(_WIDTHS[dtype] * math.prod(map(int, filter(None, dims.split(",")))) for dtype, dims in arrays)
    if kind == "reduce-scatter":
        size *= group or 1
    if kind == "all-reduce" and inside.startswith("all-reduce-scatter"):  # a TPU's form of it, one fusion
        kind = "reduce-scatter"
    named = re.search(r'op_name="([^"]*)"', line)
    dtypes = tuple(dict.fromkeys(dtype for dtype, _ in arrays))
    return Collective(kind, dtypes, size, groups, group, times, bounded, named[1] if named else "")


def _groups(line: str) -> tuple[tuple[int, ...], ...]:
    """Groups from their lists {{0,1},{2,3}}, from [2,2]<=[2,2]T(1,0), or from a mesh and the axes that take part."""
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", line):
        return tuple(tuple(map(int, pair.split(","))) for pair in re.findall(r"\{(\d+,\d+)\}", pairs[1]))
    if lists := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line):
        return tuple(tuple(map(int, part.split(","))) for part in re.findall(r"\{([\d,]+)\}", lists[1]))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, source = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
        order = [int(n) for n in iota[3].split(",")] if iota[3] else list(range(len(source)))
        return _rows(_transposed(source, order), shape[-1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        taking = re.findall(r"'(\w+)'", mesh[2])
        if not set(taking) <= set(axes) or re.search(r"'\w+':", mesh[2]) or "device_ids" in mesh[1]:
            return ()
        names = list(axes)
        order = [i for i, n in enumerate(names) if n not in taking] + [names.index(n) for n in taking]
        return _rows(_transposed(list(axes.values()), order), math.prod(axes[n] for n in taking))
    return ()


def _transposed(shape: Sequence[int], order: Sequence[int]) -> list[int]:
    """0, 1, 2, ... of an array of `shape`, read with its dimensions in another order."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    out = [0]
    for dimension in order:
        out = [place + strides[dimension] * i for place in out for i in range(shape[dimension])]
    return out


def _rows(flat: Sequence[int], width: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(flat[i : i + width]) for i in range(0, len(flat), width))


def by_kind(found: Sequence[Collective]) -> dict[str, tuple[int, float]]:
    """For each kind that occurs: how many are executed in one call, and their bytes together, on one device."""
    return {
        kind: (sum(c.times for c in found if c.kind == kind), sum(c.times * c.bytes for c in found if c.kind == kind))
        for kind in KINDS
        if any(c.kind == kind for c in found)
    }


def received(found: Sequence[Collective], islands: Sequence[int]) -> tuple[float, float]:
    """Bytes that a device must at least receive in one call: over the links of its island, and over the network.

    A group that lies in several islands fetches from the others what it lacks once an island, its members there
    sharing the work. `islands` is the island of each device in the mesh's order.
    """
    fast = slow = 0.0
    for one in found:
        places = [{islands[d] for d in group if d < len(islands)} for group in one.groups] or [set(islands)]
        across = max(map(len, places))
        wire = one.times * one.wire(len(islands))
        if across == 1:
            fast += wire
        else:
            g = one.group or len(islands)
            share = one.bytes * (across - 1) / across / (g / across) * (2 if one.kind == "all-reduce" else 1)
            slow += one.times * (share if one.kind != "collective-permute" else one.bytes)
            fast += max(0.0, wire - one.times * share) if one.kind != "collective-permute" else 0.0
    return fast, slow
