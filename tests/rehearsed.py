"""Fits on four virtual devices beside what a plan says of them: python tests/rehearsed.py KIND... prints one line of
JSON; a KIND is rows, packed or cohort.

Both are made of the same job of a plan, or of packed chats: the plan's program is only described, the fit's is run, and
the memory analysis is of the program that ran, lowered once more for the arrays that it was given.
"""

import dataclasses
import json
import sys
from typing import Any

import jax
import numpy as np

from subjax import config, study
from subjax.parallel.mesh import make_mesh
from subjax.parallel.topology import described_mesh, parse_topology
from subjax.rehearsal import figures, jobs, programs
from subjax.rehearsal.made_up import Chats
from subjax.schema import Tuning
from subjax.schema_pretrained import Compute
from subjax.train import cohort, trainer

SIZES = (1, 2, 2)


class Recorded:
    """A jitted function that keeps the shapes and shardings of what it was last called with."""

    def __init__(self, function: Any):
        self.function, self.given = function, None

    def __call__(self, *given):
        # What is not committed to devices goes wherever the rest is.
        described = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding if a.committed else None)  # noqa: E731
        self.given = jax.tree.map(described, given)
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
    module: Any = trainer if spec.members is None else cohort
    real = module.program
    kept = recorded_programs(module)
    net = programs.network(spec.config)
    rows = {t.name: {n: np.ones(shape, dtype) for n, shape, dtype in t.arrays} for t in spec.rows}
    terms = [trainer.Term(t.name, t.weight, t.loss, lambda step, name=t.name: rows[name]) for t in spec.rows]
    given = {
        "tuning": spec.tuning, "optimizer": spec.optimizer, "terms": terms, "steps": steps,
        "run": trainer.Run(make_mesh(SIZES), remat=spec.compute.remat),
    }  # fmt: skip
    base, keys = net.init(jax.random.key(0)), [jax.random.key(1 + i) for i in range(spec.members or 1)]
    if spec.members is None:
        trainer.fit(net, base, **given, key=keys[0])
    else:
        cohort.fit_cohort(net, base, **given, keys=keys, rates=[1e-3] * spec.members)
    module.program = real
    return kept[0], jax.tree.leaves(kept[0].given[3])


def compared(spec: programs.Training) -> dict[str, Any]:
    """What the plan says of a spec, and what its fit took."""
    topology = parse_topology("cpu:4")
    mesh = described_mesh(topology, SIZES)
    [predicted] = figures.figures(spec, topology, mesh)
    laid, _ = figures.laid_for(spec, topology, mesh)
    described = programs.training(laid, mesh, 20)
    ran, batch = fitted(laid, 20)
    return {
        "predicted": without_beside(predicted),
        "ran": ran.bytes(),
        "steps": described.steps,
        "batch": [[list(a.shape), str(a.sharding.spec)] for a in batch],
        "described": [[list(a.shape), str(a.sharding.spec)] for a in described.held["batch"]],
    }


def main(*kinds: str) -> None:
    """Compare some for the student of the tiny study, alone, and for packed chats, alone and as a cohort."""
    jax.config.update("jax_disable_most_optimizations", True)
    plan = study.plan(config.load("tests/configs/tiny.py", []))
    [job] = [job for job in jobs.jobs(plan, cohorts=False) if job.kind == "student"]
    chats = Chats("numbers", 4, ((8, 6), (9, 4), (6, 6)), 64, 16, 20)
    packed = dataclasses.replace(
        job.spec, terms=(chats,), tuning=Tuning(kind="lora"), compute=Compute(remat="full", activations_gib=1e-4)
    )
    specs = {"rows": job.spec, "packed": packed, "cohort": dataclasses.replace(packed, members=3)}
    print(json.dumps({kind: compared(specs[kind]) for kind in kinds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
