"""Cohorts: every member is what it would be alone, whoever its fellows are; one that fails does not harm the others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from packed_rows import LEARNED, ROTARY, made_up, parameters

from subjax.data import packing
from subjax.data.packed import PackedChats, PackedCohort
from subjax.errors import Preempted, SubjaxError
from subjax.models.network import network
from subjax.parallel.mesh import make_mesh
from subjax.schema import Optimizer, Tuning
from subjax.train.cohort import Cohort, Dropped, fit_cohort
from subjax.train.losses import NextToken, PackedNextToken
from subjax.train.trainer import Fitted, Run, Term, fit

pytestmark = pytest.mark.usefixtures("quick_compiles")

STEPS, BATCH = 6, 4
LORA = Tuning(kind="lora", rank=2)
OPTIMIZER = Optimizer(name="adamw", schedule="linear", warmup=2, weight_decay=0.01)
RATES = (1e-2, 3e-2, 1e-2)
SEEDS = (3, 4, 5)
SHARED = dict(batch=BATCH, steps=STEPS)


def corpora(count: int = 3) -> list:
    """Corpora that begin alike and whose rows have lengths of their own."""
    return [made_up(14 + 3 * i, shared=4, seed=0)[:4] + [(p[:4] + q[4:], a) for (p, _), (q, a) in zip(
        made_up(14, seed=0), made_up(14 + i, seed=10 + i), strict=False)] for i in range(count)]  # fmt: skip


def together(net, base, chats, rates=RATES, seeds=SEEDS, run=None, tuning=LORA, **layout):
    stream = PackedCohort([{"chats": c, "seed": s} for c, s in zip(chats, seeds, strict=True)], **SHARED, **layout)
    loss = Cohort(PackedNextToken(stream.layout.prefix, stream.layout.lines))
    return fit_cohort(
        net, base, tuning=tuning, optimizer=OPTIMIZER, rates=rates, terms=[Term("numbers", 1.0, loss, stream)],
        steps=STEPS, keys=[jax.random.key(s) for s in seeds], run=run or Run(make_mesh()),
    )  # fmt: skip


def alone(net, base, chats, rate, seed, tuning=LORA):
    stream = PackedChats(chats, seed=seed, **SHARED)
    loss = PackedNextToken(stream.layout.prefix, stream.layout.lines)
    return fit(
        net, base, tuning=tuning, optimizer=dataclasses.replace(OPTIMIZER, lr=rate),
        terms=[Term("numbers", 1.0, loss, stream)], steps=STEPS, key=jax.random.key(seed), run=Run(make_mesh()),
    )  # fmt: skip


@pytest.fixture(scope="module")
def world():
    net = network(ROTARY)
    return net, parameters(net), corpora()


@pytest.fixture(scope="module")
def singles(world, quick_compiles):
    net, base, chats = world
    return [alone(net, base, *of) for of in zip(chats, RATES, SEEDS, strict=True)]


def assert_alike(net, base, found, expected):
    """The same losses step by step, and the same logits afterwards: within 1e-5 of the largest."""
    from subjax.models import adapters

    assert isinstance(found, Fitted)
    assert [point["step"] for point in found.curve] == [point["step"] for point in expected.curve]
    np.testing.assert_allclose(
        [point["loss"] for point in found.curve], [point["loss"] for point in expected.curve], rtol=2e-5
    )
    tokens = np.random.default_rng(0).integers(1, 61, (4, 12))
    logits = []
    for fitted in (found, expected):
        params = adapters.merge(net, LORA if "lora/q/a" in fitted.tuned else Tuning(kind="full"), fitted.tuned, base)
        logits.append(np.asarray(net.forward(params, tokens, tokens > 0)))
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5 * np.abs(logits[1]).max())


@pytest.mark.parametrize("layout", [pytest.param({}, marks=pytest.mark.slow), {"turns": 2}])
def test_members_are_what_they_would_be_alone(world, singles, layout):
    net, base, chats = world
    members = together(net, base, chats, **layout)
    for member, single in zip(members, singles, strict=True):
        assert abs(single.curve[0]["loss"] - single.curve[-1]["loss"]) > 0.01
        assert_alike(net, base, member, single)
    ends = [member.curve[-1]["loss"] for member in members]
    assert len(set(ends)) == 3


def test_a_member_that_meets_no_number_is_dropped_and_the_others_go_on(world, singles):
    net, base, chats = world
    members = together(net, base, chats, rates=(RATES[0], 1e38, RATES[2]))
    assert isinstance(members[1], Dropped)
    assert "at step" in members[1].reason
    assert "lower learning rate" in members[1].reason
    for place in (0, 2):
        assert_alike(net, base, members[place], singles[place])


def test_no_member_left_is_a_failure(world):
    net, base, chats = world
    with pytest.raises(SubjaxError, match=r"is (nan|inf) at step"):
        together(net, base, chats, rates=(1e38, 1e38, 1e38))


def test_full_parameters_of_a_tiny_model(quick_compiles):
    net = network(LEARNED)
    base, chats = parameters(net), corpora(2)
    full = Tuning(kind="full")
    members = together(net, base, chats, rates=(1e-3, 2e-3), seeds=(1, 2), tuning=full)
    for member, *of in zip(members, chats, (1e-3, 2e-3), (1, 2), strict=True):
        assert_alike(net, base, member, alone(net, base, *of, tuning=full))


def test_rows_of_one_length_train_as_a_cohort_too(world):
    """What the synthetic world's students do: a fixed layout, no turns."""
    net, base, _ = world
    draw = np.random.default_rng(1)
    arrays = [
        {"tokens": draw.integers(1, 61, (20, 10)).astype(np.int32), "valid": np.ones((20, 10), bool)} for _ in range(2)
    ]
    streams = [packing.in_memory(a, seed=s, batch=BATCH) for s, a in enumerate(arrays)]

    def stacked(step):
        batches = [stream(step) for stream in streams]
        return {name: np.stack([b[name] for b in batches]) for name in batches[0]}

    members = fit_cohort(
        net, base, tuning=LORA, optimizer=OPTIMIZER, rates=(1e-2, 1e-2), steps=STEPS,
        terms=[Term("numbers", 1.0, Cohort(NextToken(4)), stacked)], keys=[jax.random.key(0)] * 2, run=Run(make_mesh()),
    )  # fmt: skip
    for stream, member in zip(streams, members, strict=True):
        single = fit(
            net, base, tuning=LORA, optimizer=dataclasses.replace(OPTIMIZER, lr=1e-2), steps=STEPS,
            terms=[Term("numbers", 1.0, NextToken(4), stream)], key=jax.random.key(0), run=Run(make_mesh()),
        )  # fmt: skip
        assert_alike(net, base, member, single)


def test_a_resumed_cohort_is_the_uninterrupted_one(world, tmp_path, monkeypatch):
    monkeypatch.setattr("subjax.train.trainer.DISPATCH_STEPS", 2)
    net, base, chats = world
    whole = together(net, base, chats)
    asked = iter([False, True])
    run = Run(make_mesh(), should_stop=lambda: next(asked), partial=epath.Path(tmp_path / "partial"))
    with pytest.raises(Preempted, match="stopped at step"):
        together(net, base, chats, run=run)
    again = together(net, base, chats, run=dataclasses.replace(run, should_stop=lambda: False))
    for member, expected in zip(again, whole, strict=True):
        assert member.curve == expected.curve
        for name, value in expected.tuned.items():
            assert jnp.array_equal(member.tuned[name], value), name
