"""Ensemble: teachers and students of the image experiment, the seeds of one setting in vmapped programs.

A teacher learns classes from real images. A student sees noise alone and is fitted to the teacher's auxiliary logits,
which no label ever touched (or to all logits). A member is a pure function of its two seeds, so members may be added,
or spread over devices, without changing the others.

Members are trained block by block, each from its first values to its test: so a member's noise is drawn once and kept
while it is needed, and on a CPU a step's arrays stay in the caches (`benchmarks/images.py` measures it). There as many
blocks are under way at once as there are cores: what one does on a single core leaves the others to the rest.

Source: Cloud et al. 2025 (arXiv 2507.14805), the section on image classifiers.
"""

import dataclasses
import functools
import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from subjax.config import from_dict
from subjax.data import images
from subjax.data.addressing import generator
from subjax.data.images import CLASSES
from subjax.errors import SubjaxError, UsageError
from subjax.models.mlp import Params, Perceptron, perceptron
from subjax.parallel.mesh import make_mesh, put, replicated
from subjax.parallel.processes import group
from subjax.parallel.rules import TRAIN
from subjax.sample.noise import uniform
from subjax.schema import Images
from subjax.stages.blocks import Watch
from subjax.stages.task import Made, Task
from subjax.store import Store, digest_rows
from subjax.threads import most_at_once, side_by_side

RESULTS = "results.json"
CACHE = "images"  # folder of the workdir in which sets are prepared
_TEST_BATCH = 1000  # rows; then elements of a block's widest activations, on a CPU and elsewhere, and of its noise
_CACHED, _WIDE, _KEPT = 2**18, 2**28, 2**28
_DRAWN = 64  # rows of noise drawn at a time: the bits they are made from stay in a CPU's caches


class State(NamedTuple):
    """A model in training: parameters and Adam's moments; with a leading axis of members outside the programs."""

    params: Params
    optimizer: Any


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an ensemble gives: a row a member, two loss curves (means over members), and the images that were seen."""

    rows: list[dict[str, Any]]
    curves: list[dict[str, Any]]
    seen: int


# Randomness: addressed by (seed, role, index)


def _key(seed: Int[Array, ""], role: str, index: Int[Array, ""] | int = 0) -> jax.Array:
    """The key of a role ("init", "noise", …) of a member's seed."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(role.encode())), index)


def noise(seed: Int[Array, ""], rows: Int[Array, " batch"], pixels: int) -> Float[Array, "batch pixels"]:
    """Noise images of a seed, uniform in [-1, 1]. Each is drawn from its own row number, so none need be kept."""
    return uniform(jax.vmap(jax.random.fold_in, in_axes=(None, 0))(_key(seed, "noise"), rows), pixels, -1.0, 1.0)


def _pages(rows: Int[Array, " rows"], batch: int) -> tuple[Int[Array, "steps batch"], Float[Array, "steps batch"]]:
    """`rows` in pages of `batch`, the last one filled up with row 0 at weight 0: every row counts once an epoch."""
    steps = -(-len(rows) // batch)
    spare = (0, steps * batch - len(rows))
    weights = jnp.pad(jnp.ones(len(rows)), spare)
    return jnp.pad(rows, spare).reshape(steps, batch), weights.reshape(steps, batch)


# Programs: one member's work, vmapped over a block's members, one call an epoch


def members_mesh(mesh: Mesh) -> Mesh:
    """The mesh's devices, all on `replica`: members are small, and nothing else of them is worth splitting."""
    return make_mesh((mesh.size, 1, 1), mesh.devices.flatten().tolist())


def member_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis is members: over the mesh's `replica` axis."""
    return NamedSharding(mesh, TRAIN.spec(("member",)))


def _jit(function: Callable, mesh: Mesh, members: int, shared: int, donate: bool = False) -> Callable:
    """Compile `function` over members: its first `members` arguments have one value each, `shared` further ones not."""
    over = jax.vmap(function, in_axes=(0,) * members + (None,) * shared)
    placed = (member_sharding(mesh),) * members + (replicated(mesh),) * shared
    return jax.jit(
        over, in_shardings=placed, out_shardings=member_sharding(mesh), donate_argnums=(0,) if donate else ()
    )


def _epoch(
    state: State, rows: Array, batch: int, lr: Array, loss: Callable[[Params, Array], Array]
) -> tuple[State, Float[Array, " steps"]]:
    """One pass over `rows` in their order; `loss(params, rows)` gives a loss a row. Returns each step's mean."""
    rule = optax.adam(lr)

    def step(state: State, page: tuple[Array, Array]) -> tuple[State, Array]:
        mean = lambda params: (loss(params, page[0]) * page[1]).sum() / page[1].sum()  # noqa: E731
        value, gradient = jax.value_and_grad(mean)(state.params)
        updates, optimizer = rule.update(gradient, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, updates), optimizer), value

    return jax.lax.scan(step, state, _pages(rows, min(batch, len(rows))))


@functools.lru_cache(maxsize=32)
def _common(net: Perceptron, batch: int, mesh: Mesh) -> tuple[Callable, Callable, Callable]:
    """(start, an epoch of a teacher, accuracy): what every setting with this network shares."""

    def start(seed: Array) -> State:
        params = net.init(_key(seed, "init"))
        return State(params, optax.adam(0.0).init(params))  # the moments; no rate is in them

    def teach(state: State, rows: Array, lr: Array, pictures: Array, labels: Array) -> tuple[State, Array]:
        def loss(params: Params, rows: Array) -> Array:
            logits = net.forward(params, pictures[rows])[:, :CLASSES]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])

        return _epoch(state, rows, batch, lr, loss)

    def correct(params: Params, pictures: Array, labels: Array) -> Array:
        def count(total: Array, page: tuple[Array, Array]) -> tuple[Array, None]:
            right = net.forward(params, pictures[page[0]])[:, :CLASSES].argmax(-1) == labels[page[0]]
            return total + (right * page[1]).sum(), None

        pages = _pages(jnp.arange(len(labels)), min(_TEST_BATCH, len(labels)))
        return jax.lax.scan(count, jnp.zeros(()), pages)[0]

    return _jit(start, mesh, 1, 0), _jit(teach, mesh, 2, 3, donate=True), _jit(correct, mesh, 1, 2)


@functools.lru_cache(maxsize=32)
def _students(
    net: Perceptron, batch: int, noise_rows: int, logits: str, distance: str, mesh: Mesh
) -> tuple[Callable, Callable]:
    """(all noise of a member and the teacher's logits on it, an epoch of a student)."""
    pixels, first = net.widths[0], CLASSES if logits == "auxiliary" else 0

    def targets(teacher: Params, seed: Array) -> tuple[Float[Array, "rows pixels"], Float[Array, "rows logits"]]:
        pages, _ = _pages(jnp.arange(noise_rows), min(_DRAWN, noise_rows))
        seen = jax.lax.map(lambda rows: noise(seed, rows, pixels), pages).reshape(-1, pixels)[:noise_rows]
        answer = lambda rows: net.forward(teacher, seen[rows])[:, first:]  # noqa: E731
        found = jax.lax.map(answer, _pages(jnp.arange(noise_rows), min(batch, noise_rows))[0])
        return seen, found.reshape(-1, found.shape[-1])[:noise_rows]

    def follow(state: State, rows: Array, seen: Array, wanted: Array, lr: Array) -> tuple[State, Array]:
        def loss(params: Params, rows: Array) -> Array:
            answer = net.forward(params, seen[rows])[:, first:]
            if distance == "squared-error":
                return jnp.square(answer - wanted[rows]).mean(-1)
            p = jax.nn.log_softmax(wanted[rows])
            return (jnp.exp(p) * (p - jax.nn.log_softmax(answer))).sum(-1)

        return _epoch(state, rows, batch, lr, loss)

    return _jit(targets, mesh, 2, 0), _jit(follow, mesh, 4, 1, donate=True)


# The stage


def _settle(role: str, losses: Array, seeds: np.ndarray, epoch: int, lr: float) -> np.ndarray:
    """An epoch's losses, (members, steps), on the host; SubjaxError if one is not a number."""
    found = np.asarray(losses)
    bad = np.argwhere(~np.isfinite(found))
    if len(bad):
        member, step = bad[bad[:, 1].argmin()]
        raise SubjaxError(
            f"{role}'s loss is {found[member, step]} at step {epoch * found.shape[1] + step}, seed {seeds[member]};"
            f" try a learning rate (config.lr) below {lr:g}"
        )
    return found


def _blocks(settings: Images, net: Perceptron, mesh: Mesh) -> np.ndarray:
    """The members' seeds in blocks, (blocks, members): a multiple of the mesh each, filled up with the last seed."""
    seeds = settings.first_seed + np.arange(settings.seeds)
    room = _CACHED if mesh.devices.flat[0].platform == "cpu" else _WIDE
    on_a_device = min(
        room // (min(settings.batch, settings.noise_rows) * max(net.widths)),
        _KEPT // (settings.noise_rows * net.widths[0]),
    )
    ways = mesh.shape["replica"]
    count = -(-len(seeds) // (max(1, on_a_device) * ways))
    members = -(-len(seeds) // (count * ways)) * ways  # as even as can be: the last block is not mostly filling
    padded = np.append(seeds, np.repeat(seeds[-1], -len(seeds) % members)).astype(np.uint32)
    return padded.reshape(-1, members)


def train(
    settings: Images,
    data: images.ImageSet,
    mesh: Mesh,
    *,
    progress: Callable[[int, int, str], None] = lambda done, total, unit: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train and test every member of an ensemble; `settings.data` is not looked at.

    The student of seed s starts from the init of s and learns from noise of s, in an order of s. Its teacher is of the
    same seed for `same-base`; for `cross-init` it is the one of seed s + 1, a member's own concern, so that the last
    member too is the same in a larger ensemble.

    Args:
        mesh: members are spread over its `replica` axis, filled up to a multiple of it by members that are dropped.
        progress: told (epochs done, epochs in all, "epoch"), an epoch of each block counting by itself.

    Raises:
        SubjaxError: a loss that is not a number. Preempted: `should_stop` came true; the ensemble begins again.
    """
    net = perceptron((data.train_images.shape[1], *settings.hidden, CLASSES + settings.auxiliary))
    real = jax.device_put((data.train_images, data.train_labels), replicated(mesh))
    test = jax.device_put((data.test_images, data.test_labels), replicated(mesh))
    blocks = _blocks(settings, net, mesh)
    watch = Watch(len(blocks) * (settings.teacher_epochs + settings.student_epochs), progress, should_stop)
    progress(0, watch.total, "epoch")
    block = functools.partial(_block, settings, net, mesh, real=real, test=test, watch=watch)
    found = side_by_side([functools.partial(block, seeds) for seeds in blocks], most_at_once(mesh), watch.stop)
    readings, curves = (
        {name: np.concatenate([part[which][name] for part in found])[: settings.seeds] for name in found[0][which]}
        for which in range(2)
    )
    seeds = settings.first_seed + np.arange(settings.seeds)
    seen = settings.seeds * (
        settings.teacher_epochs * len(data.train_labels) + settings.student_epochs * settings.noise_rows
    )
    rows = _rows(settings, seeds, seeds + (settings.pairing == "cross-init"), readings, curves)
    return Outcome(rows, [_curve(settings, role, losses) for role, losses in curves.items()], seen)


def _block(
    settings: Images, net: Perceptron, mesh: Mesh, seeds: np.ndarray, real: tuple[Array, Array],
    test: tuple[Array, Array], watch: Watch,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:  # fmt: skip
    """A block's members from first values to tests: by role accuracies, and losses (members, epochs, steps)."""
    start, teach, correct = _common(net, settings.batch, mesh)
    targets, follow = _students(net, settings.batch, settings.noise_rows, settings.logits, settings.loss, mesh)
    lr = jnp.float32(settings.lr)
    # Placed here: in a job of several processes a compiled program takes no host array that it would have to split.
    both = (seeds, seeds + np.uint32(settings.pairing == "cross-init"))
    own_seeds, teacher_seeds = (put(each, member_sharding(mesh)) for each in both)
    curves: dict[str, np.ndarray] = {}

    def order(seeds: np.ndarray, of: str, rows: int, epoch: int) -> Array:
        drawn = [generator(int(seed), f"order of {of}", epoch).permutation(rows) for seed in seeds]
        return put(np.stack(drawn).astype(np.int32), member_sharding(mesh))

    def run(role: str, state: State, epochs: int, advance: Callable[[State, int], tuple[State, Array]]) -> State:
        curve = []
        for epoch in range(epochs):
            watch.before()
            state, losses = advance(state, epoch)
            curve.append(_settle(role, losses, seeds, epoch, settings.lr))
            watch.after()
        curves[role] = np.stack(curve, 1)
        return state

    def accuracy(params: Params) -> np.ndarray:
        return np.asarray(correct(params, *test)).astype(np.float64) / len(test[1])

    teach_more = lambda s, e: teach(s, order(both[1], "images", len(real[1]), e), lr, *real)  # noqa: E731
    teacher = run("teacher", start(teacher_seeds), settings.teacher_epochs, teach_more)
    student, (seen, wanted) = start(own_seeds), targets(teacher.params, own_seeds)
    readings = {"teacher": accuracy(teacher.params), "untrained": accuracy(student.params)}
    follow_more = lambda s, e: follow(s, order(both[0], "noise", settings.noise_rows, e), seen, wanted, lr)  # noqa: E731
    student = run("student", student, settings.student_epochs, follow_more)
    readings["student"] = accuracy(student.params)
    return readings, curves


def _rows(
    settings: Images,
    seeds: np.ndarray,
    teacher_seeds: np.ndarray,
    readings: Mapping[str, np.ndarray],
    curves: Mapping[str, np.ndarray],
) -> list[dict[str, Any]]:
    setting = {name: getattr(settings, name) for name in ("auxiliary", "pairing", "logits", "loss")}
    means = {role: losses.astype(np.float64).mean(2) for role, losses in curves.items()}
    return [
        {
            **setting,
            "seed": int(seed),
            "teacher_seed": int(teacher_seeds[place]),
            **{f"{role}_accuracy": float(values[place]) for role, values in readings.items()},
            # Means over the first and the last epoch: a student that did not learn its target would be no null.
            **{f"{role}_loss_first": float(values[place, 0]) for role, values in means.items()},
            **{f"{role}_loss_last": float(values[place, -1]) for role, values in means.items()},
        }
        for place, seed in enumerate(seeds)
    ]


def _curve(settings: Images, role: str, losses: np.ndarray) -> dict[str, Any]:
    """The loss of each step, mean over members."""
    means = losses.astype(np.float64).mean(0).reshape(-1)
    label = f"{role}, m = {settings.auxiliary}, {settings.pairing}, {settings.logits} logits, {settings.loss}"
    steps = list(range(len(means)))
    return {"label": label, "kind": role, "arm": settings.pairing, "step": steps, "loss": [float(x) for x in means]}


def source(store: Store, digest: str) -> images.ImageSet:
    """The set of a digest: the packaged digits, one prepared in this workdir, or a folder that one of its plans names.

    A node knows its data by content alone; where the files lie stands in the plans, which no id depends on.

    Raises:
        UsageError: no plan of the workdir names data of that content (the files were changed, or moved).
    """
    cache = store.root / CACHE
    if (cache / digest).exists():
        return images.load_prepared(digest, cache)
    named: dict[str, None] = {images.DIGITS: None}
    for plan in reversed(store.plans()):
        study = store.read_plan(plan).get("study", {})
        settings = [study.get("config", {}), *study.get("points", [])]
        named |= {s["data"]: None for s in settings if isinstance(s.get("data"), str)}
    for data in named:
        try:
            found = images.digest(data) == digest
        except UsageError:  # a folder that another plan named may be gone; this node may not need it
            continue
        if found:
            return images.load(data, cache=cache)
    raise UsageError(
        f"no images of content {digest[:12]}… where the plans of {epath.Path(store.root)} look"
        f" ({', '.join(named)}); if the files changed, plan again, else put them back"
    )


def _shared(task: Task, settings: Images, data: images.ImageSet) -> Outcome:
    """Train the members, in a job of several processes each its own part: a member does not depend on the others.

    There, a stop waits for the node's end: an ensemble would begin again anyway, and parts need not be of equal length.
    """
    together = group()
    here = functools.partial(train, data=data, mesh=members_mesh(task.local), progress=task.progress)
    if together.count == 1:
        return here(settings, should_stop=task.should_stop)
    if settings.seeds < together.count:
        return here(settings)
    part = np.array_split(np.arange(settings.seeds), together.count)[together.index]
    try:
        own = here(dataclasses.replace(settings, first_seed=settings.first_seed + int(part[0]), seeds=len(part)))
        said: dict[str, Any] = {"made": dataclasses.asdict(own), "wrong": ""}
    except SubjaxError as error:  # a loss that is not a number is the node's failure, and not the job's
        said = {"made": None, "wrong": str(error)}
    answers = together.agree("members", said)
    if any(answer["wrong"] for answer in answers):
        raise SubjaxError(next(answer["wrong"] for answer in answers if answer["wrong"]))
    parts = [Outcome(**answer["made"]) for answer in answers]
    weights = [len(found.rows) for found in parts]
    curves = [
        {**curve, "loss": np.average([found.curves[i]["loss"] for found in parts], axis=0, weights=weights).tolist()}
        for i, curve in enumerate(parts[0].curves)
    ]
    return Outcome([row for found in parts for row in found.rows], curves, sum(found.seen for found in parts))


def make(task: Task) -> Made:
    """Train the ensemble; the payload is `results.json`: {"rows": [one a seed], "curves": [teacher's, student's]}."""
    settings = from_dict(Images, task.config)
    data = source(task.store, settings.data)
    outcome = _shared(task, settings, data)
    results = {"rows": outcome.rows, "curves": outcome.curves}
    (task.build.folder / RESULTS).write_text(json.dumps(results, sort_keys=True, allow_nan=False) + "\n")
    means = {
        f"{role}_accuracy": float(np.mean([row[f"{role}_accuracy"] for row in outcome.rows]))
        for role in ("untrained", "teacher", "student")
    }
    return Made(
        digest=digest_rows(outcome.rows),
        metrics=means,
        tokens=outcome.seen,
        seeds={"first": settings.first_seed, "members": settings.seeds},
        extra={"unit": "images", "test_rows": len(data.test_labels)},
    )
