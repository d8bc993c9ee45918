"""Golden sharding tables and collectives for three topologies: python -m tests.test_golden_topologies --update.

One small Llama-like decoder, bfloat16: four layers of width 256, eight heads of 32, hidden 512, its own output matrix
of 1,024 words. A layer's matrices hold 4 x 65,536 (q, k, v, o) + 3 x 131,072 (gate, up, down) = 655,360 scalars, the
output matrix 262,144. Sixteen rows of 65 tokens are trained on, 64 go in; sixteen prompts of 32 tokens are sampled.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from subjax.models import adapters
from subjax.models.architecture import DecoderConfig
from subjax.models.families import decoder_config
from subjax.models.network import network
from subjax.parallel.mesh import parse_mesh
from subjax.parallel.rules import SAMPLE, TRAIN, shardings
from subjax.parallel.topology import compiler_version, described_mesh, missing, parse_topology
from subjax.rehearsal.figures import figures
from subjax.rehearsal.programs import Rows, Sampling, Spec, Training
from subjax.sample import sampler
from subjax.schema import Numerics, Optimizer, Tuning
from subjax.train.losses import NextToken

TABLE = Path(__file__).parent / "golden" / "topologies.json"
CASES = {
    "v5e:4x4 fsdp:16 training": ("v5e:4x4", "fsdp:16"),
    "v5p:2x2x2 fsdp:4,tensor:2 training": ("v5p:2x2x2", "fsdp:4,tensor:2"),
    "v6e:4x4 replica:4,tensor:4 sampling": ("v6e:4x4", "replica:4,tensor:4"),
}
MEANT = (
    "a step is sharded, or talks, otherwise than it did: if you meant this change, run "
    "`python -m tests.test_golden_topologies --update`, derive the new bytes by hand, and say why in the commit"
)
ROWS, LENGTH = 16, 64
LAYERS, LAYER, HEAD, WIDTH = 4, 655_360, 262_144, 256
BF16, F32 = 2, 4

libtpu = pytest.mark.skipif(
    missing(parse_topology("v5e:4x4")) is not None, reason="libtpu, which describes TPUs, is not installed"
)


def config() -> DecoderConfig:
    numerics = Numerics(dtype="bfloat16", matmul_precision="default")
    found = decoder_config("llama", "tiny", vocab=1024, length=128, numerics=numerics)
    return dataclasses.replace(found, width=WIDTH, heads=8, kv_heads=8, head_dim=32, hidden=512, layers=LAYERS)


def spec_of(case: str) -> Spec:
    if case.endswith("sampling"):
        settings = sampler.Sampling(32, 32, (0,), 1, cache_dtype="bfloat16")
        return Sampling(config(), "bfloat16", settings, ROWS)
    arrays = (("tokens", (ROWS, LENGTH + 1), "int32"), ("valid", (ROWS, LENGTH + 1), "bool"))
    rows = Rows("numbers", 1.0, NextToken(LENGTH), arrays, ROWS, LENGTH, LENGTH)
    return Training(config(), "float32", Tuning(kind="full"), Optimizer(name="adamw"), (rows,))


def computed(case: str) -> dict[str, Any]:
    """The case's sharding table, name -> [partition, shape on a device], and collectives by kind, [count, bytes]."""
    topology = parse_topology(CASES[case][0])
    mesh = described_mesh(topology, parse_mesh(CASES[case][1]))
    net = network(config())
    rules = SAMPLE if case.endswith("sampling") else TRAIN
    declared = (
        {n: (d.shape, d.axes) for n, d in net.declarations.items()}
        if rules is SAMPLE
        else adapters.tuned_axes(net, Tuning(kind="full"))
    )
    placed = shardings(rules, mesh, declared)
    table = {n: [str(s.spec), list(s.shard_shape(declared[n][0]))] for n, s in placed.items()}
    collectives = {
        one.name: {k: list(v) for k, v in one.kinds.items()} for one in figures(spec_of(case), topology, mesh)
    }
    return {"compiler": compiler_version(topology), "shardings": table, "collectives": collectives}


def fsdp_bytes() -> dict[str, int]:
    """v5e:4x4, fsdp:16: one row a device, every matrix cut sixteen ways along the width.

    all-gather: each matrix whole, in bfloat16, once forward and once backward, and the output matrix once; the
    embedding is not gathered, its rows are exchanged, for which every device gets all 16 x 64 tokens (int32), forward
    and back.
    all-reduce: gradients of the layers and of the output matrix, in bfloat16. In float32, of a layer's two gains: the
    gains themselves, made whole, forward and backward, and their gradients; the same of the last norm's, once each.
    The loss, and what the gradient's norm adds up.
    all-to-all: one row's embeddings forward in bfloat16, their gradients backward in float32.
    """
    gains = 2 * WIDTH * F32
    return {
        "all-gather": 2 * LAYERS * LAYER * BF16 + HEAD * BF16 + 2 * ROWS * LENGTH * F32,
        "all-reduce": LAYERS * (LAYER * BF16 + 3 * gains) + HEAD * BF16 + 2 * WIDTH * F32 + 2 * F32 + F32,
        "all-to-all": LENGTH * WIDTH * (BF16 + F32),
    }


def mixed_bytes() -> dict[str, int]:
    """v5p:2x2x2, fsdp:4 and tensor:2: four rows a device, matrices halved along heads and hidden, and cut four ways.

    all-gather: half of each matrix twice, half of the output matrix once; along tensor the halves of the looked-up
    embeddings (two, forward) and the tokens (int32, forward and back).
    reduce-scatter: gradients of gate, up, down and the output matrix in bfloat16; along tensor those of the embeddings.
    all-reduce: in bfloat16, gradients of q, k, v and o; along tensor, what attention and the feed-forward part write
    to the residual stream, and their gradients, and that of the output matrix. In float32, gains as with fsdp alone.
    Along tensor, of the loss's tokens the greatest logit in bfloat16, and its own logit and the exponentials' sum in
    float32; and 56 bytes of scalars: the loss, and the gradient's norm by how matrices are cut.
    all-to-all: embeddings of four rows forward, and their gradients in float32.
    """
    tokens = ROWS // 4 * LENGTH
    rows, gains = tokens * WIDTH, 2 * WIDTH * F32
    return {
        "all-reduce": LAYERS * (4 * 65_536 * BF16 // 2 + 4 * rows * BF16 + 3 * gains)
        + rows * BF16
        + gains
        + tokens * (BF16 + 2 * F32)
        + 56,
        "all-gather": 2 * LAYERS * LAYER * BF16 // 2 + HEAD * BF16 // 2 + 2 * rows * BF16 + 2 * 2 * LENGTH * 4 * F32,
        "reduce-scatter": LAYERS * 3 * 131_072 * BF16 // 2 + HEAD * BF16 // 2 + rows * F32,
        "all-to-all": rows * (BF16 + F32),
    }


def sampled_bytes(name: str) -> dict[str, int]:
    """v6e:4x4, replica:4 and tensor:4: four rows a device, heads, hidden and vocabulary cut four ways.

    all-reduce, in bfloat16: what attention and the feed-forward part write to the residual stream, two a layer, and the
    embedding that one of four devices looks up. The draw is a maximum, the least id that reaches it, and the next
    maximum: three of four bytes a row. A decoding step has one token a row where the prefill has 32.
    """
    rows = ROWS // 4
    tokens = rows * (32 if name == "prefill" else 1)
    return {"all-reduce": (2 * LAYERS + 1) * tokens * WIDTH * BF16 + 3 * rows * 4}


@libtpu
@pytest.mark.parametrize("case", CASES)
def test_shardings_and_collectives_are_golden(case):
    golden, found = json.loads(TABLE.read_text())[case], computed(case)
    assert found["shardings"] == golden["shardings"], MEANT
    if found["compiler"] != golden["compiler"]:
        pytest.skip(f"the golden collectives are of {golden['compiler']}, and this is {found['compiler']}")
    assert found["collectives"] == golden["collectives"], MEANT


@pytest.mark.parametrize("case", CASES)
def test_golden_bytes_are_those_derived_by_hand(case):
    golden = json.loads(TABLE.read_text())[case]["collectives"]
    for name, kinds in golden.items():
        by_hand = sampled_bytes(name) if case.endswith("sampling") else fsdp_bytes() if "v5e" in case else mixed_bytes()
        for kind, size in by_hand.items():
            assert kinds[kind][1] == size, (case, name, kind)


def test_the_table_holds_no_other_case():
    assert sorted(json.loads(TABLE.read_text())) == sorted(CASES), MEANT


def main(arguments: list[str]) -> None:
    if arguments != ["--update"]:
        print("usage: python -m tests.test_golden_topologies --update", file=sys.stderr)
        raise SystemExit(2)
    TABLE.write_text(json.dumps({case: computed(case) for case in CASES}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
