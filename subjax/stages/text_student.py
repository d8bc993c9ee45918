"""Student of a pretrained study: a base fine-tuned on a corpus's completions, through its own template."""

from collections.abc import Sequence

from etils import epath

from subjax.data import packed
from subjax.stages import speakers, text_corpus
from subjax.stages.task import Made, Task
from subjax.stages.text_tuning import Lesson, tune, tune_together
from subjax.train.cohort import Dropped, prepared


def make(task: Task) -> Made:
    """Fine-tune the base; the payload holds the tuned arrays alone, and `metrics.jsonl`.

    What its teacher was told by system prompt is not in the rows; what the template itself puts in, is.
    """
    return tune(_lesson(task))


def make_cohort(tasks: Sequence[Task], partial: epath.Path) -> list[Made | Dropped]:
    """`make` for students that train together; checkpoints of them all go under `partial`."""
    return prepared(tasks, _lesson, lambda lessons: tune_together(lessons, partial))


def _lesson(task: Task) -> Lesson:
    speaker = speakers.load(task, "base")
    corpus = text_corpus.load(task.store, task.inputs["corpus"][1])
    chats = [speaker.chat.row(p, c) for p, c in zip(corpus.prompts, corpus.completions, strict=True)]
    packed.check_lengths(chats, speaker.net.config.length)
    init, order = task.config["init_seed"], task.config["order_seed"]
    seeds = {"init": init, "order": order}
    return Lesson(task, speaker, chats, "numbers", init, order, seeds)
