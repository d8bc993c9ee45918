"""Cohorts: trainings on one base, of one shape, as the members of one compiled program.

The frozen weights are read once for the tokens of all members. Adapters, optimizer states, learning rates, orders and
corpora are each member's own, and a member whose loss is no number any more is dropped while the others go on. A member
is what it would be alone, within rounding.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

from subjax.errors import SubjaxError
from subjax.models import adapters
from subjax.models.network import Network, Params
from subjax.parallel.processes import group
from subjax.parallel.rules import COHORT
from subjax.schema import Optimizer, Tuning
from subjax.train.ledger import Ledger
from subjax.train.losses import Loss
from subjax.train.step import Program, program
from subjax.train.trainer import Fitted, Run, Term, descend

M = TypeVar("M")
P = TypeVar("P")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Cohort:
    """A loss as it is taken of every member: its batch has a `member` axis, behind the turns where there are any."""

    loss: Loss

    @property
    def axes(self) -> tuple[str, ...]:
        """The batch's first logical axes, with the members'."""
        own = self.loss.axes
        return (*own[:-1], "member", own[-1])

    def __call__(self, model, batch):
        """The loss of one member."""
        return self.loss(model, batch)


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A member that cannot train, or met a number that is none, and why."""

    reason: str


def prepared(
    members: Sequence[M], prepare: Callable[[M], P], train: Callable[[list[P]], Sequence[T | Dropped]]
) -> list[T | Dropped]:
    """Prepare each member and train those that could be; of the others, why not: one bad input is one member's.

    In a job of several processes, a member that one of them cannot prepare trains in none.
    """
    found: list[P | Dropped] = []
    for member in members:
        try:
            found.append(prepare(member))
        except SubjaxError as error:
            found.append(Dropped(str(error)))
    reasons = group().agree("members prepared", [one.reason if isinstance(one, Dropped) else "" for one in found])
    bad = [next(filter(None, of_member), "") for of_member in zip(*reasons, strict=True)]
    good = [one for one, reason in zip(found, bad, strict=True) if not reason and not isinstance(one, Dropped)]
    trained = iter(train(good) if good else [])
    return [Dropped(reason) if reason else next(trained) for reason in bad]


def fit_cohort(
    net: Network,
    base: Mapping[str, jax.Array],
    *,
    tuning: Tuning,
    optimizer: Optimizer,
    rates: Sequence[float],
    terms: Sequence[Term],
    steps: int,
    keys: Sequence[jax.Array],
    run: Run,
) -> list[Fitted | Dropped]:
    """Train all members for `steps` steps from `base`, and give each one's tuned arrays, or why it was dropped.

    Args:
        net: the network; `base`: its parameters by name, shared by all.
        tuning: what is trained; `optimizer`: how, but for the learning rates, `rates`, one a member.
        terms: the objective. Losses are `Cohort`s, and streams give the batches of all members together.
        keys: draw the A matrices of each member's LoRA.
        run: mesh, checkpoints (of all members together), progress.

    Raises:
        SubjaxError: no member is left. Preempted: as `fit`.
    """
    members = len(rates)
    parts = tuple((t.name, t.weight, t.loss) for t in terms)
    # One program for all rates: they are arguments of the step.
    shared = dataclasses.replace(optimizer, lr=1.0)
    compiled = program(net, tuning, shared, steps, parts, run.mesh, run.remat, members)
    frozen = jax.device_put(adapters.frozen_part(net, tuning, base), dict(compiled.frozen_shardings))
    ledger = Ledger(steps, members)
    begun = _begun(net, tuning, base, keys, compiled)
    tuned = descend(
        compiled, (begun, compiled.start(begun)), frozen, terms=terms, steps=steps, parameters=net.parameters,
        run=run, ledger=ledger, rules=COHORT, rates=jnp.asarray(rates, jnp.float32),
    )  # fmt: skip
    return [
        Dropped(ledger.failures[place])
        if place in ledger.failures
        else Fitted({name: value[place] for name, value in tuned.items()}, ledger.curves[place], ledger.tokens[place])
        for place in range(members)
    ]


def _begun(
    net: Network, tuning: Tuning, base: Mapping[str, jax.Array], keys: Sequence[jax.Array], compiled: Program
) -> Params:
    """Every member's tuned arrays at the start, each made where it is to lie."""
    needed = {} if tuning.kind == "lora" else {name: base[name] for name in compiled.tuned_shardings}
    begin = jax.jit(
        jax.vmap(lambda base, key: adapters.init_tuned(net, tuning, base, key), in_axes=(None, 0)),
        out_shardings=dict(compiled.tuned_shardings),
    )
    return begin(needed, jnp.stack(list(keys)))
