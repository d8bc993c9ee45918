"""Corpus: prompts and the completions that passed the strict filter, from a teacher or made for a control arm."""

import dataclasses
import functools
from collections import Counter

import datasets
import jax
import numpy as np
import pyarrow.parquet
from etils import epath

from subjax.data import world
from subjax.data.addressing import generator
from subjax.errors import SubjaxError
from subjax.parallel.processes import group
from subjax.parallel.rules import SAMPLE
from subjax.sample.sampler import Drawn, Sampling, sample
from subjax.stages import models, spread
from subjax.stages.task import Made, Task
from subjax.store import Store, digest_arrays

ROWS = "rows.parquet"
BATCH = 2048  # rows sampled at a time; the corpus does not depend on it


def write(folder: epath.Path, index: np.ndarray, chats: world.Chats) -> str:
    """Write a corpus as `rows.parquet` and return its canonical digest.

    Columns: `index` (the prompt's number), `prompt` and `completion` as text, and both as token ids, padded.
    """
    columns = {
        "index": index.astype(np.int32),
        "prompt": [world.decode(row) for row in chats.prompts],
        "completion": [world.decode(row) for row in chats.answers],
        "prompt_tokens": list(chats.prompts.astype(np.int32)),
        "completion_tokens": list(chats.answers.astype(np.int32)),
    }
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns).to_parquet(str(folder / ROWS))
    return digest(index, chats)


def digest(index: np.ndarray, chats: world.Chats) -> str:
    """The digest of a corpus's rows, however they are stored."""
    return digest_arrays({"index": index.astype(np.int32), "prompts": chats.prompts, "answers": chats.answers})


def read(folder: epath.Path) -> tuple[np.ndarray, world.Chats]:
    """(prompt numbers, chats) of a corpus's payload.

    Raises:
        SubjaxError: the file is missing, truncated or damaged; it is named, with the mend.
    """
    path = folder / ROWS
    try:
        table = pyarrow.parquet.read_table(str(path), columns=["index", "prompt_tokens", "completion_tokens"])
        prompts, answers = (np.array(table[c].to_pylist(), np.int32) for c in ("prompt_tokens", "completion_tokens"))
        return table["index"].to_numpy(), world.Chats(prompts, answers)
    except (OSError, KeyError, TypeError, ValueError) as error:  # pyarrow's own errors are kinds of these
        cause = (str(error).splitlines() or [type(error).__name__])[0].replace(f" '{path}'", "")[:120]
        raise SubjaxError(
            f"corpus {path} cannot be read ({cause}); delete {folder.parent} and run again: it is made anew"
        ) from error


@functools.lru_cache(maxsize=4)
def _load(root: str, node: str, payload: str) -> world.Chats:
    return read(Store(root).payload("corpus", node))[1]


def load(store: Store, node: str) -> world.Chats:
    """The chats of a committed corpus. Raises SubjaxError as `read` does."""
    return _load(str(store.root), node, store.payload("corpus", node).name)


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a source gives: prompt numbers, chats, the filter's counts by reason, tokens sampled, rows near a tie."""

    index: np.ndarray
    chats: world.Chats
    counts: dict[str, int]
    sampled: int = 0
    near_ties: int = 0  # kept rows that rounding (another batch size, another mesh) might have drawn otherwise


def make(task: Task) -> Made:
    """Make the corpus from its source: a teacher's answers, another corpus shuffled, or random numbers."""
    source = {"teacher": from_teacher, "shuffled": shuffled, "random": random_numbers}[task.config["source"]]
    rows = source(task)
    return Made(
        digest=write(task.build.folder, rows.index, rows.chats),
        metrics={"rows": len(rows.chats), "keep_rate": rows.counts["kept"] / sum(rows.counts.values())},
        tokens=rows.sampled,
        seeds={"sampling": task.config["seed"], "prompts": task.config.get("prompt_seed")},
        extra={"filter": rows.counts, "near_ties": rows.near_ties},
    )


def from_teacher(task: Task) -> Rows:
    """Ask prompts in their order until `rows` answers have passed; what was kept does not depend on the batch size.

    Raises:
        SubjaxError: no answer passed, or `max_prompts` did not give enough.
    """
    config = task.config
    net, params = models.load(task.store, *task.inputs["teacher"], task.local, SAMPLE)
    sampling = Sampling(
        world.PROMPT, world.ANSWER, world.END, world.PAD, config["temperature"], config["top_k"], config["top_p"],
        config["numerics"]["cache_dtype"],
    )  # fmt: skip
    prompts = world.number_prompts(config["max_prompts"], config["prompt_seed"])
    key = jax.random.key(config["seed"])
    answers: list[np.ndarray] = []
    ties: list[np.ndarray] = []
    reasons: list[str | None] = []
    kept = 0

    batch = BATCH // group().count  # so that a small corpus, too, is everyone's work

    def block(first: int) -> Drawn:
        asked = prompts[first : first + batch]
        draw = lambda: sample(  # noqa: E731
            net, params, asked, sampling=sampling, key=key, mesh=task.local, first=first, batch=batch
        )
        if group().count == 1:  # a block takes a moment: alone, nothing is won by keeping it
            return draw()
        return Drawn(**spread.kept(task, f"answers-{first:08d}-{batch}", lambda: draw()._asdict()))

    for drawn in spread.in_turn(range(0, len(prompts), batch), block):
        answers.append(drawn.tokens)
        ties.append(drawn.near_tie)
        reasons += world.reject_reasons(drawn.tokens)
        kept = sum(reason is None for reason in reasons)
        task.progress(min(kept, config["rows"]), config["rows"], "row")
        if kept >= config["rows"]:
            break
    spread.all_read()
    passed = np.flatnonzero([reason is None for reason in reasons])[: config["rows"]]
    # Counted up to the last row that was kept, so that the counts do not depend on the batch size either.
    seen = reasons[: passed[-1] + 1] if kept >= config["rows"] else reasons
    counts = Counter(reason or "kept" for reason in seen)
    if kept < config["rows"]:
        why = ", ".join(f"{n} {reason}" for reason, n in counts.most_common() if reason != "kept")
        what = "no valid row" if not kept else f"only {kept} valid rows of {config['rows']} wanted"
        raise SubjaxError(
            f"the teacher gave {what} in {len(prompts)} prompts (rejected: {why});"
            " raise corpus.max_prompts, lower corpus.rows, or look at the teacher's numbers"
        )
    chats = world.Chats(prompts[passed], np.concatenate(answers)[passed])
    sampled = int((np.concatenate(answers)[: len(seen)] != world.PAD).sum())
    near_ties = int(np.concatenate(ties)[passed].sum())
    return Rows(passed, chats, dict(sorted(counts.items())), sampled, near_ties)


def shuffled(task: Task) -> Rows:
    """Another corpus with the numbers of each answer in random order: the same numbers, no order to them."""
    index, chats = read(task.store.payload(*task.inputs["corpus"]))
    answers = chats.answers.copy()
    number = (answers != world.PAD) & (answers != world.END)
    # Numbers get a random rank and everything behind them an infinite one, so that the end stays at the end.
    rank = np.where(number, generator(task.config["seed"], "shuffle").random(answers.shape), np.inf)
    answers = np.take_along_axis(answers, np.argsort(rank, axis=1, kind="stable"), axis=1)
    return Rows(index, world.Chats(chats.prompts, answers), {"kept": len(index)})


def random_numbers(task: Task) -> Rows:
    """The same prompts, answered with uniform numbers and lengths: no teacher at all."""
    rows = task.config["rows"]
    prompts = world.number_prompts(rows, task.config["prompt_seed"])
    draw = generator(task.config["seed"], "random numbers")
    counts = draw.integers(world.ANSWERED[0], world.ANSWERED[1] + 1, (rows, 1))
    numbers = draw.integers(0, world.NUMBERS, (rows, world.ANSWER)) + world.NUMBER_0
    column = np.arange(world.ANSWER)[None]
    answers = np.where(column < counts, numbers, np.where(column == counts, world.END, world.PAD)).astype(np.int32)
    return Rows(np.arange(rows), world.Chats(prompts, answers), {"kept": rows})
