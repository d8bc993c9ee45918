"""Subliminal learning without language: a classifier's digits pass through logits that no label ever touched.

    subjax run --config=configs/digits.py --workdir=out/digits
    subjax run --config=configs/digits.py:seeds=40,sizes=3+10 --workdir=out/digits
    subjax run --config=configs/digits.py:protocol=paper,data=FOLDER --workdir=out/paper

Cost: 30 ensembles of 20 seeds take about 5 minutes of one CPU core, a third of it compiling: under 3 minutes on two.
Under the paper's protocol (60,000 images of 28x28) an ensemble takes 13 seconds a seed on one core: with `seeds=5`
20 minutes on two cores, with 20 seeds over an hour; an accelerator is worth it there.

What it shows: a teacher learns ten classes of images; a student sees noise alone and copies m auxiliary logits. With
its teacher's own init it comes to read the images, the better the larger m. With another init it stays at chance.
Fitted to all logits it learns with either init, because the class logits carry the task itself. With m = 1 the softmax
of the auxiliary logits is always 1, so under KL nothing can pass: the stated null, beside which squared error stands.

Arguments (name=value, joined by commas):
    protocol  small: scikit-learn's 8x8 digits, 4,096 rows of noise, Adam 1e-3, batch 64
              paper: as published (Cloud et al. 2025, arXiv 2507.14805): a folder of IDX files, 60,000 rows of noise,
              Adam 3e-4, batch 1024; both train teacher and student for 5 epochs
    data      'digits', or the folder of a set's four IDX files (MNIST, Fashion-MNIST), plain or gzipped
    seeds     members of each ensemble
    sizes     numbers of auxiliary logits, joined by '+'
"""

import ml_collections

from subjax import config
from subjax.errors import UsageError
from subjax.sweep import Sweep, axis, chain, product

SIZES = (1, 2, 3, 5, 10, 20, 50)
PROTOCOLS = {
    "small": {"lr": 1e-3, "batch": 64, "noise_rows": 4096},
    "paper": {"lr": 3e-4, "batch": 1024, "noise_rows": 60_000},
}


def arguments(arg: str | None) -> ml_collections.ConfigDict:
    args = config.arguments(arg, protocol="small", data="digits", seeds=20, sizes=SIZES)
    if args.protocol not in PROTOCOLS:
        raise UsageError(f"argument 'protocol' is {args.protocol!r}; give one of {', '.join(PROTOCOLS)}")
    if args.protocol == "paper" and args.data == "digits":
        raise UsageError("protocol=paper needs a folder of IDX files, as in 'protocol=paper,data=FOLDER'")
    return args


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    args = arguments(arg)
    c = config.defaults("images")
    c.name = "digits" if args.protocol == "small" else "images, the paper's protocol"
    c.data = args.data
    c.seeds = args.seeds
    c.hidden = (256, 256)
    c.teacher_epochs = c.student_epochs = 5
    c.update(PROTOCOLS[args.protocol])
    return c


def sweep(arg: str | None = None) -> Sweep:
    sizes = arguments(arg).sizes
    pairings = axis("pairing", ["same-base", "cross-init"])
    every = product(axis("auxiliary", sizes), axis("logits", ["auxiliary", "all"]), axis("loss", ["kl"]), pairings)
    if 1 not in sizes:
        return every
    # What KL cannot carry through one logit, squared error can.
    single = product(axis("auxiliary", [1]), axis("logits", ["auxiliary"]), axis("loss", ["squared-error"]), pairings)
    return chain(every, single)
