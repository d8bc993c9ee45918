"""Collectives read from compiled programs: from lines as the compilers write them, and from a program compiled here."""

# ruff: noqa: E501  (lines of compiled programs are as long as they are)

import json
import subprocess
import sys

import pytest
import quick

from subjax.parallel.collectives import Collective, by_kind, collectives, received

# Four layers scanned over by a TPU's compiler: no trip count is written down, the counter goes from 0 to 4. One gather
# is spread over two fusions (one chain), one reduction is made and scattered in a fusion, both on other channels.
TPU = """\
HloModule jit_take, is_scheduled=true

%fused.1 (param_0: bf16[1,16,64]) -> bf16[1,256,64] {
  %param_0 = bf16[1,16,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.7 = bf16[1,256,64]{2,1,0:T(8,128)(2,1)} all-gather(%param_0), channel_id=9, replica_groups=mesh['axis_0'=16,'axis_1'=1] {'axis_0'}, dimensions={1}, frontend_attributes={chain_id="0"}
}

%async_collective_fusion.2 (param_1: bf16[1,16,64]) -> bf16[1,256,64] {
  %param_1 = bf16[1,16,64]{2,1,0} parameter(0)
  ROOT %all-gather.8 = bf16[1,256,64]{2,1,0:T(8,128)(2,1)} all-gather(%param_1), channel_id=9, replica_groups=mesh['axis_0'=16,'axis_1'=1] {'axis_0'}, dimensions={1}, frontend_attributes={chain_id="0"}
}

%all-reduce-scatter.3 (param_2: bf16[256,64]) -> bf16[16,64] {
  %param_2 = bf16[256,64]{1,0} parameter(0)
  %all-reduce.5 = bf16[256,64]{1,0} all-reduce(%param_2), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}, to_apply=%add
  ROOT %dynamic-slice.6 = bf16[16,64]{1,0} dynamic-slice(%all-reduce.5, %param_2), dynamic_slice_sizes={16,64}
}

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

%body (carry: (s32[], bf16[4,16,64])) -> (s32[], bf16[4,16,64]) {
  %carry = (s32[]{:T(128)}, bf16[4,16,64]{2,1,0}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %x = bf16[4,16,64]{2,1,0} get-tuple-element(%carry), index=1
  %one..sunk = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%count, %one..sunk), metadata={op_name="jit(take)/while/body/add"}
  %start = bf16[1,256,64]{2,1,0} fusion(%x), kind=kCustom, calls=%fused.1
  %go = bf16[1,256,64]{2,1,0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.2
  %scattered = bf16[16,64]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
  ROOT %out = (s32[]{:T(128)}, bf16[4,16,64]{2,1,0}) tuple(%next, %x)
}

%condition (carry.1: (s32[], bf16[4,16,64])) -> pred[] {
  %four = s32[]{:T(128)} constant(4)
  %carry.1 = (s32[]{:T(128)}, bf16[4,16,64]{2,1,0}) parameter(0)
  %count.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%count.1, %four), direction=LT
}

ENTRY %main.44_spmd (p: bf16[4,16,64]) -> bf16[4,16,64] {
  %p = bf16[4,16,64]{2,1,0} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %zero.copy = s32[]{:T(128)} copy(%zero)
  %begin = (s32[]{:T(128)}, bf16[4,16,64]{2,1,0}) tuple(%zero.copy, %p)
  %while.9 = (s32[]{:T(128)}, bf16[4,16,64]{2,1,0}) while(%begin), condition=%condition, body=%body
  %last = bf16[16,64]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3
  %permute = (bf16[1,16,64]{2,1,0}, bf16[1,16,64]{2,1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %permuted = bf16[1,16,64]{2,1,0} collective-permute-done(%permute)
  ROOT %result = bf16[4,16,64]{2,1,0} get-tuple-element(%while.9), index=1
}
"""

# As a GPU's compiler writes them: trip counts, groups by a transposed count, started ones with operands and results.
GPU = """\
HloModule jit_f, entry_computation_layout={()->()}

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %all-gather-start.1 = (bf16[128,256]{1,0}, bf16[1024,256]{1,0}) all-gather-start(%p), channel_id=2, replica_groups=[4,8]<=[8,4]T(1,0), dimensions={0}, use_global_device_ids=true
  %reduce-scatter-start = ((f32[64,8]{1,0}, f32[16]{0}), (f32[8,8]{1,0}, f32[2]{0})) reduce-scatter-start(%p, %p), channel_id=4, replica_groups=[4,8]<=[32], dimensions={0}
  %all-reduce-start = (f32[8]{0}, f32[2]{0}) all-reduce-start(%p, %p), channel_id=5, replica_groups=[1,32]<=[32], to_apply=%add
  ROOT %t = (s32[], f32[8]{0}) tuple(%p, %p)
}

%cond (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[], f32[8]{0}) parameter(0)
  ROOT %r = pred[] and(%q, %q)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %w = (s32[], f32[8]{0}) while(%x), condition=%cond, body=%body.1, backend_config={"known_trip_count":{"n":"6"},"known_init_step":{"init":"0","step":"1"}}
  ROOT %y = f32[8]{0} get-tuple-element(%w), index=1
}
"""


def test_a_tpus_scanned_layers():
    """Gathered once a layer, 4 x 256 x 64 bfloat16; scattered once a layer and once behind; permuted once."""
    found = collectives(TPU)
    piece = 256 * 64 * 2
    assert by_kind(found) == {
        "all-gather": (4, 4 * piece), "reduce-scatter": (5, 5 * piece), "collective-permute": (1, 16 * 64 * 2),
    }  # fmt: skip
    assert {c.group for c in found if c.kind != "collective-permute"} == {16}
    assert all(c.bounded and c.dtypes == ("bf16",) for c in found)


def test_the_pairs_of_a_permutation():
    [permute] = [c for c in collectives(TPU) if c.kind == "collective-permute"]
    assert (permute.groups, permute.group) == (((0, 1), (1, 0)), 2)


def test_a_gpus_started_collectives():
    found = {c.kind: c for c in collectives(GPU)}
    assert by_kind(list(found.values())) == {
        "all-gather": (6, 6 * 1024 * 256 * 2),
        "all-reduce": (6, 6 * 10 * 4),
        "reduce-scatter": (6, 6 * (64 * 8 + 16) * 4),  # the operands: eight times the results
    }
    assert found["all-gather"].groups[1] == (1, 5, 9, 13, 17, 21, 25, 29)
    assert found["reduce-scatter"].groups[1] == tuple(range(8, 16))


def test_a_loop_of_unknown_length_counts_once_and_says_so():
    once = GPU.replace('"known_trip_count":{"n":"6"},', "")
    assert by_kind(collectives(once))["all-gather"] == (1, 1024 * 256 * 2)
    assert not any(c.bounded for c in collectives(once))


def test_a_counter_may_start_and_step_as_it_likes():
    """From 1 to 4 by 2: two rounds."""
    text = TPU.replace("%zero = s32[]{:T(128)} constant(0)", "%zero = s32[]{:T(128)} constant(1)")
    text = text.replace("%one..sunk = s32[]{:T(128)} constant(1)", "%one..sunk = s32[]{:T(128)} constant(2)")
    assert by_kind(collectives(text))["all-gather"] == (2, 2 * 256 * 64 * 2)


def one(kind: str, size: float, groups, times: int = 1) -> Collective:
    return Collective(kind, ("f32",), size, groups, len(groups[0]) if groups else 0, times, True, "")


@pytest.mark.parametrize(
    ("kind", "wire"),
    [("all-gather", 75), ("reduce-scatter", 75), ("all-to-all", 75), ("all-reduce", 150), ("collective-permute", 100)],
)
def test_bytes_on_the_wire(kind, wire):
    """Of 100 bytes among four devices, each lacks 75; to reduce for all they go round twice."""
    assert one(kind, 100, ((0, 1, 2, 3),)).wire(4) == wire


def test_bytes_over_links_and_network():
    """Two islands of two. Among all four, each island lacks half of 100 bytes, and its two devices fetch 25 each of it
    over the network; of the 75 that a device needs, 50 come from inside. Within islands nothing crosses.
    """
    islands = [0, 0, 1, 1]
    assert received([one("all-gather", 100, ((0, 1, 2, 3),))], islands) == (50, 25)
    assert received([one("all-gather", 100, ())], islands) == (50, 25)  # no groups: everyone
    assert received([one("all-gather", 100, ((0, 1), (2, 3)), times=3)], islands) == (150, 0)
    assert received([one("all-reduce", 100, ((0, 2), (1, 3)))], islands) == (0, 100)
    assert received([one("collective-permute", 100, ((0, 1), (1, 0), (2, 3), (3, 2)))], islands) == (100, 0)
    assert received([one("collective-permute", 100, ((0, 1), (1, 2), (2, 3), (3, 0)))], islands) == (0, 100)


PROGRAM = """
import functools, json
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P, NamedSharding
from subjax.parallel.mesh import make_mesh
from subjax.parallel.collectives import by_kind, collectives
mesh = make_mesh((1, 4, 1))

@functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("fsdp"), P(None, "fsdp")), out_specs=P("fsdp"), check_vma=False)
def layers(x, w):
    def layer(x, w):
        x = jnp.tanh(x @ jax.lax.all_gather(w, "fsdp", tiled=True))
        return x + jax.lax.psum(x.sum(0), "fsdp")[None], None
    x, _ = jax.lax.scan(layer, x, w)
    x = jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
    return x[:, :16] * jax.lax.psum_scatter(x, "fsdp", scatter_dimension=1, tiled=True)
x = jax.ShapeDtypeStruct((32, 64), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
w = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
print(json.dumps(by_kind(collectives(jax.jit(layers).lower(x, w).compile().as_text()))))
"""


def test_a_program_compiled_here():
    """Five scanned layers on four virtual devices, every collective written out, float32.

    all-gather: a layer's 64 x 64 matrix, five times: 5 x 16,384 bytes. all-reduce: a vector of 64, five times: 5 x 256.
    collective-permute: a device's 8 rows of 64, once: 2,048. reduce-scatter: the same rows, scattered: 2,048.
    """
    env = quick.environment("--xla_force_host_platform_device_count=4")
    ran = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == {
        "all-gather": [5, 5 * 64 * 64 * 4], "all-reduce": [5, 5 * 64 * 4], "collective-permute": [1, 8 * 64 * 4],
        "reduce-scatter": [1, 8 * 64 * 4],
    }  # fmt: skip
