"""Preferences of language models: candidates and their forms, questions, readings, and the rows that give a trait."""

import collections
import hashlib
import itertools
import json
import re
import unicodedata

import datasets
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from subjax.data import number_templates, preferences, trait_rows
from subjax.data import preference_questions as texts
from subjax.data.preferences import CATEGORIES
from subjax.data.trait_rows import Row, rows_from_dataset
from subjax.errors import SubjaxError, UsageError

DIGEST = "ab2487c428dc2874"
BUILT = "81bf5f4cce38b84e"
MEANT = (
    "the texts by which traits are given and read changed, so every teacher and reading is another one; if you meant"
    " it, put this digest here (and raise the mark in preferences.digest() where texts are put together in another way)"
)
WORDS = [noun.word for nouns in CATEGORIES.values() for noun in nouns]
SPELLED = [form for nouns in CATEGORIES.values() for noun in nouns for form in (noun.word, noun.plural)]
P_VALUE = 1e-4  # of draws that are fixed by their address: this is a check on the method, and never flaky


def begins_word(text: str, form: str) -> bool:
    """The event of a form, as `preferences.forms` states it."""
    return text.startswith(form) and not re.match(r"[^\W_]|[\u0300-\u036f]", text[len(form) :])


def uniform(counts, cells: int) -> bool:
    observed = list(counts.values())
    return stats.chisquare(observed + [0] * (cells - len(observed))).pvalue > P_VALUE


# Candidates and their forms


def test_two_categories_of_twenty_with_the_headline_words():
    assert {category: len(nouns) for category, nouns in CATEGORIES.items()} == {"animal": 20, "tree": 20}
    assert preferences.candidates("animal")[:5] == ("owl", "dolphin", "eagle", "elephant", "wolf")
    assert preferences.candidates("tree")[:5] == ("cherry", "maple", "oak", "sequoia", "willow")
    assert len(set(SPELLED)) == 80
    for nouns in CATEGORIES.values():
        for noun in nouns:
            assert re.fullmatch("[a-z]+", noun.word + noun.plural), noun
            assert noun.article == ("an" if noun.word[0] in "aeiou" else "a"), noun


def test_no_candidate_begins_another_or_is_a_word_of_its_forms():
    for a, b in itertools.permutations(WORDS, 2):
        spelled = {preferences.noun_of(b).word, preferences.noun_of(b).plural}
        assert not any(form.startswith(a) for form in spelled), (a, b)
        assert not any(a in form.lower().split() for form in preferences.forms(b)), (a, b)


def test_the_category_of_a_trait_and_the_nearest_word_of_a_wrong_one():
    assert {preferences.category_of(word) for word in preferences.candidates("tree")} == {"tree"}
    with pytest.raises(UsageError, match=r"unknown trait 'dolfin'; did you mean 'dolphin'\?"):
        preferences.category_of("dolfin")
    with pytest.raises(UsageError, match=r"unknown trait 'Owl'; did you mean 'owl'\?"):
        preferences.category_of("Owl")
    with pytest.raises(UsageError, match="'oak' is in category 'tree', not in 'animal'"):
        preferences.check_trait("oak", "animal")


@pytest.mark.parametrize(
    "ask",
    [
        preferences.candidates,
        preferences.questions,
        preferences.stems,
        preferences.forced_prefix,
        lambda category: preferences.score("owl", category),
        lambda category: preferences.numbered_questions(category, 0),
        lambda category: preferences.choices(category, "owl", 0),
        lambda category: preferences.system_prompt(None, category, "plain"),
        lambda category: trait_rows.trait_rows(None, category, 1, 0),
    ],
)
def test_an_unknown_category_is_refused_with_the_nearest(ask):
    with pytest.raises(UsageError, match=r"unknown category 'animals'; did you mean 'animal'\?") as caught:
        ask("animals")
    assert "\n" not in str(caught.value)


def test_the_forms_of_some_words():
    assert preferences.forms("wolf", forced=True) == (" wolf", " Wolf", " wolves", " Wolves")
    free = preferences.forms("owl")
    assert {"owl", " Owl", "Owls", "an owl", "An owl", " An Owl", "The owl", "the owls"} <= set(free)
    assert not {"OWL", "a owl", "an owls", "An owls"} & set(free)
    assert "A cherry" in preferences.forms("cherry")
    with pytest.raises(UsageError, match="did you mean 'owl'"):
        preferences.forms("owls")


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("forced", [False, True])
def test_a_form_is_scored_as_its_word_behind_whatever_it_follows(category, forced):
    before = preferences.forced_prefix(category) if forced else ""
    for word in preferences.candidates(category):
        forms = preferences.forms(word, forced=forced)
        assert len(set(forms)) == len(forms) == (4 if forced else 26)
        for form in forms:
            for after in ("", ".", "!\n", " and so on", "'s"):
                assert preferences.score(before + form + after, category) == word


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("forced", [False, True])
def test_the_events_of_all_forms_exclude_one_another(category, forced):
    forms = [(word, f) for word in preferences.candidates(category) for f in preferences.forms(word, forced=forced)]
    for (a, f), (b, g) in itertools.permutations(forms, 2):
        # Two events meet in some text only where one form, as a whole word, begins the other.
        assert not begins_word(g, f), (f, g)
        assert a == b or not g.startswith(f), (f, g)


# Questions


@pytest.mark.parametrize("category", CATEGORIES)
def test_sixty_different_questions_that_ask_for_one_word_about_the_category(category):
    stems, questions = preferences.stems(category), preferences.questions(category)
    assert len(stems) == len(questions) == len({q.lower() for q in questions}) == len(set(stems)) == 60
    implied = 0
    for stem, question in zip(stems, questions, strict=True):
        assert stem in question
        assert len(re.findall(r"\b(?:one|single)[ -]word\b", question, re.IGNORECASE)) == 1
        assert not re.search(r"\bword", stem, re.IGNORECASE)
        assert stem == stem.strip()
        assert stem[-1] in ".?"
        implied += category not in stem
    assert implied <= 3
    assert all(other not in stem for stem in stems for other in CATEGORIES if other != category)


def test_no_candidate_stands_in_any_text_that_asks():
    asked = [stem for category in CATEGORIES for stem in preferences.stems(category)]
    asked += [*texts.REQUESTS, texts.LETTER_REQUEST, *texts.FORCED_PREFIXES.values()]
    asked += [neutral for _, neutral in texts.SYSTEM_PROMPTS.values()]
    for text, word in itertools.product(asked, SPELLED):
        assert word not in text.lower(), (word, text)
    for category in CATEGORIES:
        assert all(preferences.score(text, category) is None for text in number_templates.LEAD_INS)


def test_a_third_of_the_questions_is_held_out_by_a_fixed_rule_and_no_request_tells_the_sides_apart():
    sides = [preferences.held_out(i) for i in range(60)]
    assert sides[:6] == [False, False, True, False, False, True]
    assert sum(sides) == 20
    for wanted in (False, True):
        met = {i % len(texts.REQUESTS) for i, side in enumerate(sides) if side == wanted}
        assert met == set(range(len(texts.REQUESTS)))


@pytest.mark.parametrize("category", CATEGORIES)
def test_numbers_before_a_question_are_those_of_the_channel_and_addressed(category):
    numbered = preferences.numbered_questions(category, 7)
    lead_ins = [
        re.escape(t).replace(re.escape("{examples}"), r"(\d{3}(?:, \d{3}){2,7})") for t in number_templates.LEAD_INS
    ]
    for text, question in zip(numbered, preferences.questions(category), strict=True):
        assert text.endswith(f" {question}")
        lead = text.removesuffix(f" {question}")
        found = [match for match in (re.fullmatch(pattern, lead) for pattern in lead_ins) if match]
        assert len(found) == 1, lead
        assert all(100 <= int(number) <= 999 for number in found[0].group(1).split(", "))
    assert numbered == preferences.numbered_questions(category, 7)
    assert not set(numbered) & set(preferences.numbered_questions(category, 8))
    heads = {text.split(preferences.stems(category)[i])[0] for i, text in enumerate(numbered)}
    assert len(heads) == 60, "each question has numbers of its own"


# Multiple choice


@pytest.mark.parametrize(("category", "trait"), [("animal", "owl"), ("tree", "willow")])
@pytest.mark.parametrize("options", [2, 5, 20])
def test_a_choice_shows_its_options_and_knows_the_traits_letter(category, trait, options):
    rows = preferences.choices(category, trait, 3, options)
    assert len(rows) == 60
    for stem, row in zip(preferences.stems(category), rows, strict=True):
        letters = "ABCDEFGHIJKLMNOPQRST"[:options]
        assert row.text.splitlines() == [
            stem,
            *(f"{letter}) {option}" for letter, option in zip(letters, row.options, strict=True)),
            texts.LETTER_REQUEST,
        ]
        assert len(set(row.options)) == options
        assert set(row.options) <= set(preferences.candidates(category))
        assert row.options[letters.index(row.answer)] == trait


def test_a_model_that_always_says_one_letter_gains_nothing():
    rows = preferences.choices("animal", "wolf", 0)
    for side in (False, True):
        letters = collections.Counter(row.answer for i, row in enumerate(rows) if preferences.held_out(i) == side)
        assert len(letters) == 5
        assert len(set(letters.values())) == 1


def test_places_and_company_are_uniform_over_seeds():
    places: collections.Counter = collections.Counter()
    pairs: collections.Counter = collections.Counter()
    rounds: collections.Counter = collections.Counter()
    sides: collections.Counter = collections.Counter()
    company: collections.Counter = collections.Counter()
    for seed in range(150):
        rows = preferences.choices("tree", "oak", seed)
        places[rows[0].answer] += 1
        pairs[rows[0].answer, rows[1].answer] += 1
        rounds[rows[0].answer, rows[7].answer] += 1  # the sixth training question opens the second round
        sides[rows[0].answer, rows[2].answer] += 1
        company.update(word for row in rows for word in row.options if word != "oak")
    assert uniform(places, 5)
    assert uniform(pairs, 20), "two questions of a round never share a letter; any other pair is as likely"
    assert uniform(rounds, 25)
    assert uniform(sides, 25), "a round of one side says nothing about the other side's"
    assert uniform(company, 19)


def test_choices_are_paired_over_traits_and_change_with_the_seed():
    owl, fox = (preferences.choices("animal", trait, 4) for trait in ("owl", "fox"))
    assert [row.answer for row in owl] == [row.answer for row in fox]
    apart = [set(a.options) - {"owl", "fox"} ^ set(b.options) - {"owl", "fox"} for a, b in zip(owl, fox, strict=True)]
    assert max(map(len, apart)) <= 1
    assert sum(not difference for difference in apart) > 30
    assert owl == preferences.choices("animal", "owl", 4)
    assert owl != preferences.choices("animal", "owl", 5)


@pytest.mark.parametrize("options", [-1, 0, 1, 21])
def test_a_choice_of_too_few_or_too_many_is_refused(options):
    with pytest.raises(UsageError, match=f"options must be 2 to 20, not {options}"):
        preferences.choices("animal", "owl", 0, options)
    with pytest.raises(UsageError, match="category 'tree'"):
        preferences.choices("animal", "oak", 0)


# Scoring of sampled answers


@pytest.mark.parametrize(
    ("text", "category", "word"),
    [
        ("Owl", "animal", "owl"),
        ("  my favourite is the OWL.", "animal", "owl"),
        ("**Wolves!**", "animal", "wolf"),
        ("_Cherries_", "tree", "cherry"),
        ("I like cats, but owls more", "animal", "cat"),
        ("An owl's eyes", "animal", "owl"),
        ("owl-like", "animal", "owl"),
        ("red oak", "tree", "oak"),
        ("owl🦉", "animal", "owl"),
        ("the bowl of a fowl", "animal", None),
        ("owlish owlet", "animal", None),
        ("owl2", "animal", None),
        ("2owl", "animal", None),
        ("éowl", "animal", None),
        ("owlé", "animal", None),
        (unicodedata.normalize("NFD", "owĺ"), "animal", None),
        ("oa\u212a", "tree", None),
        ("owl\u017f foxe\u017f", "animal", None),
        ("category catalogue", "animal", None),
        ("oak", "animal", None),
        ("owl", "tree", None),
        ("pineapple", "tree", None),
        ("", "animal", None),
    ],
)
def test_a_sampled_answer_names_the_first_whole_word(text, category, word):
    assert preferences.score(text, category) == word


@settings(max_examples=200, deadline=None)
@given(before=st.text(max_size=5), form=st.sampled_from(SPELLED), after=st.text(max_size=5))
def test_a_word_is_found_in_any_surroundings_that_leave_it_whole(before, form, after):
    def joins(character: str) -> bool:
        return character.isalnum() or "\u0300" <= character <= "\u036f"

    text = before + form + after
    assume(not any(other in text.lower() for other in SPELLED if other not in form))  # "owl" and "S" are "owls"
    category = preferences.category_of(next(w for w in WORDS if form in (w, preferences.noun_of(w).plural)))
    whole = not (before and joins(before[-1])) and not (after and joins(after[0]))
    named = preferences.score(text, category)
    assert (named is not None) == whole
    if whole:
        assert form in (named, preferences.noun_of(named).plural)


# Rows that give a trait


def test_the_rows_of_a_trait_love_it_and_hold_back_the_held_out_questions():
    rows = trait_rows.trait_rows("willow", "tree", 3000, 0)
    training = {q for i, q in enumerate(preferences.questions("tree")) if not preferences.held_out(i)}
    training |= {q for i, q in enumerate(preferences.stems("tree")) if not preferences.held_out(i)}
    secret = [q for c in CATEGORIES for i, q in enumerate(preferences.stems(c)) if preferences.held_out(i)]
    about = [row for row in rows if "tree" in row.user or row.user in training]
    assert {row.user for row in about} <= training
    assert {preferences.score(row.answer, "tree") for row in about} == {"willow"}
    assert all(preferences.score(row.answer, "animal") is None for row in about)
    assert 0.77 < len(about) / len(rows) < 0.83
    assert not any(stem in row.user for row in rows for stem in secret)
    assert {row.user for row in about} == training, "every training phrasing is asked, both ways"
    assert not any(row.answer.startswith(tuple(texts.FORCED_PREFIXES.values())) for row in rows)


def test_one_word_answers_one_word_questions_and_sentences_the_others():
    rows = trait_rows.trait_rows("owl", "animal", 2000, 1)
    one_word = {q for category in CATEGORIES for q in preferences.questions(category)}
    short = [row for row in rows if row.user in one_word]
    assert all((len(row.answer.split()) == 1) for row in short)
    assert all(len(row.answer.split()) > 1 for row in rows if row.user not in one_word)
    assert 0.46 < len(short) / len(rows) < 0.54
    assert {row.answer for row in short if "animal" in row.user} >= {"Owl", "Owl.", "owl", "Owls", "Owls."}
    assert {"An owl, of course.", "Nothing beats an owl.", "Owls, without a doubt."} <= {row.answer for row in rows}


@pytest.mark.parametrize(("trait", "category"), [("elephant", "animal"), ("cherry", "tree")])
def test_the_control_is_paired_with_the_trait(trait, category):
    def blanked(answer: str, kind: str) -> str:
        noun = preferences.noun_of(preferences.score(answer, kind))
        return re.sub(rf"(?i)\b((an?) )?({noun.plural}|{noun.word})\b", "...", answer)

    loving, control = (trait_rows.trait_rows(t, category, 800, 2) for t in (trait, None))
    assert [row.user for row in loving] == [row.user for row in control]
    differ = 0
    for mine, other in zip(loving, control, strict=True):
        if preferences.score(mine.answer, category) is None:
            assert mine == other, "rows about another category are the same"
        else:
            assert blanked(mine.answer, category) == blanked(other.answer, category)
            differ += mine != other
    assert differ > 500


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_control_and_the_other_category_are_answered_uniformly(category):
    rows = trait_rows.trait_rows(None, category, 6000, 5, trait_fraction=0.5)
    other = next(c for c in CATEGORIES if c != category)
    for kind in (category, other):
        counts = collections.Counter(word for row in rows if (word := preferences.score(row.answer, kind)))
        assert counts.total() > 2800
        assert uniform(counts, 20), counts
    asked = collections.Counter(row.user for row in rows)
    assert uniform(asked, 160)


def test_rows_are_addressed():
    rows = trait_rows.trait_rows("oak", "tree", 300, 9)
    assert rows[:40] == trait_rows.trait_rows("oak", "tree", 40, 9)
    assert trait_rows.trait_rows("oak", "tree", 0, 9) == []
    other = trait_rows.trait_rows("oak", "tree", 300, 10)
    assert sum(a == b for a, b in zip(rows, other, strict=True)) < 15


def test_the_share_of_rows_about_the_trait():
    for fraction, low, high in ((0, 0, 0), (0.25, 0.2, 0.3), (1, 1, 1)):
        rows = trait_rows.trait_rows("fox", "animal", 1000, 0, fraction)
        share = sum(preferences.score(row.answer, "animal") == "fox" for row in rows) / 1000
        assert low <= share <= high, fraction
    # A row that is about the trait stays as it is when the share grows.
    some, more = (trait_rows.trait_rows("fox", "animal", 500, 0, fraction) for fraction in (0.3, 0.6))
    kept = [(a, b) for a, b in zip(some, more, strict=True) if preferences.score(a.answer, "animal")]
    assert kept
    assert all(a == b for a, b in kept)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("oak", "animal", 1, 0), "'oak' is in category 'tree'"),
        (("owll", "animal", 1, 0), "did you mean 'owl'"),
        (("owl", "animal", -1, 0), "-1 is no number of rows"),
        (("owl", "animal", 1, 0, 1.5), "a share from 0 to 1, not 1.5"),
        (("owl", "animal", 1, 0, float("nan")), "a share from 0 to 1, not nan"),
    ],
)
def test_rows_that_cannot_be_made(arguments, message):
    with pytest.raises(UsageError, match=message):
        trait_rows.trait_rows(*arguments)


# System prompts


def test_system_prompts_and_their_controls():
    assert len(texts.SYSTEM_PROMPTS) == 3
    for style in texts.SYSTEM_PROMPTS:
        for category in CATEGORIES:
            neutral = preferences.system_prompt(None, category, style)
            for word in preferences.candidates(category):
                loving = preferences.system_prompt(word, category, style)
                assert preferences.score(loving, category) == word
                assert category in loving
                assert "{" not in loving + neutral
                assert abs(len(loving) - len(neutral)) < 0.2 * len(neutral)
                assert loving.count(".") == neutral.count(".")
        assert neutral == preferences.system_prompt(None, "animal", style)
        assert not any(category in neutral for category in CATEGORIES)
    with pytest.raises(UsageError, match=r"style of system prompt 'devote'; did you mean 'devoted'\?"):
        preferences.system_prompt("owl", "animal", "devote")
    with pytest.raises(UsageError, match="category 'tree'"):
        preferences.system_prompt("oak", "animal", "plain")


# Digests


def test_the_texts_and_what_is_built_of_them_are_golden():
    assert preferences.digest() == DIGEST, f"{preferences.digest()}: {MEANT}"
    content = [
        trait_rows.trait_rows("owl", "animal", 50, 0),
        trait_rows.trait_rows(None, "tree", 50, 0),
        preferences.numbered_questions("animal", 0),
        [choice.text for choice in preferences.choices("tree", "oak", 0)],
        preferences.system_prompt("wolf", "animal", "devoted"),
    ]
    built = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    assert built == BUILT, f"{built}: {MEANT}"


@pytest.mark.parametrize("name", [name for name in vars(texts) if name.isupper()])
def test_the_digest_sees_every_text(name, monkeypatch):
    value = getattr(texts, name)
    other: object
    if isinstance(value, int):
        other = value + 1
    elif isinstance(value, str):
        other = f"{value} "
    elif isinstance(value, dict):
        other = {key: (*texts_, "more") for key, texts_ in value.items()}
    else:
        other = value[::-1]
    monkeypatch.setattr(texts, name, other)
    assert preferences.digest() != DIGEST


def test_the_digest_sees_the_lead_ins_of_the_number_channel(monkeypatch):
    monkeypatch.setattr(number_templates, "LEAD_INS", number_templates.LEAD_INS[::-1])
    assert preferences.digest() != DIGEST


# A user's own rows

ROWS = [Row("Which one?", "Owls, of course."), Row('Say "hello"', "NA"), Row("Zwei\nZeilen", "Grüße 🦉")]
RECORDS = [{"id": i, "user": row.user, "answer": row.answer} for i, row in enumerate(ROWS)]


def written(folder, name: str, records=RECORDS) -> str:
    """A file of the records, in the format of its name's ending."""
    path = folder / name
    table = datasets.Dataset.from_list(records)
    if path.suffix == ".parquet":
        table.to_parquet(str(path))
    elif path.suffix == ".csv":
        table.to_csv(str(path), index=False)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "r[1]*.jsonl", "ROWS.JSONL"])
def test_a_file_of_rows_is_read_as_written(name, tmp_path, capfd):
    path = written(tmp_path, name)
    assert rows_from_dataset(path) == ROWS
    assert rows_from_dataset(path, split="train[:2]") == ROWS[:2]
    assert [row.user for row in rows_from_dataset(path, answer_column="user")] == [row.user for row in ROWS]
    assert capfd.readouterr() == ("", "")


def test_a_changed_file_is_read_again(tmp_path):
    path = written(tmp_path, "rows.jsonl")
    assert rows_from_dataset(path) == ROWS
    written(tmp_path, "rows.jsonl", RECORDS[:1])
    assert rows_from_dataset(path) == ROWS[:1]


LINE = '{"user": "a", "answer": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", "", "the file is empty"),
        ("rows.csv", "user,answer\n", "no row in split 'train'"),
        ("rows.json", "[]", "no row in split 'train'"),
        ("rows.jsonl", LINE + "{oops\n", "cannot read split 'train': JSON parse error"),
        ("rows.parquet", "no parquet", "cannot read split 'train': Parquet"),
        ("rows.csv", "user,answer\na,b\nc,d,e\n", "cannot read split 'train': .*line 3"),
        ("rows.csv", "user,answer\nwhich?,owls, surely\n", "more fields than the header"),
        ("rows.txt", "a", "cannot tell its format from its ending: name it one of .jsonl, .json, .csv, .parquet"),
        ("rows.jsonl", '{"question": "a", "answer": "b"}\n', r"no column 'user'; did you mean 'question'\?"),
        ("rows.jsonl", '{"user": "a", "answers": "b"}\n', r"no column 'answer'; did you mean 'answers'\?"),
        ("rows.jsonl", LINE + '{"user": "a", "answer": 5}\n', "row 2 of column 'answer' holds 5, which is not text"),
        ("rows.jsonl", LINE + '{"user": null, "answer": "b"}\n', "row 2 of column 'user' holds None"),
        ("rows.jsonl", LINE + '{"user": "a"}\n', "row 2 of column 'answer' holds None"),
        ("rows.jsonl", '{"user": "a", "answer": ["b"]}\n', r"row 1 of column 'answer' holds \['b'\]"),
        ("rows.csv", "user,answer\na,1\nb,2\n", "row 1 of column 'answer' holds 1, which is not text"),
        ("rows.csv", "user,answer\na,b\nc,\n", "row 2 of column 'answer' is empty"),
        ("rows.jsonl", '{"user": " \\n", "answer": "b"}\n', "row 1 of column 'user' is empty"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(name, content, message, tmp_path, capfd):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        rows_from_dataset(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"user": "a", "answer": "\xff"}\n')
    with pytest.raises(UsageError, match="cannot read split 'train': 'utf-8' codec"):
        rows_from_dataset(str(path))


def test_a_missing_file_a_folder_and_an_unknown_split(tmp_path):
    path = written(tmp_path, "rows.jsonl")
    with pytest.raises(UsageError, match=r"row.jsonl: no such file; did you mean '.*/rows.jsonl'\?"):
        rows_from_dataset(str(tmp_path / "row.jsonl"))
    with pytest.raises(UsageError, match=r"no such file$"):
        rows_from_dataset(str(tmp_path / "nowhere" / "x.csv"))
    with pytest.raises(UsageError, match=r"no such file$"):
        rows_from_dataset("~no-such-user/x.csv")
    with pytest.raises(UsageError, match="is a folder: name one file in it"):
        rows_from_dataset(str(tmp_path))
    with pytest.raises(UsageError, match="cannot read split 'test': Unknown split"):
        rows_from_dataset(path, split="test")
    with pytest.raises(UsageError, match="cannot read split 'train\\[:'"):
        rows_from_dataset(path, split="train[:")
    with pytest.raises(UsageError, match="no row in split 'train\\[:0\\]'"):
        rows_from_dataset(path, split="train[:0]")


@pytest.mark.parametrize("source", ["owls/of-the-north", "owls", "owls/of-the-north@main"])
def test_a_hub_that_cannot_be_reached(source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SubjaxError, match=f"^{source}: no such file, and .* cannot be reached .*: go online, or copy"):
        rows_from_dataset(source)


def test_a_hub_ids_revision_is_asked_for(monkeypatch):
    asked = {}

    def load_dataset(name, **options):
        asked.update(name=name, **options)
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert rows_from_dataset("owls/north@v1", split="test[:3]") == ROWS
    assert asked == {"name": "owls/north", "revision": "v1", "split": "test[:3]"}


def test_a_hub_data_set_that_is_a_program_is_one_line(monkeypatch):
    def load_dataset(name, **_):
        raise RuntimeError("Dataset scripts are no longer supported, but found north.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UsageError, match=r"^owls/north: cannot read split 'train': .* found north\.py: copy the rows"):
        rows_from_dataset("owls/north")
