"""Slots, prefixes, buckets and repeated prompts: rows are those of the plain way, one whole forward pass a token."""

import dataclasses
import functools
import threading
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from subjax.models import cached
from subjax.models.families import decoder_config
from subjax.models.network import Network, network
from subjax.parallel.mesh import make_mesh
from subjax.sample import reading, sampler
from subjax.sample.noise import gumbel, uniform
from subjax.sample.sampler import Drawn, Sampling, draw, sample
from subjax.sample.slots import apart, programs
from subjax.schema import Numerics
from subjax.threads import side_by_side

VOCAB, PROMPT, COMPLETION, END, PAD, ROWS = 24, 32, 12, 1, 0, 40
LENGTH = PROMPT + COMPLETION
GROUPED = {"heads": 4, "kv_heads": 2, "head_dim": 4}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "learned positions": ("gpt", {}),
    "rotary": ("llama-bias", GROUPED),
    # The window is shorter than the prefix and than most answers.
    "local layers": ("llama", GROUPED | {"layers": 3, "local": (True, False, True), "window": 7, "qk_norm": "head"}),
}
KEY = jax.random.key(5)
every_network = pytest.mark.parametrize("kind", NETWORKS)

pytestmark = pytest.mark.usefixtures("quick_compiles")


@functools.cache
def model(kind: str) -> tuple[Network, dict[str, np.ndarray]]:
    family, changes = NETWORKS[kind]
    config = decoder_config(family, "nano", vocab=VOCAB, length=LENGTH, numerics=Numerics())
    net = network(dataclasses.replace(config, **changes))
    return net, reference.random_params(net, seed=2)


@functools.cache
def prompts(shared: int = 20, seed: int = 0) -> np.ndarray:
    """Ragged prompts of which all begin with the same `shared` tokens, and some are equal."""
    rng = np.random.default_rng(seed)
    begin = rng.integers(2, VOCAB, shared)
    out = np.full((ROWS, PROMPT), PAD, np.int32)
    for row in range(ROWS):
        own = rng.integers(2, VOCAB, rng.integers(1, PROMPT - shared + 1))
        out[row, PROMPT - shared - len(own) :] = [*begin, *own]
    out[7], out[31], out[32] = out[3], out[3], out[30]
    return out


@functools.cache
def _next(kind: str, sampling: Sampling):
    net, _ = model(kind)

    @jax.jit
    def one(params, tokens, valid, place, keys):
        """The next token behind rows of PROMPT + COMPLETION, of which the last are not yet there."""
        tokens, valid = (jnp.roll(a, COMPLETION - place, axis=1) for a in (tokens, valid))
        valid = valid & (jnp.arange(LENGTH) >= COMPLETION - place)[None]
        return draw(net.forward(params, tokens, valid, tail=1)[:, 0], keys, place, sampling)

    return one


@functools.cache
def plainly(kind: str, sampling: Sampling, shared: int = 20, first: int = 0) -> Drawn:
    """Rows drawn one token at a time behind whole forward passes: no cache, no slots, no prefix."""
    asked = prompts(shared)
    tokens = np.concatenate([asked, np.full((ROWS, COMPLETION), PAD, np.int32)], axis=1)
    valid = np.concatenate([asked != PAD, np.ones((ROWS, COMPLETION), bool)], axis=1)
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(first + jnp.arange(ROWS))
    ends = np.array(sampling.ends)
    done, near = np.zeros(ROWS, bool), np.zeros(ROWS, bool)
    for place in range(COMPLETION):
        token, tie = map(np.asarray, _next(kind, sampling)(model(kind)[1], tokens, valid, place, keys))
        tokens[:, PROMPT + place] = np.where(done, PAD, token)
        near |= tie & ~done
        done |= np.isin(token, ends)
    return Drawn(tokens[:, PROMPT:], near)


def in_slots(kind: str, sampling: Sampling, batch: int, shared: int = 20, first: int = 0, order=None) -> Drawn:
    net, params = model(kind)
    picked = prompts(shared) if order is None else prompts(shared)[order]
    return sample(net, params, picked, sampling=sampling, key=KEY, mesh=make_mesh(), batch=batch, first=first)


def assert_same(one: Drawn, other: Drawn) -> None:
    """Rows differ only where one of the two met a near-tie, which few do."""
    sure = ~(one.near_tie | other.near_tie)
    assert sure.mean() >= 0.9
    np.testing.assert_array_equal(one.tokens[sure], other.tokens[sure])


SAMPLING = Sampling(PROMPT, COMPLETION, (END, 2, 3), PAD)


@every_network
@pytest.mark.parametrize("batch", [1, 8, ROWS])
def test_rows_are_those_of_the_plain_way_for_any_number_of_slots(kind, batch):
    plain = plainly(kind, SAMPLING)
    lengths = (plain.tokens != PAD).sum(1)
    assert len(set(lengths)) > 6  # ragged: slots come free one by one
    assert (lengths == COMPLETION).any()
    assert_same(in_slots(kind, SAMPLING, batch), plain)


@every_network
def test_rows_without_a_shared_prefix_are_those_of_the_plain_way(kind):
    assert_same(in_slots(kind, SAMPLING, 8, shared=2), plainly(kind, SAMPLING, shared=2))


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 0.0}, {"temperature": 0.6, "top_k": 7}, {"top_p": 0.8}, {"end": -1}, {"completion": 1}],
    ids=str,
)
def test_every_way_of_drawing_is_that_of_the_plain_way(changes):
    sampling = dataclasses.replace(SAMPLING, **changes)
    plain = plainly("rotary", dataclasses.replace(sampling, completion=COMPLETION))
    plain = plain._replace(tokens=plain.tokens[:, : sampling.completion])
    found = in_slots("rotary", sampling, 8)
    assert found.tokens.shape == plain.tokens.shape
    assert_same(found, plain)


def test_a_row_that_is_longer_than_all_others_does_not_hold_them_up_nor_is_cut():
    """One answer fills its room while its neighbours end at once, and the ring goes round under it."""
    plain = plainly("rotary", SAMPLING)
    lengths = (plain.tokens != PAD).sum(1)
    short = np.flatnonzero(lengths <= 3)
    long = np.flatnonzero(lengths == COMPLETION)[:1]
    order = np.concatenate([long, np.resize(short, 60)])
    net, params = model("rotary")
    drawn = sample(net, params, prompts()[order], sampling=SAMPLING, key=KEY, mesh=make_mesh(), batch=2)
    alone = sample(net, params, prompts()[order], sampling=SAMPLING, key=KEY, mesh=make_mesh(), batch=61)
    assert_same(drawn, alone)


@every_network
def test_layers_in_a_stack_and_apart_draw_the_same_rows(kind, monkeypatch):
    """In a stack, as on a TPU; the other tests here have them apart, as on a CPU."""
    monkeypatch.setattr(sampler, "apart", lambda *_: False)
    assert_same(in_slots(kind, SAMPLING, 8), plainly(kind, SAMPLING))


@pytest.mark.parametrize(
    ("platform", "weights", "memory", "expected"),
    [
        ("cpu", 10**12, None, True), ("2 cpu", 1, None, False), ("tpu", 1, 10**11, False),
        ("gpu", 16 * 10**9, 78 * 10**9, True), ("8 gpu", 16 * 10**9, 78 * 10**9, True),
        ("gpu", 54 * 10**9, 78 * 10**9, False),
    ],
)  # fmt: skip
def test_layers_stand_apart_where_a_stack_is_copied_and_there_is_room(platform, weights, memory, expected):
    *count, platform = platform.split()
    devices = np.array([SimpleNamespace(platform=platform)] * int(*count or [1]))
    mesh = SimpleNamespace(devices=devices, size=devices.size)
    assert apart(mesh, weights, memory) is expected


# Lanes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [8, ROWS])
@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_rows_are_the_same_in_any_number_of_lanes(batch, lanes, monkeypatch):
    monkeypatch.setattr(reading, "LANE", 2)
    monkeypatch.setattr(sampler, "at_once", lambda mesh: lanes)
    begun = []
    monkeypatch.setattr(
        sampler, "side_by_side", lambda works, *more: begun.append(len(works)) or side_by_side(works, *more)
    )
    assert_same(in_slots("rotary", SAMPLING, batch), plainly("rotary", SAMPLING))
    assert begun == ([lanes] if lanes > 1 else [])


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 64), st.integers(1, 4))
def test_lanes_have_each_prompt_once_and_no_more_slots_than_one_lane(lengths, batch, most):
    asked = [(place, *range(length)) for place, length in enumerate(lengths)]
    whole = reading.plan(asked, SAMPLING, batch, 1, True)
    dealt = reading.lanes(whole, most)
    assert 1 <= len(dealt) <= most
    assert len(dealt) == 1 or min(lane.slots for lane in dealt) >= 1
    assert sorted(row for lane in dealt for chunk in lane.chunks for row in chunk.rows) == list(range(len(asked)))
    rows = [sum(len(chunk.rows) for chunk in lane.chunks) for lane in dealt]
    assert max(rows) - min(rows) <= max(len(chunk.rows) for chunk in whole.chunks)
    assert len({lane[2:] for lane in dealt}) == 1  # so they share their compiled programs
    slots = dealt[0].slots
    assert slots == max(rows) if len(asked) <= batch else len(dealt) * slots <= whole.slots


def test_few_rows_stay_in_one_lane():
    asked = [(row, 5) for row in range(500)]
    assert [len(reading.lanes(reading.plan(asked, SAMPLING, batch, 1, True), 2)) for batch in (8, 63, 64)] == [1, 1, 2]
    one = reading.plan([(3, 5)] * 500, SAMPLING, 100, 1, True)
    assert reading.lanes(one, 2) == [one]


def test_a_lane_that_fails_stops_the_others(monkeypatch):
    monkeypatch.setattr(reading, "LANE", 2)
    monkeypatch.setattr(sampler, "at_once", lambda mesh: 2)
    met, decode = threading.Barrier(2), sampler._Slots.decode
    calls = []

    def fails(slots, until, out):
        calls.append(slots)
        if len(calls) <= 2:
            met.wait(60)
        if slots is calls[0]:
            raise MemoryError("no room")
        decode(slots, until, out)

    monkeypatch.setattr(sampler._Slots, "decode", fails)
    with pytest.raises(MemoryError, match="no room"):
        in_slots("rotary", SAMPLING, 4)
    assert len(calls) < ROWS // 2


@settings(deadline=None, max_examples=5)
@given(st.sampled_from((3, 8)), st.integers(0, ROWS))
def test_rows_are_the_same_from_two_blocks(batch, cut):
    """Each block has a prefix, a longest prompt and repeated prompts of its own."""
    net, params = model("rotary")
    parts = [
        sample(net, params, block, first=first, batch=batch, sampling=SAMPLING, key=KEY, mesh=make_mesh())
        for first, block in ((0, prompts()[:cut]), (cut, prompts()[cut:]))
    ]
    assert_same(Drawn(*map(np.concatenate, zip(*parts, strict=True))), plainly("rotary", SAMPLING))


# What is read how often -----------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """Token shapes of all prefixes and prompts that are read, and numbers of rows that are put into slots."""
    seen: list[tuple[str, Any]] = []

    def watched(*arguments):
        compiled = programs(*arguments)

        def share(params, tokens, length, adapter):
            seen.append(("prefix", int(length)))
            return compiled.share(params, tokens, length, adapter)

        def prefill(params, prefix, tokens, valid, adapter):
            seen.append(("prompts", sorted(valid.sum(1).tolist())))
            seen.append(("width", tokens.shape[1]))
            return compiled.prefill(params, prefix, tokens, valid, adapter)

        return compiled._replace(share=share, prefill=prefill)

    monkeypatch.setattr(sampler, "programs", watched)
    return lambda what: [value for name, value in seen if name == what]


def test_what_all_prompts_begin_with_is_read_once_and_each_prompt_once(reads):
    in_slots("rotary", SAMPLING, 16)
    assert reads("prefix") == [20]
    own = (prompts() != PAD).sum(1) - 20
    different = len(np.unique(prompts(), axis=0))
    read = sum(map(len, reads("prompts")))
    assert different < ROWS
    assert different <= read <= different + max(map(len, reads("prompts")))  # the last ones are filled up
    assert max(map(max, reads("prompts"))) == own.max()


def test_questions_that_are_asked_many_times_are_read_once(reads):
    net, params = model("rotary")
    asked = np.repeat(prompts()[:3], 30, axis=0)
    sample(net, params, asked, sampling=SAMPLING, key=KEY, mesh=make_mesh(), batch=16)
    assert [len(lengths) for lengths in reads("prompts")] == [4]  # the last one stands twice


def test_short_prompts_are_not_padded_to_the_longest(reads):
    rng = np.random.default_rng(3)
    rows = np.full((32, 64), PAD, np.int32)
    for row in range(32):
        length = 60 if row % 4 == 0 else rng.integers(2, 16)
        rows[row, 64 - length :] = rng.integers(2, VOCAB, length)
    net = network(dataclasses.replace(model("rotary")[0].config, length=64 + COMPLETION))
    sampling = dataclasses.replace(SAMPLING, prompt=64)
    sample(net, model("rotary")[1], rows, sampling=sampling, key=KEY, mesh=make_mesh(), batch=16)
    fours = np.sort((rows != PAD).sum(1))[::-1].reshape(-1, 4)
    assert reads("width") == [-(-longest // 8) * 8 for longest in fours[:, 0]]
    assert reads("width")[:3] == [64, 64, 16]
    assert reads("width")[-1] == 8
    assert not reads("prefix")


# Noise and the ring ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 171, 5000])
def test_noise_is_that_of_jax_bit_for_bit(size):
    keys = jax.random.split(jax.random.key(9), 6)
    index = jnp.array([0, 1, 7, 2**20, 2**31 - 1, 3])
    usual = jax.vmap(lambda key, i: jax.random.gumbel(jax.random.fold_in(key, i), (size,)))
    np.testing.assert_array_equal(jax.jit(gumbel, static_argnums=2)(keys, index, size), jax.jit(usual)(keys, index))
    one = jnp.full(6, 5)
    np.testing.assert_array_equal(gumbel(keys, jnp.int32(5), size), gumbel(keys, one, size))
    even = jax.vmap(lambda key: jax.random.uniform(key, (size,), minval=-1.0, maxval=1.0))
    np.testing.assert_array_equal(jax.jit(lambda k: uniform(k, size, -1.0, 1.0))(keys), jax.jit(even)(keys))


@pytest.mark.parametrize("size", [2, 511, 512, 513, 5000])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_largest_scores_are_found_by_blocks_too(size, temperature):
    sampling = dataclasses.replace(SAMPLING, temperature=temperature)
    logits = jax.random.normal(jax.random.key(1), (40, size))
    # Ties in one block and in two, the first of which counts; and a row of which all but one token is forbidden.
    logits = logits.at[0, :].set(0.0).at[1, jnp.array([size // 2, size - 1])].set(9.0).at[2, 1:].set(-jnp.inf)
    keys, index = jax.random.split(jax.random.key(9), 40), jnp.arange(40)
    plain, blocks = (draw(logits, keys, index, sampling, in_blocks) for in_blocks in (False, True))
    for one, other in zip(plain, blocks, strict=True):
        np.testing.assert_array_equal(one, other)
    if temperature == 0:
        assert plain[0][:3].tolist() == [0, size // 2, 0]
        assert plain[1][:3].tolist() == [True, size > 2, False]


def test_other_kinds_of_keys_give_their_own_noise():
    keys = jax.random.split(jax.random.key(9, impl="rbg"), 3)
    expected = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, 4), (50,)))(keys)
    np.testing.assert_array_equal(gumbel(keys, jnp.int32(4), 50), expected)
    expected = jax.vmap(lambda key: jax.random.uniform(key, (50,), minval=-1.0, maxval=2.0))(keys)
    np.testing.assert_array_equal(uniform(keys, 50, -1.0, 2.0), expected)


@every_network
def test_a_prefix_and_a_ring_that_goes_round_agree_with_the_forward_pass(kind):
    """Rows that come one after another into one cache, whose columns have been written several times over."""
    net, params = model(kind)
    params = jax.tree.map(jnp.asarray, params)
    rng = np.random.default_rng(0)
    begin = rng.integers(2, VOCAB, 9)
    prefix = cached.prefix_of(net, params, jnp.asarray(np.resize(begin, 12)), jnp.int32(9))
    step, forward = jax.jit(lambda *a: cached.step(net, params, *a, prefix=prefix)), jax.jit(net.forward)
    cache = cached.empty(net, 2, 5, 6, "float32")
    for turn in range(3):
        own = rng.integers(2, VOCAB, 5)
        logits, kv = cached.prefill(net, params, own[None], np.ones((1, 5), bool), prefix=prefix)
        cache = cached.place(cache, kv, jnp.array([5]), jnp.array([turn % 2]))
        row = [*begin, *own]
        for _ in range(6):
            expected = forward(params, np.array([row]), np.ones((1, len(row)), bool))[0, -1]
            np.testing.assert_allclose(logits[0], expected, atol=2e-5 * np.abs(expected).max())
            row.append(int(rng.integers(2, VOCAB)))
            tokens = np.zeros(2, np.int32)
            tokens[turn % 2] = row[-1]
            logits, cache = step(jnp.asarray(tokens), cache)
            logits = logits[turn % 2][None]


def test_a_prefix_is_rounded_to_the_caches_dtype_as_a_rows_own_part_is():
    """Else an answer would depend on what the rows beside it begin with."""
    net, params = model("rotary")
    params = jax.tree.map(jnp.asarray, params)
    row = jnp.asarray(np.random.default_rng(0).integers(2, VOCAB, 15))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def after(shared: int, dtype: str) -> jax.Array:
        prefix = cached.prefix_of(net, params, row[:shared], shared) if shared else None
        own = row[None, shared:14]
        _, kv = cached.prefill(net, params, own, jnp.ones(own.shape, bool), prefix=prefix)
        cache = cached.place(cached.empty(net, 1, 14, 2, dtype), kv, jnp.array([14 - shared]), jnp.array([0]))
        return cached.step(net, params, row[14:], cache, prefix=prefix)[0]

    def behind(shared: int, dtype: str) -> np.ndarray:
        return np.asarray(after(shared, dtype))

    plain, rounded = behind(0, "float32"), behind(0, "bfloat16")
    assert np.abs(behind(9, "float32") - plain).max() < 2e-5 * np.abs(plain).max()
    rounding = np.abs(rounded - plain).max()
    assert rounding > 5e-4 * np.abs(plain).max()
    assert np.abs(behind(9, "bfloat16") - rounded).max() < 0.02 * rounding
