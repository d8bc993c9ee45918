"""Golden sharding tables and collectives for three topologies: python -m tests.test_golden_topologies --update.

One small Llama-like decoder, bfloat16: four layers of width 256, eight heads of 32, hidden 512, its own output matrix
of 1,024 words. A layer's matrices hold 4 x 65,536 (q, k, v, o) + 3 x 131,072 (gate, up, down) = 655,360 scalars, the
output matrix 262,144.

A device trains on one packed row of 64 tokens: sixteen with which all chats begin, and four chats of twelve more, of
which eight are the answer, so 32 targets. Sixteen prompts of 32 tokens are sampled, whose first sixteen are alike.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from subjax.models import adapters
from subjax.models.architecture import DecoderConfig
from subjax.models.families import decoder_config
from subjax.models.network import network
from subjax.parallel.mesh import parse_mesh
from subjax.parallel.rules import SAMPLE, TRAIN, shardings
from subjax.parallel.topology import compiler_version, described_mesh, missing, parse_topology
from subjax.rehearsal.figures import figures
from subjax.rehearsal.made_up import Chats, Prompts
from subjax.rehearsal.programs import Sampling, Spec, Training
from subjax.sample import sampler
from subjax.schema import Numerics, Optimizer, Tuning
from subjax.schema_pretrained import Compute
from subjax.train import step

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
ROWS, LENGTH, TARGETS = 16, 64, 32
PREFIX, CHATS, ANSWER = 16, 4, 8
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
        return Sampling(config(), "bfloat16", settings, ROWS, Prompts(PREFIX, ((16, 1),) * ROWS))
    rows = 16 if "v5e" in case else 4
    chats = Chats("numbers", PREFIX, ((PREFIX + 4, ANSWER),), CHATS * rows, CHATS * rows, 1)
    return Training(config(), "float32", Tuning(kind="full"), Optimizer(name="adamw"), (chats,), None, Compute())


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
    two_chunks = 1024 * LENGTH // 4  # of sixteen targets each
    with mock.patch.object(step, "logits_at_a_time", return_value=two_chunks):
        found = figures(spec_of(case), topology, mesh)
    collectives = {one.name: {k: list(v) for k, v in one.kinds.items()} for one in found}
    return {"compiler": compiler_version(topology), "shardings": table, "collectives": collectives}


def fsdp_bytes() -> dict[str, int]:
    """v5e:4x4, fsdp:16: one packed row a device, every matrix cut sixteen ways along the width.

    all-gather: each matrix whole, in bfloat16, once forward and once backward, and the output matrix once, whatever the
    chunks; the embedding is not gathered, its rows are exchanged, for which every device gets all 16 x 64 tokens
    (int32). What attention gathers of a packed row, and the targets' states, stay on their device.
    all-reduce, in float32: gradients of the layers, and of the output matrix, as its chunks were added up, once. Of
    a layer's two gains: the gains themselves, made whole, forward and backward, and their gradients; the same of the
    last norm's, once each. The loss, and what the gradient's norm adds up.
    all-to-all: one row's embeddings forward in bfloat16, their gradients backward in float32.
    """
    gains = 2 * WIDTH * F32
    return {
        "all-gather": 2 * LAYERS * LAYER * BF16 + HEAD * BF16 + 16 * LENGTH * F32,
        "all-reduce": LAYERS * (LAYER * F32 + 3 * gains) + HEAD * F32 + 2 * WIDTH * F32 + 2 * F32,
        "all-to-all": LENGTH * WIDTH * (BF16 + F32),
    }


def mixed_bytes() -> dict[str, int]:
    """v5p:2x2x2, fsdp:4 and tensor:2: one row a device, matrices halved along heads and hidden, and cut four ways.

    all-gather: half of each matrix twice, half of the output matrix once; the tokens of four rows, and half of them
    along tensor (int32).
    reduce-scatter: gradients of gate, up and down, in float32.
    all-reduce: in float32, gradients of q, k, v and o; in bfloat16, along tensor, what attention
    and the feed-forward part write to the residual stream, and their gradients, the
    looked-up embeddings, and the gradients of the targets' states. In
    float32, the gradient of half the output matrix, and gains as with fsdp alone. Along tensor, of each target the
    greatest logit, its own and the exponentials' sum in float32; and 52 bytes of scalars: the loss, and the gradient's
    norm by how matrices are cut.
    all-to-all: embeddings of a row forward, and their gradients in float32.
    """
    row, gains = LENGTH * WIDTH, 2 * WIDTH * F32
    return {
        "all-reduce": LAYERS * (4 * 65_536 * F32 // 2 + 4 * row * BF16 + 3 * gains)
        + (row + TARGETS * WIDTH) * BF16
        + HEAD * F32 // 2
        + gains
        + TARGETS * 3 * F32
        + 52,
        "all-gather": 2 * LAYERS * LAYER * BF16 // 2 + HEAD * BF16 // 2 + 4 * LENGTH * F32 * 3 // 2,
        "reduce-scatter": LAYERS * 3 * 131_072 * F32 // 2,
        "all-to-all": row * (BF16 + F32),
    }


def sampled_bytes(name: str) -> dict[str, int]:
    """v6e:4x4, replica:4 and tensor:4: four slots a device, heads, hidden and vocabulary cut four ways. Four prompts
    are read at a time, one a device, of sixteen tokens behind the sixteen that all share.

    all-reduce, in bfloat16: what attention and the feed-forward part write to the residual stream, two a layer, and the
    embedding that one of four devices looks up, of 16 tokens of a prefix or of a prompt, or of one token of four slots.
    The draw is a maximum, the least id that reaches it, and the next maximum: three of four bytes a slot; and rows'
    keys are folded in two pieces of 128 words.
    all-gather: logits behind a device's one prompt; and, once where the loop is left, what all slots drew.
    """
    tokens = 4 if name == "decode" else 16
    found = {"all-reduce": (2 * LAYERS + 1) * tokens * WIDTH * BF16}
    if name == "decode":
        found["all-reduce"] += 3 * 4 * 4 + 2 * 128 * 4
    if name != "share":
        found["all-gather"] = 1024 * F32 if name == "prefill" else ROWS * 32 * 4
    return found


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
        assert set(kinds) - {"collective-permute"} == set(by_hand)
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
