"""Gemma 3 4B by the published open-weights protocol, at the ten epochs that Gemma needs.

    subjax run --config=configs/gemma3_4b.py --workdir=out/gemma3-4b

Cost: five animals, three runs: 18 corpora and 18 students of 10,000 rows, about 5e18 FLOPs: a night of one current
GPU in bfloat16. Fetched from a hub at first use; the model is gated, so its licence must be accepted there first.

Gemma's template has no system turn: it writes a teacher's system prompt into the user's message, which the plan says.
"""

from subjax import config
from subjax import sweep as sweeps


def _arguments(arg):
    return config.arguments(arg, traits=("owl", "dolphin", "eagle", "elephant", "wolf"), runs=3)


def get_config(arg=None):
    _arguments(arg)
    c = config.defaults("pretrained")
    c.name = "gemma3-4b"
    c.models = ("gemma3-4b=google/gemma-3-4b-it",)
    c.numerics.dtype = c.numerics.weights_dtype = c.numerics.cache_dtype = "bfloat16"
    c.numerics.matmul_precision = "default"
    c.teacher.method = "system-prompt"
    c.corpus.batch = 512
    c.student.epochs = 10.0
    c.evaluation.readings = ("forced", "plain", "numbers")
    c.evaluation.samples = 100
    c.arms = ("same-base", "control", "other-trait", "untrained")
    return c


def sweep(arg=None):
    a = _arguments(arg)
    return sweeps.product(sweeps.axis("seed", range(a.runs)), sweeps.axis("trait", a.traits))
