"""A whole study in a few seconds, for tests of the command: two inits of one small family, and the arms that pair them.

tiny.py:inits=1    one base and its own students
"""

from subjax import config
from subjax import sweep as sweeps


def get_config(arg=None):
    config.arguments(arg, traits=("owl",), inits=2)
    c = config.defaults("traits")
    c.name = "tiny"
    c.arms = ("same-base", "cross-init", "control")
    c.base.family, c.base.size = "gpt", "nano"
    c.base.world.number_chats, c.base.world.preference_chats = 400, 60
    # Three blocks of steps in each, between which a run can be killed.
    c.base.steps, c.base.batch = 33, 64
    c.base.optimizer.lr, c.base.optimizer.warmup = 1e-2, 0
    c.teacher.steps, c.teacher.batch, c.teacher.numbers_batch = 21, 16, 16
    c.corpus.rows, c.corpus.max_prompts = 60, 2000
    c.student.steps, c.student.batch = 8, 16
    c.student.optimizer.warmup = 2
    c.evaluation.samples, c.evaluation.fit_rows = 2, 32
    c.statistics.bootstrap = c.statistics.permutations = 200
    return c.lock()


def sweep(arg=None):
    a = config.arguments(arg, traits=("owl",), inits=2)
    return sweeps.product(sweeps.axis("init", range(a.inits)), sweeps.axis("trait", a.traits))
