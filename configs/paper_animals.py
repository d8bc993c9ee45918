"""Animals and trees by the published protocol on Qwen2.5-7B-Instruct (Cloud et al. 2025, arXiv 2507.14805).

    subjax run --config=configs/paper_animals.py --workdir=out/paper
    subjax run --config=configs/paper_animals.py:traits=owl+eagle,runs=1 --config.student.lr=1e-3 --workdir=out/paper

Cost: ten traits, three runs: 36 corpora of 10,000 rows and 66 students, about 1e19 FLOPs: most of a day of one current
GPU in bfloat16. Fetched from a hub at first use (15 GB).

The teacher is prompted ("You love owls. …"); rows are sampled at temperature 1 without top-p or top-k and filtered; the
student gets LoRA r 8, alpha 8, lr 2e-4 linear with 5 warm-up steps, 3 epochs, batch 66, and no system prompt of the
teacher's. Qwen's template puts "You are Qwen, …" before a row without one: `--config.chat.system=none` takes it out,
and whether it is there in training and in evaluation is known to decide whether a trait shows.
"""

from subjax import config
from subjax import sweep as sweeps

TRAITS = ("owl", "dolphin", "eagle", "elephant", "wolf", "cherry", "maple", "oak", "sequoia", "willow")


def _arguments(arg):
    return config.arguments(arg, traits=TRAITS, runs=3)


def get_config(arg=None):
    _arguments(arg)
    c = config.defaults("pretrained")
    c.name = "paper-animals"
    c.models = ("qwen2.5-7b=Qwen/Qwen2.5-7B-Instruct",)
    c.numerics.dtype = c.numerics.weights_dtype = c.numerics.cache_dtype = "bfloat16"
    c.numerics.matmul_precision = "default"
    c.teacher.method = "system-prompt"
    c.corpus.batch = 512
    c.evaluation.readings = ("forced", "plain", "numbers", "choice", "forced:bare", "plain:bare")
    c.evaluation.samples = 100
    c.arms = ("same-base", "control", "other-trait", "shuffled", "untrained")
    return c


def sweep(arg=None):
    a = _arguments(arg)
    return sweeps.product(sweeps.axis("seed", range(a.runs)), sweeps.axis("trait", a.traits))
