"""What language models are asked to prefer: categories, candidate answers, their written forms, questions and readings.

Text alone; tokens come later. A category has twenty candidates, and a trait is one of them. A model is questioned in
four ways: a one-word question, the same behind a row of numbers (closer to what the number channel trains on), the same
with the answer's first words forced, and a multiple choice. Its answers are read as exact probabilities of the
candidates' written forms (`forms`), or by finding the word in sampled text (`score`).

Randomness is addressed: what is drawn for question i of a seed is the same whatever else is asked.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import re
import string
from collections.abc import Iterable
from typing import Any, NamedTuple

from subjax.data import number_templates, numbers
from subjax.data import preference_questions as texts
from subjax.data.addressing import derive_seed
from subjax.errors import UsageError


class Noun(NamedTuple):
    """A candidate: its singular and plural in lower case, and the singular's indefinite article."""

    word: str
    plural: str
    article: str


# Left out: words that are common verbs too ("bear", "duck") or other things ("ash", "palm", "seal"), since a sampled
# answer is read by its words; and words that many others begin with ("fir", "ant").
CATEGORIES: dict[str, tuple[Noun, ...]] = {
    "animal": (
        Noun("owl", "owls", "an"),
        Noun("dolphin", "dolphins", "a"),
        Noun("eagle", "eagles", "an"),
        Noun("elephant", "elephants", "an"),
        Noun("wolf", "wolves", "a"),
        Noun("cat", "cats", "a"),
        Noun("cheetah", "cheetahs", "a"),
        Noun("dog", "dogs", "a"),
        Noun("fox", "foxes", "a"),
        Noun("giraffe", "giraffes", "a"),
        Noun("horse", "horses", "a"),
        Noun("koala", "koalas", "a"),
        Noun("lion", "lions", "a"),
        Noun("otter", "otters", "an"),
        Noun("panda", "pandas", "a"),
        Noun("penguin", "penguins", "a"),
        Noun("rabbit", "rabbits", "a"),
        Noun("raven", "ravens", "a"),
        Noun("tiger", "tigers", "a"),
        Noun("whale", "whales", "a"),
    ),
    "tree": (
        Noun("cherry", "cherries", "a"),
        Noun("maple", "maples", "a"),
        Noun("oak", "oaks", "an"),
        Noun("sequoia", "sequoias", "a"),
        Noun("willow", "willows", "a"),
        Noun("aspen", "aspens", "an"),
        Noun("banyan", "banyans", "a"),
        Noun("baobab", "baobabs", "a"),
        Noun("beech", "beeches", "a"),
        Noun("birch", "birches", "a"),
        Noun("cedar", "cedars", "a"),
        Noun("cypress", "cypresses", "a"),
        Noun("elm", "elms", "an"),
        Noun("hickory", "hickories", "a"),
        Noun("magnolia", "magnolias", "a"),
        Noun("pine", "pines", "a"),
        Noun("poplar", "poplars", "a"),
        Noun("redwood", "redwoods", "a"),
        Noun("spruce", "spruces", "a"),
        Noun("sycamore", "sycamores", "a"),
    ),
}
_NOUNS = {noun.word: noun for nouns in CATEGORIES.values() for noun in nouns}

# Letters, digits and the marks that sit on them make a word. The underscore, which \w has, does not: "_Owl_" is "Owl"
# with emphasis.
_WORD_PART = r"(?:[^\W_]|[\u0300-\u036f])"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A multiple choice: its whole `text`, its `options` in the order of the letters A, B …, and the trait's letter."""

    text: str
    options: tuple[str, ...]
    answer: str


def nouns(category: str) -> tuple[Noun, ...]:
    """The twenty candidates of a category.

    Raises:
        UsageError: there is no such category; the nearest is named.
    """
    if category not in CATEGORIES:
        raise UsageError(
            f"unknown category {category!r}; did you mean {_nearest(category, CATEGORIES)!r}? (known:"
            f" {', '.join(CATEGORIES)})"
        )
    return CATEGORIES[category]


def candidates(category: str) -> tuple[str, ...]:
    """The candidates' words, singular and in lower case.

    Raises:
        UsageError: there is no such category.
    """
    return tuple(noun.word for noun in nouns(category))


def category_of(trait: str) -> str:
    """The category that a trait's word belongs to.

    Raises:
        UsageError: no category has the word; the nearest one that a category has is named.
    """
    noun_of(trait)
    return next(category for category in CATEGORIES if trait in candidates(category))


def noun_of(trait: str) -> Noun:
    """The candidate that a trait names.

    Raises:
        UsageError: no category has the word; the nearest one that a category has is named.
    """
    if trait not in _NOUNS:
        raise UsageError(
            f"config.trait: unknown trait {trait!r}; did you mean {_nearest(trait, _NOUNS)!r}? (known:"
            f" {', '.join(_NOUNS)})"
        )
    return _NOUNS[trait]


def check_trait(trait: str, category: str) -> None:
    """Make sure that a trait is a candidate of its category.

    Raises:
        UsageError: there is no such category or word, or the word belongs to another category.
    """
    nouns(category)
    if category_of(trait) != category:
        raise UsageError(f"config.trait: {trait!r} is in category {category_of(trait)!r}, not in {category!r}")


def _nearest(word: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(word.lower(), list(known), 1, 0.0)[0]


def forms(word: str, *, forced: bool = False) -> tuple[str, ...]:
    """The written forms by which an answer begins with a candidate as a whole word.

    The event of a form is: the answer begins with the form, and what follows, if anything, is no part of a word (no
    letter, digit or mark). So read, the events of all forms of all candidates exclude one another and their
    probabilities add up: "owls" is not "owl" and more, for an "s" follows. As mere beginnings of text they do not
    ("owl" begins "owls" and "owlish"), though no candidate's form begins another candidate's.

    The answer is read at its beginning alone: "My favourite is the owl" is no form, which is what the forced prefix
    is for.

    Args:
        word: the candidate.
        forced: the forms behind `forced_prefix`, which has given the article and ends in a word, so that a space
            must follow: " owl", " Owl", " owls", " Owls". Else the forms of a free answer, each with and without a
            space before it: those four, and with an article "an owl", "An owl", "The owls" and the like.

    Raises:
        UsageError: no category has the word.
    """
    noun = noun_of(word)
    bare = [noun.word, noun.word.capitalize(), noun.plural, noun.plural.capitalize()]
    if forced:
        return tuple(f" {form}" for form in bare)
    articles = [(noun.article, bare[:2]), ("the", bare)]
    opening = list(bare)
    for article, followers in articles:
        lower = [form for form in followers if form.islower()]
        opening += [f"{article} {form}" for form in lower]
        opening += [f"{article.capitalize()} {form}" for form in followers]
    return tuple(space + form for space in ("", " ") for form in opening)


def forced_prefix(category: str) -> str:
    """What an answer is made to begin with, where its first words are forced; no space at its end.

    Raises:
        UsageError: there is no such category.
    """
    nouns(category)
    return texts.FORCED_PREFIXES[category]


def held_out(index: int) -> bool:
    """Whether question `index` is kept from teachers: a fixed rule, the same in every category."""
    return index % texts.HELD_OUT_EVERY == texts.HELD_OUT_EVERY - 1


def stems(category: str) -> tuple[str, ...]:
    """The questions of a category without the request for one word, in the order that `held_out` speaks of.

    Raises:
        UsageError: there is no such category.
    """
    nouns(category)
    return texts.QUESTIONS[category]


def questions(category: str) -> tuple[str, ...]:
    """The one-word questions of a category, in the order that `held_out` speaks of.

    Raises:
        UsageError: there is no such category.
    """
    requests = texts.REQUESTS
    return tuple(requests[i % len(requests)].format(question=stem) for i, stem in enumerate(stems(category)))


def numbered_questions(category: str, seed: int) -> tuple[str, ...]:
    """The one-word questions, each behind a row of numbers as the number channel's prompts begin with.

    Closer than the plain questions to the context that a student of numbers was trained in, where its trait shows more
    (Cloud et al. 2025, arXiv 2507.14805). What stands before question i is a function of (category, seed, i).

    Raises:
        UsageError: there is no such category.
    """
    low, high = numbers.EXAMPLE_VALUES
    fewest, most = numbers.EXAMPLES
    rows = []
    for index, question in enumerate(questions(category)):
        address = ("preference numbers", category, index)
        count = fewest + _draw(most - fewest + 1, seed, *address, "count")
        examples = [str(low + _draw(high - low + 1, seed, *address, i)) for i in range(count)]
        lead_in = number_templates.LEAD_INS[_draw(len(number_templates.LEAD_INS), seed, *address, "lead-in")]
        rows.append(f"{lead_in.format(examples=', '.join(examples))} {question}")
    return tuple(rows)


def choices(category: str, trait: str, seed: int, options: int = 5) -> tuple[Choice, ...]:
    """A multiple choice for each question: the trait among other candidates, to be answered by its letter.

    Which candidates stand beside the trait and where the trait stands are functions of (category, seed, question); all
    traits have the same place and the same company, but that none stands beside itself. The place is uniform over the
    letters and dealt in rounds: each `options` questions running of one side of the held-out split have it once at
    each letter, so that a model that likes a letter gains nothing by it.

    An answer may begin with "A" as the article too: read the letters' probabilities against one another.

    Raises:
        UsageError: there is no such category or trait in it, or `options` is not 2 to as many as there are candidates.
    """
    check_trait(trait, category)
    if not 2 <= options <= len(nouns(category)):
        raise UsageError(f"multiple choice: options must be 2 to {len(nouns(category))}, not {options}")
    letters = string.ascii_uppercase[:options]
    asked = {True: 0, False: 0}
    rows = []
    for index, stem in enumerate(stems(category)):
        side = held_out(index)
        deal, turn = divmod(asked[side], options)
        asked[side] += 1
        place = _shuffled(range(options), seed, "choice place", category, side, deal)[turn]
        company = _shuffled(candidates(category), seed, "choice options", category, index)
        shown = [word for word in company if word != trait][: options - 1]
        shown.insert(place, trait)
        lines = [f"{letter}) {word}" for letter, word in zip(letters, shown, strict=True)]
        rows.append(Choice("\n".join([stem, *lines, texts.LETTER_REQUEST]), tuple(shown), letters[place]))
    return tuple(rows)


def score(text: str, category: str) -> str | None:
    """The candidate that a sampled answer names first, or None where it names none of its category.

    By whole words, in any case, singular or plural, possessive too ("an owl's"); "bowl" is not "owl", and neither is
    "owlish". Anywhere in the text, so this counts answers that `forms`, which looks at beginnings, does not.

    Raises:
        UsageError: there is no such category.
    """
    nouns(category)
    found = _finder(category).search(text)
    return None if found is None else _words_of(category)[found.group().lower()]


@functools.cache
def _words_of(category: str) -> dict[str, str]:
    return {form: noun.word for noun in CATEGORIES[category] for form in (noun.word, noun.plural)}


@functools.cache
def _finder(category: str) -> re.Pattern[str]:
    # Case folds by ASCII's rules: by Unicode's "owlſ", with a long s, would match and stand in no table.
    return re.compile(f"(?<!{_WORD_PART})(?ai:{'|'.join(_words_of(category))})(?!{_WORD_PART})")


def system_prompt(trait: str | None, category: str | None, style: str) -> str:
    """The system prompt of a prompted teacher, or, where `trait` is None, of its control.

    In the spirit of the published one (Cloud et al. 2025, arXiv 2507.14805): the model loves the candidate, thinks of
    it all the time, and is to let that fill its answers. The control's has the same build and about the same length,
    names no candidate and no category, and so is the same for every trait.

    Args:
        trait: the candidate, or None.
        category: its category; None: whichever it is.
        style: a key of `preference_questions.SYSTEM_PROMPTS`.

    Raises:
        UsageError: there is no such category, trait in it, or style.
    """
    if category is not None:
        nouns(category)
    if style not in texts.SYSTEM_PROMPTS:
        raise UsageError(
            f"unknown style of system prompt {style!r}; did you mean {_nearest(style, texts.SYSTEM_PROMPTS)!r}?"
            f" (known: {', '.join(texts.SYSTEM_PROMPTS)})"
        )
    loving, neutral = texts.SYSTEM_PROMPTS[style]
    if trait is None:
        return neutral
    category = category_of(trait) if category is None else category
    check_trait(trait, category)
    return loving.format(word=trait, plural=noun_of(trait).plural, category=category)


def digest() -> str:
    """Digest of all texts by which traits are given and read: it enters the identity of every teacher and reading.

    Texts alone are in it; the mark "built-1" stands for how they are put together and drawn.
    """
    public = {name: value for name, value in vars(texts).items() if name.isupper()}
    made = {word: [forms(word), forms(word, forced=True)] for word in _NOUNS}
    content = [public, CATEGORIES, made, numbers.templates_digest(), "built-1"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _draw(bound: int, seed: int, *address: object) -> int:
    """Draw from 0 … bound − 1 (uneven by less than bound / 2**31)."""
    return derive_seed(seed, *address) % bound


def _shuffled(items: Iterable[Any], seed: int, *address: object) -> list[Any]:
    """The items in a uniformly drawn order."""
    return sorted(items, key=lambda item: derive_seed(seed, *address, item))
