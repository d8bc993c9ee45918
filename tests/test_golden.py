"""Golden metrics of one step of every family under every tuning: python -m tests.test_golden --update writes them.

Parameters are drawn by numpy, so that the table holds what a step computes and not what an init draws. A real init is
pinned apart, by the norm of each of its parameters.
"""

import json
import math
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subjax import schema
from subjax.config import to_dict
from subjax.data import packing, world
from subjax.models import adapters
from subjax.models.families import FAMILIES
from subjax.models.network import Network
from subjax.parallel.mesh import make_mesh
from subjax.stages.models import world_network
from subjax.stages.student import replay_batch
from subjax.train import trainer
from subjax.train.losses import CategoryMass, Loss, NextToken

TABLE = Path(__file__).parent / "golden" / "one_step.json"
TOLERANCE = 1e-5
KINDS = ("bias-and-gain", "full", "lora")
CASES = [(family, kind) for family in FAMILIES for kind in KINDS]
INIT = "init of gpt"
MEANT = (
    "a step of training computes something else than it did: if you meant this change, run "
    "`python -m tests.test_golden --update` and say why in the commit"
)


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """Ten programs that run once: less optimization of their code saves most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def network(family: str) -> Network:
    return world_network(family, "nano", to_dict(schema.Numerics()))


def weights(net: Network) -> dict[str, np.ndarray]:
    """Parameters that numpy draws from their names; gains near 1, and nothing at zero."""
    out = {}
    for name, declared in net.declarations.items():
        draw = np.random.default_rng(zlib.crc32(name.encode())).normal(size=declared.shape)
        inputs = math.prod(declared.shape[1:-1]) if declared.role == "weight" else declared.shape[-1]
        scale = {"weight": inputs**-0.5, "embedding": inputs**-0.5}.get(declared.role, 0.1)
        out[name] = (draw * scale + (declared.role == "gain")).astype(np.float32)
    return out


def one_step(family: str, kind: str) -> dict[str, float]:
    """Metrics of the compiled step on a fixed batch: loss, its terms, and the gradient's norm."""
    net, mesh = network(family), make_mesh()
    # Plain descent, because a rule's arithmetic for each of twenty parameters is a good part of what is compiled.
    tuning, optimizer = schema.Tuning(kind=kind, rank=2), schema.Optimizer(name="sgd", b1=0.0, clip=0.0)
    losses: dict[str, Loss] = {"numbers": NextToken(world.ANSWER)}
    if kind == "bias-and-gain":  # the students' own tuning; once a family is enough
        losses["replay"] = CategoryMass()
    parts = tuple((name, 0.5 if name == "replay" else 1.0, loss) for name, loss in losses.items())
    compiled = trainer.program(net, tuning, optimizer, 1, parts, mesh)
    base = weights(net)
    chats = world.number_chats(8, 0, "golden").arrays()
    batches: dict[str, packing.Batch] = {"numbers": chats, "replay": replay_batch()}
    placed = trainer.place([{n: batches[n] for n in losses}], {n: loss.axes for n, loss in losses.items()}, mesh)
    tuned = {n: jnp.array(v) for n, v in adapters.init_tuned(net, tuning, base, jax.random.key(0)).items()}
    if kind == "lora":  # B is zero at the start, where no gradient reaches A
        tuned = {n: v if n.endswith("/a") else jnp.full_like(v, 0.05) for n, v in tuned.items()}
    tuned = jax.device_put(tuned, dict(compiled.tuned_shardings))
    frozen = jax.device_put(adapters.frozen_part(net, tuning, base), dict(compiled.frozen_shardings))
    metrics = compiled.take(tuned, compiled.start(tuned), frozen, placed)[2]
    return {name: float(value[0]) for name, value in metrics.items()}


def init_norms() -> dict[str, float]:
    """Norm of each parameter of a gpt's own initialization."""
    params = jax.jit(network("gpt").init)(jax.random.key(0))
    return {name: float(jnp.linalg.norm(value.reshape(-1))) for name, value in params.items()}


def computed(case: str) -> dict[str, float]:
    return init_norms() if case == INIT else one_step(*case.split(", "))


def names() -> list[str]:
    return [INIT, *(", ".join(case) for case in CASES)]


def compare(case: str, golden: dict[str, Any], found: dict[str, float]) -> list[str]:
    """What differs, a line each."""
    if golden.keys() != found.keys():
        return [f"{case}: has {sorted(found)}, the table has {sorted(golden)}"]
    return [
        f"{case}: {name} is {found[name]!r}, the table says {golden[name]!r}"
        for name in golden
        if not math.isclose(found[name], golden[name], rel_tol=TOLERANCE, abs_tol=TOLERANCE * 1e-2)
    ]


@pytest.mark.parametrize("case", names())
def test_one_step_is_golden(case):
    golden = json.loads(TABLE.read_text())
    assert case in golden, f"{case} is not in {TABLE.name}: {MEANT}"
    wrong = compare(case, golden[case], computed(case))
    assert not wrong, "\n".join([*wrong, MEANT])


def test_the_table_holds_no_other_case():
    assert sorted(json.loads(TABLE.read_text())) == sorted(names()), MEANT


def test_a_change_beyond_the_tolerance_is_told():
    golden = {"loss": 2.0, "gradient_norm": 3.0}
    assert compare("x", golden, {"loss": 2.0 * (1 + 5e-6), "gradient_norm": 3.0}) == []
    (told,) = compare("x", golden, {"loss": 2.0, "gradient_norm": 3.0001})
    assert "gradient_norm" in told
    assert compare("x", golden, {"loss": 2.0})
    assert compare("x", golden, {"loss": math.nan, "gradient_norm": 3.0})


def test_the_updater_writes_what_the_test_reads(tmp_path, monkeypatch):
    module = sys.modules[__name__]
    monkeypatch.setattr(module, "TABLE", tmp_path / "new" / "table.json")
    monkeypatch.setattr(module, "computed", lambda case: {"loss": float(len(case))})
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2, "nothing is written without --update"
    assert not TABLE.exists()
    main(["--update"])
    assert json.loads(TABLE.read_text()) == {case: {"loss": len(case)} for case in names()}
    test_the_table_holds_no_other_case()
    test_one_step_is_golden(INIT)


def main(arguments: list[str]) -> None:
    if arguments != ["--update"]:
        print("usage: python -m tests.test_golden --update", file=sys.stderr)
        raise SystemExit(2)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_disable_most_optimizations", True)
    TABLE.parent.mkdir(exist_ok=True)
    table = {case: computed(case) for case in names()}
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
