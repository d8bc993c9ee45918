"""Names and sizes of a mesh's axes, as they are asked for on the command line; needs no JAX."""

import difflib

from subjax.errors import UsageError

AXES = ("replica", "fsdp", "tensor")
Shape = tuple[int, int, int]  # sizes of (replica, fsdp, tensor)


def parse_mesh(text: str) -> Shape:
    """Sizes of (replica, fsdp, tensor) from text such as "fsdp:4,tensor:2"; an axis that is not named has size 1.

    Raises:
        UsageError: an axis that is unknown (the nearest is named), without a name or named twice, or a size that is
            not a whole number above 0.
    """
    sizes: dict[str, int] = {}
    for piece in text.split(",") if text else ():
        name, _, size = piece.partition(":")
        if not name:
            raise UsageError(f"mesh {text!r}: an axis without a name; give AXIS:N, as in 'fsdp:4,tensor:2'")
        if name not in AXES:
            near = difflib.get_close_matches(name, AXES, 1, 0.0)[0]
            raise UsageError(f"mesh {text!r}: unknown axis {name!r}; did you mean {near!r}?")
        if name in sizes:
            raise UsageError(f"mesh {text!r}: axis {name!r} stands twice; name it once")
        if not size.isdecimal() or int(size) < 1:
            raise UsageError(f"mesh {text!r}: axis {name!r} needs a positive whole number, as in '{name}:4'")
        sizes[name] = int(size)
    return sizes.get("replica", 1), sizes.get("fsdp", 1), sizes.get("tensor", 1)


def shown(shape: Shape) -> str:
    """The axes as they are written on the command line; those of size 1 are left out, unless all are."""
    named = [f"{axis}:{size}" for axis, size in zip(AXES, shape, strict=True) if size > 1]
    return ",".join(named) or "fsdp:1"
