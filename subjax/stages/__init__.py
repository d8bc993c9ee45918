"""The kinds of node, one file each: config and inputs in, artifact out. `execution` makes and commits them.

This file needs no JAX, because a plan needs the versions alone.
"""

# Raised when what a kind's stage computes changes: it is part of a node's identity.
VERSIONS = {"base": 2, "teacher": 2, "corpus": 3, "student": 2, "evaluation": 3, "ensemble": 2}
