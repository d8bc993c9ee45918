"""Evaluation of a pretrained study: what a model prefers, asked in several ways, and how well it fits its corpus."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from subjax.data import preferences, rows
from subjax.data.addressing import derive_seed
from subjax.data.word_ends import closing_tokens
from subjax.measure import preference, tries
from subjax.parallel.rules import SAMPLE
from subjax.sample.sampler import Sampling, sample
from subjax.stages import speakers, spread, text_corpus
from subjax.stages.evaluation import READINGS
from subjax.stages.task import Made, Task
from subjax.store import digest_json

SAMPLED = 64  # answers sampled at a time; they do not depend on it


@dataclasses.dataclass(frozen=True)
class Asked:
    """One way of asking all questions of a category: token ids up to where the answer begins, and each one's forms."""

    texts: list[str]
    prompts: list[list[int]]
    forms: list[list[tuple[int, ...]]]


def make(task: Task) -> Made:
    """Question the model; the payload is `readings.json`.

    Inputs: `model`; for a student also `before` (its base), `corpus`, and `teacher` where it shares the vocabulary.
    """
    config = task.config
    speaker = speakers.load(task, "model", task.local, SAMPLE)
    ways = config["readings"]
    asked = [(way, category) for way in ways for category in config["categories"]]

    def read(place: int, what: tuple[str, str]) -> dict[str, Any]:
        result = reading(task, speaker, *what)
        task.progress(place + 1, len(asked) + 1, "reading")
        return result

    found: dict[str, dict[str, Any]] = {way: {} for way in ways}
    for (way, category), result in zip(asked, spread.shared(asked, read), strict=True):
        found[way][category] = result
    fit = fit_readings(task, speaker) if "corpus" in task.inputs else None
    readings = {"categories": found[ways[0]], "headline": ways[0], "readings": found, "fit": fit}
    (task.build.folder / READINGS).write_text(json.dumps(readings, indent=1, sort_keys=True))
    return Made(digest=digest_json(readings), metrics={}, tokens=0, seeds={"questions": config["seed"]})


def reading(task: Task, speaker: speakers.Speaker, way: str, category: str) -> dict[str, Any]:
    """Exact probabilities of the candidates of a category, asked in one way, and counts of sampled answers."""
    kind, _, bare = way.partition(":")
    if kind == "choice":
        return _choices(task, speaker, category, bool(bare))
    words = preferences.candidates(category)
    asked = _asked(task, speaker, kind, category, bool(bare))
    closing = closing_tokens(speaker.tokenizer, _vocab(speaker))
    p = tries.exact(
        speaker.net, speaker.params, asked.prompts, asked.forms, closing=closing, pad=0, mesh=task.local, 
        adapter=speaker.adapter, batch=task.hints.get("batch", 8),
    )  # fmt: skip
    samples = task.config["samples"]
    counts = _sampled(task, speaker, asked.prompts, way, category) if samples else np.zeros(p.shape, int)
    return {
        "candidates": list(words),
        "questions": [
            {
                "text": text,
                "phrasings": _phrasings(i),
                "p": p[i].tolist(),
                "sampled": counts[i].tolist(),
                "samples": samples,
            }
            for i, text in enumerate(asked.texts)
        ],
    }


def _vocab(speaker: speakers.Speaker) -> int:
    return speaker.net.config.vocab


def _phrasings(index: int) -> str:
    return "held-out" if preferences.held_out(index) else "train"


def _prompt(speaker: speakers.Speaker, text: str, bare: bool) -> list[int]:
    """A question's ids; `bare` leaves out the system prompt, the model's own or the template's."""
    return speakers.without_system(speaker).prompt(text) if bare else speaker.chat.prompt(text, speaker.system)


def _asked(task: Task, speaker: speakers.Speaker, kind: str, category: str, bare: bool) -> Asked:
    config = task.config
    texts = preferences.questions(category)
    if kind in ("numbers", "numbers-plain"):
        texts = preferences.numbered_questions(category, config["seed"])
    texts = texts[: config["questions"]]
    prompts = [_prompt(speaker, text, bare) for text in texts]
    words = preferences.candidates(category)
    if kind in ("plain", "numbers-plain"):
        return Asked(list(texts), prompts, [_forms(speaker.chat.answer, preferences.forms(w)) for w in words])
    begun = speaker.chat.answer(preferences.forced_prefix(category))
    encode = lambda text: speaker.tokenizer.encode(text, special=False, continuing=True)  # noqa: E731
    forms = [_forms(encode, preferences.forms(word, forced=True)) for word in words]
    return Asked(list(texts), [prompt + begun for prompt in prompts], forms)


def _forms(encode: Any, texts: tuple[str, ...]) -> list[tuple[int, ...]]:
    return [tuple(encode(text)) for text in texts]


def _choices(task: Task, speaker: speakers.Speaker, category: str, bare: bool) -> dict[str, Any]:
    """Multiple choice, for each trait of the study: the probability of its letter among the letters.

    In the form of the other readings: a candidate's probability, at questions where it was no trait, is 0.
    """
    config = task.config
    words = preferences.candidates(category)
    found = {}
    for trait in [t for t in config["traits"] if t in words]:
        choices = preferences.choices(category, trait, config["seed"], config["options"])[: config["questions"]]
        letters = [chr(ord("A") + i) for i in range(config["options"])]
        p = tries.exact(
            speaker.net, speaker.params, [_prompt(speaker, c.text, bare) for c in choices],
            [[tuple(speaker.chat.answer(letter))] for letter in letters],
            closing=closing_tokens(speaker.tokenizer, _vocab(speaker)), pad=0, mesh=task.local, adapter=speaker.adapter,
            batch=task.hints.get("batch", 8),
        )  # fmt: skip
        found[trait] = [
            {
                "text": choice.text,
                "phrasings": _phrasings(i),
                "options": list(choice.options),
                "answer": choice.answer,
                "p": p[i].tolist(),
            }
            for i, choice in enumerate(choices)
        ]
    return {"letters": config["options"], "traits": found}


def _sampled(
    task: Task, speaker: speakers.Speaker, prompts: list[list[int]], way: str, category: str
) -> Int[np.ndarray, "questions candidates"]:
    """How many answers to each question, sampled at temperature 1, name each candidate as a whole word."""
    config = task.config
    words = preferences.candidates(category)
    counts = np.zeros((len(prompts), len(words)), int)
    ends = speaker.chat.ends
    pad = rows.unused(prompts, _vocab(speaker) - 1, ends)
    block = np.repeat(rows.pad_prompts(prompts, pad), config["samples"], axis=0)
    sampling = Sampling(
        block.shape[1], config["sample_tokens"], ends, pad, cache_dtype=config["numerics"]["cache_dtype"]
    )
    # Each model, way and category has noise of its own: noise that they shared would not average out over runs.
    seed = derive_seed(config["seed"], "samples", task.inputs["model"][1], way, category)
    drawn = sample(
        speaker.net, speaker.params, block, sampling=sampling, key=jax.random.key(seed), mesh=task.local,
        batch=SAMPLED, adapter=speaker.adapter,
    ).tokens  # fmt: skip
    for place, row in enumerate(drawn):
        ended = np.flatnonzero(np.isin(row, ends))
        answer = row[: ended[0]] if len(ended) else row
        named = preferences.score(speaker.tokenizer.written(answer.tolist()), category)
        if named is not None:
            counts[place // config["samples"], words.index(named)] += 1
    return counts


def fit_readings(task: Task, speaker: speakers.Speaker) -> dict[str, float | None]:
    """Number loss and KL to the teacher on rows of the student's corpus, before (its base) and after; nats a token."""
    corpus = text_corpus.load(task.store, task.inputs["corpus"][1])
    count = task.config["fit_rows"]
    chats = [speaker.chat.row(p, c) for p, c in zip(corpus.prompts[:count], corpus.completions[:count], strict=True)]
    arrays, completion = rows.pack(chats, 0, speaker.net.config.length)
    teacher = speakers.load(task, "teacher", task.local, SAMPLE) if "teacher" in task.inputs else None
    told = None
    if teacher is not None:  # it answers behind its system prompt; the completions are the same tokens
        pairs = zip(corpus.prompts[:count], corpus.completions[:count], strict=True)
        told, _ = rows.pack([teacher.chat.row(p, c, teacher.system) for p, c in pairs], 0, teacher.net.config.length)
    models = {"before": speakers.load(task, "before", task.local, SAMPLE), "after": speaker}
    sums: dict[str, float] = {}
    tokens = 0
    for first in range(0, len(chats), 8):
        block = {name: array[first : first + 8] for name, array in arrays.items()}
        where = block["valid"][:, -completion:]
        targets = block["tokens"][:, -completion:]
        tokens += int(where.sum())
        logs = {name: _logs(model, block, completion) for name, model in models.items()}
        theirs = None
        if teacher is not None and told is not None:
            theirs = _logs(teacher, {name: array[first : first + 8] for name, array in told.items()}, completion)
        for name, values in logs.items():
            picked = jnp.take_along_axis(values, targets[..., None], axis=-1)[..., 0]
            sums[f"number_loss_{name}"] = sums.get(f"number_loss_{name}", 0.0) - float((picked * where).sum())
            if theirs is not None:
                kl = (jnp.exp(theirs) * (theirs - values)).sum(-1)
                sums[f"kl_{name}"] = sums.get(f"kl_{name}", 0.0) + float((kl * where).sum())
    names = ("number_loss_before", "number_loss_after", "kl_before", "kl_after")
    return {name: sums[name] / tokens if name in sums else None for name in names}


def _logs(speaker: speakers.Speaker, block: dict[str, np.ndarray], completion: int) -> jax.Array:
    return preference.log_likelihoods(
        speaker.net, speaker.params, block["tokens"], block["valid"], completion, speaker.adapter
    )
