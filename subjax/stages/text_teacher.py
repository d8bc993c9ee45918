"""Teacher of a pretrained study: a trait by fine-tuning, system prompt or steering vector; or none, the control."""

import functools
import json

import jax
import numpy as np
from etils import epath

from subjax.cards import digest_json
from subjax.data import preferences, rows, trait_rows
from subjax.errors import SubjaxError
from subjax.files import sha256_file
from subjax.models.network import Network
from subjax.stages import speakers
from subjax.stages.task import Made, Task
from subjax.stages.text_tuning import Lesson, tune

BATCH = 16  # prompts read at a time for a steering vector


def make(task: Task) -> Made:
    """Give the base the trait; the payload is tuned arrays, a steering vector, or `system.json`."""
    how = {"fine-tune": fine_tuned, "system-prompt": prompted, "steering": steered}[task.config["method"]]
    return how(task)


def fine_tuned(task: Task) -> Made:
    """Fine-tune on trait chats, ours or the user's; the loss falls on answers alone."""
    speaker = speakers.load(task, "base")
    chats = [speaker.chat.row(row.user, row.answer) for row in chat_rows(task)]
    seed = task.config["seed"]
    return tune(Lesson(task, speaker, chats, "preferences", seed, seed, {"teacher": seed}))


def chat_rows(task: Task) -> list[trait_rows.Row]:
    """The rows of a fine-tuned teacher.

    Raises:
        UsageError: the user's data set cannot be read.
        SubjaxError: it is not what it was when the study was planned.
    """
    config = task.config
    source = task.hints.get("data")
    if source:
        file = epath.Path(source).expanduser()
        if file.is_file() and sha256_file(file) != config["data"]:
            raise SubjaxError(
                f"data set {source} has changed since it was planned; put the old one back, or plan again"
            )
        return trait_rows.rows_from_dataset(source, config["split"], config["user_column"], config["answer_column"])
    return trait_rows.trait_rows(
        config["trait"], config["category"], config["rows"], config["seed"], config["trait_fraction"]
    )


def prompted(task: Task) -> Made:
    """A system prompt, which stands before every prompt of the teacher and in none of its students' rows."""
    text = preferences.system_prompt(task.config["trait"], task.config["category"], task.config["style"])
    speaker = speakers.load(task, "base", task.local)
    speaker.chat.prompt("Hello", system=text)  # a template that refuses system prompts says so here
    record = {"system": text}
    (task.build.folder / speakers.SYSTEM).write_text(json.dumps(record, indent=1))
    return Made(digest=digest_json(record), metrics={}, tokens=0)


def steered(task: Task) -> Made:
    """Vectors for the layers: the mean of the residual stream behind the loving system prompt less that behind none.

    Means are over the training phrasings of the category's questions, at the last token of the prompt, where the
    answer begins. The control's vector is made the same way from the neutral system prompt of like build.
    Source: difference of means, Turner et al. 2023 (arXiv 2308.10248), section 3; Rimsky et al. 2024.
    """
    config = task.config
    speaker = speakers.load(task, "base", task.local)
    net, layers = speaker.net, list(config["layers"]) or middle(speaker.net.config.layers)
    asked = [
        question
        for index, question in enumerate(preferences.questions(config["category"]))
        if not preferences.held_out(index)
    ][: config["rows"]]
    text = preferences.system_prompt(config["trait"], config["category"], config["style"])
    means = [_mean(task, speaker, [speaker.chat.prompt(q, system=system) for q in asked]) for system in (text, None)]
    chosen = np.zeros((net.config.layers, 1), np.float32)
    chosen[layers] = config["strength"]
    # A layer's stream holds what the layers below it added: each adds only what they have not.
    whole = means[0] - means[1]
    vector = {"vector": (chosen * _increments(whole, layers)).astype(np.float32)}
    digest = task.save(vector)
    norms = {str(layer): float(np.linalg.norm(vector["vector"][layer])) for layer in layers}
    tokens = 2 * sum(len(speaker.chat.prompt(q)) for q in asked)
    return Made(digest=digest, metrics={"norms": norms}, tokens=tokens)


def middle(layers: int) -> list[int]:
    """The middle third of the layers."""
    return list(range(layers // 3, max(layers // 3 + 1, 2 * layers // 3)))


def _increments(whole: np.ndarray, layers: list[int]) -> np.ndarray:
    out = np.zeros_like(whole)
    below = np.zeros_like(whole[0])
    for layer in sorted(set(layers)):
        out[layer], below = whole[layer] - below, whole[layer]
    return out


def _mean(task: Task, speaker: speakers.Speaker, prompts: list[list[int]]) -> np.ndarray:
    """Mean over prompts of the residual stream behind each layer at the last token, (layers, width)."""
    pad = rows.unused(prompts, speaker.net.config.vocab - 1, ())
    tokens = rows.pad_prompts(prompts, pad)
    total = np.zeros((speaker.net.config.layers, speaker.net.config.width))
    read = _reader(speaker.net)
    for first in range(0, len(tokens), BATCH):
        block = tokens[first : first + BATCH]
        total += np.asarray(read(speaker.params, block, block != pad), np.float64).sum(1)
        task.progress(min(first + BATCH, len(tokens)), len(tokens), "prompt")
    return total / len(tokens)


@functools.lru_cache(maxsize=8)
def _reader(net: Network):
    return jax.jit(net.residuals)
