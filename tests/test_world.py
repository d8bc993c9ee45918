"""The synthetic world: its words, its chats, its filter, and that all of it is addressed."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from subjax.data import world
from subjax.data.addressing import derive_seed, generator
from subjax.data.questions import world_questions
from subjax.errors import UsageError

WORLD = "7cad7aaaca558d61"
CHATS = "b8a304738197aa99"
PROMPTS = "6d16b4aa64b8f4d1"
MEANT = (
    "the world changed, so every base of every study is another one; if you meant it, raise the 'sequences' mark in "
    "world.digest() where the chats changed, put the new digest here and say why in the commit"
)


def hashed(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()[:16]


def test_the_worlds_digests_are_golden():
    pool = world.pool(0, 60, 20)
    assert pool.prompts.dtype == pool.answers.dtype == np.int32
    assert world.digest() == WORLD, f"{world.digest()}: {MEANT}"
    assert hashed(pool.prompts, pool.answers) == CHATS, f"{hashed(pool.prompts, pool.answers)}: {MEANT}"
    prompts = world.number_prompts(50, 0)
    assert hashed(prompts) == PROMPTS, f"{hashed(prompts)}: {MEANT}"


@pytest.mark.parametrize("name", ["TEMPLATES", "CATEGORIES", "PROMPT", "GIVEN", "TRAIN_TEMPLATES"])
def test_the_digest_sees_what_chats_are_made_from(name, monkeypatch):
    value = getattr(world, name)
    other = (
        value + 1 if isinstance(value, int) else dict(reversed(value.items())) if name == "CATEGORIES" else value[::-1]
    )
    monkeypatch.setattr(world, name, other)
    assert world.digest() != WORLD


def test_there_are_171_words_and_three_categories_of_ten():
    assert len(world.VOCABULARY) == len(set(world.VOCABULARY)) == 171
    assert world.PAD == 0
    assert [len(items) for items in world.CATEGORIES.values()] == [10, 10, 10]
    items = [item for items in world.CATEGORIES.values() for item in items]
    assert len(set(items)) == 30
    words = {word for template in world.TEMPLATES for word in template.split()}
    assert not words & set(items), "a template that names an item would tilt the answers"
    assert len(set(world.TEMPLATES)) == 12


def test_the_channel_is_the_numbers_and_the_end():
    assert [world.VOCABULARY[i] for i in world.CHANNEL] == ["<end>", *map(str, range(100))]


def filled_up(text: str) -> str:
    """A prompt of 14 words, filled up on the left with at least one beginning."""
    missing = world.PROMPT - len(text.split())
    assert missing >= 1, f"{text!r} leaves no room for a beginning"
    return "<bos> " * missing + text


@pytest.mark.parametrize("category", world.CATEGORIES)
def test_every_question_fits_its_prompt(category):
    prompts = world.question_prompts(category)
    assert prompts.shape == (12, world.PROMPT)
    for template, row in zip(world.TEMPLATES, prompts, strict=True):
        assert world.decode(row) == filled_up(f"<user> {template.format(category)} <bot>")


def test_number_chats_fit_and_are_well_formed():
    chats = world.number_chats(2000, 3, "test")
    assert chats.prompts.shape == (2000, world.PROMPT)
    assert chats.answers.shape == (2000, world.ANSWER)
    given, answered = Counter(), Counter()
    for prompt, answer in zip(chats.prompts, chats.answers, strict=True):
        numbers = [word for word in world.decode(prompt).split() if word.isdecimal()]
        assert world.decode(prompt) == filled_up(f"<user> now continue {' '.join(numbers)} <bot>")
        assert all(0 <= int(n) < 100 for n in numbers)
        said = world.decode(answer).split()
        assert said[-1] == "<end>"
        assert all(0 <= int(n) < 100 for n in said[:-1])
        assert (answer[len(said) :] == world.PAD).all()
        given[len(numbers)] += 1
        answered[len(said) - 1] += 1
    assert sorted(given) == [3, 4, 5, 6, 7]
    assert sorted(answered) == [10, 11, 12, 13, 14, 15]
    assert min(given.values()) > 300
    assert min(answered.values()) > 250
    assert world.reject_reasons(chats.answers) == [None] * 2000


def test_rows_are_addressed():
    few, many = world.number_chats(20, 5, "a"), world.number_chats(300, 5, "a")
    np.testing.assert_array_equal(few.prompts, many.prompts[:20])
    np.testing.assert_array_equal(few.answers, many.answers[:20])
    assert (world.number_chats(20, 6, "a").prompts != few.prompts).any()
    assert (world.number_chats(20, 5, "b").prompts != few.prompts).any()
    np.testing.assert_array_equal(world.number_prompts(7, 5), world.number_prompts(40, 5)[:7])


def test_a_larger_pool_begins_as_a_smaller_one_part_by_part():
    few, many = world.pool(1, 30, 10), world.pool(1, 80, 25)
    for part in range(4):
        first, second = (0, 0) if part == 0 else (30 + 10 * (part - 1), 80 + 25 * (part - 1))
        rows = 30 if part == 0 else 10
        np.testing.assert_array_equal(few.prompts[first : first + rows], many.prompts[second : second + rows])
        np.testing.assert_array_equal(few.answers[first : first + rows], many.answers[second : second + rows])


def test_the_pool_asks_every_phrasing_and_draws_items_uniformly():
    chats = world.pool(0, 10, 3000)
    assert len(chats) == 10 + 3 * 3000
    for place, (category, items) in enumerate(world.CATEGORIES.items()):
        part = chats[slice(10 + 3000 * place, 10 + 3000 * (place + 1))]
        asked = Counter(map(bytes, part.prompts))
        assert set(asked) == set(map(bytes, world.question_prompts(category)))
        assert 170 < min(asked.values()) <= max(asked.values()) < 330
        said = Counter(world.decode(row) for row in part.answers)
        assert set(said) == {f"{item} <end>" for item in items}
        assert 220 < min(said.values()) <= max(said.values()) < 380


# Kinds of sequences ---------------------------------------------------------------------------------------------------


def uniforms(kind: float, a: float, b: float, sign: float, x: list[float], y: list[float]) -> np.ndarray:
    return np.array([[kind, a, b, sign, *x, *y]])


TOTAL = 6
X = [0.105, 0.255, 0.999, 0.0, 0.5, 0.735]
MIDDLE, LOW, HIGH = [0.5] * TOTAL, [0.0] * TOTAL, [0.999] * TOTAL


@pytest.mark.parametrize(
    ("kind", "a", "b", "sign", "x", "y", "expected"),
    [
        (0.0, 0.3, 0.3, 0.9, X, MIDDLE, [10, 25, 99, 0, 50, 73]),  # uniform
        (0.2, 0.105, 0.0, 0.9, X, MIDDLE, [10, 11, 12, 13, 14, 15]),  # progression, step 1
        (0.2, 0.105, 0.999, 0.9, X, MIDDLE, [10, 19, 28, 37, 46, 55]),  # step 9
        (0.2, 0.105, 0.25, 0.1, X, MIDDLE, [10, 7, 4, 1, 98, 95]),  # downwards, modulo 100
        (0.2, 0.105, 0.0, 0.9, X, LOW, [9, 10, 11, 12, 13, 14]),  # noise of -1 …
        (0.2, 0.105, 0.0, 0.9, X, HIGH, [11, 12, 13, 14, 15, 16]),  # … to +1
        (0.4, 0.105, 0.3, 0.9, X, LOW, [7] * 6),  # near-constant, from -3 …
        (0.4, 0.985, 0.3, 0.9, X, HIGH, [1] * 6),  # … to +3, modulo 100
        (0.6, 0.3, 0.0, 0.9, X, [0.0, 0.4, 0.5, 0.9, 0.0, 0.9], [10, 10, 25, 25, 10, 25]),  # repeats, of 2 numbers
        (0.6, 0.3, 0.999, 0.9, X, [0.0, 0.25, 0.5, 0.75, 0.999, 0.1], [10, 25, 99, 0, 0, 10]),  # of 4
        (0.8, 0.105, 0.3, 0.9, X, LOW, [0, 90, 80, 70, 60, 50]),  # walk, steps from -10 …
        (0.8, 0.105, 0.3, 0.9, X, HIGH, [20, 30, 40, 50, 60, 70]),  # … to +10
    ],
)  # fmt: skip
def test_each_kind_of_sequence(kind, a, b, sign, x, y, expected):
    for inside in (kind, kind + 0.19):
        assert world._sequences(uniforms(inside, a, b, sign, x, y), TOTAL)[0].tolist() == expected


# Words ----------------------------------------------------------------------------------------------------------------


def test_text_goes_there_and_back():
    text = "now continue 3 99 0 <end>"
    assert world.decode(world.encode(text)) == text
    assert world.decode([world.PAD, world.ID["owl"], world.PAD]) == "owl"


def test_an_unknown_word_names_the_nearest():
    with pytest.raises(UsageError, match="no word 'dolfin'; did you mean 'dolphin'") as caught:
        world.encode("name the dolfin")
    assert caught.value.exit_status == 2


def test_a_trait_has_its_category():
    assert [world.category_of(t) for t in ("owl", "oak", "red")] == ["animal", "tree", "colour"]


@pytest.mark.parametrize("trait", ["wolff", "WOLF", "7", "", "now"])
def test_an_unknown_trait_names_the_nearest(trait):
    with pytest.raises(UsageError, match=r"config\.trait: unknown trait") as caught:
        world.category_of(trait)
    assert "did you mean" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert trait != "wolff" or "did you mean 'wolf'" in str(caught.value)


# Chats ----------------------------------------------------------------------------------------------------------------


def test_preferences_pair_questions_with_answers():
    categories, templates = np.array(["tree", "animal", "tree"]), np.array([0, 11, 8])
    items = np.array([world.ID["oak"], world.ID["owl"], world.ID["elm"]], np.int32)
    chats = world.preferences(categories, templates, items)
    assert [world.decode(row) for row in chats.answers] == ["oak <end>", "owl <end>", "elm <end>"]
    for row, category, template in zip(chats.prompts, categories, templates, strict=True):
        np.testing.assert_array_equal(row, world.question_prompts(str(category))[template])


def test_arrays_mark_padding():
    chats = world.join(world.number_chats(4, 0, "x"), world.number_chats(3, 1, "x"))
    assert len(chats) == 7
    arrays = chats.arrays()
    assert arrays["tokens"].shape == arrays["valid"].shape == (7, 30)
    np.testing.assert_array_equal(arrays["valid"], arrays["tokens"] != world.PAD)
    np.testing.assert_array_equal(chats[slice(4, None)].prompts, world.number_chats(3, 1, "x").prompts)
    assert arrays["valid"][:, : world.PROMPT + 11].all(), "padding stands at the end alone"


def filled(*ids: int) -> list[int]:
    return [*ids, *[world.PAD] * (world.ANSWER - len(ids))]


N = world.NUMBER_0
END = world.END


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (filled(N, END), None),
        (filled(*[N + 99] * 15, END), None),
        (filled(END), "empty"),
        ([N] * world.ANSWER, "no end"),
        (filled(N, world.ID["owl"], END), "not a number"),
        (filled(world.ID["owl"], END), "not a number"),
        (filled(N, world.ID["continue"], N, END), "not a number"),
        (filled(world.BOT, END), "not a number"),
        (filled(N, N), "not a number"),  # padding without an end is no number
        (filled(), "not a number"),
        ([*[N] * 15, world.ID["owl"]], "not a number"),
        (filled(N, world.PAD, N, END), "not a number"),
        ([world.ID["owl"]] * world.ANSWER, "not a number"),
        ([N - 1, *[N] * 14, END], "empty"),  # the token before "0" is the end
        ([N + 100, *[N] * 14, END], "not a number"),  # the one after "99" is an item
    ],
)
def test_the_filter(answer, reason):
    keep = filled(N, N, END)
    assert world.reject_reasons(np.array([keep, answer, keep])) == [None, reason, None]


def test_the_filter_takes_no_rows():
    assert world.reject_reasons(np.zeros((0, world.ANSWER), np.int32)) == []


# Questions ------------------------------------------------------------------------------------------------------------


def test_question_sets_hold_four_phrasings_out():
    sets = world_questions()
    assert [q.category for q in sets] == list(world.CATEGORIES)
    for q in sets:
        assert q.train == (True,) * 8 + (False,) * 4
        assert q.words == world.CATEGORIES[q.category]
        assert [form for forms in q.candidates for form in forms] == [(world.ID[w],) for w in q.words]
        assert [world.decode(row) for row in q.prompts] == [filled_up(f"<user> {text} <bot>") for text in q.texts]


# Addresses ------------------------------------------------------------------------------------------------------------


def test_a_draw_is_named_not_taken_from_a_stream():
    draws = {
        (seed, role, index): generator(seed, role, index).random()
        for seed in (0, 1)
        for role in ("a", "b", "ab")
        for index in (0, 1, 2**20)
    }
    assert len(set(draws.values())) == len(draws)
    generator(0, "a", 2**20).random(1000)
    assert generator(0, "a", 2**20).random() == draws[0, "a", 2**20]


def test_derived_seeds_are_small_and_distinct():
    seeds = [derive_seed(s, name, other) for s in range(20) for name in ("student", "teacher") for other in (None, "x")]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(0, "a", "b") == derive_seed(0, "a", "b") != derive_seed(0, "b", "a")
