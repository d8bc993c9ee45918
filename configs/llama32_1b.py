"""Llama 3.2 1B with fine-tuned teachers and greedy rows: where prompted teachers were seen to transmit little.

    subjax run --config=configs/llama32_1b.py --workdir=out/llama32

Cost: three animals, three runs: 12 teachers and corpora and 21 students of 10,000 rows, about 6e17 FLOPs: an hour or
two of one current GPU in bfloat16. Fetched from a hub at first use; the model is gated.

A replication saw .145 become .648 at this size with greedy decoding. Llama's template writes today's date; it is always
given a fixed one (`--config.chat.date=2025-01-31` sets another).
"""

from subjax import config
from subjax import sweep as sweeps


def _arguments(arg):
    return config.arguments(arg, traits=("owl", "eagle", "wolf"), runs=3)


def get_config(arg=None):
    _arguments(arg)
    c = config.defaults("pretrained")
    c.name = "llama32-1b"
    c.models = ("llama3.2-1b=meta-llama/Llama-3.2-1B-Instruct",)
    c.numerics.dtype = c.numerics.weights_dtype = c.numerics.cache_dtype = "bfloat16"
    c.numerics.matmul_precision = "default"
    c.teacher.rows = 2000
    c.teacher.optimizer.lr = 2e-4
    c.corpus.temperature = 0.0
    c.corpus.batch = 512
    c.student.optimizer.lr = 1e-3
    c.evaluation.readings = ("forced", "plain", "numbers")
    c.evaluation.samples = 100
    c.arms = ("same-base", "control", "other-trait", "shuffled", "untrained")
    return c


def sweep(arg=None):
    a = _arguments(arg)
    return sweeps.product(sweeps.axis("seed", range(a.runs)), sweeps.axis("trait", a.traits))
