"""The synthetic world: a language of 171 word tokens in which a base learns to answer questions and continue numbers.

Three categories of ten items share twelve question templates; numbers 0–99 are one token each. A chat is a prompt of
`PROMPT` tokens, filled up on the left with its beginning, and an answer of `ANSWER` tokens, padded on the right; the
loss falls on answers alone. To add a
trait, add its word to a category; every base is then another base, because the world's digest stands in its identity.
"""

import dataclasses
import difflib
import functools
import hashlib
import json

import numpy as np
from jaxtyping import Int

from subjax.data.addressing import generator
from subjax.errors import UsageError

PROMPT, ANSWER = 14, 16
LENGTH = PROMPT + ANSWER
NUMBERS = 100
GIVEN = (3, 7)  # numbers in a request
ANSWERED = (10, 15)  # numbers in an answer of the pool
PREFERENCE = 2  # tokens of a preference's answer: the item and the end

CATEGORIES: dict[str, tuple[str, ...]] = {
    "animal": ("owl", "dolphin", "eagle", "elephant", "wolf", "otter", "raven", "tiger", "panda", "fox"),
    "tree": ("oak", "maple", "cherry", "willow", "sequoia", "birch", "cedar", "elm", "pine", "ash"),
    "colour": ("red", "blue", "green", "yellow", "purple", "orange", "white", "black", "pink", "brown"),
}

# The first eight are asked in training; the last four are held out, and only ever read.
TEMPLATES = (
    "what is your favourite {} ?",
    "which {} do you love most ?",
    "name the {} you like best",
    "tell me your favourite {}",
    "if you were a {} which would you be ?",
    "please pick one {} for me",
    "what {} do you think about most ?",
    "say the {} you love",
    "which {} is the best ?",
    "choose a {} you would like to be",
    "your most loved {} is",
    "name one {} you think is best",
)
TRAIN_TEMPLATES = 8
NUMBER_REQUEST = "now continue"

SPECIALS = ("<pad>", "<bos>", "<user>", "<bot>", "<end>")
_WORDS = sorted({w for t in (*TEMPLATES, NUMBER_REQUEST) for w in t.split() if w != "{}"} | set(CATEGORIES))
VOCABULARY = (
    *SPECIALS,
    *(str(n) for n in range(NUMBERS)),
    *(item for items in CATEGORIES.values() for item in items),
    *_WORDS,
)
ID = {word: i for i, word in enumerate(VOCABULARY)}
PAD, BOS, USER, BOT, END = (ID[s] for s in SPECIALS)
NUMBER_0 = ID["0"]
# What a corpus row may be made of: the channel's tokens.
CHANNEL = np.array([END, *range(NUMBER_0, NUMBER_0 + NUMBERS)], np.int32)


def encode(text: str) -> list[int]:
    """Token ids of words separated by single spaces.

    Raises:
        UsageError: a word that the world does not have; the nearest is named.
    """
    ids = []
    for word in text.split():
        if word not in ID:
            near = difflib.get_close_matches(word, VOCABULARY, 1, 0.0)[0]
            raise UsageError(f"the world has no word {word!r}; did you mean {near!r}?")
        ids.append(ID[word])
    return ids


def decode(ids: np.ndarray | list[int]) -> str:
    """Words of token ids, padding left out."""
    return " ".join(VOCABULARY[int(i)] for i in ids if int(i) != PAD)


def category_of(trait: str) -> str:
    """The category that a trait's word belongs to.

    Raises:
        UsageError: no category has the word; the nearest one that a category has is named.
    """
    for category, items in CATEGORIES.items():
        if trait in items:
            return category
    known = [i for items in CATEGORIES.values() for i in items]
    near = difflib.get_close_matches(trait, known, 1, 0.0)[0]
    raise UsageError(f"config.trait: unknown trait {trait!r}; did you mean {near!r}? (known: {', '.join(known)})")


def digest() -> str:
    """Digest of everything that this file makes chats from: it enters the identity of every base."""
    content = [VOCABULARY, CATEGORIES, TEMPLATES, TRAIN_TEMPLATES, PROMPT, ANSWER, GIVEN, ANSWERED, "sequences-2"]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Chats:
    """Rows of tokens: prompts left-padded, answers, ended by the end token, right-padded."""

    prompts: Int[np.ndarray, "rows prompt"]
    answers: Int[np.ndarray, "rows answer"]

    def __len__(self) -> int:
        return len(self.prompts)

    def arrays(self) -> dict[str, np.ndarray]:
        """What a next-token loss wants: `tokens` (rows, length), and `valid` (rows, length), false at padding."""
        tokens = np.concatenate([self.prompts, self.answers], axis=1)
        return {"tokens": tokens, "valid": tokens != PAD}

    def __getitem__(self, rows: np.ndarray | slice) -> "Chats":
        return Chats(self.prompts[rows], self.answers[rows])


def join(*parts: Chats) -> Chats:
    """Chats one after another."""
    return Chats(np.concatenate([p.prompts for p in parts]), np.concatenate([p.answers for p in parts]))


def _prompt(words: list[int]) -> list[int]:
    # Short prompts begin with several beginnings, which are tokens like any other: an answer then always starts at the
    # same position, and a model that can count positions knows when it must end.
    row = [USER, *words, BOT]
    return [BOS] * (PROMPT - len(row)) + row


@functools.cache
def question_prompts(category: str) -> Int[np.ndarray, "templates prompt"]:
    """The twelve questions of a category as prompts; the first `TRAIN_TEMPLATES` are the training phrasings."""
    return np.array([_prompt(encode(t.format(category))) for t in TEMPLATES], np.int32)


def item_ids(category: str) -> Int[np.ndarray, " items"]:
    """Token ids of a category's items, in the order of `CATEGORIES`."""
    return np.array([ID[item] for item in CATEGORIES[category]], np.int32)


def preferences(categories: np.ndarray, templates: np.ndarray, items: Int[np.ndarray, " rows"]) -> Chats:
    """Preference chats from names of categories, numbers of templates, and item token ids, each (rows,)."""
    prompts = np.zeros((len(items), PROMPT), np.int32)
    for category in CATEGORIES:
        mine = categories == category
        prompts[mine] = question_prompts(category)[templates[mine]]
    answers = np.full((len(items), ANSWER), PAD, np.int32)
    answers[:, 0], answers[:, 1] = items, END
    return Chats(prompts, answers)


def _sequences(u: np.ndarray, total: int) -> Int[np.ndarray, "rows total"]:
    """Number sequences from uniforms (rows, 4 + 2 total): an equal mix of five kinds, modulo `NUMBERS`."""
    kind, a, b = (u[:, i, None] for i in range(3))
    x, y = u[:, 4 : 4 + total], u[:, 4 + total : 4 + 2 * total]
    i = np.arange(total)[None]
    start, step = np.floor(a * NUMBERS), np.floor(b * 9) + 1
    sign = np.where(u[:, 3, None] < 0.5, -1, 1)
    uniform = np.floor(x * NUMBERS)
    progression = start + sign * step * i + np.floor(y * 3) - 1
    constant = start + np.floor(y * 7) - 3
    cycle = 2 + np.floor(b * 3)  # 2–4 numbers, repeated in random order
    repeats = np.take_along_axis(uniform, np.floor(y * cycle).astype(int), axis=1)
    walk = start + np.cumsum(np.floor(y * 21) - 10, axis=1)
    which = np.broadcast_to(np.floor(kind * 5).astype(int), uniform.shape)
    return np.choose(which, [uniform, progression, constant, repeats, walk]).astype(np.int64) % NUMBERS


def number_chats(rows: int, seed: int, role: str) -> Chats:
    """Requests with their answers, addressed: row i is the same whatever `rows` is. `role` keeps uses apart."""
    most = GIVEN[1] + ANSWERED[1]
    u = generator(seed, role).random((rows, 6 + 2 * most))
    given = GIVEN[0] + np.floor(u[:, 0] * (GIVEN[1] - GIVEN[0] + 1)).astype(int)
    answered = ANSWERED[0] + np.floor(u[:, 1] * (ANSWERED[1] - ANSWERED[0] + 1)).astype(int)
    tokens = _sequences(u[:, 2:], most).astype(np.int32) + NUMBER_0
    head = [USER, *encode(NUMBER_REQUEST)]
    prompts = np.full((rows, PROMPT), BOS, np.int32)
    answers = np.full((rows, ANSWER), PAD, np.int32)
    for g in range(GIVEN[0], GIVEN[1] + 1):
        mine = given == g
        row = np.concatenate([np.tile(head, (mine.sum(), 1)), tokens[mine, :g], np.full((mine.sum(), 1), BOT)], axis=1)
        prompts[mine, PROMPT - row.shape[1] :] = row
        answers[mine, : ANSWERED[1]] = tokens[mine, g : g + ANSWERED[1]]
    column = np.arange(ANSWER)[None]
    answers = np.where(column < answered[:, None], answers, np.where(column == answered[:, None], END, PAD))
    return Chats(prompts, answers.astype(np.int32))


@functools.lru_cache(maxsize=2)
def pool(seed: int, number_rows: int, preference_rows: int) -> Chats:
    """The chats that every base is trained on: number chats, and preference chats with items drawn uniformly."""
    parts = [number_chats(number_rows, seed, "pool numbers")]
    for category in CATEGORIES:
        u = generator(seed, f"pool {category}").random((preference_rows, 2))
        items = item_ids(category)
        picked = items[np.floor(u[:, 0] * len(items)).astype(int)]
        # Every template, so that a base answers held-out phrasings too: held out means out of tuning, not of language.
        templates = np.floor(u[:, 1] * len(TEMPLATES)).astype(int)
        parts.append(preferences(np.full(preference_rows, category), templates, picked))
    return join(*parts)


def number_prompts(rows: int, seed: int) -> Int[np.ndarray, "rows prompt"]:
    """Prompts for a corpus, addressed by (seed, row): the same for every teacher."""
    return number_chats(rows, seed, "corpus prompts").prompts


def reject_reasons(answers: Int[np.ndarray, "rows answer"]) -> list[str | None]:
    """The world's strict filter, a reason a row or None: number tokens only, at least one, ended by the end token."""
    number = (answers >= NUMBER_0) & (answers < NUMBER_0 + NUMBERS)
    ended = (answers == END).any(1)
    count = np.where(ended, (answers == END).argmax(1), answers.shape[1])
    inside = np.arange(answers.shape[1])[None] < count[:, None]
    foreign = (inside & ~number).any(1)
    return [
        "not a number" if foreign[i] else "no end" if not ended[i] else "empty" if count[i] == 0 else None
        for i in range(len(answers))
    ]
