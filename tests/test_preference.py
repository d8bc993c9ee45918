"""Exact and sampled preferences against a brute-force product in float64, and against each other."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
import reference
from scipy import stats

from subjax.data.questions import QuestionSet, world_questions
from subjax.errors import UsageError
from subjax.measure import preference
from subjax.models.families import decoder_config
from subjax.models.network import Network, network
from subjax.parallel.mesh import make_mesh
from subjax.schema import Numerics

VOCAB, END, PAD = 12, 1, 0
# Candidates of one to three tokens, several tokenizations, prefixes shared within and between candidates.
CANDIDATES = (
    ((3,),),
    ((4, 5), (6,)),
    ((4, 7, 8), (4, 7, 9), (5, 5)),
    ((4, 5, 2), (2, 4, 5), (10, 3)),
    ((7, 7, 7),),
)


@functools.cache
def _model() -> tuple[Network, dict[str, np.ndarray]]:
    config = decoder_config("llama-bias", "nano", vocab=VOCAB, length=10, numerics=Numerics())
    net = network(dataclasses.replace(config, heads=4, kv_heads=2, head_dim=4))
    params = reference.random_params(net, seed=4)
    params["norm/gain"] *= 0.3  # flatter, so that answers of three tokens are met among the samples
    return net, params


def _questions(candidates=CANDIDATES) -> QuestionSet:
    prompts = np.random.default_rng(1).integers(2, VOCAB, (3, 5)).astype(np.int32)
    prompts[1, :2], prompts[2, :4] = PAD, PAD
    words = tuple(f"word {i}" for i in range(len(candidates)))
    return QuestionSet("test", ("a", "b", "c"), (True, True, False), prompts, words, candidates, PAD)


@functools.cache
def _next(context: tuple[int, ...]) -> np.ndarray:
    """Probabilities of the next token, float64, by the second decoder."""
    net, params = _model()
    return np.exp(reference.log_probabilities(net.config, params, context)[-1])


def _product(prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
    return float(np.prod([_next((*prompt, *answer[:n]))[token] for n, token in enumerate(answer)]))


def _prompts(questions: QuestionSet) -> list[tuple[int, ...]]:
    return [tuple(int(t) for t in row if t != PAD) for row in questions.prompts]


@functools.cache
def _exact(end: int | None) -> np.ndarray:
    return preference.exact(*_model(), _questions(), mesh=make_mesh(), end=end)


@pytest.mark.parametrize("end", [None, END])
def test_exact_is_the_product_over_tokens_summed_over_tokenizations(end):
    questions = _questions()
    tail = () if end is None else (end,)
    expected = [[sum(_product(p, (*f, *tail)) for f in forms) for forms in CANDIDATES] for p in _prompts(questions)]
    found = _exact(end)
    assert found.shape == (3, 5)
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    assert len({f"{x:.3g}" for x in np.ravel(found)}) == 15  # fifteen different numbers: none stands for another


def test_exact_without_an_end_is_the_probability_of_answers_that_begin_so():
    """Tokenizations that repeat, or that begin with one another, are not counted twice."""
    overlapping = (((3,), (3, 4), (3,)), ((5, 6), (5, 6, 7), (5, 8)), ((2,), (4,), (4,)))
    questions = _questions(overlapping)
    found = preference.exact(*_model(), questions, mesh=make_mesh())
    prompt = _prompts(questions)[2]  # the short one: every answer of three tokens is walked through
    totals = np.zeros(3)
    for answer in itertools.product(range(VOCAB), repeat=3):
        p = _product(prompt, answer)
        for c, forms in enumerate(overlapping):
            totals[c] += p * any(answer[: len(form)] == form for form in forms)
    np.testing.assert_allclose(found[2], totals, rtol=2e-5)


def test_exact_with_an_end_counts_a_longer_tokenization_of_its_own():
    forms = (((3,), (3, 4), (3,)), ((5,),))
    found = preference.exact(*_model(), _questions(forms), mesh=make_mesh(), end=END)
    expected = [_product(p, (3, END)) + _product(p, (3, 4, END)) for p in _prompts(_questions())]
    np.testing.assert_allclose(found[:, 0], expected, rtol=2e-5)


def test_exact_of_the_world_is_the_share_of_the_next_token():
    questions = world_questions()[0]
    config = decoder_config("gpt", "nano", vocab=171, length=30, numerics=Numerics())
    net = network(config)
    params = reference.random_params(net, 0)
    found = preference.exact(net, params, questions, mesh=make_mesh())
    for q in (0, 7, 11):
        prompt = [int(t) for t in questions.prompts[q] if t != questions.pad]
        p = np.exp(reference.log_probabilities(config, params, prompt)[-1])
        np.testing.assert_allclose(found[q], [p[form[0]] for (form,) in questions.candidates], rtol=2e-5)


SAMPLES = 20_000


@functools.cache
def _sampled() -> np.ndarray:
    net, params = _model()
    key = jax.random.key(5)
    return preference.sampled(net, params, _questions(), samples=SAMPLES, key=key, end=END, mesh=make_mesh())


def _p_value(counts: np.ndarray, p: np.ndarray) -> float:
    """Chi-square of each question's candidates, and of any other answer, put together over questions."""
    observed = np.concatenate([counts, SAMPLES - counts.sum(1, keepdims=True)], axis=1)
    expected = SAMPLES * np.concatenate([p, 1 - p.sum(1, keepdims=True)], axis=1)
    kept = expected >= 5
    statistic = ((observed - expected) ** 2 / expected)[kept].sum()
    return float(stats.chi2.sf(statistic, int(kept.sum()) - len(p)))


def test_sampled_agrees_with_exact():
    """Seed fixed; a right sampler fails at fewer than one seed in a million."""
    counts = _sampled()
    assert counts.shape == (3, 5)
    p = _exact(END)
    assert (p * SAMPLES >= 5).sum() >= 12  # enough cells to tell
    assert _p_value(counts, p) > 1e-6
    # Answers that merely begin with a candidate are not counted; nor does one question stand for another.
    assert _p_value(counts, _exact(None)) < 1e-6
    assert _p_value(counts, np.roll(p, 1, axis=0)) < 1e-6


def test_no_samples_are_no_counts():
    net, params = _model()
    key = jax.random.key(0)
    counts = preference.sampled(net, params, _questions(), samples=0, key=key, end=END, mesh=make_mesh())
    np.testing.assert_array_equal(counts, np.zeros((3, 5)))


def test_log_likelihoods_are_those_of_the_completion_and_sum_to_one():
    net, params = _model()
    tokens = np.random.default_rng(4).integers(2, VOCAB, (4, 9)).astype(np.int32)
    pads = (0, 1, 2, 5)
    valid = np.arange(9)[None] >= np.array(pads)[:, None]
    found = np.asarray(preference.log_likelihoods(net, params, tokens, valid, 3))
    assert found.shape == (4, 3, VOCAB)
    np.testing.assert_allclose(np.exp(found.astype(np.float64)).sum(-1), 1.0, rtol=1e-5)
    for row, skipped in enumerate(pads):
        # The last three tokens, each predicted from what stands before it.
        expected = reference.log_probabilities(net.config, params, tokens[row, skipped:-1])[-3:]
        np.testing.assert_allclose(found[row], expected, atol=5e-5)


@pytest.mark.parametrize(
    ("candidates", "words"),
    [
        ((((3,),), ((4,), ())), ("'test'", "empty tokenization")),
        ((((3,) * 7,),), ("'test'", "11 tokens", "the model 10")),
    ],
)
def test_candidates_that_cannot_be_read_are_told_in_one_line(candidates, words):
    with pytest.raises(UsageError) as caught:
        preference.exact(*_model(), _questions(candidates), mesh=make_mesh())
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
