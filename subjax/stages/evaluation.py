"""Evaluation: what a model prefers, exactly and by samples, and how well it fits the numbers it was trained on."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subjax.data import world
from subjax.data.questions import QuestionSet, world_questions
from subjax.measure import preference
from subjax.models.network import Network, Params
from subjax.parallel.rules import SAMPLE
from subjax.stages import corpus, models, spread
from subjax.stages.task import Made, Task
from subjax.store import digest_json

READINGS = "readings.json"


def make(task: Task) -> Made:
    """Question the model; the payload is `readings.json`.

    Inputs: `model`; for a student also `before` (its base), `corpus`, and `teacher` where there is one.
    """
    config = task.config
    net, params = models.load(task.store, *task.inputs["model"], task.local, SAMPLE)
    key = jax.random.key(config["seed"])
    sets = world_questions()

    def reading(place: int, questions: QuestionSet) -> dict[str, Any]:
        p = preference.exact(net, params, questions, mesh=task.local)
        draw = jax.random.fold_in(key, place)
        counts = preference.sampled(net, params, questions, samples=config["samples"], key=draw, mesh=task.local)
        task.progress(place + 1, len(sets) + 1, "reading")
        return {
            "candidates": list(questions.words),
            "questions": [
                {
                    "text": text,
                    "phrasings": "train" if train else "held-out",
                    "p": [float(x) for x in p[i]],
                    "sampled": [int(x) for x in counts[i]],
                    "samples": config["samples"],
                }
                for i, (text, train) in enumerate(zip(questions.texts, questions.train, strict=True))
            ],
        }

    found = spread.shared(sets, reading)
    categories = {questions.category: result for questions, result in zip(sets, found, strict=True)}
    readings = {"categories": categories, "fit": fit_readings(task, net, params) if "corpus" in task.inputs else None}
    (task.build.folder / READINGS).write_text(json.dumps(readings, indent=1, sort_keys=True))
    return Made(digest=digest_json(readings), metrics={}, tokens=0, seeds={"samples": config["seed"]})


def fit_readings(task: Task, net: Network, params: Params) -> dict[str, float | None]:
    """Number loss and KL to the teacher on rows of the student's corpus, before (its base) and after; nats a token."""
    chats = corpus.load(task.store, task.inputs["corpus"][1])[slice(task.config["fit_rows"])]
    arrays = chats.arrays()
    rows: dict[str, Any] = {"tokens": arrays["tokens"], "valid": arrays["valid"], "completion": world.ANSWER}
    targets, where = arrays["tokens"][:, -world.ANSWER :], arrays["valid"][:, -world.ANSWER :]
    _, before = models.load(task.store, *task.inputs["before"], task.local, SAMPLE)
    teacher = None
    if "teacher" in task.inputs:
        theirs = models.load(task.store, *task.inputs["teacher"], task.local, SAMPLE)
        teacher = preference.log_likelihoods(*theirs, **rows)
    out: dict[str, float | None] = {}
    for name, arrays_of in (("before", before), ("after", params)):
        logs = preference.log_likelihoods(net, arrays_of, **rows)
        picked = np.take_along_axis(np.asarray(logs), targets[..., None], axis=-1)[..., 0]
        out[f"number_loss_{name}"] = float(-(picked * where).sum() / where.sum())
        kl = None if teacher is None else np.asarray((jnp.exp(teacher) * (teacher - logs)).sum(-1))
        out[f"kl_{name}"] = None if kl is None else float((kl * where).sum() / where.sum())
    return out
