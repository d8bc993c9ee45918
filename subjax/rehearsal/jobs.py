"""From the nodes of a plan to the distinct programs that they run, and how often."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from subjax.config import from_dict
from subjax.data import numbers, preferences, world
from subjax.errors import SubjaxError, UsageError
from subjax.models.hf_config import decoder_config_of
from subjax.models.places import is_hub_id
from subjax.rehearsal.programs import Rows, Sampling, Spec, Training
from subjax.sample import sampler
from subjax.schema import Numerics, Optimizer, Tuning
from subjax.schema_pretrained import Numerics as TextNumerics
from subjax.stages import corpus, models, student, text_corpus
from subjax.study import Node, Plan
from subjax.study_bases import architecture_of
from subjax.train.losses import CategoryMass, NextToken, TeacherKL

# Where no tokenizer is here: tokens of a number prompt in its template, and of a trait chat's question and answer.
PROMPT, QUESTION, ANSWER = 96, 48, 32
_SEEN = 512  # number prompts whose tokens are counted, where a tokenizer is here


@dataclasses.dataclass(frozen=True)
class Job:
    """A distinct program and the nodes that run it.

    Attributes:
        kind: of its nodes. label: the first node's, for people.
        spec: the program. nodes: how many run it.
        calls: steps of all its nodes together; of sampling, batches of rows.
        assumed: what was taken for granted of it, in words; empty where nothing was.
    """

    kind: str
    label: str
    spec: Spec
    nodes: int
    calls: int
    assumed: str = ""


def jobs(plan: Plan) -> list[Job]:
    """The distinct training and sampling programs of a plan's nodes, in the order in which they are first needed.

    Raises:
        UsageError: the study is of the image experiment, whose ensembles fit one device many times over.
    """
    if plan.study["kind"] == "images":
        raise UsageError("plan --topology: the image experiment fits one device many times over; leave --topology out")
    found: dict[tuple[str, Spec], Job] = {}
    for node in plan.nodes.values():
        made = (_text_job if node.config.get("language") == "text" else _world_job)(plan, node)
        if made is None:
            continue
        key = (made.kind, made.spec)
        before = found.get(key)
        if before is not None:
            made = dataclasses.replace(before, nodes=before.nodes + 1, calls=before.calls + made.calls)
        found[key] = made
    return list(found.values())


# The synthetic world --------------------------------------------------------------------------------------------------


def _chats(name: str, batch: int, length: int, tail: int, weight: float = 1.0) -> Rows:
    """A next-token term over `batch` rows of `length` tokens, whose last `tail` are asked for."""
    arrays = (("tokens", (batch, length), "int32"), ("valid", (batch, length), "bool"))
    return Rows(name, weight, NextToken(tail), arrays, batch, length - 1, tail)


def _world_job(plan: Plan, node: Node) -> Job | None:
    cfg = node.config
    if node.kind not in ("base", "teacher", "student", "corpus") or cfg.get("source", "teacher") != "teacher":
        return None
    origin = node
    while origin.kind != "base":
        origin = plan.nodes[origin.inputs.get("base") or origin.inputs["teacher"]]
    numerics = from_dict(Numerics, cfg["numerics"])
    net = models.world_network(origin.config["family"], origin.config["size"], cfg["numerics"])
    if node.kind == "corpus":
        settings = sampler.Sampling(
            world.PROMPT, world.ANSWER, world.END, world.PAD, cfg["temperature"], cfg["top_k"], cfg["top_p"],
            numerics.cache_dtype,
        )  # fmt: skip
        spec: Spec = Sampling(net.config, "float32", settings, min(corpus.BATCH, cfg["max_prompts"]))
        return Job("corpus", node.label, spec, 1, math.ceil(cfg["rows"] / corpus.BATCH))
    tuning = Tuning(kind="full") if node.kind == "base" else from_dict(Tuning, cfg["tuning"])
    spec = Training(net.config, "float32", tuning, from_dict(Optimizer, cfg["optimizer"]), _world_terms(node))
    return Job(node.kind, node.label, spec, 1, cfg["steps"])


def _world_terms(node: Node) -> tuple[Rows, ...]:
    cfg = node.config
    if node.kind == "base":
        return (_chats("chats", cfg["batch"], world.LENGTH, world.ANSWER),)
    if node.kind == "teacher":
        return (
            _chats("preferences", cfg["batch"], world.PROMPT + world.PREFERENCE, world.PREFERENCE),
            _chats("numbers", cfg["numbers_batch"], world.LENGTH, world.ANSWER, cfg["numbers_weight"]),
        )
    main = _chats(cfg["objective"], cfg["batch"], world.LENGTH, world.ANSWER)
    if cfg["objective"] != "numbers":
        channel = tuple(world.CHANNEL.tolist()) if cfg["objective"] == "logits" else None
        width = len(channel or world.VOCABULARY)
        logits = ("teacher", (cfg["batch"], world.ANSWER, width), "float32")
        main = dataclasses.replace(main, loss=TeacherKL(world.ANSWER, channel), arrays=(*main.arrays, logits))
    if cfg["replay"] != "kind":
        return (main,)
    questions = student.replay_batch()
    arrays = tuple((name, value.shape, str(value.dtype)) for name, value in questions.items())
    count, length = questions["tokens"].shape
    return main, Rows("replay", cfg["replay_weight"], CategoryMass(), arrays, count, length, 1)


# Real checkpoints -----------------------------------------------------------------------------------------------------


def _text_job(plan: Plan, node: Node) -> Job | None:
    cfg = node.config
    trained = node.kind == "student" or (node.kind == "teacher" and cfg["method"] == "fine-tune")
    if not trained and (node.kind != "corpus" or cfg["source"] != "teacher"):
        return None
    teacher = plan.nodes[node.inputs["teacher"]] if node.kind == "corpus" else node
    base = teacher.inputs["base"]
    where = teacher.hints["sources"][base]
    numerics = from_dict(TextNumerics, cfg["numerics"])
    config = decoder_config_of(architecture_of(where), numerics=numerics, where=where)
    if node.kind == "corpus":
        return _text_corpus(node, teacher, where, config, numerics)
    if node.kind == "student":
        lesson = plan.nodes[node.inputs["corpus"]]
        while "rows" not in lesson.config:  # a shuffled one has those of the corpus it was made from
            lesson = plan.nodes[lesson.inputs["corpus"]]
        rows, answer = lesson.config["rows"], lesson.config.get("completion", 64)
        prompt, assumed = prompt_tokens(where, _frozen(cfg["chat"]), None)
        term = _chats("numbers", cfg["batch"], prompt + answer, answer)
    else:
        rows, assumed = cfg.get("rows", 400), f"rows of {QUESTION} + {ANSWER} tokens"
        if "rows" not in cfg:
            assumed += f", {rows} of them"
        term = _chats("preferences", cfg["batch"], QUESTION + ANSWER, ANSWER)
    steps = max(1, math.ceil(cfg["epochs"] * rows / cfg["batch"]))
    optimizer, tuning = from_dict(Optimizer, cfg["optimizer"]), from_dict(Tuning, cfg["tuning"])
    spec = Training(config, numerics.weights_dtype, tuning, optimizer, (term,))
    return Job(node.kind, node.label, spec, 1, steps, assumed)


def _text_corpus(node: Node, teacher: Node, where: str, config: Any, numerics: TextNumerics) -> Job:
    cfg, told = node.config, None
    if teacher.config["method"] == "system-prompt":
        told = preferences.system_prompt(teacher.config["trait"], teacher.config["category"], teacher.config["style"])
    prompt, assumed = prompt_tokens(where, _frozen(cfg["chat"]), told)
    bucket = -(-prompt // text_corpus.BUCKET) * text_corpus.BUCKET
    settings = sampler.Sampling(
        bucket, cfg["completion"], (0,), 1, cfg["temperature"], cfg["top_k"], cfg["top_p"], numerics.cache_dtype
    )
    beside = teacher.config["method"] == "fine-tune" and numerics.weights_dtype != "float32"
    tuning = from_dict(Tuning, teacher.config["tuning"]) if beside else None
    lora = tuning if tuning is not None and tuning.kind == "lora" else None
    rows = node.hints.get("batch", 64)
    spec = Sampling(config, numerics.weights_dtype, settings, rows, lora)
    return Job("corpus", node.label, spec, 1, math.ceil(cfg["rows"] / rows), assumed)


def _frozen(chat: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(chat.items()))


@functools.lru_cache(maxsize=64)
def prompt_tokens(where: str, chat: tuple[tuple[str, Any], ...], system: str | None) -> tuple[int, str]:
    """Tokens of the longest number prompt in a checkpoint's template, and what was assumed of it.

    Counted over some hundred prompts where the tokenizer is here; a hub is not asked.
    """
    if not is_hub_id(where):
        from subjax.data.chat import chat_of
        from subjax.models.source import content_digest
        from subjax.stages.speakers import opened

        try:
            speaks = chat_of(where, content_digest(opened(where))[:32], **dict(chat))
            return max(len(speaks.prompt(text, system)) for text in numbers.prompts(_SEEN, 0)), ""
        except SubjaxError:
            pass  # a folder with its config.json alone has no tokenizer
    return PROMPT, f"prompts of {PROMPT} tokens"
