"""FLOPs counted from the architecture: by hand for one small model, and against XLA's count of programs without loops.

XLA counts a scanned layer once whatever the depth, and element-wise operations too. So models here have as many layers
as make their scans one iteration long, and the two agree within 2 %, the element-wise part.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from subjax.data.packed import PackedChats
from subjax.models import adapters, cached, costs
from subjax.models.families import decoder_config
from subjax.models.network import network
from subjax.schema import Numerics, Tuning
from subjax.train.losses import PackedNextToken
from subjax.train.step import Bound

ROWS, LENGTH, TAIL = 4, 64, 16
CONFIG = dataclasses.replace(
    decoder_config("llama", "tiny", vocab=512, length=256, numerics=Numerics()),
    width=256, heads=4, kv_heads=2, head_dim=64, hidden=512, layers=2,
)  # fmt: skip


def test_forward_by_hand():
    """Two rows of eight tokens, three asked for, through two layers of width 4: two heads of 2, one of keys, hidden 6.

    A layer's matrices: q 4x4 = 16, k and v 4x2 = 8 each, o 16, gate, up and down 24 each. The first layer sees 16
    tokens; the last makes keys and values of 16 and all else of 6. Scores: 2 products x 2 a multiply-add x 8 keys x
    (2 heads x 2) = 128 a query, of 16 + 6 queries. Output: 2 x 10 x 4 a token asked for.
    """
    config = dataclasses.replace(CONFIG, vocab=10, width=4, heads=2, kv_heads=1, head_dim=2, hidden=6, layers=2)
    assert costs.forward(config, 2, 8, 3) == {
        "q": 2 * 16 * (16 + 6), "k": 2 * 8 * (16 + 16), "v": 2 * 8 * (16 + 16), "o": 2 * 16 * (16 + 6),
        "gate": 2 * 24 * (16 + 6), "up": 2 * 24 * (16 + 6), "down": 2 * 24 * (16 + 6),
        "scores": 128 * (16 + 6), "head": 2 * 10 * 4 * 6,
    }  # fmt: skip


def test_what_is_trained_costs_its_own_gradient():
    """A frozen matrix: 2 passes (4N a token); a trained one: 3 (6N); attention's products: 3, whatever is trained."""
    once = costs.forward(CONFIG, ROWS, LENGTH)
    full = costs.training(CONFIG, ROWS, LENGTH, None, "full")
    assert full == {name: 3 * flops for name, flops in once.items()}
    frozen = costs.training(CONFIG, ROWS, LENGTH, None, "bias-and-gain")
    assert frozen == {name: (3 if name == "scores" else 2) * flops for name, flops in once.items()}
    lora = costs.training(CONFIG, ROWS, LENGTH, None, "lora", 8, ("q", "down"))
    # 6n a token: q/a is 256 x 8, q/b 8 x 256, down/a 512 x 8, down/b 8 x 256, in two layers.
    added = {"q/a": 2048, "q/b": 2048, "down/a": 4096, "down/b": 2048}
    assert lora == frozen | {name: 6 * n * 2 * ROWS * LENGTH for name, n in added.items()}
    again = costs.training(CONFIG, ROWS, LENGTH, None, "full", recomputed=True)
    assert again == {name: (3 if name == "head" else 4) * flops for name, flops in once.items()}


def test_six_n_of_the_parameters():
    """Short rows of a long model come to 6 FLOPs a token a matrix scalar."""
    config = dataclasses.replace(CONFIG, layers=64)
    flops = sum(costs.training(config, 1, 8, None, "full").values())
    assert flops == pytest.approx(6 * 8 * config.matrices, rel=0.03)


def counted(function, *shapes) -> float:
    return jax.jit(function).lower(*shapes).cost_analysis()["flops"]


TOKENS = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32), jax.ShapeDtypeStruct((ROWS, LENGTH), bool)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_training_as_xla_counts_it(kind):
    net, tuning = network(CONFIG), Tuning(kind=kind)
    shapes = {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, (shape, _) in adapters.tuned_axes(net, tuning).items()}
    frozen = {n: value for n, value in net.abstract().items() if n not in shapes}

    def loss(tuned, frozen, tokens, valid):
        params, adapter = adapters.join(tuning, tuned, frozen)
        return jnp.square(net.forward(params, tokens, valid, tail=TAIL, adapter=adapter)).sum()

    ours = sum(costs.training(CONFIG, ROWS, LENGTH, TAIL, kind, tuning.rank, tuning.targets).values())
    assert counted(jax.value_and_grad(loss), shapes, frozen, *TOKENS) == pytest.approx(ours, rel=0.02)


def test_packed_by_hand():
    """Two packed rows of 40 tokens: 4 with which all begin, three lines of 12 more. Scores: of each line's 12 queries
    16 keys, and of the beginning's 4 queries 4; 2 products x 2 a multiply-add x 256 a pair. Targets: 9 a row.
    """
    flops = costs.packed(CONFIG, 2, 40, [(3, 12)], 9, "bias-and-gain", prefix=4)
    scores = 4 * 256 * 2 * (3 * 12 * 16 + 4 * 4) * 2
    assert flops["scores"] == 3 * scores
    assert flops["q"] == 2 * 2 * 256 * 256 * 2 * 40 * 2
    assert flops["head"] == 2 * 2 * 512 * 256 * 2 * 9
    dots = costs.packed(CONFIG, 2, 40, [(3, 12)], 9, "bias-and-gain", prefix=4, remat="dots")
    assert dots == flops | {"scores": 4 * scores}
    full = costs.packed(CONFIG, 2, 40, [(3, 12)], 9, "bias-and-gain", prefix=4, remat="full")
    assert full == {n: f if n == "head" else f * 4 / 3 if n == "scores" else f * 3 / 2 for n, f in flops.items()}
    trained = costs.packed(CONFIG, 2, 40, [(3, 12)], 9, "full", prefix=4)
    assert trained == {n: f if n == "scores" else f * 3 / 2 for n, f in flops.items()}


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_packed_rows_as_xla_counts_them(kind, remat):
    """Layers alone: the output matrix's scan is counted once whatever its chunks, so there is one chunk here."""
    config = dataclasses.replace(CONFIG, layers=1)
    net, tuning = network(config), Tuning(kind=kind)
    chats = [((0,) * 16 + (1 + i,) * 8, (0,) * 8) for i in range(8)]
    stream = PackedChats(chats, seed=0, batch=8, steps=1, rows=2, grain=16)
    batch, layout = {name: array[0] for name, array in stream(0).items()}, stream.layout
    shapes = {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, (shape, _) in adapters.tuned_axes(net, tuning).items()}
    frozen = {n: value for n, value in net.abstract().items() if n not in shapes}

    def loss(tuned, frozen, batch):
        params, adapter = adapters.join(tuning, tuned, frozen)
        model = Bound(net, params, adapter, None, remat)
        return PackedNextToken(layout.prefix, layout.lines)(model, batch)

    (rows, length), targets = batch["tokens"].shape, batch["targets"].shape[1]
    ours = costs.packed(
        config, rows, length, layout.lines, targets, kind, prefix=layout.prefix, rank=tuning.rank,
        lora_targets=tuning.targets, remat=remat,
    )  # fmt: skip
    assert counted(jax.value_and_grad(loss), shapes, frozen, batch) == pytest.approx(sum(ours.values()), rel=0.06)


def test_sampling_as_xla_counts_it():
    config = dataclasses.replace(CONFIG, layers=1)
    net = network(config)
    prefill = lambda params, tokens, valid: cached.prefill(net, params, tokens, valid)  # noqa: E731
    ours = sum(costs.prefill(config, ROWS, LENGTH).values())
    assert counted(prefill, net.abstract(), *TOKENS) == pytest.approx(ours, rel=0.02)
    cache = jax.eval_shape(lambda: cached.empty(net, ROWS, LENGTH, 8, "float32"))
    token = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    step = lambda params, token, cache: cached.step(net, params, token, cache)  # noqa: E731
    ours = sum(costs.decode(config, ROWS, LENGTH + 8).values())
    assert counted(step, net.abstract(), token, cache) == pytest.approx(ours, rel=0.02)
    prefix = jax.eval_shape(
        lambda params, tokens: cached.prefix_of(net, params, tokens, jnp.int32(30)), net.abstract(),
        jax.ShapeDtypeStruct((32,), jnp.int32),
    )  # fmt: skip
    behind = lambda params, tokens, valid, prefix: cached.prefill(net, params, tokens, valid, prefix=prefix)  # noqa: E731
    ours = sum(costs.prefill(config, ROWS, LENGTH, prefix=32).values())
    assert counted(behind, net.abstract(), *TOKENS, prefix) == pytest.approx(ours, rel=0.02)
