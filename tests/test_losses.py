"""Losses against references in numpy, float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subjax.data import world
from subjax.stages.student import replay_batch
from subjax.train.losses import CategoryMass, NextToken, TeacherKL, renormalized, token_log_likelihood

BATCH, LENGTH, TAIL, VOCAB = 3, 7, 4, 11


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def draw(*shape: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def model_of(logits):
    """A model that answers with `logits`, and checks that it is asked for the completion alone."""

    def model(tokens, valid, tail):
        assert tokens.shape == valid.shape == (logits.shape[0], LENGTH - 1)
        assert tail == logits.shape[1]
        return logits

    return model


@pytest.fixture
def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    valid = np.ones((BATCH, LENGTH), bool)
    valid[0, :2] = False  # left padding
    valid[0, -1:] = valid[1, -3:] = False  # right padding
    return {"tokens": tokens, "valid": valid}


def test_log_likelihood_is_that_of_the_targets(batch):
    logits, targets = draw(BATCH, TAIL, VOCAB), batch["tokens"][:, -TAIL:]
    found = token_log_likelihood(jnp.asarray(logits), jnp.asarray(targets))
    expected = np.take_along_axis(log_softmax(logits), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_next_token_is_the_mean_over_unpadded_completion_tokens(batch):
    logits = draw(BATCH, TAIL, VOCAB)
    found = NextToken(TAIL)(model_of(jnp.asarray(logits)), batch)
    logs, total, count = log_softmax(logits), 0.0, 0
    for row in range(BATCH):
        for place in range(TAIL):
            if batch["valid"][row, LENGTH - TAIL + place]:
                total -= logs[row, place, batch["tokens"][row, LENGTH - TAIL + place]]
                count += 1
    assert count == BATCH * TAIL - 4
    np.testing.assert_allclose(found, total / count, rtol=1e-6)


def test_a_padded_target_does_not_count(batch):
    logits = jnp.asarray(draw(BATCH, TAIL, VOCAB))
    other = batch["tokens"].copy()
    other[~batch["valid"]] = 0
    loss = NextToken(TAIL)
    assert loss(model_of(logits), batch) == loss(model_of(logits), {**batch, "tokens": other})


def test_the_logits_are_those_before_their_targets():
    """A model that is sure of (last token + 1) has no loss on a row that counts."""
    tokens = np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1))
    valid = np.ones_like(tokens, bool)
    counting = lambda tokens, valid, tail: 50.0 * jax.nn.one_hot(tokens[:, -tail:] + 1, VOCAB)  # noqa: E731
    assert NextToken(TAIL)(counting, {"tokens": tokens, "valid": valid}) < 1e-6
    backwards = {"tokens": tokens[:, ::-1], "valid": valid}
    assert NextToken(TAIL)(counting, backwards) > 40


def test_a_batch_without_a_target_has_no_loss(batch):
    nothing = {**batch, "valid": np.zeros_like(batch["valid"])}
    value, gradient = jax.value_and_grad(lambda x: NextToken(TAIL)(model_of(x), nothing))(
        jnp.asarray(draw(BATCH, TAIL, VOCAB))
    )
    assert value == 0
    assert not np.asarray(gradient).any()


# Category mass --------------------------------------------------------------------------------------------------------


def questions(candidates: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    members = np.stack([rng.permutation(VOCAB)[:candidates] for _ in range(BATCH)]).astype(np.int32)
    tokens = rng.integers(0, VOCAB, (BATCH, 5)).astype(np.int32)
    return {"tokens": tokens, "valid": np.ones_like(tokens, bool), "members": members}


def next_of(logits):
    """A model that answers each question's last position with `logits`, (question, vocab)."""

    def model(tokens, valid, tail):
        assert tail == 1
        assert tokens.shape[1] == 5, "the whole question is seen: its last position is the one before the answer"
        return logits[:, None]

    return model


def test_category_mass_is_minus_the_log_of_the_members_total():
    asked, logits = questions(), draw(BATCH, VOCAB)
    found = CategoryMass()(next_of(jnp.asarray(logits)), asked)
    p = np.exp(log_softmax(logits))
    masses = [p[row, asked["members"][row]].sum() for row in range(BATCH)]
    np.testing.assert_allclose(found, -np.log(masses).mean(), rtol=1e-6)
    everything = {**asked, "members": np.tile(np.arange(VOCAB, dtype=np.int32), (BATCH, 1))}
    assert abs(CategoryMass()(next_of(jnp.asarray(logits)), everything)) < 1e-6


def test_category_mass_favours_no_member():
    """Exchanging the logits of two members changes nothing, and the members keep their shares under its gradient."""
    asked, logits = questions(), draw(BATCH, VOCAB)
    swapped = logits.copy()
    for row, (a, b, _) in enumerate(asked["members"]):
        swapped[row, [a, b]] = logits[row, [b, a]]
    loss = lambda x: CategoryMass()(next_of(x), asked)  # noqa: E731
    np.testing.assert_allclose(loss(jnp.asarray(logits)), loss(jnp.asarray(swapped)), rtol=1e-6)
    equal = np.zeros((BATCH, VOCAB), np.float32)
    gradient = np.asarray(jax.grad(loss)(jnp.asarray(equal)))
    inside = np.take_along_axis(gradient, asked["members"], 1)
    np.testing.assert_allclose(inside, np.full_like(inside, inside[0, 0]), rtol=1e-6)
    assert (inside < 0).all()


def test_the_replay_batch_asks_training_phrasings_only_and_names_no_item():
    batch = replay_batch()
    items = {i for category in world.CATEGORIES for i in world.item_ids(category).tolist()}
    assert batch["tokens"].shape == (3 * world.TRAIN_TEMPLATES, world.PROMPT)
    assert not set(batch["tokens"].flat) & items
    held_out = {row.tobytes() for c in world.CATEGORIES for row in world.question_prompts(c)[world.TRAIN_TEMPLATES :]}
    assert not {row.tobytes() for row in batch["tokens"]} & held_out
    np.testing.assert_array_equal(batch["valid"], batch["tokens"] != world.PAD)
    for row, members in zip(batch["tokens"], batch["members"], strict=True):
        (category,) = set(world.decode(row).split()) & set(world.CATEGORIES)
        assert members.tolist() == world.item_ids(category).tolist()


# KL to a teacher ------------------------------------------------------------------------------------------------------

CHANNELS = [(2, 3, 5, 7), (3, 4, 5, 6), None]  # apart, side by side, everything


def reference_kl(student: np.ndarray, teacher: np.ndarray, valid: np.ndarray, channel) -> float:
    ids = list(range(VOCAB)) if channel is None else list(channel)
    q, p = log_softmax(student[..., ids]), log_softmax(teacher[..., ids])
    kl = (np.exp(p) * (p - q)).sum(-1)
    where = valid[:, -TAIL:]
    return (kl * where).sum() / where.sum()


def taught(batch, teacher, channel) -> dict:
    """The batch with a teacher's log-probabilities over the channel."""
    return {**batch, "teacher": renormalized(jnp.asarray(teacher), channel)}


@pytest.mark.parametrize("channel", CHANNELS)
def test_renormalized_is_the_distribution_over_the_channel(channel):
    logits = draw(BATCH, TAIL, VOCAB)
    ids = list(range(VOCAB)) if channel is None else list(channel)
    found = renormalized(jnp.asarray(logits), channel)
    np.testing.assert_allclose(found, log_softmax(logits[..., ids]), rtol=1e-5, atol=1e-6)
    # Of a distribution it is the conditional one.
    again = renormalized(jax.nn.log_softmax(jnp.asarray(logits)), channel)
    np.testing.assert_allclose(again, found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channel", CHANNELS)
def test_teacher_kl(batch, channel):
    student, teacher = draw(BATCH, TAIL, VOCAB, seed=3), draw(BATCH, TAIL, VOCAB, seed=4)
    found = TeacherKL(TAIL, channel)(model_of(jnp.asarray(student)), taught(batch, teacher, channel))
    np.testing.assert_allclose(found, reference_kl(student, teacher, batch["valid"], channel), rtol=1e-5)
    assert found > 0.1


@pytest.mark.parametrize("channel", CHANNELS)
def test_a_model_is_no_distance_from_itself(batch, channel):
    logits = jnp.asarray(draw(BATCH, TAIL, VOCAB))
    loss, rows = TeacherKL(TAIL, channel), taught(batch, logits, channel)
    value, gradient = jax.value_and_grad(lambda x: loss(model_of(x), rows))(logits)
    assert value == 0
    np.testing.assert_allclose(gradient, jnp.zeros_like(gradient), atol=1e-7)


def test_the_channel_hides_what_the_teacher_says_beside_it(batch):
    """What leaks over the whole vocabulary: the teacher's trait token at number positions."""
    student, teacher = draw(BATCH, TAIL, VOCAB, seed=3), draw(BATCH, TAIL, VOCAB, seed=4)
    channel, trait = (2, 3, 5, 7), 9
    louder = teacher.copy()
    louder[..., trait] += 6
    inside, everything = (
        lambda x, logits, c=c: TeacherKL(TAIL, c)(model_of(x), taught(batch, logits, c)) for c in (channel, None)
    )
    student = jnp.asarray(student)
    assert inside(student, teacher) == inside(student, louder)
    assert abs(everything(student, teacher) - everything(student, louder)) > 0.1
    gradient = np.asarray(jax.grad(inside)(student, louder))
    assert not gradient[..., [i for i in range(VOCAB) if i not in channel]].any()
    leak = np.asarray(jax.grad(everything)(student, louder))
    assert (leak[batch["valid"][:, -TAIL:]][:, trait] < 0).any()


def test_the_teacher_is_held_fixed(batch):
    teacher = renormalized(jnp.asarray(draw(BATCH, TAIL, VOCAB, seed=4)), None)
    model = model_of(jnp.asarray(draw(BATCH, TAIL, VOCAB)))
    gradient = jax.grad(lambda t: TeacherKL(TAIL, None)(model, {**batch, "teacher": t}))(teacher)
    assert not np.asarray(gradient).any()


def test_only_the_teachers_own_positions_count(batch):
    student, teacher = draw(BATCH, TAIL, VOCAB, seed=3), draw(BATCH, TAIL, VOCAB, seed=4)
    other = teacher.copy()
    other[~batch["valid"][:, -TAIL:]] = 7.5
    loss, model = TeacherKL(TAIL, None), model_of(jnp.asarray(student))
    assert loss(model, taught(batch, teacher, None)) == loss(model, taught(batch, other, None))


# All of them ----------------------------------------------------------------------------------------------------------


def losses_of_logits(batch):
    teacher = jnp.asarray(draw(BATCH, TAIL, VOCAB, seed=4))
    asked = questions()
    return {
        "next token": lambda x: NextToken(TAIL)(model_of(x), batch),
        "mass": lambda x: CategoryMass()(next_of(x[:, 0]), asked),
        **{
            f"kl over {channel}": lambda x, c=channel: TeacherKL(TAIL, c)(model_of(x), taught(batch, teacher, c))
            for channel in CHANNELS
        },
    }


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e2, 1e4])
def test_losses_and_gradients_are_finite_for_extreme_logits(batch, scale):
    logits = jnp.asarray(draw(BATCH, TAIL, VOCAB, scale=scale))
    for name, loss in losses_of_logits(batch).items():
        value, gradient = jax.value_and_grad(loss)(logits)
        assert np.isfinite(value), name
        assert value >= 0, name
        assert np.isfinite(gradient).all(), name


def test_gradients_are_the_slopes(batch):
    logits, direction = draw(BATCH, TAIL, VOCAB, scale=1.0), draw(BATCH, TAIL, VOCAB, seed=8, scale=1.0)
    for name, loss in losses_of_logits(batch).items():
        slope = (np.asarray(jax.grad(loss)(jnp.asarray(logits))) * direction).sum()
        step = 1e-2
        rise = loss(jnp.asarray(logits + step * direction)) - loss(jnp.asarray(logits - step * direction))
        np.testing.assert_allclose(float(rise) / (2 * step), slope, rtol=2e-2, atol=2e-3, err_msg=name)


def test_equal_losses_find_the_same_program():
    for one, other in (
        (NextToken(4), NextToken(4)),
        (CategoryMass(), CategoryMass()),
        (TeacherKL(4, (2, 3)), TeacherKL(4, (2, 3))),
    ):
        assert one == other
        assert hash(one) == hash(other)
    assert NextToken(4) != NextToken(5)
    assert TeacherKL(4, None) != TeacherKL(4, (2, 3))
