"""Packed rows: the same losses and gradients as chats alone, whatever the packing; and no token lost or mixed."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_rows import CONFIGS, LOCAL, ROTARY, chats_of, made_up, parameters

from subjax.data import packing
from subjax.data.addressing import order
from subjax.data.packed import GROUPS, LENGTHS, PackedChats, common_prefix, grouped
from subjax.data.packing import tokens_of
from subjax.errors import UsageError
from subjax.models import adapters, flash
from subjax.models.network import network
from subjax.models.packed import Packing
from subjax.parallel.mesh import make_mesh
from subjax.schema import Optimizer, Tuning
from subjax.train import trainer
from subjax.train.cross_entropy import CPU_CHUNK, Head, chunk_of, cross_entropy, logits_at_a_time
from subjax.train.losses import NextToken, PackedNextToken
from subjax.train.step import Bound
from subjax.train.trainer import Term

pytestmark = pytest.mark.usefixtures("quick_compiles")


def padded(chats, pad: int = 0):
    """The chats one a row, as losses of fixed layouts take them."""
    before, after = (max(len(chat[side]) for chat in chats) for side in (0, 1))
    tokens, valid = np.full((len(chats), before + after), pad, np.int32), np.zeros((len(chats), before + after), bool)
    for row, (prompt, answer) in enumerate(chats):
        tokens[row, before - len(prompt) : before + len(answer)] = [*prompt, *answer]
        valid[row, before - len(prompt) : before + len(answer)] = True
    return {"tokens": tokens, "valid": valid}, after


def loss_of(net, tuning, stream, remat="none"):
    """(tuned, frozen) to the loss of the stream's step 0 over all turns."""
    batch = stream(0)
    loss = PackedNextToken(stream.layout.prefix, stream.layout.lines)

    def whole(tuned, frozen):
        params, adapter = adapters.join(tuning, tuned, frozen)
        model = Bound(net, params, adapter, None, remat)
        return jax.lax.map(lambda turn: loss(model, turn), batch).sum()

    return whole


def split(net, kind: str):
    tuning = Tuning(kind=kind, rank=3, alpha=6.0)
    params = parameters(net)
    tuned = adapters.init_tuned(net, tuning, params, jax.random.key(0))
    draw = np.random.default_rng(5)  # B is zero at first, and A would have no gradient
    tuned = {n: v + 0.2 * draw.normal(size=v.shape).astype(np.float32) if "lora" in n else v for n, v in tuned.items()}
    return tuning, tuned, adapters.frozen_part(net, tuning, params)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("kind", "layout"),
    [("full", {}), ("lora", {"rows": 2, "turns": 3}), ("lora", {"share_prefix": False, "rows": 2})],
)
def test_loss_and_gradient_are_those_of_chats_one_a_row(name, kind, layout):
    net, chats = network(CONFIGS[name]), made_up(9)
    tuning, tuned, frozen = split(net, kind)
    rows, completion = padded(chats)

    def alone(tuned, frozen):
        params, adapter = adapters.join(tuning, tuned, frozen)
        return NextToken(completion)(Bound(net, params, adapter, None, "none"), rows)

    stream = PackedChats(chats, seed=0, batch=len(chats), steps=1, **layout)
    loss, gradient = jax.jit(jax.value_and_grad(loss_of(net, tuning, stream)))(tuned, frozen)
    expected, by_row = jax.jit(jax.value_and_grad(alone))(tuned, frozen)
    assert float(loss) == pytest.approx(float(expected), rel=2e-6)
    largest = max(float(jnp.abs(g).max()) for g in by_row.values())
    assert largest > 0.01
    for part, value in by_row.items():
        np.testing.assert_allclose(gradient[part], value, atol=3e-6 * largest, rtol=2e-4, err_msg=part)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_what_is_computed_again_changes_no_gradient(remat):
    net, chats = network(LOCAL), made_up(5)
    tuning, tuned, frozen = split(net, "lora")
    stream = PackedChats(chats, seed=0, batch=5, steps=1)
    kept = jax.jit(jax.grad(loss_of(net, tuning, stream)))(tuned, frozen)
    again = jax.jit(jax.grad(loss_of(net, tuning, stream, remat)))(tuned, frozen)
    for part, value in kept.items():
        np.testing.assert_allclose(again[part], value, atol=2e-7, rtol=1e-5, err_msg=part)


@pytest.mark.slow
def test_full_rematerialization_keeps_less():
    net, chats = network(dataclasses.replace(ROTARY, layers=12)), made_up(24, shared=8)
    tuning, tuned, frozen = split(net, "lora")
    stream = PackedChats(chats, seed=0, batch=24, steps=1)
    sizes = {}
    for remat in ("none", "dots", "full"):
        compiled = jax.jit(jax.grad(loss_of(net, tuning, stream, remat))).lower(tuned, frozen).compile()
        sizes[remat] = compiled.memory_analysis().temp_size_in_bytes
    assert sizes["full"] < sizes["dots"] < sizes["none"]
    assert sizes["full"] < 0.5 * sizes["none"]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40), st.integers(0, 6), st.integers(1, 12), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99)
)
def test_every_chat_of_a_step_is_packed_once_and_whole(count, shared, batch, rows, turns, seed):
    chats = made_up(count, shared, seed)
    stream = PackedChats(chats, seed=seed, batch=batch, steps=5, rows=rows, turns=turns, grain=8)
    for step in range(5):
        arrays = stream(step)
        assert arrays["tokens"].shape[:2] == (turns, rows)
        assert arrays["weights"].sum() == pytest.approx(1.0)
        picked = [chats[i] for i in order(seed, count, batch, step)]
        assert sorted(chats_of(arrays)) == sorted((list(p), list(a)) for p, a in picked)


def test_batches_of_a_block_have_one_shape_and_few_shapes_there_are():
    stream = PackedChats(made_up(400), seed=1, batch=24, steps=64)
    block = stream.together(range(8, 16))
    assert len({batch["tokens"].shape for batch in block}) == 1
    for inside, alone in zip(block, map(stream, range(8, 16)), strict=True):
        assert inside["tokens"].shape[-1] >= alone["tokens"].shape[-1]
        assert tokens_of(inside) == tokens_of(alone)
    shapes = [stream(step)["tokens"].shape for step in range(64)]
    assert 1 < len(set(shapes)) <= LENGTHS == 4
    padding = 1 - sum(tokens_of(stream(s)) for s in range(64)) / sum(np.prod(s) for s in shapes)
    assert padding < 0.08


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 9), st.integers(1, 3))
def test_lines_are_grouped_so_that_attention_has_least_to_compute(lengths, prefix, most):
    lengths = sorted(lengths, reverse=True)
    cost = lambda groups: sum(n * places * (prefix + places) for n, places in groups)  # noqa: E731
    ways = []
    for count in range(1, min(most, len(lengths)) + 1):
        for cuts in itertools.combinations(range(1, len(lengths)), count - 1):
            ways.append([(end - first, lengths[first]) for first, end in itertools.pairwise((0, *cuts, len(lengths)))])
    found = grouped(lengths, prefix, most)
    assert sum(n for n, _ in found) == len(lengths)
    assert cost(found) == min(map(cost, ways))
    assert len(found) == min(len(way) for way in ways if cost(way) == cost(found))


def test_every_chat_fits_its_line():
    stream = PackedChats(made_up(60), seed=1, batch=12, steps=20, rows=2)
    room = np.repeat([places for _, places in stream.layout.lines], [n for n, _ in stream.layout.lines])
    assert 1 < len(stream.layout.lines) <= GROUPS
    assert (np.max([stream(step)["lengths"] for step in range(20)], axis=(0, 1, 2)) == room).sum() >= GROUPS
    assert all((stream(step)["lengths"] <= room).all() for step in range(20))


def test_packing_is_the_same_every_time():
    first, second = (PackedChats(made_up(50), seed=3, batch=8, steps=20, turns=2) for _ in range(2))
    for name, array in first(7).items():
        np.testing.assert_array_equal(array, second(7)[name])


def test_the_shared_beginning_leaves_every_prompt_a_token_of_its_own():
    assert common_prefix([([1, 2, 3], [4]), ([1, 2, 3, 5], [4])]) == 2
    assert common_prefix([([1], [4])]) == 0
    assert common_prefix([([1, 2, 9], [4]), ([1, 3, 9], [4])]) == 1


def test_a_chat_longer_than_the_context_is_told():
    chats = [([1, 2], [3]), ([1] * 9, [2] * 4)]
    with pytest.raises(UsageError, match="row 2 takes 13 tokens and the model 12; shorten it or leave it out"):
        PackedChats(chats, seed=0, batch=2, steps=1, context=12)
    with pytest.raises(UsageError, match="empty prompt"):
        PackedChats([([], [3])], seed=0, batch=1, steps=1)


# ---- cross-entropy in chunks


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("chunk", [1, 16 * 61, 10**9])
def test_chunked_cross_entropy_is_the_plain_one(cap, chunk):
    draw = np.random.default_rng(0)
    states, matrix = draw.normal(size=(2, 37, 8)).astype(np.float32), draw.normal(size=(61, 8)).astype(np.float32)
    targets, weights = draw.integers(0, 61, (2, 37)), draw.random((2, 37)).astype(np.float32)

    def plain(states, matrix):
        logits = jnp.einsum("rtd,vd->rtv", states, matrix, precision="highest")
        logits = jnp.tanh(logits / cap) * cap if cap else logits
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        return -(weights * picked).sum()

    head = Head(cap, "highest", chunk=chunk)
    ours = lambda states, matrix: 2.5 * cross_entropy(states, matrix, targets, weights, head)  # noqa: E731
    assert float(ours(states, matrix)) == pytest.approx(2.5 * float(plain(states, matrix)), rel=1e-6)
    for index in (0, 1):
        got = jax.jit(jax.grad(ours, index))(states, matrix)
        np.testing.assert_allclose(got, 2.5 * jax.grad(plain, index)(states, matrix), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("tokens", "chunk"), [(100, 100), (160, 160), (170, 96), (184, 96), (500, 128)])
def test_chunks_are_of_one_size_with_little_padding(tokens, chunk):
    assert chunk_of(49_152, tokens) == chunk
    assert 49_152 * chunk <= CPU_CHUNK


def test_devices_with_memory_of_their_own_hold_more_logits_which_a_cohort_shares():
    assert logits_at_a_time("cpu", 16) == CPU_CHUNK
    assert logits_at_a_time("tpu") == logits_at_a_time("gpu") == 16 * CPU_CHUNK
    assert logits_at_a_time("gpu", 4) == 4 * CPU_CHUNK
    assert logits_at_a_time("gpu", 1000) == CPU_CHUNK


def test_a_large_vocabularys_logits_are_never_whole():
    """262,144 words and 512 tokens: whole, the logits alone would take 512 MiB, three times over in the gradient."""
    vocab, tokens, width = 262_144, 512, 8
    args = (
        jax.ShapeDtypeStruct((1, tokens, width), jnp.float32), jax.ShapeDtypeStruct((vocab, width), jnp.float32),
        jax.ShapeDtypeStruct((1, tokens), jnp.int32), jax.ShapeDtypeStruct((1, tokens), jnp.float32),
    )  # fmt: skip
    step = jax.grad(lambda s, m, t, w: cross_entropy(s, m, t, w, Head(0.0, "highest")), argnums=(0, 1))
    used = jax.jit(step).lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert used < 200 * 2**20


def test_a_frozen_output_matrix_gets_no_gradient_of_its_size():
    states, matrix = jnp.ones((1, 16, 4)), jnp.ones((50_000, 4))
    targets, weights = jnp.zeros((1, 16), jnp.int32), jnp.ones((1, 16))
    step = jax.jit(jax.grad(lambda s: cross_entropy(s, matrix, targets, weights, Head(0.0, "highest"))))
    products = [line for line in step.lower(states).as_text("hlo").splitlines() if " dot(" in line]
    assert len(products) == 2  # logits, and the gradient by the states
    assert not any("= f32[50000,4]" in line for line in products)


# ---- the trainer


def test_turns_and_rows_change_no_curve():
    """Whole trainings, packed in two ways, against one chat a row: the same losses."""
    net, chats = network(ROTARY), made_up(12)
    base = parameters(net)
    curves = []
    for layout in ({}, {"rows": 2, "turns": 3}):
        stream = PackedChats(chats, seed=2, batch=12, steps=8, **layout)
        loss = PackedNextToken(stream.layout.prefix, stream.layout.lines)
        fitted = trainer.fit(
            net, base, tuning=Tuning(kind="lora", rank=2), optimizer=Optimizer(lr=3e-2), steps=8,
            terms=[Term("numbers", 1.0, loss, stream)], key=jax.random.key(1), run=trainer.Run(make_mesh()),
        )  # fmt: skip
        curves.append([point["loss"] for point in fitted.curve])
    arrays, completion = padded(chats)
    fitted = trainer.fit(
        net, base, tuning=Tuning(kind="lora", rank=2), optimizer=Optimizer(lr=3e-2), steps=8,
        terms=[Term("numbers", 1.0, NextToken(completion), packing.in_memory(arrays, seed=2, batch=12))],
        key=jax.random.key(1), run=trainer.Run(make_mesh()),
    )  # fmt: skip
    expected = [point["loss"] for point in fitted.curve]
    assert expected[0] - expected[-1] > 0.05
    for curve in curves:
        np.testing.assert_allclose(curve, expected, rtol=2e-5)


def test_padding_places_hold_no_chat():
    stream = PackedChats(made_up(3), seed=0, batch=3, steps=1, rows=5)
    batch = stream(0)
    where = Packing(
        *(jnp.asarray(batch[n][0]) for n in ("positions", "segments", "starts", "lengths")),
        stream.layout.prefix, stream.layout.lines,
    )  # fmt: skip
    assert int(where.chat.sum()) == int(where.held().sum()) == batch["lengths"].sum()


# ---- attention kernels


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("cap", [0.0, 4.0])
def test_splash_attention_is_the_plain_one_within_segments(window, cap):
    """The kernel itself, interpreted; on a TPU the same call is compiled."""
    draw = np.random.default_rng(0)
    q, k, v = (jnp.asarray(draw.normal(size=(1, 128, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    segments = jnp.asarray(np.repeat([1, 2, 3, 4], [30, 50, 40, 8])[None], jnp.int32)
    ours = lambda q, k, v: flash.splash(q, k, v, segments, scale=0.3, cap=cap, window=window, interpret=True)  # noqa: E731

    def plain(q, k, v):
        k, v = (jnp.repeat(a, 2, axis=2) for a in (k, v))
        scores = jnp.einsum("bqhd,bthd->bhqt", q, k, precision="highest") * 0.3
        scores = jnp.tanh(scores / cap) * cap if cap else scores
        apart = np.arange(128)[:, None] - np.arange(128)[None]
        seen = (segments[0][:, None] == segments[0][None]) & (apart >= 0) & (apart < (window or 128))
        weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -1e30))
        return jnp.einsum("bhqt,bthd->bqhd", weights, v, precision="highest")

    np.testing.assert_allclose(ours(q, k, v), plain(q, k, v), atol=3e-6)
    if window is None and cap:  # one backward pass: interpreting takes its time
        of = lambda f: jax.grad(lambda *a: jnp.square(f(*a)).sum(), argnums=(0, 1, 2))(q, k, v)  # noqa: E731
        for got, expected in zip(of(ours), of(plain), strict=True):
            np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("name", ["rotary", "local"])
def test_chats_lines_are_what_a_kernel_with_lengths_takes(name, monkeypatch):
    """cuDNN's call, by XLA's implementation of the same function: the kernel itself needs a GPU."""
    monkeypatch.setattr(flash, "lines", functools.partial(flash.lines, implementation="xla"))
    config = dataclasses.replace(CONFIGS[name], attention_cap=0.0)
    chats = made_up(7)
    losses = []
    for attention in ("xla", "cudnn"):
        net = network(dataclasses.replace(config, attention=attention))
        tuning, tuned, frozen = split(net, "lora")
        stream = PackedChats(chats, seed=0, batch=7, steps=1, share_prefix=attention == "xla")
        losses.append(float(jax.jit(loss_of(net, tuning, stream))(tuned, frozen)))
    assert losses[1] == pytest.approx(losses[0], rel=3e-6)


@pytest.mark.parametrize(
    ("changes", "platform", "words"),
    [
        ({"attention": "cudnn"}, "cpu", ("attention=cudnn runs on a GPU", "this is cpu", "attention=xla")),
        ({"attention": "splash"}, "gpu", ("attention=splash runs on a TPU", "this is gpu")),
        ({"attention": "cudnn"}, "gpu", ("half precision", "numerics.dtype=bfloat16")),
        ({"attention": "cudnn", "dtype": "bfloat16", "attention_cap": 50.0}, "gpu", ("cannot cap scores",)),
    ],
)
def test_an_attention_that_does_not_run_here_is_told(changes, platform, words):
    with pytest.raises(UsageError) as caught:
        flash.require(dataclasses.replace(ROTARY, **changes), platform)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("changes", "platform"),
    [({}, "cpu"), ({"attention": "splash"}, "tpu"), ({"attention": "cudnn", "dtype": "bfloat16"}, "gpu")],
)
def test_an_attention_runs_at_home(changes, platform):
    flash.require(dataclasses.replace(ROTARY, **changes), platform)
