"""Student of a pretrained study: a base fine-tuned on a corpus's completions, through its own template."""

from subjax.stages import speakers, text_corpus
from subjax.stages.task import Made, Task
from subjax.stages.text_tuning import tune


def make(task: Task) -> Made:
    """Fine-tune the base; the payload holds the tuned arrays alone, and `metrics.jsonl`.

    What its teacher was told by system prompt is not in the rows; what the template itself puts in, is.
    """
    speaker = speakers.load(task, "base")
    corpus = text_corpus.load(task.store, task.inputs["corpus"][1])
    chats = [speaker.chat.row(p, c) for p, c in zip(corpus.prompts, corpus.completions, strict=True)]
    init, order = task.config["init_seed"], task.config["order_seed"]
    seeds = {"init": init, "order": order}
    return tune(task, speaker, chats, term="numbers", init_seed=init, order_seed=order, seeds=seeds)
