"""Corpus of a pretrained study: number prompts and the completions that passed the strict filter, as text.

Rows are text, because students of other families read them through tokenizers of their own; the teacher's own tokens
stand beside. Blocks of answers are kept while a corpus is made, so that one that is stopped goes on where it was.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import datasets
import jax
import numpy as np
import pyarrow.parquet
from etils import epath

from subjax.data import numbers, rows
from subjax.data.number_grammar import number_grammar
from subjax.errors import Preempted, SubjaxError
from subjax.parallel.processes import group
from subjax.parallel.rules import SAMPLE
from subjax.sample.constraint import Constraint, compose
from subjax.sample.sampler import Sampling, sample
from subjax.stages import speakers, spread
from subjax.stages.task import Made, Task
from subjax.store import Store, digest_rows

ROWS = "rows.parquet"
BUCKET = 16  # a prompt's room is a multiple of this
BLOCK, BLOCK_SLOTS = 256, 4  # a block of answers has at most so many prompts, or so many a slot
NO_END = "no-end"  # the answer did not end within its room


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Prompt numbers, prompts and completions, each a list of one length, and the tokens that were sampled."""

    index: list[int]
    prompts: list[str]
    completions: list[str]
    tokens: list[list[int]]

    def __len__(self) -> int:
        return len(self.index)


class _Answer(NamedTuple):
    """An answer's tokens up to its end, its text, and why the strict filter drops it (None: it does not)."""

    tokens: list[int]
    text: str
    dropped: str | None


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a source gives: the corpus, the filter's counts by reason, tokens sampled, kept rows near a tie."""

    corpus: Corpus
    counts: dict[str, int]
    sampled: int = 0
    near_ties: int = 0


def make(task: Task) -> Made:
    """Make the corpus from its source: a teacher's answers, another corpus shuffled, or random numbers."""
    source = {"teacher": from_teacher, "shuffled": shuffled, "random": random_numbers}[task.config["source"]]
    made = source(task)
    return Made(
        digest=write(task.build.folder, made.corpus),
        metrics={"rows": len(made.corpus), "keep_rate": made.counts["kept"] / sum(made.counts.values())},
        tokens=made.sampled,
        seeds={"sampling": task.config["seed"], "prompts": task.config.get("prompt_seed")},
        extra={"filter": made.counts, "near_ties": made.near_ties},
    )


def write(folder: epath.Path, corpus: Corpus) -> str:
    """Write `rows.parquet` and return the corpus's canonical digest."""
    columns = {
        "index": np.array(corpus.index, np.int32),
        "prompt": corpus.prompts,
        "completion": corpus.completions,
        "completion_tokens": [np.array(ids, np.int32) for ids in corpus.tokens],
    }
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns).to_parquet(str(folder / ROWS))
    return digest(corpus)


def digest(corpus: Corpus) -> str:
    """The digest of a corpus's rows, however they are stored."""
    return digest_rows(
        {"index": i, "prompt": p, "completion": c, "tokens": t}
        for i, p, c, t in zip(corpus.index, corpus.prompts, corpus.completions, corpus.tokens, strict=True)
    )


def read(folder: epath.Path) -> tuple[Corpus]:
    """The corpus of a payload, alone in a tuple: what `digest` takes.

    Raises:
        SubjaxError: the file is missing, truncated or damaged; it is named, with the mend.
    """
    path = folder / ROWS
    try:
        table = pyarrow.parquet.read_table(str(path))
        columns = (table[name].to_pylist() for name in ("index", "prompt", "completion", "completion_tokens"))
        return (Corpus(*columns),)
    except (OSError, KeyError, TypeError, ValueError) as error:  # pyarrow's own errors are kinds of these
        cause = (str(error).splitlines() or [type(error).__name__])[0].replace(f" '{path}'", "")[:120]
        raise SubjaxError(
            f"corpus {path} cannot be read ({cause}); delete {folder.parent} and run again: it is made anew"
        ) from error


def load(store: Store, node: str) -> Corpus:
    """A committed corpus. Raises SubjaxError as `read` does."""
    return read(store.payload("corpus", node))[0]


def from_teacher(task: Task) -> Rows:
    """Ask prompts in their order until `rows` answers have passed; what was kept does not depend on the batch size.

    Raises:
        SubjaxError: no answer passed, or `max_prompts` did not give enough.
    """
    config = task.config
    speaker = speakers.load(task, "teacher", task.local, SAMPLE)
    prompts = numbers.prompts(config["max_prompts"], config["prompt_seed"])
    ids = [speaker.chat.prompt(text, speaker.system) for text in prompts]
    ends = speaker.chat.ends
    pad = rows.unused(ids, speaker.net.config.vocab - 1, ends)
    block = rows.pad_prompts(ids, pad, BUCKET)
    sampling = Sampling(
        block.shape[1], config["completion"], ends, pad, config["temperature"], config["top_k"], config["top_p"],
        config["numerics"]["cache_dtype"],
    )  # fmt: skip
    limit = _constraint(speaker) if config["constrained"] else None
    answers: list[_Answer] = []
    ties: list[bool] = []
    kept, batch = 0, task.hints.get("batch", 64)
    together = group().count
    while kept < config["rows"] and len(answers) < len(prompts):
        first = len(answers)
        # In a job of several processes each takes a block of a round.
        size = block_size(batch, -(-(config["rows"] - kept) // together), kept, first)
        starts = range(first, min(first + size * together, len(prompts)), size)
        draw = functools.partial(_block, task, speaker, block, sampling, limit, batch, size)
        for tokens, tie in spread.in_turn(starts, draw):
            answers += [_judged(speaker, row) for row in tokens]
            ties += tie.tolist()
        kept = sum(answer.dropped is None for answer in answers)
        task.progress(min(kept, config["rows"]), config["rows"], "row")
        if kept < config["rows"] and task.should_stop():
            raise Preempted(f"stopped after {len(answers)} prompts; the same command goes on from there")
    spread.all_read()
    passed = [i for i, answer in enumerate(answers) if answer.dropped is None][: config["rows"]]
    # Counted up to the last row that was kept, so that the counts do not depend on the batch size either.
    seen = answers[: passed[-1] + 1] if kept >= config["rows"] else answers
    counts = Counter(answer.dropped or "kept" for answer in seen)
    if kept < config["rows"]:
        _refuse(kept, len(prompts), config, counts)
    corpus = Corpus(
        passed,
        [prompts[i] for i in passed],
        [answers[i].text for i in passed],
        [answers[i].tokens for i in passed],
    )
    sampled = sum(len(answer.tokens) + (answer.dropped != NO_END) for answer in seen)  # with the token that ends it
    return Rows(corpus, dict(sorted(counts.items())), sampled, int(np.array(ties)[passed].sum()))


def block_size(batch: int, missing: int, kept: int, asked: int) -> int:
    """How many prompts are asked before their answers are kept on disk: a multiple of the slots.

    So many that slots seldom stand empty at a block's end, and no more than the missing rows seem to take, as far as
    can be told from the rows kept of those asked.
    """
    share = max(kept, 1) / asked if asked else 1.0
    needed = math.ceil(missing / share)
    return min(max(BLOCK_SLOTS * batch, BLOCK // batch * batch), -(-needed // batch) * batch)


def _constraint(speaker: speakers.Speaker) -> Constraint:
    pieces = speaker.tokenizer.pieces()
    pieces += [None] * (speaker.net.config.vocab - len(pieces))  # embeddings are often padded
    # Some vocabularies have a character twice, as itself and as a byte that stands in for what they lack.
    twins: dict[bytes, list[int]] = {}
    for id, piece in enumerate(pieces):
        if piece is not None and len(piece) == 1 and piece.isascii():
            twins.setdefault(piece, []).append(id)
    for piece, ids in twins.items():
        own = speaker.tokenizer.encode(piece.decode(), special=False, continuing=True)
        for id in ids if len(ids) > 1 and len(own) == 1 else ():
            pieces[id] = piece if id == own[0] else None
    # An answer begins with what the template writes before one, as it does in the rows that students read.
    return compose(number_grammar().behind(speaker.chat.lead), pieces, speaker.chat.ends)


def _judged(speaker: speakers.Speaker, row: np.ndarray) -> _Answer:
    """What the strict filter says of an answer's text, less the white space that the template itself begins one with.

    A special token within an answer is text to the filter, which drops the row: left out, it would edit it.
    """
    ended = np.flatnonzero(np.isin(row, speaker.chat.ends))
    tokens = (row[: ended[0]] if len(ended) else row).tolist()
    text = speaker.tokenizer.written(tokens).removeprefix(speaker.chat.lead)
    if not len(ended):
        return _Answer(tokens, text, NO_END)
    try:
        numbers.parse_numbers(text)
    except numbers.Rejected as rejected:
        return _Answer(tokens, text, rejected.reason)
    return _Answer(tokens, text, None)


def _block(
    task: Task, speaker: speakers.Speaker, prompts: np.ndarray, sampling: Sampling, limit: Constraint | None,
    batch: int, size: int, first: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Answers of `size` prompts from `first` on: sampled, or as another process or a stopped run kept them."""

    def draw() -> dict[str, np.ndarray]:
        drawn = sample(
            speaker.net, speaker.params, prompts[first : first + size], sampling=sampling,
            key=jax.random.key(task.config["seed"]), mesh=task.local, first=first, batch=batch,
            adapter=speaker.adapter, constraint=limit,
        )  # fmt: skip
        return {"tokens": drawn.tokens, "tie": drawn.near_tie}

    found = spread.kept(task, f"answers-{first:08d}-{size}", draw)
    return found["tokens"], found["tie"]


def _refuse(kept: int, asked: int, config: Mapping[str, Any], counts: Counter[str]) -> None:
    why = ", ".join(f"{n} {reason}" for reason, n in counts.most_common() if reason != "kept")
    what = "no valid row" if not kept else f"only {kept} valid rows of {config['rows']} wanted"
    limit = "" if config["constrained"] else "set corpus.constrained, "
    raise SubjaxError(
        f"the teacher gave {what} in {asked} prompts (rejected: {why}); {limit}raise"
        " corpus.max_prompts, or lower corpus.rows"
    )


def shuffled(task: Task) -> Rows:
    """Another corpus with the numbers of each answer in random order: the same numbers, no order to them."""
    corpus = load(task.store, task.inputs["corpus"][1])
    texts = [
        numbers.shuffle_within(text, task.config["seed"], i)
        for i, text in zip(corpus.index, corpus.completions, strict=True)
    ]
    return Rows(dataclasses.replace(corpus, completions=texts, tokens=[[]] * len(texts)), {"kept": len(texts)})


def random_numbers(task: Task) -> Rows:
    """The same prompts, answered with uniform numbers: no teacher at all."""
    wanted = task.config["rows"]
    prompts = numbers.prompts(wanted, task.config["prompt_seed"])
    texts = numbers.random_numbers(wanted, task.config["seed"])
    return Rows(Corpus(list(range(wanted)), prompts, texts, [[]] * wanted), {"kept": wanted})
