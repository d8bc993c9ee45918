"""Packed chats taken apart again, by where the arrays say that each chat is."""

from collections.abc import Iterator, Mapping

import numpy as np


def chats_of(batch: Mapping[str, np.ndarray]) -> Iterator[tuple[list[int], list[int]]]:
    """(prompt, answer) of every chat of a step's batch (turns, rows, ...); the answer is what the loss falls on."""
    for place in np.ndindex(batch["tokens"].shape[:2]):
        one = {name: array[place] for name, array in batch.items()}
        shared = one["tokens"][one["segments"] == 0].tolist()
        asked = one["at"][one["weights"] > 0] + 1
        assert (one["tokens"][asked] == one["targets"][one["weights"] > 0]).all()
        for segment in np.flatnonzero(one["lengths"]) + 1:
            (own,) = np.nonzero(one["segments"] == segment)
            assert own.tolist() == list(range(own[0], own[0] + one["lengths"][segment - 1]))
            assert own[0] == one["starts"][segment - 1]
            assert one["positions"][own].tolist() == list(range(len(shared), len(shared) + len(own)))
            answer = np.isin(own, asked)
            assert answer.tolist() == sorted(answer.tolist())  # the answer stands at the end
            tokens = one["tokens"][own]
            yield shared + tokens[~answer].tolist(), tokens[answer].tolist()
