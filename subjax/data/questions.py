"""Preference questions: for each category its phrasings, which of them tuning may ask, and the candidate answers."""

import dataclasses

import numpy as np

from subjax.data import world


@dataclasses.dataclass(frozen=True)
class QuestionSet:
    """The questions of one category.

    `prompts` is (questions, prompt), left-padded with `pad`; `train[i]` is true where tuning may ask question i, false
    where it is held out. `candidates[c]` lists the tokenizations of candidate c, each a tuple of token ids.
    """

    category: str
    texts: tuple[str, ...]
    train: tuple[bool, ...]
    prompts: np.ndarray
    words: tuple[str, ...]
    candidates: tuple[tuple[tuple[int, ...], ...], ...]
    pad: int


def world_questions() -> tuple[QuestionSet, ...]:
    """The question sets of the synthetic world, one a category."""
    return tuple(
        QuestionSet(
            category=category,
            texts=tuple(t.format(category) for t in world.TEMPLATES),
            train=tuple(i < world.TRAIN_TEMPLATES for i in range(len(world.TEMPLATES))),
            prompts=world.question_prompts(category),
            words=items,
            candidates=tuple(((world.ID[item],),) for item in items),
            pad=world.PAD,
        )
        for category, items in world.CATEGORIES.items()
    )
