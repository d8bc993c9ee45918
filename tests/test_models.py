"""The decoder: every family against a second implementation, its cache, padding, depth and size; checkpoints."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from etils import epath

from subjax.data import world
from subjax.errors import SubjaxError, UsageError
from subjax.models import adapters, cached, checkpoints
from subjax.models.architecture import DecoderConfig
from subjax.models.decoder import NEGATIVE, scaled, softmax
from subjax.models.families import FAMILIES, decoder_config
from subjax.models.network import Adapter, network
from subjax.schema import Numerics, Tuning

VOCAB, LENGTH, PROMPT = 29, 18, 8
PADS = (0, 1, 3, 7)  # left padding of the rows; the last leaves one token of its prompt
LORA = Tuning(kind="lora", rank=3, alpha=6.0)


def _nano(family: str, **changes) -> DecoderConfig:
    config = decoder_config(family, "nano", vocab=VOCAB, length=LENGTH, numerics=Numerics())
    return dataclasses.replace(config, **changes)


# Two key-value heads under four query heads, so that a wrong order of grouping shows; tied where the family is not and
# the other way round.
GROUPED = {
    f"{f}-grouped": _nano(f, heads=4, kv_heads=2, head_dim=4, tied=not FAMILIES[f]["tied"]) for f in sorted(FAMILIES)
}
CONFIGS = {f: _nano(f) for f in sorted(FAMILIES)} | GROUPED
every_config = pytest.mark.parametrize("name", CONFIGS)


@functools.cache
def _rows() -> tuple[np.ndarray, np.ndarray]:
    """Tokens (rows, length) and which of them are valid, with the left padding of `PADS`."""
    tokens = np.random.default_rng(1).integers(1, VOCAB, (len(PADS), LENGTH))
    return tokens, np.arange(LENGTH)[None] >= np.array(PADS)[:, None]


@functools.cache
def _params(name: str) -> dict[str, np.ndarray]:
    return reference.random_params(network(CONFIGS[name]), seed=0)


def _adapter(name: str) -> tuple[dict[str, jax.Array], Adapter]:
    """Random LoRA pairs, none of them zero, as the trainer holds them and as the network takes them."""
    rng = np.random.default_rng(2)
    axes = adapters.tuned_axes(network(CONFIGS[name]), LORA)
    tuned = {n: jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32) for n, (shape, _) in axes.items()}
    return tuned, adapters.join(LORA, tuned, {})[1]


@functools.cache
def _full(name: str):
    return jax.jit(network(CONFIGS[name]).forward, static_argnames="tail")


def _begun(net, params, tokens, valid, columns, adapter=None, apart=False):
    """Logits behind prompts, and a cache that holds them, with `columns` in all."""
    logits, kv = cached.prefill(net, params, tokens, valid, adapter=adapter)
    rows, prompt = tokens.shape
    empty = cached.empty(net, rows, prompt, columns - prompt, "float32", apart)
    return logits, cached.place(empty, kv, valid.sum(1), jnp.arange(rows))


@functools.cache
def _cached(name: str, apart: bool = False):
    """Logits from position PROMPT - 1 on, by prefilling the prompt and then feeding one token at a time.

    `apart`: with each layer in arrays of its own.
    """
    net = network(CONFIGS[name])

    def run(params, tokens, valid, adapter=None):
        first, cache = _begun(net, params, tokens[:, :PROMPT], valid[:, :PROMPT], LENGTH, adapter, apart)
        layers = cached.set_apart(net, params) if apart else params

        def feed(cache, slot):
            logits, cache = cached.step(net, layers, tokens[:, slot], cache, adapter=adapter)
            return cache, logits

        _, rest = jax.lax.scan(feed, cache, jnp.arange(PROMPT, LENGTH))
        return jnp.concatenate([first[:, None], jnp.swapaxes(rest, 0, 1)], axis=1)

    return jax.jit(run)


def _assert_close(actual, expected, relative: float):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    worst, allowed = np.abs(actual - expected).max(), relative * np.abs(expected).max()
    assert worst <= allowed, f"differs by {worst:.3g}; {allowed:.3g} allowed"


@every_config
def test_forward_agrees_with_a_second_decoder_on_left_padded_rows(name):
    config, params, (tokens, valid) = CONFIGS[name], _params(name), _rows()
    logits = _full(name)(params, tokens, valid)
    assert logits.dtype == jnp.float32
    for row, pads in enumerate(PADS):
        expected = reference.logits(config, params, tokens[row, pads:])
        assert np.abs(expected).max() > 1  # logits near zero would agree with anything
        _assert_close(logits[row, pads:], expected, 1e-5)


@every_config
def test_decoding_with_a_cache_agrees_with_the_full_forward_pass(name):
    params, rows = _params(name), _rows()
    full = _full(name)(params, *rows)
    _assert_close(_cached(name)(params, *rows), full[:, PROMPT - 1 :], 5e-6)


@every_config
def test_decoding_with_a_cache_agrees_with_the_full_forward_pass_after_lora(name):
    """Merged into the parameters, as the sampler is given them."""
    params, rows = _params(name), _rows()
    merged = adapters.merge(network(CONFIGS[name]), LORA, _adapter(name)[0], params)
    plain, full = _full(name)(params, *rows), _full(name)(merged, *rows)
    assert np.abs(full - plain).max() > 0.1 * np.abs(plain).max()  # the adapter does something
    _assert_close(_cached(name, apart=True)(merged, *rows), full[:, PROMPT - 1 :], 5e-6)


@pytest.mark.slow
@every_config
def test_decoding_with_a_cache_agrees_with_the_full_forward_pass_beside_an_adapter(name):
    params, rows, adapter = _params(name), _rows(), _adapter(name)[1]
    full = _full(name)(params, *rows, adapter=adapter)
    for apart in (False, True):
        _assert_close(_cached(name, apart)(params, *rows, adapter=adapter), full[:, PROMPT - 1 :], 5e-6)
    tail = _full(name)(params, *rows, adapter=adapter, tail=3)
    _assert_close(tail, full[:, -3:], 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_decoding_with_a_cache_agrees_at_the_recipes_size(family, seed):
    config = decoder_config(family, "tiny", vocab=len(world.VOCABULARY), length=world.LENGTH, numerics=Numerics())
    net, rng = network(config), np.random.default_rng(seed)
    params = reference.random_params(net, seed)
    tokens = rng.integers(1, config.vocab, (32, world.LENGTH))
    valid = np.arange(world.LENGTH)[None] >= rng.integers(0, world.PROMPT, 32)[:, None]
    full = jax.jit(net.forward)(params, tokens, valid)
    logits, cache = _begun(net, params, tokens[:, : world.PROMPT], valid[:, : world.PROMPT], world.LENGTH)
    step = jax.jit(functools.partial(cached.step, net))
    for slot in range(world.PROMPT, world.LENGTH):
        _assert_close(logits, full[:, slot - 1], 5e-6)
        logits, cache = step(params, tokens[:, slot], cache)
    _assert_close(logits, full[:, -1], 5e-6)


@pytest.mark.parametrize("name", ["gpt", "llama-grouped", "llama-bias"])
def test_tail_is_the_end_of_the_full_forward_pass(name):
    params, rows = _params(name), _rows()
    full = _full(name)(params, *rows)
    tail = _full(name)(params, *rows, tail=5)
    assert tail.shape == (len(PADS), 5, VOCAB)
    _assert_close(tail, full[:, -5:], 2e-6)


def test_tail_of_a_single_layer():
    rows = _rows()
    one = network(_nano("gpt", layers=1))
    params = reference.random_params(one, 0)
    expected = reference.logits(one.config, params, rows[0][0])
    _assert_close(jax.jit(one.forward, static_argnames="tail")(params, *rows, tail=1)[0, 0], expected[-1], 1e-5)


@every_config
def test_padding_does_not_change_the_logits_of_valid_tokens(name):
    params, (tokens, _) = _params(name), _rows()
    kept = LENGTH - max(PADS)
    # The same row behind 0, 1, 3 and 7 pads, all else the same; then other tokens under the padding.
    shifted = np.zeros_like(tokens)
    valid = np.zeros(tokens.shape, bool)
    for row, pads in enumerate(PADS):
        shifted[row, pads : pads + kept], valid[row, pads : pads + kept] = tokens[0, :kept], True
    logits = np.asarray(_full(name)(params, shifted, valid))
    for row, pads in enumerate(PADS[1:], start=1):
        _assert_close(logits[row, pads : pads + kept], logits[0, :kept], 2e-6)
    again = np.asarray(_full(name)(params, np.where(valid, shifted, 5), valid))
    for row, pads in enumerate(PADS):
        np.testing.assert_array_equal(again[row, pads : pads + kept], logits[row, pads : pads + kept])


def test_a_row_of_nothing_but_padding_is_finite_and_leaves_the_others_alone():
    params, (tokens, valid) = _params("llama"), _rows()
    empty = valid & (np.arange(len(PADS)) != 2)[:, None]
    logits, untouched = _full("llama")(params, tokens, empty), _full("llama")(params, tokens, valid)
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(np.delete(logits, 2, 0)[-1], untouched[-1])


@pytest.mark.parametrize(
    ("family", "all_of_them", "vectors"), [("gpt", 31_904, 896), ("llama-bias", 32_960, 864), ("llama", 37_728, 160)]
)
def test_parameter_counts_are_the_recipes(family, all_of_them, vectors):
    config = decoder_config(family, "tiny", vocab=len(world.VOCABULARY), length=world.LENGTH, numerics=Numerics())
    net = network(config)
    assert network(dataclasses.replace(config)) is net  # compiled programs are found by it
    assert net.parameters == all_of_them
    sizes = {n: int(np.prod(d.shape)) for n, d in net.declarations.items()}
    assert sum(s for n, s in sizes.items() if n.endswith(("bias", "gain"))) == vectors
    assert sum(sizes.values()) == all_of_them
    matrices = sum(s for n, s in sizes.items() if n.endswith("kernel")) + config.vocab * config.width
    assert config.matrices == matrices


def test_parameter_counts_of_large_models_do_not_overflow():
    big = network(_nano("llama", width=8192, layers=80, heads=64, kv_heads=8, head_dim=128, hidden=28_672, vocab=10))
    attention, mlp = 8192 * 128 * (2 * 64 + 2 * 8), 3 * 8192 * 28_672
    assert big.parameters == 80 * (attention + mlp + 2 * 8192) + 2 * 10 * 8192 + 8192


def _equations(jaxpr) -> int:
    """Number of equations of a jaxpr, those inside its loops and calls included."""
    total = 0
    for equation in jaxpr.eqns:
        total += 1
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                total += _equations(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("use", ["forward", "tail", "cache", "gradient"])
def test_programs_do_not_grow_with_depth(use):
    tokens, valid = _rows()

    def size(layers: int) -> int:
        net = network(_nano("llama-bias", layers=layers))

        def step(p):
            return cached.step(net, p, tokens[:, 0], _begun(net, p, tokens, valid, LENGTH + 1)[1])

        run = {
            "forward": lambda p: net.forward(p, tokens, valid),
            "tail": lambda p: net.forward(p, tokens, valid, tail=3),
            "cache": step,
            "gradient": jax.grad(lambda p: net.forward(p, tokens, valid, tail=3).sum()),
        }[use]
        return _equations(jax.make_jaxpr(run)(net.abstract()).jaxpr)

    assert size(2) == size(8) > 50


def test_key_biases_have_no_gradient_without_rotation():
    net, rows, params = network(CONFIGS["gpt"]), _rows(), jax.tree.map(jnp.asarray, _params("gpt"))
    names = [n for n, d in net.declarations.items() if d.role in ("bias", "key-bias")]
    held = {n: p for n, p in params.items() if n not in names}

    def loss(biases):
        return -jax.nn.log_softmax(net.forward({**held, **biases}, *rows))[..., 3].mean()

    gradient = jax.jit(jax.grad(loss))({n: params[n] for n in names})
    keys = [n for n, d in net.declarations.items() if d.role == "key-bias"]
    assert keys == ["blocks/attention/k/bias"]
    largest = {n: float(jnp.abs(g).max()) for n, g in gradient.items()}
    assert all(largest[n] < 1e-6 for n in keys), largest
    assert all(largest[n] > 1e-3 for n in names if n not in keys), largest


def test_key_biases_act_only_where_keys_are_rotated():
    rows = _rows()
    for name, acts in (("gpt", False), ("llama-bias", True)):
        params = _params(name)
        moved = {**params, "blocks/attention/k/bias": params["blocks/attention/k/bias"] + 1.0}
        logits, plain = _full(name)(moved, *rows), _full(name)(params, *rows)
        apart = float(jnp.abs(logits - plain).max() / jnp.abs(plain).max())
        assert apart > 1e-2 if acts else apart < 5e-6, (name, apart)


def test_the_softmax_has_the_usual_gradient():
    scores, weights = np.random.default_rng(0).normal(0, 3, (2, 4, 7)).astype(np.float32)
    scores[1, 3:], scores[3] = NEGATIVE, NEGATIVE  # a masked part, and a row with no valid key

    def gradient(function):
        return jax.grad(lambda s: (function(s) * weights).sum())(scores)

    np.testing.assert_allclose(gradient(softmax), gradient(jax.nn.softmax), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("over", [1, 2])
def test_the_norm_has_the_usual_gradient(over):
    y, weights = np.random.default_rng(0).normal(0, 3, (2, 2, 3, 4, 7)).astype(np.float32)
    axes = tuple(range(-over, 0))
    usual = lambda y: y * jax.lax.rsqrt(jnp.square(y).mean(axes, keepdims=True) + 0.1)  # noqa: E731

    def gradient(function):
        return jax.grad(lambda y: (function(y) * weights).sum())(y)

    np.testing.assert_allclose(gradient(lambda y: scaled(y, over, 0.1)), gradient(usual), rtol=1e-5, atol=1e-6)


def test_bfloat16_computes_near_float32_and_gives_float32_logits():
    params, rows = _params("llama-bias-grouped"), _rows()
    half = network(dataclasses.replace(CONFIGS["llama-bias-grouped"], dtype="bfloat16"))
    assert {d.dtype for d in half.declarations.values()} == {"float32"}
    logits = jax.jit(half.forward)(params, *rows)
    assert logits.dtype == jnp.float32
    exact = _full("llama-bias-grouped")(params, *rows)
    valid = rows[1]
    assert 0 < np.abs(np.asarray(logits - exact)[valid]).mean() < 0.02 * np.abs(np.asarray(exact)[valid]).max()
    # Not rounded to bfloat16 on their way: few of them are numbers that it has.
    assert (logits == logits.astype(jnp.bfloat16)).mean() < 0.05


@every_config
def test_weights_held_in_bfloat16_compute_in_float32_as_their_float32_copies_do(name):
    held = {n: jnp.asarray(a, jnp.bfloat16) for n, a in _params(name).items()}
    wide = {n: a.astype(jnp.float32) for n, a in held.items()}
    forward = jax.jit(network(CONFIGS[name]).forward)
    np.testing.assert_allclose(forward(held, *_rows()), forward(wide, *_rows()), atol=1e-5)


@pytest.mark.parametrize(
    ("family", "size", "words"),
    [("lama", "tiny", ("model family 'lama'", "'llama'")), ("gpt", "tinny", ("size 'tinny'", "'tiny'"))],
)
def test_an_unknown_family_or_size_is_told_in_one_line_with_the_nearest(family, size, words):
    with pytest.raises(UsageError) as caught:
        decoder_config(family, size, vocab=VOCAB, length=LENGTH, numerics=Numerics())
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_checkpoints_come_back_bit_for_bit(tmp_path):
    params = _params("gpt")
    checkpoints.save(epath.Path(tmp_path) / "arrays", {n: jnp.asarray(p) for n, p in params.items()})
    loaded = checkpoints.load(epath.Path(tmp_path) / "arrays")
    assert loaded.keys() == params.keys()
    for name, array in params.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


@pytest.mark.parametrize("harm", ["missing", "truncated", "without metadata"])
def test_a_damaged_checkpoint_is_told_in_one_line(tmp_path, harm):
    path = epath.Path(tmp_path) / "arrays"
    if harm != "missing":
        checkpoints.save(path, {"a/b": jnp.arange(4096.0)})
    if harm == "truncated":
        data = max((f for f in tmp_path.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    elif harm == "without metadata":
        (path / "_METADATA").unlink()
    with pytest.raises(SubjaxError) as caught:
        checkpoints.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
