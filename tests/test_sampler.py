"""The sampler: the right distribution, the right sets, the same rows whatever the batch size and the device count."""

import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import on_devices
import pytest
import reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from subjax.errors import UsageError
from subjax.models.families import FAMILIES, decoder_config
from subjax.models.network import Network, network
from subjax.parallel.mesh import make_mesh
from subjax.sample.sampler import NEAR_TIE, Drawn, Sampling, draw, restrict, sample
from subjax.schema import Numerics

unhurried = settings(deadline=None, max_examples=60)  # a busy machine is slow, not wrong

# ---------------------------------------------------------------------------------------------- frequencies

VOCAB, PROMPT, COMPLETION, FORCED = 16, 6, 10, 15
FREE = (5, 10)  # positions whose next token is free; after every other one it is FORCED
PADS = (0, 1, 3, 4)  # left padding of the four prompts
NO_END = VOCAB  # a token that is never drawn
ALPHA = 1e-7


def _on_rails() -> tuple[Network, dict[str, np.ndarray]]:
    """A gpt that says FORCED after every position but the free ones.

    Rows of one prompt so share their context deep in the cache, where otherwise no two of them would. Two coordinates
    of the residual stream carry the order, which the position table gives and only FORCED's row of the head reads.
    """
    config = decoder_config("gpt", "nano", vocab=VOCAB, length=PROMPT + COMPLETION, numerics=Numerics())
    net = network(dataclasses.replace(config, tied=False))
    params = reference.random_params(net, seed=4)
    for name in ("embed", "position", "head"):
        params[name][:, :2] = 0.0
    for name, array in params.items():
        if name.startswith(("blocks/attention/o", "blocks/mlp/down")):
            array[..., :2] = 0.0
    # Of mean 0, so that LayerNorm centres nothing else by it; large enough to decide, too small to drown the content.
    forced = [p for p in range(net.config.length) if p not in FREE]
    params["position"][forced, :2] = 5.0, -5.0
    params["head"][FORCED, :2] = 40.0, -40.0
    params["norm/gain"][:2], params["norm/bias"][:2] = 1.0, 0.0
    params["head"][:, 2:] *= 2.0
    for name in ("q", "k", "v"):  # attend to few tokens and make much of them, so that contexts differ
        params[f"blocks/attention/{name}/kernel"] *= 2.0
    return net, params


@functools.cache
def _rail_prompts() -> np.ndarray:
    prompts = np.random.default_rng(5).integers(1, VOCAB - 1, (len(PADS), PROMPT)).astype(np.int32)
    prompts[np.arange(PROMPT)[None] < np.array(PADS)[:, None]] = 0
    return prompts


def _counts(tokens: np.ndarray, path: tuple[int, ...]) -> np.ndarray:
    """How often each token follows `path` among rows (rows, completion)."""
    follows = tokens[(tokens[:, : len(path)] == np.array(path, int)).all(1), len(path)]
    return np.bincount(follows, minlength=VOCAB)


def _chi_square(counts: np.ndarray, p: np.ndarray) -> tuple[float, int]:
    """(statistic, degrees of freedom) of counts against probabilities; cells that expect under 5 are put together."""
    order = np.argsort(-p)
    counts, expected = counts[order], p[order] * counts.sum()
    kept = max(int((expected >= 5).sum()), 2)
    if expected[kept:].sum() < 5:
        kept -= 1
    observed = np.append(counts[:kept], counts[kept:].sum())
    expected = np.append(expected[:kept], expected[kept:].sum())
    return float(((observed - expected) ** 2 / expected).sum()), kept


@functools.cache
def _contexts(temperature: float, rows: int) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
    """(prompt, tokens drawn before, counts, true probabilities at temperature 1) of eight contexts."""
    net, params = _on_rails()
    sampling = Sampling(PROMPT, COMPLETION, NO_END, 0, temperature=temperature)
    prompts = np.repeat(_rail_prompts(), rows, axis=0)
    drawn = sample(net, params, prompts, sampling=sampling, key=jax.random.key(11), mesh=make_mesh(), batch=20_000)
    out = []
    for i, (prompt, pads) in enumerate(zip(_rail_prompts(), PADS, strict=True)):
        tokens = drawn.tokens[i * rows : (i + 1) * rows]
        for position in FREE:
            depth = position - (PROMPT - pads) + 1
            # Up to the first free position the path is forced, from there on it follows the likeliest branch.
            path = Counter(map(tuple, tokens[:, :depth].tolist())).most_common(1)[0][0]
            logs = reference.log_probabilities(net.config, params, [*prompt[pads:], *path])[-1]
            out.append((i, depth, _counts(tokens, path), np.exp(logs)))
    return out


def _p_values(contexts: list[tuple[int, int, np.ndarray, np.ndarray]]) -> list[float]:
    """The p-value of each context and, last, of all of them together."""
    found = [_chi_square(counts, p) for *_, counts, p in contexts]
    total = tuple(map(sum, zip(*found, strict=True)))
    return [float(stats.chi2.sf(*pair)) for pair in [*found, total]]


ROWS_A_PROMPT = 36_000


def test_frequencies_pass_a_chi_square_in_eight_contexts():
    """2e5 draws; nine tests at 1e-7 each, so a right sampler fails at fewer than one seed in a million."""
    contexts = _contexts(1.0, ROWS_A_PROMPT)
    assert len(contexts) == 8
    assert sum(counts.sum() for *_, counts, _ in contexts) >= 200_000
    assert all(counts.sum() >= 5_000 for *_, counts, _ in contexts)
    assert all(depth >= 5 for _, depth, *_ in contexts[1::2])  # deep in the cache, behind two draws
    # What was drawn before matters: the contexts' distributions are far apart, in total variation.
    ps = [p for *_, p in contexts]
    apart = min(np.abs(a - b).sum() / 2 for n, a in enumerate(ps) for b in ps[:n])
    assert apart > 0.01, apart
    p_values = _p_values(contexts)
    assert min(p_values) > ALPHA, p_values


def test_a_planted_temperature_fails_the_chi_square():
    """At 1.05 a statistic grows by about draws x (.05 / 1.05)² x the variance of the context's log-probability.

    That variance is near 1.2 here, so half of the draws, 1e5, add about 260 to a pooled statistic whose mean is 111 and
    whose threshold at 1e-7 is 200. Its standard deviation is then about 35: the power is beyond 1 - 1e-5, and twice
    the draws, on which the sampler itself is judged, leave no doubt.
    """
    contexts = _contexts(1.05, ROWS_A_PROMPT // 2)
    added = sum(
        counts.sum() * (0.05 / 1.05) ** 2 * ((p * np.log(p) ** 2).sum() - (p * np.log(p)).sum() ** 2)
        for *_, counts, p in contexts
    )
    assert added > 240  # what the text above counts on
    p_values = _p_values(contexts)
    assert p_values[-1] < ALPHA, p_values


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_first_tokens_of_every_family_pass_a_chi_square_at_several_temperatures(family):
    """2e5 draws behind each of four prompts; 4 prompts x 3 settings x 3 families at 1e-8 each."""
    net = network(decoder_config(family, "nano", vocab=VOCAB, length=PROMPT + 1, numerics=Numerics()))
    params = reference.random_params(net, seed=6)
    prompts = np.repeat(_rail_prompts(), 200_000, axis=0)
    for changes in ({"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}):
        sampling = Sampling(PROMPT, 1, NO_END, 0, **changes)
        drawn = sample(net, params, prompts, sampling=sampling, key=jax.random.key(3), mesh=make_mesh(), batch=50_000)
        for i, (prompt, pads) in enumerate(zip(_rail_prompts(), PADS, strict=True)):
            logits = reference.logits(net.config, params, prompt[pads:])[-1]
            p = _restricted(logits, sampling)
            counts = _counts(drawn.tokens[i * 200_000 : (i + 1) * 200_000], ())
            assert counts[p == 0].sum() == 0
            assert stats.chi2.sf(*_chi_square(counts[p > 0], p[p > 0])) > 1e-8, (changes, i)


# ---------------------------------------------------------------------------------------------- top-k and top-p


def _restricted(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities of the tokens that top-k and then top-p leave, 0 for the others; float64, one row."""
    p = np.exp((logits - logits.max()) / sampling.temperature)
    order = list(np.argsort(-p, kind="stable"))
    if sampling.top_k:
        order = order[: sampling.top_k]
    total, kept, mass = p[order].sum(), [], 0.0
    for token in order:
        kept.append(token)
        mass += p[token] / total
        if mass >= sampling.top_p and sampling.top_p < 1:
            break
    out = np.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


_logits = st.lists(st.integers(-4000, 4000), min_size=12, max_size=12, unique=True).map(lambda n: np.array(n) / 500.0)


@unhurried
@given(
    rows=st.lists(_logits, min_size=2, max_size=2),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.6]),
    top_k=st.sampled_from([0, 1, 2, 5, 11, 12, 40]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.8, 0.95, 0.999, 1.0]),
)
def test_top_k_and_top_p_keep_the_right_tokens(rows, temperature, top_k, top_p):
    sampling = Sampling(1, 1, 1, 0, temperature=temperature, top_k=top_k, top_p=top_p)
    expected = np.stack([_restricted(row, sampling) for row in rows])
    # Where the mass meets top_p to within rounding, either set is right.
    lower, upper = (
        np.stack([_restricted(row, dataclasses.replace(sampling, top_p=min(top_p * f, 1.0))) for row in rows])
        for f in (1 - 1e-5, 1 + 1e-5)
    )
    assume(((lower > 0) == (upper > 0)).all())
    out = np.asarray(restrict(jnp.asarray(rows, jnp.float32), sampling))
    np.testing.assert_array_equal(np.isfinite(out), expected > 0)
    assert not np.isnan(out).any()
    kept = np.where(np.isfinite(out), out, -np.inf)
    p = np.exp(kept - kept.max(-1, keepdims=True))
    np.testing.assert_allclose(p / p.sum(-1, keepdims=True), expected, atol=2e-6)


def test_nothing_is_restricted_by_default_and_greedy_keeps_the_logits():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 9)), jnp.float32)
    np.testing.assert_array_equal(restrict(logits, Sampling(1, 1, 1, 0)), logits)
    np.testing.assert_array_equal(restrict(logits, Sampling(1, 1, 1, 0, temperature=0.0, top_k=1)), logits)


def test_a_near_tie_is_flagged_and_scales_with_a_low_temperature():
    keys = jax.random.split(jax.random.key(0), 3)
    logits = jnp.array([[0.0, 1.0, 1.0 - NEAR_TIE / 2], [0.0, 1.0, 1.0 - 2 * NEAR_TIE], [0.0, 1.0, 0.0]])
    greedy = Sampling(1, 1, 1, 0, temperature=0.0)
    tokens, tie = draw(logits, keys, jnp.int32(0), greedy)
    assert tokens.tolist() == [1, 1, 1]
    assert tie.tolist() == [True, False, False]
    # At temperature .01 a rounding error of the logits is a hundred times larger when it meets the noise.
    wide = jnp.array([[-500.0, 0.0, gap] for gap in np.linspace(-0.5, 0.5, 2001)])
    keys = jnp.repeat(keys[:1], len(wide), axis=0)
    cold = dataclasses.replace(greedy, temperature=0.01)
    tokens, tie = draw(wide, keys, jnp.int32(0), cold)
    other, _ = draw(wide.at[:, 2].add(NEAR_TIE * 0.9), keys, jnp.int32(0), cold)
    changed = np.asarray(tokens != other)
    assert not (changed & ~np.asarray(tie)).any()
    _, tie = draw(wide, keys, jnp.int32(0), dataclasses.replace(cold, temperature=0.001))
    assert tie.sum() <= 3


# ---------------------------------------------------------------------------------------------- greedy


def test_greedy_is_the_argmax_of_the_full_forward_pass_step_by_step():
    config = decoder_config("llama", "nano", vocab=37, length=24, numerics=Numerics())
    net = network(dataclasses.replace(config, heads=4, kv_heads=2, head_dim=4))
    params = reference.random_params(net, 2)
    rng = np.random.default_rng(8)
    prompts = rng.integers(2, 37, (40, 8)).astype(np.int32)
    prompts[np.arange(8)[None] < rng.integers(0, 8, (40, 1))] = 0
    sampling = Sampling(8, 16, 1, 0, temperature=0.0)
    drawn = sample(net, params, prompts, sampling=sampling, key=jax.random.key(0), mesh=make_mesh())
    again = sample(net, params, prompts, sampling=sampling, key=jax.random.key(1), mesh=make_mesh())
    np.testing.assert_array_equal(drawn.tokens, again.tokens)  # no key enters a greedy answer
    tokens = np.concatenate([prompts, drawn.tokens], axis=1)
    valid = np.concatenate([prompts != 0, np.ones(drawn.tokens.shape, bool)], axis=1)
    logits = np.asarray(jax.jit(net.forward)(params, tokens[:, :-1], valid[:, :-1]))[:, 7:]
    alive = np.cumsum(drawn.tokens == 1, axis=1) - (drawn.tokens == 1) == 0  # up to the end token
    sure = ~drawn.near_tie
    assert sure.mean() > 0.9
    assert (logits.argmax(-1) == drawn.tokens)[sure][alive[sure]].all()
    assert (drawn.tokens[~alive] == 0).all()
    assert alive.mean() > 0.5
    assert len(np.unique(drawn.tokens)) > 5


# ---------------------------------------------------------------------------------------------- the same corpus


@functools.cache
def _corpus(batch: int, first: int = 0, last: int = on_devices.ROWS) -> Drawn:
    case = on_devices.corpus_case()
    case = case | {"prompts": case["prompts"][first:last]}
    return sample(**case, mesh=make_mesh(), first=first, batch=batch)


def _assert_same_corpus(one: Drawn, other: Drawn) -> None:
    """Rows may differ only where one of the two met a near-tie, and under one in a thousand of them."""
    assert one.tokens.shape == other.tokens.shape
    differ = (one.tokens != other.tokens).any(1)
    unexplained = differ & ~(one.near_tie | other.near_tie)
    assert not unexplained.any(), f"rows differ without a near-tie: {np.flatnonzero(unexplained)[:5]}"
    assert differ.sum() < 1e-3 * len(differ), f"{differ.sum()} rows of {len(differ)} differ by near-ties"


@pytest.mark.parametrize(
    ("batch", "rows"),
    [
        (1, 24),
        (7, 500),
        pytest.param(7, 2048, marks=pytest.mark.slow),
        pytest.param(2048, 2048, marks=pytest.mark.slow),
    ],
)
def test_the_corpus_is_the_same_from_other_batch_sizes(batch, rows):
    whole = _corpus(512)
    _assert_same_corpus(_corpus(batch, 0, rows), Drawn(whole.tokens[:rows], whole.near_tie[:rows]))


# A process of one device is what this one is already, so that another is asked only in the long run.
@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 2, 8])
def test_the_corpus_is_the_same_from_other_device_counts(devices):
    found = on_devices.result(devices, "corpus")
    _assert_same_corpus(_corpus(512), Drawn(np.array(found["tokens"]), np.array(found["near_tie"])))
    # Batches of 512 over (replica, fsdp); heads and vocabulary over tensor: it was not the same work on each device.
    rows, split = 512 // {1: 1, 2: 2, 8: 4}[devices], 2 if devices == 8 else 1
    assert found["shards"] == {
        "token": [[rows]],
        "k": [[2, rows, 2 // split, 17, 8]],
        "read": [[2, rows, 2 // split, 8, 8]],
        "embed": [[40 // split, 16]],
        "q": [[2, 16, 2 // split, 8]],
    }


def test_a_program_on_several_cpu_devices_is_waited_for_before_the_next():
    # More than 32 under way on each of several CPU devices can wait for each other for ever (parallel.mesh.settle).
    for devices in (2, 8):
        waited = on_devices.result(devices, "corpus")["waited"]
        assert len(waited) > 32
        assert all(waited)


def test_slots_prefixes_and_readings_are_the_same_on_eight_devices():
    found, alone = on_devices.result(8, "shared"), on_devices.shared(make_mesh())
    one, other = (Drawn(np.array(run["tokens"]), np.array(run["near_tie"])) for run in (found, alone))
    _assert_same_corpus(one, other)
    assert len(set((one.tokens != on_devices.PAD).sum(1))) > 8  # ragged
    np.testing.assert_allclose(found["p"], alone["p"], rtol=3e-5)
    # Of int8 codes one may fall otherwise by a product's rounding, and a draw with it: seldom.
    found, alone = (np.array(run["coded"]) for run in (found, alone))
    assert (found == alone).all(1).mean() >= 0.95
    assert (alone == other.tokens).mean() > 0.7


def test_rows_are_addressed_by_their_number():
    case, whole = on_devices.corpus_case(), _corpus(512)
    part = _corpus(512, first=1300, last=1300 + 512)
    _assert_same_corpus(part, Drawn(whole.tokens[1300:1812], whole.near_tie[1300:1812]))
    # The number matters, and the key: the same prompts elsewhere are answered otherwise.
    moved = sample(**case | {"prompts": case["prompts"][1300:1812]}, mesh=make_mesh(), first=0, batch=512)
    assert (moved.tokens != part.tokens).any(1).mean() > 0.9
    keyed = sample(**case | {"key": jax.random.key(8)}, mesh=make_mesh(), batch=512)
    assert (keyed.tokens != whole.tokens).any(1).mean() > 0.9
    with pytest.raises(AssertionError, match="without a near-tie"):
        _assert_same_corpus(keyed, whole)


def test_rows_of_one_prompt_are_drawn_apart():
    case = on_devices.corpus_case()
    prompts = np.repeat(case["prompts"][:1], 512, axis=0)
    tokens = sample(**case | {"prompts": prompts}, mesh=make_mesh(), batch=512).tokens
    assert len(np.unique(tokens, axis=0)) > 450


def test_answers_end_at_the_end_token_and_are_padded_behind_it():
    tokens = _corpus(512).tokens
    assert tokens.dtype == np.int32
    assert tokens.shape == (on_devices.ROWS, on_devices.COMPLETION)
    ended = np.cumsum(tokens == on_devices.END, axis=1) - (tokens == on_devices.END) > 0
    assert ended.any()
    assert (tokens[ended] == on_devices.PAD).all()
    assert (tokens[:, 0] == on_devices.END).any()  # an answer may be empty
    assert (~ended[:, -1]).any()  # and may be cut off


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"top_k": -1}, "top_k -1"),
        ({"completion": 0}, "a completion of 0 tokens"),
    ],
)
def test_sampling_settings_out_of_range_are_told_in_one_line(changes, words):
    with pytest.raises(UsageError) as caught:
        Sampling(**{"prompt": 4, "completion": 4, "end": 1, "pad": 0} | changes)
    assert "\n" not in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("prompts", "completion", "words"),
    [
        (np.full((3, 5), 2), on_devices.COMPLETION, ("5 tokens", "the bucket is 8")),
        (np.full((3, 8), 2), 11, ("8", "11 tokens exceed the model's 18")),
        (np.array([[2] * 8, [2] * 7 + [0]]), on_devices.COMPLETION, ("prompt 41 ends in padding", "on the left")),
    ],
)
def test_prompts_that_do_not_fit_are_told_in_one_line(prompts, completion, words):
    case = on_devices.corpus_case()
    sampling = dataclasses.replace(case["sampling"], completion=completion)
    with pytest.raises(UsageError) as caught:
        sample(**case | {"prompts": prompts.astype(np.int32), "sampling": sampling}, mesh=make_mesh(), first=40)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_no_prompts_give_no_answers():
    case = on_devices.corpus_case()
    drawn = sample(**case | {"prompts": case["prompts"][:0]}, mesh=make_mesh())
    assert drawn.tokens.shape == (0, on_devices.COMPLETION)
    assert drawn.near_tie.shape == (0,)
