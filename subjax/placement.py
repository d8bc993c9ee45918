"""What stands where: the table that a run on several devices prints before it begins.

Everything follows from declarations (shapes, logical axes) and the rules; no array is made. Bytes are those of
parameters, what is trained and optimizer moments at rest: activations and caches depend on the batch, and
`subjax plan --topology` counts them.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from subjax.config import from_dict
from subjax.graph import Node, Plan
from subjax.models import adapters
from subjax.models.network import Declaration, Network, network
from subjax.overview import quantity
from subjax.parallel.axes import Shape, shown
from subjax.parallel.mesh import local_mesh
from subjax.parallel.rules import SAMPLE, TRAIN, Rules, mesh_axes
from subjax.run_state import cohort_of
from subjax.schema import Optimizer, Tuning
from subjax.stages.models import world_network
from subjax.train.optimizers import make_optimizer

Array = tuple[str, tuple[int, ...], tuple[str, ...], str]  # name, shape, logical axes, dtype
GROUPS = ("embedding", "attention", "mlp", "norms and biases")


@dataclasses.dataclass(frozen=True)
class Part:
    """A group of arrays: over which mesh axes some dimension of each is split, what is kept whole, bytes a device."""

    axes: tuple[str, ...]
    whole: tuple[str, ...]
    bytes: int

    def text(self) -> str:
        """The axes and the bytes, for a column of the table."""
        over = ", ".join(self.axes) or "whole"
        return f"{over + (' *' if self.whole else ''):<17}{quantity(self.bytes) + 'B':>9}"


@dataclasses.dataclass(frozen=True)
class Trained:
    """What is trained of a model and how; whether its base stands beside it meanwhile; members of a cohort, at most."""

    tuning: Tuning
    optimizer: Optimizer
    beside: bool = False
    members: int = 1


@dataclasses.dataclass
class Model:
    """A network of the plan, the dtype that its frozen weights are held in, and what its nodes train of it and how."""

    name: str
    net: Network
    dtype: str
    nodes: Counter[str] = dataclasses.field(default_factory=Counter)
    trained: set[Trained] = dataclasses.field(default_factory=set)


def models_of(plan: Plan) -> list[Model]:
    """The distinct models of a plan, of which some node is made."""
    found: dict[tuple[Network, str], Model] = {}
    of_node: dict[str, Model] = {}
    cohorts = Counter(cohort_of(node) for node in plan.nodes.values())
    for id, node in plan.nodes.items():
        model = _model(node, plan) if node.kind == "base" else _of_inputs(node, of_node)
        if model is None:
            continue
        model = found.setdefault((model.net, model.dtype), model)
        of_node[id] = model
        model.nodes[node.kind] += 1
        if node.kind == "base" and "optimizer" in node.config:
            model.trained.add(Trained(Tuning(kind="full"), from_dict(Optimizer, node.config["optimizer"])))
        elif "tuning" in node.config:
            tuning, optimizer = from_dict(Tuning, node.config["tuning"]), from_dict(Optimizer, node.config["optimizer"])
            members = cohorts[cohort] if (cohort := cohort_of(node)) else 1
            model.trained.add(Trained(tuning, optimizer, tuning.kind != "lora", members))
    return list(found.values())


def _of_inputs(node: Node, of_node: Mapping[str, Model]) -> Model | None:
    """The model of a node: that of its base, of the model it asks, or of the teacher that writes it."""
    inputs = (node.inputs.get(role) for role in ("base", "model", "teacher"))
    return next((of_node[id] for id in inputs if id is not None and id in of_node), None)


def _model(node: Node, plan: Plan) -> Model:
    config = node.config
    if config.get("language") != "text":
        return Model(f"{config['family']} {config['size']}", _world(config), "float32")
    from subjax.models.hf_config import decoder_config_of
    from subjax.schema_pretrained import Numerics
    from subjax.stages.speakers import opened

    where = node.hints["source"]
    users = [n for n in plan.nodes.values() if "numerics" in n.config and node.id in n.inputs.values()]
    numerics = from_dict(Numerics, users[0].config["numerics"]) if users else Numerics()
    net = network(decoder_config_of(opened(where).config, numerics=numerics, where=where))
    return Model(node.label.removeprefix("base "), net, numerics.weights_dtype)


def _world(config: Mapping[str, Any]) -> Network:
    return world_network(config["family"], config["size"], config["numerics"])


def _group(name: str, declared: Declaration) -> str:
    if declared.role in ("gain", "bias", "key-bias"):
        return "norms and biases"
    return next((group for group in ("attention", "mlp") if f"/{group}/" in name), "embedding")


def _part(mesh: Mesh, rules: Rules, arrays: Iterable[Array]) -> Part:
    """Where arrays stand."""
    axes: set[str] = set()
    whole: set[str] = set()
    total = 0
    for name, shape, logical, dtype in arrays:
        sharding, refused = rules.fitted(mesh, shape, logical, name)
        axes |= {axis for part in sharding.spec for axis in mesh_axes(part) if mesh.shape[axis] > 1}
        whole |= {name} if refused else set()
        total += math.prod(sharding.shard_shape(shape)) * jnp.dtype(dtype).itemsize
    return Part(tuple(a for a in mesh.axis_names if a in axes), tuple(sorted(whole)), total)


def sampled_parts(model: Model, mesh: Mesh) -> dict[str, Part]:
    """Each group of a model's parameters where it is asked."""
    return _groups(model, mesh, SAMPLE, {})


def trained_parts(model: Model, mesh: Mesh, trained: Trained) -> dict[str, Part]:
    """Each group of a model's parameters in training, what is trained in float32; adapters; the base that stands beside
    what was made of it; the optimizer.
    """
    tuned = _tuned(model, trained)
    out = _groups(model, mesh, TRAIN, tuned)
    if trained.tuning.kind == "lora":
        out["adapters"] = _part(mesh, TRAIN, [(name, *declared, "float32") for name, declared in tuned.items()])
    if trained.beside:
        declared = {name: model.net.declarations[name] for name in tuned}
        out["base beside"] = _part(mesh, TRAIN, [(n, d.shape, d.axes, model.dtype) for n, d in declared.items()])
    out["optimizer"] = _optimizer(model, mesh, trained)
    return out


def _tuned(model: Model, trained: Trained) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shapes and logical axes of what is trained, of all members of a cohort together."""
    alone = adapters.tuned_axes(model.net, trained.tuning)
    if trained.members == 1:
        return alone
    return {name: ((trained.members, *shape), ("member", *axes)) for name, (shape, axes) in alone.items()}


def _groups(
    model: Model, mesh: Mesh, rules: Rules, tuned: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]]
) -> dict[str, Part]:
    """Parts by group, of what is `tuned` as that says, in float32, and of the rest as it is declared."""
    arrays: dict[str, list[Array]] = {group: [] for group in GROUPS}
    for name, declared in model.net.declarations.items():
        held = (*tuned[name], "float32") if name in tuned else (declared.shape, declared.axes, model.dtype)
        arrays[_group(name, declared)].append((name, *held))
    return {group: _part(mesh, rules, of_group) for group, of_group in arrays.items()}


def _optimizer(model: Model, mesh: Mesh, trained: Trained) -> Part:
    """The optimizer's moments, each where its parameter is; counters and the like stand whole on every device."""
    tuned = _tuned(model, trained)
    rule = make_optimizer(trained.optimizer, 1, adapters.matrix_axes(model.net, trained.tuning))
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, (shape, _) in tuned.items()}
    arrays = []
    init = rule.init if trained.members == 1 else jax.vmap(rule.init)
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.eval_shape(init, shapes)):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey) and entry.key in tuned]
        same = bool(names) and leaf.shape == tuned[names[-1]][0]
        axes = tuned[names[-1]][1] if same else ("length",) * leaf.ndim  # `length` is split by no rule
        arrays.append((names[-1] if names else "counter", leaf.shape, axes, str(leaf.dtype)))
    return _part(mesh, TRAIN, arrays)


def table(plan: Plan, mesh: Mesh) -> str:
    """The table: processes, devices, mesh, and for each model of the plan what each part is split over and takes."""
    devices = mesh.devices.flatten().tolist()
    kinds = Counter(device.device_kind for device in devices)
    processes = Counter(device.process_index for device in devices)
    sizes: Shape = tuple(mesh.shape[axis] for axis in mesh.axis_names)
    local = local_mesh(mesh)
    lines = [
        f"processes  {len(processes)}",
        f"devices    {', '.join(f'{count} x {kind}' for kind, count in kinds.items())}"
        + (f", {min(processes.values())} a process" if len(processes) > 1 else ""),
        f"mesh       {shown(sizes)}" + ("" if local is mesh else f"; models are asked on {_shown(local)} a process"),
    ]
    for model in models_of(plan):
        lines += ["", *_block(model, mesh, local)]
    if any(node.kind == "ensemble" for node in plan.nodes.values()):
        lines.append("ensembles  members spread over all devices, each whole on its own")
    return "\n".join(lines)


def _shown(mesh: Mesh) -> str:
    return shown(tuple(mesh.shape[axis] for axis in mesh.axis_names))


def _block(model: Model, mesh: Mesh, local: Mesh) -> Iterator[str]:
    """A model's lines: what takes most in training, and in sampling."""
    made = ", ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in model.nodes.items())
    yield f"{model.name}: {quantity(model.net.parameters)} parameters; {made}".replace("corpuss", "corpora")
    sampled = sampled_parts(model, local)
    choices = []
    for one in sorted(model.trained, key=str):
        trained = trained_parts(model, mesh, one)
        together = f", {one.members} together" if one.members > 1 else ""
        words = f"{one.tuning.kind}, {one.optimizer.name}{together}"
        choices.append((sum(part.bytes for part in trained.values()), words, trained))
    total, how, trained = max(choices, default=(0, "nothing is trained", {}), key=lambda choice: choice[0])
    yield f"  {'':<18}{f'training ({how})':<30}{'sampling, evaluation'}"
    for name in trained or sampled:
        left = trained[name].text() if name in trained else ""
        right = sampled[name].text() if name in sampled else ""
        yield f"  {name:<18}{left:<30}{right}".rstrip()
    asked = sum(part.bytes for part in sampled.values())
    left = f"{'':<17}{quantity(total) + 'B':>9}" if trained else ""
    yield f"  {'bytes per device':<18}{left:<30}{'':<17}{quantity(asked) + 'B':>9}"
    whole = sorted({name for part in [*trained.values(), *sampled.values()] for name in part.whole})
    if whole:
        more = f" and {len(whole) - 3} more" if len(whole) > 3 else ""
        yield f"  * kept whole over an axis that does not divide it: {', '.join(whole[:3])}{more}"
