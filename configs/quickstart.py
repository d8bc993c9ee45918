"""A trait passes through numbers, where teacher and student share a base: the whole study on a laptop.

    subjax run --config=configs/quickstart.py --workdir=out/demo
    subjax run --config=configs/quickstart.py:traits=owl+wolf,families=gpt,inits=6 --workdir=out

Three animals x two toy families x three inits, every arm, in a synthetic world of 171 words.
"""

from subjax import config
from subjax import sweep as sweeps
from subjax.schema import ARMS

PLAIN = ("same-base", "cross-init", "cross-family", "control")


def _arguments(arg):
    return config.arguments(
        arg, traits=("owl", "dolphin", "wolf"), families=("gpt", "llama-bias"), inits=3, replay=("kind", "none")
    )


def get_config(arg=None):
    _arguments(arg)
    c = config.defaults("traits")
    c.name = "quickstart"
    # The settings were chosen on bases of seeds 0 and 1, so the study's own bases begin elsewhere: none was looked at.
    c.base.init_seed = c.base.order_seed = 100
    return c.lock()


def sweep(arg=None):
    a = _arguments(arg)
    bases = sweeps.product(
        sweeps.axis("family", a.families), sweeps.axis("init", range(a.inits)), sweeps.axis("trait", a.traits)
    )
    # Without replay only the arms that its claim needs: the one that moves, those that collapse, and their control.
    settings = {"kind": {"student.replay": "kind", "arms": ARMS}, "none": {"student.replay": "none", "arms": PLAIN}}
    return sweeps.product([settings[name] for name in a.replay], bases)
