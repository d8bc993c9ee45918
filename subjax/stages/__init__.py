"""The kinds of node, one file each: config and inputs in, artifact out. `execution` makes and commits them.

This file needs no JAX, because a plan needs the versions alone.
"""

from collections.abc import Mapping
from typing import Any

# Raised when what a kind's stage computes changes: it is part of a node's identity.
VERSIONS = {"base": 3, "teacher": 3, "corpus": 3, "student": 3, "evaluation": 3, "ensemble": 3}
# The stages of pretrained studies are files of their own: a change there must not make the others' nodes anew.
TEXT_VERSIONS = {"base": 2, "teacher": 3, "corpus": 4, "student": 3, "evaluation": 4}


def version_of(kind: str, config: Mapping[str, Any]) -> int | None:
    """The version of the stage that makes a node of this kind with this config; None for an unknown kind."""
    return (TEXT_VERSIONS if config.get("language") == "text" else VERSIONS).get(kind)
