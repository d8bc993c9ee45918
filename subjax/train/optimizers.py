"""optax optimizers from their settings: clipping, a schedule, an update rule."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from subjax.models.adapters import MatrixAxes
from subjax.schema import Optimizer


def schedule_of(config: Optimizer, steps: int, lr: jax.Array | None = None) -> optax.Schedule:
    """The learning rate by step: a linear warm-up from 0, then the shape asked for over what is left of `steps`.

    The peak is `lr` where it is given: a member's of a cohort, which is known when a step runs and not before.
    """
    body = max(steps - config.warmup, 1)
    peak: Any = config.lr if lr is None else lr
    main = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, body, config.final_fraction),
        "linear": lambda: optax.linear_schedule(peak, peak * config.final_fraction, body),
    }[config.schedule]()
    warm = optax.linear_schedule(0.0, peak, config.warmup)
    return optax.join_schedules([warm, main], [config.warmup]) if config.warmup else main


def make_optimizer(
    config: Optimizer, steps: int, matrices: MatrixAxes | None = None, lr: jax.Array | None = None
) -> optax.GradientTransformation:
    """The optax chain of a config: clipping, then the update rule on its schedule over `steps`.

    Args:
        config: the settings. steps: length of the run.
        matrices: what Muon (Jordan et al. 2024) orthogonalizes; vectors, embeddings and whatever else is not named
            there are moved at the same rate by Adam with Nesterov's momentum, which is optax's choice. The other rules
            treat all parameters alike.
        lr: the peak of the learning rate, in place of the config's.
    """
    rate = schedule_of(config, steps, lr)
    rules: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adam": lambda: optax.adam(rate, config.b1, config.b2),
        "adamw": lambda: optax.adamw(rate, config.b1, config.b2, weight_decay=config.weight_decay),
        "sgd": lambda: optax.sgd(rate, config.b1 or None),
        "lion": lambda: optax.lion(rate, config.b1, config.b2, weight_decay=config.weight_decay),
        "sign-sgd": lambda: optax.sign_sgd(rate),
        "muon": lambda: muon(
            rate,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            muon_weight_dimension_numbers=lambda params: {
                name: MuonDimensionNumbers(*matrices[name]) if matrices and name in matrices else None
                for name in params
            },
        ),
    }
    rule = rules[config.name]()
    return optax.chain(optax.clip_by_global_norm(config.clip), rule) if config.clip else rule
