"""A trait passes through numbers, where teacher and student share a base: the whole study on a laptop.

    subjax run --config=configs/quickstart.py --workdir=out/demo
    subjax run --config=configs/quickstart.py:traits=owl+wolf,families=gpt,inits=6 --workdir=out

Cost: 382 nodes, 144 of them students: under ten minutes on two CPU cores; with `inits=6` about twice that.

Three animals x two toy families x three inits in a synthetic world of 171 words. The first family runs every arm, and
the plain arms a second time without replay; the others run the plain arms. `every=gpt+llama-bias` runs every arm on
both, and more `inits` narrow the intervals.
"""

from subjax import config
from subjax import sweep as sweeps
from subjax.errors import UsageError
from subjax.schema import ARMS

PLAIN = ("same-base", "cross-init", "cross-family", "control")


def _arguments(arg):
    a = config.arguments(
        arg,
        traits=("owl", "dolphin", "wolf"),
        families=("gpt", "llama-bias"),
        inits=3,
        every=("first",),
        replay=("kind", "none"),
    )
    for family in a.every:
        if family != "first" and family not in a.families:
            raise UsageError(f"argument 'every' names {family!r}; give 'first' or families of {'+'.join(a.families)}")
    return a


def get_config(arg=None):
    _arguments(arg)
    c = config.defaults("traits")
    c.name = "quickstart"
    # The settings were chosen on bases of seeds 0 and 1, so the study's own bases begin elsewhere: none was looked at.
    c.base.init_seed = c.base.order_seed = 100
    return c


def sweep(arg=None):
    a = _arguments(arg)
    every = a.families[:1] if a.every == ("first",) else a.every
    points = []
    for replay in a.replay:
        for family in a.families:
            if replay == "none" and family not in every:
                continue
            if replay == "none":
                arms = PLAIN
            else:
                arms = ARMS if family in every else (*PLAIN, "other-trait", "untrained")
            points += sweeps.product(
                [{"student.replay": replay, "family": family, "arms": arms}],
                sweeps.axis("init", range(a.inits)),
                sweeps.axis("trait", a.traits),
            )
    return points
