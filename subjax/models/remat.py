"""What the backward pass keeps of a layer and what it computes again, by name: memory against time."""

from collections.abc import Callable
from typing import Any, Literal

import jax

from subjax.models.products import PRODUCT

# none: keep everything that gradients need. dots: keep what matrix products with weights give, compute the rest again
# (norms, activations, attention). full: keep a layer's input alone.
Remat = Literal["none", "dots", "full"]


def rematerialized(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """A layer whose backward pass keeps what `remat` names. Source: Chen et al. 2016, arXiv 1604.06174."""
    if remat == "none":
        return layer
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names(PRODUCT) if remat == "dots" else policies.nothing_saveable
    # Inside a scan nothing could be merged with the forward pass anyway, and forbidding it costs time.
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)
