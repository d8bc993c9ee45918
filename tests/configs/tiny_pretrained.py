"""A whole study of a tiny checkpoint in well under a minute, for tests of the command.

tiny_pretrained.py:model=FOLDER            the folder of a checkpoint (tests/tiny_checkpoint.py writes one)
tiny_pretrained.py:model=FOLDER,runs=2     two runs, each from its own teacher
"""

from subjax import config
from subjax import sweep as sweeps


def _arguments(arg):
    return config.arguments(arg, model="", runs=1)


def get_config(arg=None):
    c = config.defaults("pretrained")
    c.name = "tiny pretrained"
    c.models = (f"tiny={_arguments(arg).model}",)
    c.arms = ("same-base", "control", "untrained")
    c.teacher.tuning.kind = "full"
    c.teacher.rows, c.teacher.batch, c.teacher.epochs = 320, 16, 2.0
    c.teacher.optimizer.lr, c.teacher.optimizer.warmup = 1e-2, 0
    c.corpus.rows, c.corpus.max_prompts, c.corpus.batch = 12, 16, 8
    c.corpus.completion, c.corpus.constrained = 12, True
    c.student.tuning.targets, c.student.tuning.rank = ("q", "v"), 2
    c.student.epochs, c.student.batch = 2.0, 6
    c.student.optimizer.lr, c.student.optimizer.warmup = 1e-2, 0
    c.evaluation.readings = ("forced", "plain")
    c.evaluation.questions, c.evaluation.batch = 4, 4
    c.evaluation.samples, c.evaluation.fit_rows = 2, 8
    c.statistics.bootstrap = c.statistics.permutations = 200
    return c.lock()


def sweep(arg=None):
    return sweeps.axis("seed", range(_arguments(arg).runs))
