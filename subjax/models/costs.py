"""Floating-point operations of training and sampling steps, counted from the architecture. Needs no JAX.

Compilers count a scanned layer once, whatever its depth, so these are counted by hand: 2 a multiply-add, in matrix
products alone. Attention counts every key that a query is multiplied with, masked or not, as the programs do. Work is
kept by part, because parts are shared between devices in different ways: a key matrix of four heads does not split
eight ways.

For a frozen matrix of N scalars a token costs 2N forward and 2N backward (its input's gradient); its own gradient, 2N
more, is only computed where it is trained: 4N and 6N. A LoRA pair of n scalars costs 6n on top.
"""

from collections.abc import Collection, Mapping

from subjax.models.architecture import DecoderConfig

# Parts: the matrices of a layer by their names, "scores" (both products of attention), "head" (the output matrix), and
# LoRA's "q/a", "q/b" and so on.
Flops = dict[str, float]


def layer_matrices(config: DecoderConfig) -> dict[str, int]:
    """Scalars of each matrix of one layer, by name."""
    heads = config.heads * config.head_dim
    keys = config.kv_heads * config.head_dim
    found = {"q": config.width * heads, "k": config.width * keys, "v": config.width * keys, "o": heads * config.width}
    names = ("gate", "up", "down") if config.gated else ("up", "down")
    return found | dict.fromkeys(names, config.width * config.hidden)


def lora_matrices(config: DecoderConfig, rank: int, targets: Collection[str]) -> dict[str, int]:
    """Scalars of each matrix of one layer's LoRA pairs: "q/a" (inputs x rank) and "q/b" (rank x outputs)."""
    heads, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    sides = {
        "q": (config.width, heads), "k": (config.width, keys), "v": (config.width, keys), "o": (heads, config.width),
        "gate": (config.width, config.hidden), "up": (config.width, config.hidden),
        "down": (config.hidden, config.width),
    }  # fmt: skip
    there = [name for name in targets if name in layer_matrices(config)]
    return {f"{n}/{side}": rank * sides[n][at] for n in there for at, side in enumerate("ab")}


def forward(
    config: DecoderConfig, rows: int, length: int, tail: int | None = None, lora: Mapping[str, int] | None = None
) -> Flops:
    """A forward pass over `rows` rows of `length` tokens, with logits at the last `tail` (None: all).

    Where only a tail is asked for, the last layer's keys and values are made of all tokens and all else of it of the
    tail, as `Network.forward` does.
    """
    tail = length if tail is None else tail
    tokens, late = rows * length, rows * tail
    scores = 4.0 * length * config.heads * config.head_dim
    found: Flops = {"scores": scores * (tokens * (config.layers - 1) + late), "head": 2.0 * late * _head(config)}
    for name, size in {**layer_matrices(config), **(lora or {})}.items():
        last = tokens if name.partition("/")[0] in ("k", "v") else late
        found[name] = 2.0 * size * (tokens * (config.layers - 1) + last)
    return found


def _head(config: DecoderConfig) -> int:
    return config.vocab * config.width


def training(
    config: DecoderConfig, rows: int, length: int, tail: int | None, kind: str, rank: int = 0,
    targets: Collection[str] = (), recomputed: bool = False,
) -> Flops:  # fmt: skip
    """One step's forward and backward pass over `rows` rows of `length` tokens that go in.

    Args:
        config: the architecture. rows, length, tail: as `forward` has them.
        kind: what is trained, as `Tuning.kind` has it; `rank` and `targets` of LoRA.
        recomputed: whether the backward pass makes the layers' values again. What is made twice is no progress: leave
            it out of MFU, and count it for the time.
    """
    lora = lora_matrices(config, rank, targets) if kind == "lora" else {}
    once = forward(config, rows, length, tail, lora)
    found = {}
    for name, flops in once.items():
        # Both operands of a product of attention have gradients, whatever is trained.
        trained = name == "scores" or name in lora or kind == "full"
        found[name] = flops * ((3 if trained else 2) + (1 if recomputed and name != "head" else 0))
    return found


def packed(
    config: DecoderConfig, rows: int, length: int, lines: Collection[tuple[int, int]], targets: int, kind: str, *,
    prefix: int = 0, rank: int = 0, lora_targets: Collection[str] = (), remat: str = "none",
) -> Flops:  # fmt: skip
    """One step's forward and backward pass over packed rows.

    Args:
        rows, length: packed rows, of all turns and members, and their tokens, what all chats begin with and padding
            counted.
        lines: (lines of attention in a row, places of each), group by group: a chat's own behind `prefix` shared
            tokens; of a kernel that takes a row as it is, one line of all its tokens.
        targets: tokens of a row with a loss; the output matrix's part is never computed again.
        kind, rank, lora_targets: as `training` has them.
        remat: what the backward pass computes again (`subjax.models.remat`); "none" counts what is progress.
    """
    lora = lora_matrices(config, rank, lora_targets) if kind == "lora" else {}
    tokens = rows * length
    pairs = rows * (sum(count * places * (prefix + places) for count, places in lines) + prefix * prefix)
    found: Flops = {}
    for name, size in {**layer_matrices(config), **lora}.items():
        passes = (3 if name in lora or kind == "full" else 2) + (remat == "full")
        found[name] = 2.0 * size * tokens * config.layers * passes
    found["scores"] = 4.0 * pairs * config.heads * config.head_dim * config.layers * (3 + (remat != "none"))
    found["head"] = 2.0 * rows * targets * _head(config) * (3 if kind == "full" else 2)
    return found


def prefill(
    config: DecoderConfig, rows: int, length: int, lora: Mapping[str, int] | None = None, prefix: int = 0,
    asked: bool = True,
) -> Flops:  # fmt: skip
    """A prompt's pass over all layers, behind a `prefix` of all rows, with logits at the last token alone; of a prefix
    itself none are `asked`.
    """
    found = forward(config, rows, length, None, lora)
    found["scores"] *= (prefix + length) / length
    return {**found, "head": 2.0 * rows * _head(config) if asked else 0.0}


def decode(config: DecoderConfig, rows: int, slots: int, lora: Mapping[str, int] | None = None) -> Flops:
    """One token a row behind a cache of `slots` slots, all of which are read."""
    found: Flops = {
        name: 2.0 * rows * config.layers * n for name, n in {**layer_matrices(config), **(lora or {})}.items()
    }
    found["scores"] = 4.0 * rows * slots * config.heads * config.head_dim * config.layers
    found["head"] = 2.0 * rows * _head(config)
    return found
