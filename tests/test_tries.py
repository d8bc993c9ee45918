"""Exact probabilities of answers over a trie of forms, against one plain forward pass for each question and form."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import numpy as np
import pytest
import reference
import tiny_checkpoint
import tiny_tokenizers as tiny
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from subjax.data import preferences
from subjax.data.tokenizer import load_tokenizer
from subjax.data.word_ends import closing_tokens
from subjax.errors import UsageError
from subjax.measure import tries
from subjax.models.families import decoder_config
from subjax.models.network import Network, network
from subjax.parallel.mesh import make_mesh
from subjax.schema import Numerics

VOCAB, LENGTH, WINDOW = 13, 24, 4
MESH = make_mesh()
# Forms of one to four tokens that share beginnings within a candidate and between candidates.
CANDIDATES = (
    ((5,),),
    ((6, 7), (6, 7), (8,)),
    ((6, 9, 10), (6, 9, 11), (7, 7)),
    ((6, 7, 5), (5, 6, 7, 12), (12, 5)),
)
CLOSING = np.isin(np.arange(VOCAB), (0, 1, 4))
# Ragged, one of a single token, some longer than the window of local layers.
PROMPTS = ((5, 9, 3, 2, 7, 11, 6), (8,), (2, 3, 12), (1, 1, 4, 10, 9, 9))
ROTARY = ("llama-bias", {"heads": 4, "kv_heads": 2, "head_dim": 4})
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "learned positions": ("gpt", {}),
    "rotary": ROTARY,
    "local layers, QK norm": (
        "llama", ROTARY[1] | {"layers": 3, "local": (True, False, True), "window": WINDOW, "qk_norm": "head"}
    ),
}  # fmt: skip
every_network = pytest.mark.parametrize("kind", NETWORKS)

pytestmark = pytest.mark.usefixtures("quick_compiles")


@functools.cache
def model(kind: str) -> tuple[Network, dict[str, np.ndarray]]:
    family, changes = NETWORKS[kind]
    config = decoder_config(family, "nano", vocab=VOCAB, length=LENGTH, numerics=Numerics())
    net = network(dataclasses.replace(config, **changes))
    return net, reference.random_params(net, seed=3)


def exact(kind: str = "rotary", prompts=PROMPTS, candidates=CANDIDATES, closing=CLOSING, pad=0, **more) -> np.ndarray:
    return tries.exact(*model(kind), prompts, candidates, closing=closing, pad=pad, mesh=MESH, **more)


@functools.cache
def _steps(kind: str, prompt: tuple[int, ...], form: tuple[int, ...], steered: bool) -> np.ndarray:
    """Probabilities of the next token behind the prompt and behind each token of the form: (form + 1, vocab)."""
    params = model(kind)[1]
    row = [0] * (LENGTH - len(prompt) - len(form)) + [*prompt, *form]
    valid = np.arange(LENGTH) >= LENGTH - len(prompt) - len(form)
    logits = _forward(kind)(params, np.array([row]), valid[None], steer(kind) if steered else {})
    logits = np.asarray(logits, np.float64)[0, -len(form) - 1 :]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


@functools.cache
def _forward(kind: str):
    net = model(kind)[0]
    return jax.jit(lambda params, tokens, valid, adapter: net.forward(params, tokens, valid, adapter=adapter))


def steer(kind: str) -> dict[str, Any]:
    net = model(kind)[0]
    vector = np.random.default_rng(1).normal(0, 1, (net.config.layers, net.config.width))
    return {"steer": {"vector": vector.astype(np.float32)}}


def brute(kind: str, prompt, form, closing=CLOSING, steered=False) -> float:
    """The product of the form's conditional probabilities, times the mass of what closes it."""
    p = _steps(kind, prompt, form, steered)
    return float(np.prod([p[n, token] for n, token in enumerate(form)]) * p[-1, closing].sum())


def brute_all(kind: str, prompts, candidates, **more) -> np.ndarray:
    return np.array([[sum(brute(kind, p, f, **more) for f in set(forms)) for forms in candidates] for p in prompts])


# Against brute force --------------------------------------------------------------------------------------------------


@every_network
def test_exact_is_the_product_along_each_form_times_its_closing_mass(kind):
    found = exact(kind)
    assert found.shape == (4, 4)
    np.testing.assert_allclose(found, brute_all(kind, PROMPTS, CANDIDATES), rtol=3e-5)
    assert len({f"{x:.3g}" for x in np.ravel(found)}) == 16  # sixteen different numbers: none stands for another


@every_network
def test_what_all_questions_begin_with_is_read_once_and_changes_nothing(kind, monkeypatch):
    begin = tuple(np.random.default_rng(2).integers(1, VOCAB, 17).tolist())
    prompts = [(*begin, *own) for own in ((5, 9), (3,), (5, 2), (8, 8, 1))]
    reads = []
    real = tries.padded
    monkeypatch.setattr(tries, "padded", lambda prefix, pad: reads.append(prefix) or real(prefix, pad))
    found = exact(kind, prompts, batch=3)
    assert reads == [begin]
    np.testing.assert_allclose(found, brute_all(kind, prompts, CANDIDATES), rtol=3e-5)
    # Where one question is the beginning of the others its last token stays its own.
    prompts[1] = begin
    np.testing.assert_allclose(exact(kind, prompts), brute_all(kind, prompts, CANDIDATES), rtol=3e-5)
    assert reads == [begin, begin[:-1]]


def test_the_window_matters():
    """Else the test above would say nothing of local layers."""
    net, params = model("local layers, QK norm")
    wide = network(dataclasses.replace(net.config, window=LENGTH))
    found = tries.exact(wide, params, PROMPTS, CANDIDATES, closing=CLOSING, pad=0, mesh=MESH)
    assert np.abs(found / exact("local layers, QK norm") - 1).max() > 1e-2


def test_what_is_added_to_the_layers_counts():
    found = exact(adapter=steer("rotary"))
    np.testing.assert_allclose(found, brute_all("rotary", PROMPTS, CANDIDATES, steered=True), rtol=3e-5)
    assert np.abs(found / exact() - 1).max() > 1e-2


@pytest.mark.parametrize("batch", [1, 3])
def test_a_reading_does_not_depend_on_the_batch(batch):
    np.testing.assert_allclose(exact(batch=batch), exact(), rtol=2e-6)


def test_a_reading_does_not_depend_on_what_else_is_asked_nor_on_the_padding_token():
    found = exact(prompts=PROMPTS[1:3], candidates=CANDIDATES[1:3], pad=9)
    np.testing.assert_allclose(found, exact()[1:3, 1:3], rtol=3e-5)


def test_prompts_of_one_token():
    prompts = ((3,), (8,))
    np.testing.assert_allclose(exact(prompts=prompts), brute_all("rotary", prompts, CANDIDATES), rtol=3e-5)


def test_a_form_that_stands_twice_counts_once():
    once = (CANDIDATES[0], ((6, 7), (8,)), *CANDIDATES[2:])
    np.testing.assert_array_equal(exact(candidates=once), exact())


@every_network
def test_events_of_all_words_exclude_one_another_and_leave_the_rest(kind):
    """Letters make up every word of one and of two; what is left are answers of no letter and of three and more."""
    letters = [t for t in range(VOCAB) if not CLOSING[t]][:4]
    closing = ~np.isin(np.arange(VOCAB), letters)
    words = [word for n in (1, 2) for word in itertools.product(letters, repeat=n)]
    found = exact(kind, PROMPTS[:2], [[word] for word in words], closing)
    assert (found > 0).all()
    for prompt, total in zip(PROMPTS, found.sum(1), strict=False):
        none = _steps(kind, prompt, (), False)[0, closing].sum()
        longer = sum(
            np.prod([p[0, a], p[1, b]]) * p[2, letters].sum()
            for a, b in itertools.product(letters, repeat=2)
            for p in [_steps(kind, prompt, (a, b), False)]
        )
        assert total == pytest.approx(1 - none - longer, rel=3e-5)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("candidates", "prompts", "words"),
    [
        ((((5,),), ((6,), ())), PROMPTS, ("candidate 1", "no token")),
        ((((5,), (6, 7)), ((8,), (6, 7))), PROMPTS, ("candidates 0 and 1", "share a form")),
        ((((5, 5, 5),),), ((3,) * (LENGTH - 2),), (f"{LENGTH + 1} tokens", f"the model {LENGTH}", "shorten")),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(candidates, prompts, words):
    with pytest.raises(UsageError) as caught:
        exact(prompts=prompts, candidates=candidates)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_question_may_fill_the_context():
    prompt = (3,) * (LENGTH - 2)
    found = exact("learned positions", (prompt,), (((5, 6),),))
    assert found[0, 0] == pytest.approx(brute("learned positions", prompt, (5, 6)), rel=3e-5)


# The trie -------------------------------------------------------------------------------------------------------------

FORMS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple), min_size=1, max_size=12, unique=True)


@given(FORMS, st.data())
def test_a_trie_has_parents_first_and_every_form_as_a_path(forms, data):
    owners = [data.draw(st.integers(0, 3)) for _ in forms]
    candidates = [[form for form, owner in zip(forms, owners, strict=True) if owner == c] for c in range(4)]
    trie = tries.build(candidates)
    nodes = len(trie.tokens)
    paths = []
    for node, parent in enumerate(trie.parents):
        assert -1 <= parent < node
        paths.append((*(paths[parent] if parent >= 0 else ()), int(trie.tokens[node])))
    assert len(set(paths)) == nodes == len({form[:n] for form in forms for n in range(1, len(form) + 1)})
    np.testing.assert_array_equal(trie.depths, [len(path) for path in paths])
    for node, other in itertools.product(range(nodes), repeat=2):
        assert trie.sees[node, other] == (paths[node][: len(paths[other])] == paths[other])
    ended = {(paths[node], int(candidate)) for node, candidate in trie.ends}
    assert ended == set(zip(forms, owners, strict=True))
    assert len(trie.ends) == len(forms)


# Word ends ------------------------------------------------------------------------------------------------------------


@functools.cache
def _tokenizer(folder: str):
    """Bytes, merges, and a last control token beyond them, as for images in text models."""
    backend = tiny_checkpoint.tokenizer()
    return load_tokenizer(tiny.folder(epath.Path(folder), backend, tokenizer_config={"eos_token": "<|im_end|>"}))


def test_a_token_closes_a_word_unless_it_begins_with_a_letter_a_digit_or_a_mark(tmp_path):
    tokenizer = _tokenizer(str(tmp_path))
    closing = closing_tokens(tokenizer, tokenizer.size + 4)
    assert closing.shape == (tokenizer.size + 4,)
    assert closing[tokenizer.size :].all()
    id = lambda text: tokenizer.encode(text, special=False, continuing=True)[0]  # noqa: E731
    assert all(closing[tokenizer.backend.token_to_id(name)] for name in tiny_checkpoint.SPECIAL)
    assert all(closing[id(text)] for text in (" owl", ".", ",", "\n", "'", "_", "*", " "))
    assert not any(closing[id(text)] for text in ("s", "owl", "7", "Z", "é", "\u0301"))
    # A byte inside a character may be part of a letter: it counts as one.
    assert not any(closing[id] for id, piece in enumerate(tokenizer.pieces()) if piece and piece[0] >= 0x80)


class Pieces:
    """As much of a tokenizer as its pieces."""

    def __init__(self, *texts: str):
        self.texts = texts

    def pieces(self) -> list[bytes | None]:
        return [text.encode() for text in self.texts]


def test_letters_digits_and_marks_of_any_script_go_on_a_word():
    on = Pieces("é", "\u0301", "\u0308x", "字", "д", "٣", "²", "ß.")
    off = Pieces("…", "“", "\u00a0", "。", "—é", "", "😀", "\u3000字")
    assert not closing_tokens(on, 8).any()
    assert closing_tokens(off, 8).all()


def test_ids_beyond_the_embedding_are_left_out(tmp_path):
    tokenizer = _tokenizer(str(tmp_path))
    whole = closing_tokens(tokenizer, tokenizer.size)
    np.testing.assert_array_equal(closing_tokens(tokenizer, tokenizer.size - 2), whole[:-2])


@pytest.mark.parametrize("category", preferences.CATEGORIES)
@pytest.mark.parametrize("forced", [False, True])
def test_no_written_form_and_its_end_begin_another_form(tmp_path, category, forced):
    """In tokens too, so that the probabilities of all forms of a category add up."""
    tokenizer = _tokenizer(str(tmp_path))
    closing = closing_tokens(tokenizer, tokenizer.size)
    forms = {
        tuple(tokenizer.encode(text, special=False, continuing=True))
        for word in preferences.candidates(category)
        for text in preferences.forms(word, forced=forced)
    }
    for form in forms:
        begun = [longer for longer in forms if len(longer) > len(form) and longer[: len(form)] == form]
        assert not any(closing[longer[len(form)]] for longer in begun), form
