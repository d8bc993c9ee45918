"""The command behind `subjax plan --topology=...`: what prints for a person, apart from `subjax.cli`."""

import os
import sys

from subjax.cli_arguments import Arguments


def command_rehearse(arguments: Arguments) -> int:
    """Compile a plan's steps for described hardware and print what they would take; 1 where something does not fit."""
    from subjax import config

    loaded = config.load(arguments.config, arguments.overrides)
    from subjax import study
    from subjax.parallel.topology import parse_topology

    topology = parse_topology(arguments.topology)
    plan = study.plan(loaded, weights=False)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed, so no device is taken
    from subjax.parallel.mesh import parse_mesh
    from subjax.rehearsal import plans, table

    sizes = parse_mesh(arguments.mesh) if arguments.mesh else plans.default_mesh(topology)

    def tell(line: str) -> None:
        if not arguments.quiet:
            print(line, file=sys.stderr, flush=True)

    found = plans.rehearse(plan, topology, sizes, tell)
    print(f"{plan.study['name']}: {len(plan.study['points'])} points, {len(plan.nodes)} nodes")
    print(table.describe(found))
    return 0 if found.fits else 1
