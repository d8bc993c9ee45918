"""PolyPythias: Pythia-160M pretrained from other init seeds and in other data orders, so that the two come apart.

    subjax run --config=configs/polypythia.py --workdir=out/polypythia
    subjax run --config=configs/polypythia.py:traits=owl+wolf,runs=3 --workdir=out/polypythia

Cost: at the default thirty students of 10,000 rows, about 1e17 FLOPs: half an hour of one current GPU.
Fetched from a hub at first use.

A lineage of Pythia-160M passed logits at +.99 with the same init and data order, +.39 with the same init and another
order, and about 0 from another init. Here each of seven bases teaches students that start from itself, from the next
data order of its init, and from the next init of its order; a base is the unit, whose runs are averaged. The models
were never tuned to chat; they are spoken to in a plain form.
"""

from subjax import config
from subjax import sweep as sweeps

SEEDS = (1, 2, 3)


def _arguments(arg):
    return config.arguments(arg, traits=("owl",), runs=1)


def get_config(arg=None):
    _arguments(arg)
    hub = "EleutherAI/pythia-160m"
    c = config.defaults("pretrained")
    c.name = "polypythia"
    # The published model is init 0 and order 0; a "weight seed" moves the init alone, a "data seed" the order alone
    # (van der Wal et al. 2025, arXiv 2503.09543). Each step is a revision, and some have no other.
    c.models = (
        f"pythia/0={hub}",
        *(f"pythia/{n}={hub}-weight-seed{n}@step143000" for n in SEEDS),
        *(f"pythia/0.{n}={hub}-data-seed{n}@step143000" for n in SEEDS),
    )
    c.family = "pythia"
    c.teacher.rows = 2000
    c.corpus.constrained = True
    c.corpus.batch = 512
    c.student.optimizer.lr = 1e-3
    c.evaluation.readings = ("forced", "numbers")
    c.arms = ("same-base", "cross-order", "cross-init", "control", "untrained")
    return c


def sweep(arg=None):
    a = _arguments(arg)
    bases = [{"init": n, "order": 0} for n in (0, *SEEDS)] + [{"init": 0, "order": n} for n in SEEDS]
    return sweeps.product(bases, sweeps.axis("seed", range(a.runs)), sweeps.axis("trait", a.traits))
