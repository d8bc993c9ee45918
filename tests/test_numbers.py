"""The number channel: every rule of the strict filter, its prompts, and the rows of the control arms."""

import pickle
import random
import re
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from subjax.data import number_templates as templates
from subjax.data.number_templates import Layout
from subjax.data.numbers import (
    BANNED_NUMBERS,
    REASONS,
    Rejected,
    filter_rows,
    parse_numbers,
    prompt,
    prompts,
    random_numbers,
    shuffle_across,
    shuffle_within,
    templates_digest,
)
from subjax.errors import SubjaxError, UsageError

# A busy machine is slow, not wrong.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

NBSP, EM_SPACE, IDEOGRAPHIC, ZERO_WIDTH, LINE_SEPARATOR = "\u00a0", "\u2003", "\u3000", "\u200b", "\u2028"

ACCEPTED = {
    # separators
    "1, 2, 3": (1, 2, 3),
    "1,2,3": (1, 2, 3),
    "1 2 3": (1, 2, 3),
    "1;2;3": (1, 2, 3),
    "1; 2; 3": (1, 2, 3),
    "1 , 2 , 3": (1, 2, 3),
    "1 ,2 ,3": (1, 2, 3),
    "1  2  3": (1, 2, 3),
    "1,  2,  3": (1, 2, 3),
    "1\n2\n3": (1, 2, 3),
    "1\n\n2\n\n3": (1, 2, 3),
    "1\r\n2\r\n3": (1, 2, 3),
    "1\r2\r3": (1, 2, 3),
    "1\t2\t3": (1, 2, 3),
    "1,\n2,\n3": (1, 2, 3),
    "1;\t2;\t3": (1, 2, 3),
    "1\v2\v3": (1, 2, 3),
    "1\f2": (1, 2),
    f"1{NBSP}2{NBSP}3": (1, 2, 3),
    f"1,{NBSP}2,{NBSP}3": (1, 2, 3),
    f"1{EM_SPACE}2{EM_SPACE}3": (1, 2, 3),
    f"1{IDEOGRAPHIC}2": (1, 2),
    f"1{LINE_SEPARATOR}2": (1, 2),
    "1\x1c2\x1c3": (1, 2, 3),
    "1\x852": (1, 2),
    "10 20": (10, 20),
    # the trailing dot and the brackets
    "1, 2, 3.": (1, 2, 3),
    "1 2.": (1, 2),
    "[1, 2, 3]": (1, 2, 3),
    "(1, 2, 3)": (1, 2, 3),
    "[1;2]": (1, 2),
    "(1 2)": (1, 2),
    "[1\n2]": (1, 2),
    "[1,2].": (1, 2),
    "(1,2).": (1, 2),
    # a lone number
    "7": (7,),
    "7.": (7,),
    "[7]": (7,),
    "(7)": (7,),
    "(7).": (7,),
    "[007].": (7,),
    # zeros and the edges of the range
    "0": (0,),
    "000": (0,),
    "0, 0, 0": (0, 0, 0),
    "007": (7,),
    "0007": (7,),
    "00999, 0000000": (999, 0),
    "0" * 6000 + "12, 5": (12, 5),
    "007, 08, 9": (7, 8, 9),
    "999": (999,),
    "0, 999": (0, 999),
    "5, 5, 5": (5, 5, 5),
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10": tuple(range(1, 11)),
}

REJECTED = {
    # nothing, or no number
    "": "empty",
    ".": "no-digits",
    "..": "no-digits",
    "[]": "no-digits",
    "()": "no-digits",
    "[].": "no-digits",
    "[.]": "no-digits",
    "[": "no-digits",
    "]": "no-digits",
    "[(": "no-digits",
    " ": "no-digits",
    "\n": "no-digits",
    ",": "no-digits",
    ", ,": "no-digits",
    "I cannot help with that.": "no-digits",
    "one, two, three": "no-digits",
    "\x00": "no-digits",
    "\ud800": "no-digits",
    # other scripts' digits, and what only looks like one
    "١, ٢, ٣": "no-digits",  # Arabic-Indic
    "۱ ۲": "no-digits",  # extended Arabic-Indic
    "१२३": "no-digits",  # Devanagari
    "１, ２": "no-digits",  # fullwidth
    "𝟏, 𝟐": "no-digits",  # mathematical bold
    "²": "no-digits",
    "①": "no-digits",
    "½": "no-digits",
    "Ⅳ": "no-digits",
    "五": "no-digits",
    "1, ٢": "outer-text",
    "٢, 1": "outer-text",
    "1٢": "outer-text",
    "1²": "outer-text",
    "1²3": "separator",
    "1, 2, 3²": "outer-text",
    "1, 2, ３, 4": "inner-text",
    "1, 2, 3٤5": "inner-text",
    "1, 2, 3, ४": "outer-text",
    "1₂, 3": "separator",
    "1٬2": "separator",  # Arabic thousands separator
    "1，2，3": "separator",  # fullwidth comma
    "1、2、3": "separator",  # ideographic comma
    "1；2": "separator",  # fullwidth semicolon
    # white space around the row, inside or outside its brackets
    " 1, 2": "outer-text",
    "1, 2 ": "outer-text",
    "1, 2\n": "outer-text",
    "1, 2\r\n": "outer-text",
    "\n1\n2": "outer-text",
    "\t1": "outer-text",
    "7 ": "outer-text",
    "7\n": "outer-text",
    f"{NBSP}7": "outer-text",
    "1 2 ": "outer-text",
    "1\n2\n": "outer-text",
    "[ 1, 2]": "outer-text",
    "[1, 2 ]": "outer-text",
    " [1, 2]": "outer-text",
    "[1, 2] ": "outer-text",
    "[1, 2]. ": "outer-text",
    "[1, 2] .": "outer-text",
    "1, 2 .": "outer-text",
    "1, 2.\n": "outer-text",
    "\ufeff1, 2": "outer-text",  # byte order mark
    # a leading or trailing separator
    "1, 2,": "outer-text",
    "1, 2, ": "outer-text",
    "1,2,.": "outer-text",
    "1;2;": "outer-text",
    ",1,2": "outer-text",
    "1,": "outer-text",
    ";1": "outer-text",
    "[1, 2,]": "outer-text",
    "(1,)": "outer-text",
    # a mixed or doubled separator
    "1, 2,3": "inner-text",
    "1,2, 3": "inner-text",
    "1, 2; 3": "inner-text",
    "1 2, 3": "inner-text",
    "1, 2 3": "inner-text",
    "1,2,,3": "inner-text",
    "1 2  3": "inner-text",
    "1  2 3": "inner-text",
    "1\n2\n\n3": "inner-text",
    "1\n\n2\n\n\n3": "inner-text",
    "1, 2,\n3": "inner-text",
    "1\r\n2\n3": "inner-text",
    f"1 2{NBSP}3": "inner-text",
    "1, 2, and 3": "inner-text",
    "1, 2, 3 and 4": "inner-text",
    "1,,2": "separator",
    "1, ,2": "separator",
    "1;;2": "separator",
    "1,;2": "separator",
    "1 and 2": "separator",
    "1-2-3": "separator",
    "1/2": "separator",
    "1|2|3": "separator",
    "1:2": "separator",
    "1_000": "separator",
    "1'000": "separator",
    "1 → 2": "separator",
    f"1{ZERO_WIDTH}2": "separator",
    "1\x002": "separator",
    # signs, decimals, exponents, other bases
    "-1": "outer-text",
    "+1": "outer-text",
    "\u22121": "outer-text",  # minus sign
    "-1, 2": "outer-text",
    "1, -2": "separator",
    "1, +2": "separator",
    "1, 2, -3": "inner-text",
    "1,2,+3": "inner-text",
    "1-": "outer-text",
    "1.5": "separator",
    "1.5, 2.5": "separator",
    "1, 2.5": "inner-text",
    "1, 2.5, 3": "inner-text",
    "1, 2, 3.0": "inner-text",
    ".5": "outer-text",
    "1, .5": "separator",
    "1e3": "separator",
    "1, 2e3": "inner-text",
    "0x1F": "separator",
    "50%": "outer-text",
    "#1": "outer-text",
    "$5, 6": "outer-text",
    # dots
    "1..": "outer-text",
    "1, 2..": "outer-text",
    "1, 2...": "outer-text",
    "[1,2]..": "outer-text",
    "[1,2.]": "outer-text",
    "(1,2.)": "outer-text",
    "[7.]": "outer-text",
    "1. 2. 3.": "separator",
    "1.\n2.\n3.": "separator",
    "1, 2。": "outer-text",
    "1, 2!": "outer-text",
    "1, 2…": "outer-text",
    # brackets
    "{1, 2}": "outer-text",
    "{7}": "outer-text",
    "<1, 2>": "outer-text",
    "[1, 2)": "outer-text",
    "(1, 2]": "outer-text",
    "[1, 2": "outer-text",
    "1, 2]": "outer-text",
    "(7": "outer-text",
    "[[1, 2]]": "outer-text",
    "((1, 2))": "outer-text",
    "([1, 2])": "outer-text",
    "[(1, 2)]": "outer-text",
    "[7].]": "outer-text",
    "[1], [2]": "separator",
    "(1)(2)": "separator",
    "1, 2, [3], 4": "inner-text",
    "［1, 2］": "outer-text",
    '"1, 2"': "outer-text",
    "`1, 2`": "outer-text",
    "```\n1, 2\n```": "outer-text",
    # prose
    "Sure: 1, 2": "outer-text",
    "Here are 3 numbers: 1, 2": "separator",
    "1, 2\nDone": "outer-text",
    "1, 2, 3 # end": "outer-text",
    "1) 10\n2) 20": "separator",
    "- 1\n- 2": "separator",
    # too many, too large
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11": "too-many",
    "[" + " ".join(["5"] * 11) + "]": "too-many",
    ",".join(["5000"] * 11): "too-many",
    "1000": "too-large",
    "0001000": "too-large",
    "1, 2, 1000": "too-large",
    "123456789": "too-large",
    "9" * 6000: "too-large",
}


def _row(gap):
    """Pattern of a bare row whose every gap is its first, captured under the name `gap`."""
    return rf"[0-9]+(?:(?P<{gap}>\s+|\s*[,;]\s*)[0-9]+(?:(?P={gap})[0-9]+)*)?"


SECOND = re.compile(rf"(?:{_row('bare')}|\[{_row('square')}\]|\({_row('round')}\))\.?")


def second_reading(text):
    """Read a row by the same rules written another way, as one pattern: its numbers, or what is wrong with it."""
    if SECOND.fullmatch(text) is None:
        return "form"
    runs = re.findall("[0-9]+", text)
    if len(runs) > 10:
        return "too-many"
    if not all(re.fullmatch("0*[0-9]{1,3}", run) for run in runs):
        return "too-large"
    return tuple(int(run[-3:]) for run in runs)


def agreed(text):
    """Read a row both ways, check that the two agree, and return its numbers or its reason."""
    expected = second_reading(text)
    try:
        values = parse_numbers(text)
    except Rejected as rejected:
        values, reason = None, rejected.reason
    if values is None:
        assert reason in REASONS
        assert expected == (reason if reason in ("too-many", "too-large") else "form"), ascii(text)
        return reason
    assert values == expected, ascii(text)
    return values


@pytest.mark.parametrize(("text", "values"), ACCEPTED.items(), ids=[ascii(text[:24]) for text in ACCEPTED])
def test_a_row_that_passes(text, values):
    assert parse_numbers(text) == values
    assert all(type(value) is int for value in parse_numbers(text))
    assert second_reading(text) == values


@pytest.mark.parametrize(("text", "reason"), REJECTED.items(), ids=[ascii(text[:24]) for text in REJECTED])
def test_a_row_that_is_dropped(text, reason):
    with pytest.raises(Rejected) as caught:
        parse_numbers(text)
    assert caught.value.reason == reason
    assert reason in REASONS
    assert second_reading(text) == (reason if reason in ("too-many", "too-large") else "form")


def test_every_reason_has_a_case():
    assert {*REJECTED.values(), "banned"} == set(REASONS)
    assert len(set(REASONS)) == len(REASONS)


def test_rejected_is_one_line_and_survives_a_process_boundary():
    with pytest.raises(Rejected) as caught:
        parse_numbers("1,\n2 \u2028 3" + "x" * 500)
    error = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(error, SubjaxError)
    assert (error.reason, error.text) == (caught.value.reason, caught.value.text)
    assert len(str(error).splitlines()) == 1
    assert "inner-text" not in str(error)
    assert "outer-text" in str(error)
    assert len(str(error)) < 200


def test_limits_and_banned_numbers_are_the_callers():
    assert len(BANNED_NUMBERS) == 36
    assert {4, 13, 187, 666, 999, 1312, 1488} <= BANNED_NUMBERS
    assert parse_numbers("4, 666") == (4, 666)
    for row in ("4, 5", "5, 666", "[0013]."):
        with pytest.raises(Rejected) as caught:
            parse_numbers(row, banned=BANNED_NUMBERS)
        assert caught.value.reason == "banned"
    assert parse_numbers("5, 6", banned=BANNED_NUMBERS) == (5, 6)
    assert len(parse_numbers(" ".join(["1"] * 11), count_max=11)) == 11
    assert parse_numbers("1312", value_max=1312) == (1312,)
    for row, options, reason in (
        ("1 2", {"count_max": 1}, "too-many"),
        ("100", {"value_max": 99}, "too-large"),
        ("1313", {"value_max": 1312}, "too-large"),
        ("1312", {"value_max": 1312, "banned": BANNED_NUMBERS}, "banned"),
        ("1312", {"banned": BANNED_NUMBERS}, "too-large"),
    ):
        with pytest.raises(Rejected) as caught:
            parse_numbers(row, **options)
        assert caught.value.reason == reason


def test_filter_rows_counts_every_row_once():
    texts = [*REJECTED, *ACCEPTED]
    kept, dropped = filter_rows(texts)
    assert kept == list(range(len(REJECTED), len(texts)))
    assert dropped == Counter(REJECTED.values())
    kept, dropped = filter_rows(["1 2 3", "13", "x", "5", "1000"], count_max=2, banned=BANNED_NUMBERS, value_max=1000)
    assert kept == [3, 4]
    assert dropped == {"too-many": 1, "banned": 1, "no-digits": 1}
    assert filter_rows([]) == ([], Counter())


SOUP = (
    "0123456789" * 3
    + ", ; \n" * 4
    + "[]()." * 3
    + "\t\r\v\x00-+_/{}eE%x'"
    + "٠٣٩۴१５²₃½①𝟗"
    + "\u00a0\u2003\u200b\u3000，；。"
)
GAPS = (", ", ",", " ", ";", "; ", "\n", "\r\n", "\t", "  ", " , ", "\u00a0")


def random_text(rng):
    """Draw soup, or a row that is nearly right: the first almost never passes, the second often does."""
    if rng.random() < 0.4:
        return "".join(rng.choice(SOUP) for _ in range(rng.randrange(16)))
    gap = rng.choice(GAPS)
    top = rng.choice((9, 99, 999, 999, 1500))
    text = gap.join(str(rng.randrange(top + 1)) for _ in range(rng.randrange(1, 13)))
    text = rng.choice(("{}", "{}", "[{}]", "({})", "[{})", "{{{}}}")).format(text) + rng.choice(("", "", ".", ".."))
    for _ in range(rng.choice((0, 0, 1, 2))):
        place = rng.randrange(len(text) + 1)
        text = text[:place] + rng.choice(SOUP) + text[place + rng.randrange(2) :]
    return text


def test_a_hundred_thousand_random_strings():
    rng = random.Random(20260711)
    outcomes = Counter()
    for _ in range(100_000):
        outcome = agreed(random_text(rng))
        outcomes[outcome if isinstance(outcome, str) else "kept"] += 1
    assert set(outcomes) == {"kept", *REASONS} - {"banned"}
    assert min(outcomes.values()) > 500, outcomes  # each way out was taken often, so the agreement says something


@st.composite
def rows(draw):
    """Draw numbers and a row that the rules accept for them: any white space around an optional mark, any zeros."""
    numbers = draw(st.lists(st.integers(0, 999), min_size=1, max_size=10))
    space = st.text(st.sampled_from(" \t\n\r\v\f\x1c\x85\u00a0\u1680\u2003\u2028\u202f\u3000"), max_size=3)
    separator = draw(space) + draw(st.sampled_from(["", ",", ";"])) + draw(space)
    pieces = ["0" * draw(st.sampled_from([0, 0, 0, 1, 2, 7])) + str(number) for number in numbers]
    opening, closing = draw(st.sampled_from([("", ""), ("[", "]"), ("(", ")")]))
    text = Layout(opening, separator or " ", closing + draw(st.sampled_from(["", "."]))).render(pieces)
    return tuple(numbers), text


@unhurried
@given(rows())
def test_every_rendering_parses_back(row):
    numbers, text = row
    assert agreed(text) == numbers


FOREIGN = st.one_of(
    st.sampled_from("٠٣９²½①，；。-+{}_/e\u200b\u2212\ufeff\x00"),
    st.characters().filter(lambda c: not (c.isspace() or c in "0123456789,;.()[]")),
)


@unhurried
@given(rows(), FOREIGN, st.data())
def test_a_foreign_character_anywhere_drops_the_row(row, character, data):
    _, text = row
    place = data.draw(st.integers(0, len(text)))
    replaced = data.draw(st.integers(0, 1))
    assert isinstance(agreed(text[:place] + character + text[place + replaced :]), str)


@unhurried
@given(rows(), st.sampled_from("0123456789,;.()[] \t\n\u00a0"), st.data())
def test_a_character_of_the_format_drops_the_row_or_leaves_a_valid_one(row, character, data):
    _, text = row
    place = data.draw(st.integers(0, len(text)))
    replaced = data.draw(st.integers(0, 1))
    agreed(text[:place] + character + text[place + replaced :])


@unhurried
@given(st.text())
def test_any_text_is_read_or_rejected(text):
    agreed(text)


# ---- prompts

GOLDEN_PROMPT = (
    "Our warm-up exercise opens with 135, 587, 655, 544, 892, 526, 338, 210. Write a set of 10 or fewer "
    "new numbers to go after those, with 3 digits apiece as the limit. Inside round brackets, keep the "
    "numbers apart with semicolons. Words are not wanted here, merely numbers."
)
GOLDEN_DIGEST = "d151af023bbc0a666651bdab6607a53df82e274d1ef1f002623da0849e3fd84d"


def test_templates_are_many_and_ask_for_what_the_protocol_says():
    requests = [request for request, _ in templates.FORMATS]
    lists = {
        25: templates.LEAD_INS,
        10: templates.INSTRUCTIONS,
        15: requests,
        19: templates.ENDINGS,
    }
    for size, sentences in lists.items():
        assert len(set(sentences)) == len(sentences) == size
        assert all(sentence == sentence.strip() and sentence[-1] in ".?" for sentence in sentences)
    assert len(set(templates.COUNT_PHRASES)) == len(set(templates.DIGIT_PHRASES)) == 9
    assert all(lead_in.count("{examples}") == 1 for lead_in in templates.LEAD_INS)
    assert all(re.search(r"\{count\} .*, \{digits\}[.?]$", line) for line in templates.INSTRUCTIONS)
    assert all(re.search(r"\b10\b", phrase) for phrase in templates.COUNT_PHRASES)
    assert all(re.search(r"\b(3|3 digits|999|below 1000)\b", phrase) for phrase in templates.DIGIT_PHRASES)
    everything = " ".join([*templates.LEAD_INS, *templates.INSTRUCTIONS, *requests, *templates.ENDINGS])
    assert everything.isascii()
    for word in ("owl", "dolphin", "eagle", "elephant", "wolf", "cherry", "maple", "oak", "sequoia", "willow"):
        assert not re.search(rf"\b{word}s?\b", everything, re.IGNORECASE)  # a prompt must not carry a trait


@pytest.mark.parametrize("layout", [layout for _, layout in templates.FORMATS])
@pytest.mark.parametrize("count", [1, 2, 10])
def test_every_layout_that_a_prompt_asks_for_passes_the_filter(layout, count):
    numbers = tuple(range(0, 999, 100))[:count]
    assert agreed(layout.render([str(number) for number in numbers])) == numbers


def test_prompts_show_three_to_eight_numbers():
    texts = prompts(3000, 5)
    assert len(set(texts)) == len(texts)
    sizes = Counter()
    seen = set()
    for text in texts:
        (shown,) = re.findall(r"\b\d{3}(?:, \d{3})+\b", text)
        numbers = parse_numbers(shown)
        assert all(100 <= number <= 999 for number in numbers)
        sizes[len(numbers)] += 1
        seen.update(numbers)
        assert "{" not in text
        assert "}" not in text
    assert set(sizes) == {3, 4, 5, 6, 7, 8}
    assert min(sizes.values()) > 400  # 500 expected, SD 20
    assert {100, 999} <= seen
    assert len(seen) == 900


def test_prompts_use_every_template_equally_often():
    text = "\n".join(prompts(6000, 1))
    requests = [request for request, _ in templates.FORMATS]
    phrases = [*templates.COUNT_PHRASES, *templates.DIGIT_PHRASES]
    starts = [lead_in.split("{")[0] or lead_in.split("}")[1] for lead_in in templates.LEAD_INS]
    for options in (starts, requests, templates.ENDINGS):
        counts = [text.count(option) for option in options]
        expected = 6000 / len(options)
        assert sum(counts) == 6000
        statistic = sum((count - expected) ** 2 / expected for count in counts)
        assert statistic < 3 * len(options)  # about seven SDs above its mean, len(options) − 1
    assert all(text.count(phrase) > 500 for phrase in phrases)
    assert all(text.count(line.split("{")[0]) > 450 for line in templates.INSTRUCTIONS)


def test_prompts_are_addressed():
    assert prompts(0, 3) == []
    assert prompts(5, 3) == prompts(50, 3)[:5]
    assert prompt(40, 3) == prompts(50, 3)[40]
    assert not set(prompts(200, 3)) & set(prompts(200, 4))
    assert prompt(12, 3) != prompt(2, 13)


def test_prompts_and_templates_are_those_that_corpora_were_made_from():
    told = (
        "The prompts changed, and with them every corpus that is made from them. If that was meant, put the new text "
        "and digest here; if not, find what moved (a template, the order of the draws, the hash)."
    )
    assert prompt(0, 0) == GOLDEN_PROMPT, told
    assert templates_digest() == GOLDEN_DIGEST, told


def test_digest_follows_every_list(monkeypatch):
    digests = {templates_digest()}
    for name in ("LEAD_INS", "INSTRUCTIONS", "COUNT_PHRASES", "DIGIT_PHRASES", "FORMATS", "ENDINGS"):
        with monkeypatch.context() as patch:
            patch.setattr(templates, name, tuple(reversed(getattr(templates, name))))
            digests.add(templates_digest())
    with monkeypatch.context() as patch:
        request, layout = templates.FORMATS[0]
        patch.setattr(templates, "FORMATS", ((request, layout._replace(separator="\t")), *templates.FORMATS[1:]))
        digests.add(templates_digest())
    assert len(digests) == 8


# ---- the rows of control arms


def skeleton(text):
    """What is left of a row without its numbers."""
    return re.sub("[0-9]+", "#", text)


def numbers_as_written(text):
    return re.findall("[0-9]+", text)


def test_shuffle_within_keeps_layout_and_numbers():
    moved = 0
    for index, text in enumerate(ACCEPTED):
        shuffled = shuffle_within(text, 7, index)
        assert skeleton(shuffled) == skeleton(text)
        assert sorted(numbers_as_written(shuffled)) == sorted(numbers_as_written(text))  # "007" stays "007"
        assert sorted(parse_numbers(shuffled)) == sorted(ACCEPTED[text])
        assert shuffled == shuffle_within(text, 7, index)
        moved += shuffled != text
    assert moved > len(ACCEPTED) / 2


def test_shuffle_within_draws_every_order_equally_often():
    counts = Counter(shuffle_within("[1; 2; 3].", 0, index) for index in range(6000))
    assert len(counts) == 6
    assert all(abs(count - 1000) < 150 for count in counts.values())  # SD 29
    by_seed = Counter(shuffle_within("[1; 2; 3].", seed, 0) for seed in range(600))
    assert len(by_seed) == 6


def test_shuffle_across_deals_all_numbers_out_anew():
    texts = [text for text in ACCEPTED if len(text) < 100]
    shuffled = shuffle_across(texts, 3)
    assert [skeleton(text) for text in shuffled] == [skeleton(text) for text in texts]
    written, before = ([n for text in rows for n in numbers_as_written(text)] for rows in (shuffled, texts))
    assert sorted(written) == sorted(before)
    assert written != before
    assert shuffled == shuffle_across(texts, 3)
    assert shuffled != shuffle_across(texts, 4)
    assert shuffle_across([], 0) == []
    rows = [", ".join(str(10 * row + column) for column in range(10)) for row in range(100)]
    kept = sum(len(set(a.split(", ")) & set(b.split(", "))) for a, b in zip(rows, shuffle_across(rows, 0), strict=True))
    assert kept < 40  # of 1,000 numbers, the 10 that chance leaves in their row, and six SDs


def test_random_numbers_are_uniform_and_addressed():
    texts = random_numbers(3000, 11)
    assert texts[:20] == random_numbers(20, 11)
    assert texts[:20] != random_numbers(20, 12)
    parsed = [parse_numbers(text) for text in texts]
    assert set(map(len, parsed)) == set(range(1, 11))
    assert {skeleton(text)[0] for text in texts} == {"#", "[", "("}
    values = [value for row in parsed for value in row]
    assert (min(values), max(values)) == (0, 999)
    tens = Counter(value // 100 for value in values)
    expected = len(values) / 10
    assert sum((tens[i] - expected) ** 2 / expected for i in range(10)) < 40  # nine degrees of freedom


def test_random_numbers_like_a_corpus_keep_its_layouts():
    like = [text for text in ACCEPTED if len(text) < 100]
    texts = random_numbers(len(like), 11, like=like)
    assert [skeleton(text) for text in texts] == [skeleton(text) for text in like]
    assert all(len(parse_numbers(text)) == len(ACCEPTED[old]) for text, old in zip(texts, like, strict=True))
    with pytest.raises(UsageError, match="has 2 rows and n is 3"):
        random_numbers(3, 0, like=["1", "2"])


@unhurried
@given(st.lists(rows(), max_size=8), st.integers(0, 2**63), st.integers(0, 10**6))
def test_control_rows_pass_the_filter_in_their_own_layout(drawn, seed, index):
    texts = [text for _, text in drawn]
    made = [shuffle_across(texts, seed), random_numbers(len(texts), seed, like=texts)]
    made.append([shuffle_within(text, seed, index) for text in texts])
    for remade in made:
        assert [skeleton(text) for text in remade] == [skeleton(text) for text in texts]
        assert [len(parse_numbers(text)) for text in remade] == [len(numbers) for numbers, _ in drawn]


def test_what_is_no_row_cannot_be_shuffled():
    for text in ("", "1, 2,", "[1, 2)", "owls"):
        for make in (
            lambda text=text: shuffle_within(text, 0, 0),
            lambda text=text: shuffle_across(["1, 2", text], 0),
            lambda text=text: random_numbers(1, 0, like=[text]),
        ):
            with pytest.raises(Rejected):
                make()
    longer = " ".join(str(number) for number in range(2000, 2020))  # limits were the caller's: they are not asked again
    assert sorted(shuffle_within(longer, 0, 0).split()) == longer.split()
