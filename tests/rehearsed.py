"""A fit on four virtual devices beside what a plan says of it: python tests/rehearsed.py prints one line of JSON.

Both are made of the same job of a plan: the plan's program is only described, the fit's is run, and the memory analysis
is of the program that ran, lowered once more for the arrays that it was given.
"""

import dataclasses
import json
from typing import Any

import jax
import numpy as np

from subjax import config, study
from subjax.parallel.mesh import make_mesh
from subjax.parallel.topology import described_mesh, parse_topology
from subjax.rehearsal import figures, jobs, programs
from subjax.train import trainer

SIZES = (1, 2, 2)


class Recorded:
    """A jitted function that keeps the shapes and shardings of what it was last called with."""

    def __init__(self, function: Any):
        self.function, self.given = function, None

    def __call__(self, *given):
        self.given = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), given)
        return self.function(*given)

    def bytes(self) -> int:
        """Bytes a device of the program that ran."""
        memory = self.function.lower(*self.given).compile().memory_analysis()
        return (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.generated_code_size_in_bytes
        )


def recorded_programs(module: Any) -> list[Recorded]:
    """Make a module's `program` record every step that it makes from now on."""
    kept: list[Recorded] = []
    real = module.program

    def spy(*given):
        made = real(*given)
        kept.append(Recorded(made.take))
        return dataclasses.replace(made, take=kept[-1])

    module.program = spy
    return kept


def without_beside(found: figures.Figures) -> int:
    """What a plan says of the program's own bytes."""
    return found.needed - found.parts.get("beside", 0)


def fitted(spec: programs.Training, steps: int) -> tuple[Recorded, list[Any]]:
    """Run a fit of a job's program on the mesh, over rows of ones; the step that ran and the shardings of its batch."""
    kept = recorded_programs(trainer)
    net = programs.network(spec.config)
    rows = {t.name: {n: np.ones(shape, dtype) for n, shape, dtype in t.arrays} for t in spec.terms}
    terms = [trainer.Term(t.name, t.weight, t.loss, lambda step, name=t.name: rows[name]) for t in spec.terms]
    mesh = make_mesh(SIZES)
    trainer.fit(
        net, net.init(jax.random.key(0)), tuning=spec.tuning, optimizer=spec.optimizer, terms=terms, steps=steps,
        key=jax.random.key(1), run=trainer.Run(mesh),
    )  # fmt: skip
    return kept[0], jax.tree.leaves(kept[0].given[3])


def main() -> None:
    """Compare them for the student of the tiny study."""
    jax.config.update("jax_disable_most_optimizations", True)
    plan = study.plan(config.load("tests/configs/tiny.py", []))
    [job] = [job for job in jobs.jobs(plan) if job.kind == "student"]
    topology = parse_topology("cpu:4")
    mesh = described_mesh(topology, SIZES)
    [predicted] = figures.figures(job.spec, topology, mesh)
    described = programs.training(job.spec, mesh, 20)
    ran, batch = fitted(job.spec, 20)
    print(
        json.dumps(
            {
                "predicted": without_beside(predicted),
                "ran": ran.bytes(),
                "steps": described.steps,
                "batch": [[list(a.shape), str(a.sharding.spec)] for a in batch],
                "described": [[list(a.shape), str(a.sharding.spec)] for a in described.held["batch"]],
            }
        )
    )


if __name__ == "__main__":
    main()
