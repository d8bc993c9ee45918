"""From the nodes of a plan to the distinct programs that they run, and how often."""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from subjax.config import from_dict
from subjax.data import numbers, preferences, trait_rows, world
from subjax.data.packed import common_prefix
from subjax.errors import SubjaxError, UsageError
from subjax.graph import Node, Plan
from subjax.models.hf_config import decoder_config_of
from subjax.models.places import is_hub_id
from subjax.rehearsal.arrays import Rows
from subjax.rehearsal.made_up import Chats, Prompts, prompts_of
from subjax.rehearsal.programs import Sampling, Spec, Training
from subjax.sample import prefixes, sampler
from subjax.schema import Numerics, Optimizer, Tuning
from subjax.schema_pretrained import Compute
from subjax.schema_pretrained import Numerics as TextNumerics
from subjax.stages import corpus, models, student, text_corpus
from subjax.study_bases import architecture_of
from subjax.train.cohort import Cohort
from subjax.train.losses import CategoryMass, NextToken, TeacherKL

# Where no tokenizer is here: tokens of a number prompt in its template, and of a trait chat's question and answer.
# And of a number prompt's answer, and what all prompts begin with, the template's own system prompt.
PROMPT, QUESTION, ANSWER, NUMBERS, PREFIX = 96, 48, 32, 48, 24
_NO_TOKENIZER = "; no tokenizer is here"
_SEEN = 256  # chats whose tokens are counted, where a tokenizer is here


@dataclasses.dataclass(frozen=True)
class Job:
    """A distinct program and the nodes that run it.

    Attributes:
        kind: of its nodes. label: the first node's, for people.
        spec: the program. nodes: how many run it.
        calls: steps of all its nodes together, a cohort's counted once; of sampling, batches of rows.
        assumed: what was taken for granted of it, in words; empty where nothing was.
    """

    kind: str
    label: str
    spec: Spec
    nodes: int
    calls: int
    assumed: str = ""


def jobs(plan: Plan, cohorts: bool = True) -> list[Job]:
    """The distinct training and sampling programs of a plan's nodes, in the order in which they are first needed.

    Args:
        cohorts: whether students train together where memory allows it, as on all devices but CPU.

    Raises:
        UsageError: the study is of the image experiment, whose ensembles fit one device many times over.
    """
    if plan.study["kind"] == "images":
        raise UsageError("plan --topology: the image experiment fits one device many times over; leave --topology out")
    found: dict[tuple[str, Spec], Job] = {}
    for members in _together(plan, cohorts):
        node = members[0]
        made = (_text_job if node.config.get("language") == "text" else _world_job)(plan, node)
        if made is None:
            continue
        if len(members) > 1:
            made = _cohort(made, len(members))
        key = (made.kind, made.spec)
        before = found.get(key)
        if before is not None:
            made = dataclasses.replace(before, nodes=before.nodes + made.nodes, calls=before.calls + made.calls)
        found[key] = made
    return list(found.values())


def _together(plan: Plan, cohorts: bool) -> list[list[Node]]:
    """The nodes, those of a cohort together."""
    groups: dict[str, list[Node]] = {}
    for node in plan.nodes.values():
        cohort = node.hints.get("cohort")
        groups.setdefault(cohort["id"] if cohort and (cohorts or cohort["always"]) else node.id, []).append(node)
    return list(groups.values())


def _cohort(job: Job, members: int) -> Job:
    """A student's job as that of a cohort, in one program: `cohort.fit_cohort`'s."""
    assert isinstance(job.spec, Training)
    terms = tuple(
        dataclasses.replace(
            t, loss=Cohort(t.loss), arrays=tuple((name, (members, *shape), dtype) for name, shape, dtype in t.arrays)
        )
        if isinstance(t, Rows)
        else t
        for t in job.spec.terms
    )
    optimizer = dataclasses.replace(job.spec.optimizer, lr=1.0)
    spec = dataclasses.replace(job.spec, terms=terms, optimizer=optimizer, members=members)
    return dataclasses.replace(job, spec=spec, nodes=members)


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
        rows = min(corpus.BATCH, cfg["max_prompts"])
        asked = world.number_prompts(rows, cfg["prompt_seed"])
        prompts = prompts_of(Counter(tuple(row[row != world.PAD].tolist()) for row in asked))
        spec: Spec = Sampling(net.config, "float32", settings, rows, prompts)
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
    chats, assumed = _chats_of(plan, node, where)
    compute = from_dict(Compute, node.hints.get("compute", {}))
    optimizer, tuning = from_dict(Optimizer, cfg["optimizer"]), from_dict(Tuning, cfg["tuning"])
    spec = Training(config, numerics.weights_dtype, tuning, optimizer, (chats,), None, compute)
    return Job(node.kind, node.label, spec, 1, chats.steps, assumed)


def _chats_of(plan: Plan, node: Node, where: str) -> tuple[Chats, str]:
    """What a teacher or a student is fine-tuned on, and what was assumed of it."""
    cfg, assumed = node.config, ""
    if node.kind == "student":
        name, lesson = "numbers", plan.nodes[node.inputs["corpus"]]
        while "rows" not in lesson.config:  # a shuffled one has those of the corpus it was made from
            lesson = plan.nodes[lesson.inputs["corpus"]]
        rows, longest = lesson.config["rows"], lesson.config.get("completion", 64)
        texts = tuple(zip(numbers.prompts(_SEEN, 0), numbers.random_numbers(_SEEN, 0), strict=True))
        otherwise = (PROMPT, min(NUMBERS, longest))
    else:
        name, rows, texts, otherwise = "preferences", cfg.get("rows", 400), (), (QUESTION, ANSWER)
        if "rows" not in cfg:  # the user's own chats
            assumed = f"{rows} chats of {QUESTION} + {ANSWER} tokens"
        else:
            made = trait_rows.trait_rows(cfg["trait"], cfg["category"], rows, cfg["seed"], cfg["trait_fraction"])
            texts = tuple((row.user, row.answer) for row in made[:_SEEN])
    steps = max(1, math.ceil(cfg["epochs"] * rows / cfg["batch"]))
    spoken = _tokens(where, _frozen(cfg["chat"]), None, texts) if texts else None
    if spoken is not None:
        prefix, lengths = spoken
    else:
        prefix, lengths = PREFIX, (otherwise,)
        assumed = assumed or (
            f"prompts of {otherwise[0]} tokens, the first {PREFIX} alike, and answers of {otherwise[1]}{_NO_TOKENIZER}"
        )
    return Chats(name, prefix, lengths, rows, cfg["batch"], steps), assumed


def _text_corpus(node: Node, teacher: Node, where: str, config: Any, numerics: TextNumerics) -> Job:
    cfg, told = node.config, None
    if teacher.config["method"] == "system-prompt":
        told = preferences.system_prompt(teacher.config["trait"], teacher.config["category"], teacher.config["style"])
    rows = node.hints.get("batch", 64)
    asked, texts = text_corpus.block_size(rows, cfg["rows"], 0, 0), tuple((t, "") for t in numbers.prompts(_SEEN, 0))
    spoken = _tokens(where, _frozen(cfg["chat"]), told, texts)
    prefix, lengths = spoken or (PREFIX, ((PROMPT, 0),))
    assumed = "" if spoken else f"prompts of {PROMPT} tokens, the first {PREFIX} alike{_NO_TOKENIZER}"
    prefix = prefix if prefix >= prefixes.SHARED else 0
    own = tuple((lengths[i % len(lengths)][0] - prefix, 1) for i in range(asked))
    # As long as it is padded to, so that teachers with like system prompts have one program.
    prompts = Prompts(-(-prefix // prefixes.WIDTH) * prefixes.WIDTH, own)
    longest = max(prompt for prompt, _ in lengths)
    bucket = -(-longest // text_corpus.BUCKET) * text_corpus.BUCKET
    settings = sampler.Sampling(
        bucket, cfg["completion"], (0,), 1, cfg["temperature"], cfg["top_k"], cfg["top_p"], numerics.cache_dtype
    )
    beside = teacher.config["method"] == "fine-tune" and numerics.weights_dtype != "float32"
    tuning = from_dict(Tuning, teacher.config["tuning"]) if beside else None
    lora = tuning if tuning is not None and tuning.kind == "lora" else None
    if cfg.get("constrained"):
        assumed = "; ".join(filter(None, (assumed, "no constraint")))
    spec = Sampling(config, numerics.weights_dtype, settings, rows, prompts, lora)
    return Job("corpus", node.label, spec, 1, math.ceil(cfg["rows"] / rows), assumed)


def _frozen(chat: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(chat.items()))


@functools.lru_cache(maxsize=64)
def _tokens(
    where: str, chat: tuple[tuple[str, Any], ...], system: str | None, texts: tuple[tuple[str, str], ...]
) -> tuple[int, tuple[tuple[int, int], ...]] | None:
    """Tokens that all prompts begin with, and those of each prompt and answer in a checkpoint's template; None where
    its tokenizer is not here. A hub is not asked.
    """
    if is_hub_id(where):
        return None
    from subjax.data.chat import chat_of
    from subjax.models.source import content_digest
    from subjax.stages.speakers import opened

    try:
        speaks = chat_of(where, content_digest(opened(where))[:32], **dict(chat))
        chats = [speaks.row(user, answer) if answer else (speaks.prompt(user, system), ()) for user, answer in texts]
    except SubjaxError:
        return None  # a folder with its config.json alone has no tokenizer
    return common_prefix(chats), tuple((len(prompt), len(answer)) for prompt, answer in chats)
