"""A model of the store to a folder that transformers or peft load: which checkpoint it stands on, and in which form."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from etils import epath

from subjax.config import from_dict
from subjax.data import world
from subjax.data.tokenizer import Tokenizer, load_tokenizer
from subjax.errors import SubjaxError, UsageError
from subjax.models import adapters, checkpoints, hf_export, peft_export
from subjax.models.forms import Dtype, Form
from subjax.models.gguf_file import GgufSource
from subjax.models.hf_config import decoder_config_of, text_part
from subjax.models.hf_export import Weight
from subjax.models.network import Network, network
from subjax.models.places import TOKENIZER_FILES
from subjax.models.source import Source, content_digest, open_source
from subjax.schema import Numerics, Tuning
from subjax.stages import models
from subjax.stages.speakers import CHECKPOINT, SYSTEM
from subjax.store import Card, Store

# What transformers builds from tokenizer.json as it is, in its older versions and the present one.
_TOKENIZER_CLASS = "PreTrainedTokenizerFast"
_GENERATION = "generation_config.json"
KINDS = ("base", "teacher", "student")

# The world's chats in Jinja: prompts are as long as one another, filled up with beginnings.
_WORLD_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    f"{{{{ '<bos> ' * ({world.PROMPT - 2} - message['content'].split() | length) }}}}"
    "<user> {{ message['content'] }} <bot>{% else %} {{ message['content'] }} <end>{% endif %}{% endfor %}"
)


@dataclasses.dataclass(frozen=True)
class _Base:
    """What a model stands on: its network, and the checkpoint; None where it was trained here."""

    card: Card
    net: Network
    source: Source | None

    @property
    def config(self) -> Mapping[str, Any]:
        """Its config.json."""
        if self.source is not None:
            return self.source.config
        ids = {"bos_token_id": world.BOS, "eos_token_id": world.END, "pad_token_id": world.PAD}
        return hf_export.hf_config_of(self.net.config) | ids


def export(
    store: Store,
    kind: str,
    node: str,
    folder: str | os.PathLike[str],
    *,
    form: Form | None = None,
    dtype: Dtype | None = None,
    hints: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Write a base, teacher or student into `folder` for other tools, and return a line that says what was written.

    Args:
        store: where it is made. kind, node: which one.
        folder: must not be there yet, or be empty.
        form: "merged" is a whole Hugging Face folder; "adapter" a LoRA alone, as peft's; by default an adapter where
            the model is a LoRA.
        dtype: of a whole folder. By default a base has its checkpoint's own, and what was tuned, dequantized or trained
            here float32.
        hints: "sources" has where checkpoints lie now, by base, as the hints of a plan's nodes do.

    Raises:
        UsageError: there is no such node, it is no model or has no weights of its own, it is not of that form, or the
            folder is taken. SubjaxError: it is not made yet, its checkpoint has changed, or the disk is full.
    """
    if dtype is not None and dtype not in hf_export.DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(hf_export.DTYPES)}")
    card = _card(store, kind, node)
    form = _form(store, card, form)
    hf_export.free_folder(folder)  # before anything is read, which may take minutes
    base = _base(store, card, hints)
    if form == "adapter":
        if dtype is not None:
            raise UsageError(f"{card.kind} {card.id}: an adapter is written in float32; leave the dtype out")
        return _write_adapter(store, card, base, folder)
    return _write_model(store, card, base, folder, dtype)


def _card(store: Store, kind: str, node: str) -> Card:
    kind, node = store.find(f"{kind}/{node}")
    if kind not in KINDS:
        raise UsageError(f"{kind} {node} is no model; give a base, teacher or student (see `subjax status`)")
    card = store.card(kind, node)
    if card is None:
        raise SubjaxError(f"{kind} {node} is not made yet in {store.root}; run the study that plans it")
    return card


def _form(store: Store, card: Card, form: Form | None) -> Form:
    """The form to write, refused where the model has no weights of its own or cannot be written so."""
    name = f"{card.kind} {card.id}"
    method = card.config.get("method", "fine-tune")
    if method != "fine-tune":
        base, payload = card.inputs["base"]["id"], store.payload(card.kind, card.id)
        what = "a system prompt" if method == "system-prompt" else "a steering vector"
        where = payload / (SYSTEM if method == "system-prompt" else models.ARRAYS)
        raise UsageError(
            f"{name} is base {base} with {what}, and has no weights of its own; export that base, and take {what} from"
            f" {where}"
        )
    kind = "full" if card.kind == "base" else card.config["tuning"]["kind"]
    if form == "adapter" and kind != "lora":
        how = "is a base" if card.kind == "base" else f"was tuned with tuning.kind={kind}"
        raise UsageError(f"{name} {how}, which no PEFT adapter can hold; export it merged")
    return form or ("adapter" if kind == "lora" else "merged")


def _base(store: Store, card: Card, hints: Mapping[str, Any]) -> _Base:
    base = models.base_of(store, card.kind, card.id)
    if base.config.get("language") != "text":
        config = base.config
        return _Base(base, models.world_network(config["family"], config["size"], config["numerics"]), None)
    known = hints.get("sources", {}).get(base.id)
    where = known or json.loads((store.payload("base", base.id) / CHECKPOINT).read_text())["source"]
    source = open_source(where)
    digest = base.config["checkpoint"]
    if content_digest(source)[: len(digest)] != digest:
        raise SubjaxError(
            f"checkpoint {where} has changed since base {base.id} was made of it; put the old one back, or run the"
            " study again"
        )
    return _Base(base, network(decoder_config_of(source.config, numerics=Numerics(), where=where)), source)


# ---- a whole model ----


def _write_model(store: Store, card: Card, base: _Base, folder: str | os.PathLike[str], dtype: str | None) -> str:
    weights = _weights(store, card, base, dtype)
    config = dict(base.config)
    beside: Mapping[str, str | epath.Path]
    if base.source is None:
        beside = world_tokenizer_files()
    elif isinstance(base.source, GgufSource):
        tokenizer = load_tokenizer(base.source)
        beside = tokenizer_files(tokenizer, base.net.config.length)
        config = _with_ends(config, tokenizer.ends)
    else:
        files = {name: path for name, path in base.source.files.items() if name in TOKENIZER_FILES}
        if generation := files.pop(_GENERATION, None):
            config = _with_ends(config, json.loads(generation.read_text()).get("eos_token_id"))
        beside = files
    hf_export.write_model(folder, weights, config, beside)
    dtypes, scalars = "/".join(sorted({weight.dtype for weight in weights.values()})), base.net.parameters
    return (
        f"{os.fspath(folder)}: {card.kind} {card.id} as a Hugging Face folder, {scalars:,} parameters in {dtypes}"
        f" ({_amount(weights)}); transformers.AutoModelForCausalLM.from_pretrained loads it"
    )


def _with_ends(config: dict[str, Any], ends: int | Sequence[int] | None) -> dict[str, Any]:
    """A config.json whose `eos_token_id` has also `ends`, the ids that end an answer.

    A GGUF file keeps the end of a turn apart from that of a text, and a folder may have it in generation_config.json,
    which is not written.
    """
    own = config.get("eos_token_id")
    if own is None:  # a model that also reads images may have them in its language model alone
        own = text_part(config).get("eos_token_id")
    lists = [[] if ids is None else [ids] if isinstance(ids, int) else ids for ids in (own, ends)]
    known = list(dict.fromkeys([*lists[0], *lists[1]]))
    return config | {"eos_token_id": known} if len(known) > len(lists[0]) else config


def _weights(store: Store, card: Card, base: _Base, dtype: str | None) -> dict[str, Weight]:
    if base.source is None:
        net, params = models.load(store, card.kind, card.id)
        return hf_export.merged_weights(net, params, dtype=dtype or "float32")
    if card.kind == "base":
        # What a GGUF file has quantized is in float32 once it is read, and its other tensors go with it.
        stored = None if not isinstance(base.source, GgufSource) else "float32"
        return hf_export.stored_weights(base.net, base.source, dtype or stored)
    tuned = checkpoints.load(store.payload(card.kind, card.id) / models.ARRAYS)
    arrays, adapter = adapters.join(from_dict(Tuning, card.config["tuning"]), tuned, {})
    held = card.config["numerics"]["weights_dtype"]
    return hf_export.merged_weights(base.net, arrays, adapter, base.source, held=held, dtype=dtype or "float32")


def _amount(weights: Mapping[str, Weight]) -> str:
    size = sum(weight.size for weight in weights.values())
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size / 1e3:.2f} kB"


# ---- an adapter ----


def _write_adapter(store: Store, card: Card, base: _Base, folder: str | os.PathLike[str]) -> str:
    tuning = from_dict(Tuning, card.config["tuning"])
    tuned = checkpoints.load(store.payload(card.kind, card.id) / models.ARRAYS)
    config = peft_export.adapter_config(base.net, tuning, base.config)
    weights = peft_export.adapter_weights(base.net, tuning, tuned, base.config)
    name, revision = _name(base.source)
    hf_export.write_adapter(folder, weights, config | {"base_model_name_or_path": name, "revision": revision})
    return (
        f"{os.fspath(folder)}: {card.kind} {card.id} as a PEFT adapter of {name or f'base {base.card.id}'}, rank"
        f" {tuning.rank} ({_amount(weights)}); peft.PeftModel.from_pretrained puts it on that model"
    )


def _name(source: Source | None) -> tuple[str | None, str | None]:
    """What peft finds the base by, and its revision; nothing where the base was trained here."""
    if source is None:
        return None, None
    if source.revision is not None:
        return source.where.partition("@")[0], source.revision
    path = epath.Path(source.where).expanduser()
    return (os.path.abspath(path) if path.exists() else source.where), None


# ---- tokenizers ----


def tokenizer_files(tokenizer: Tokenizer, length: int) -> dict[str, str]:
    """The files that transformers makes the same tokenizer of: tokenizer.json and tokenizer_config.json.

    Args:
        tokenizer: of a GGUF file; a folder's own files are copied instead. length: tokens that the model reads.
    """
    from tokenizers import processors

    backend = type(tokenizer.backend).from_str(tokenizer.backend.to_str())
    if tokenizer.add_bos:
        bos = tokenizer.token(tokenizer.bos)
        assert bos is not None
        # Older versions of transformers go by this, and not by `add_bos_token`.
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, tokenizer.bos)]
        )
    settings = {
        "tokenizer_class": _TOKENIZER_CLASS,
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": tokenizer.add_bos,
        "add_eos_token": False,
        "bos_token": tokenizer.token(tokenizer.bos),
        "eos_token": tokenizer.token(tokenizer.eos),
        "pad_token": tokenizer.token(tokenizer.pad),
        "chat_template": tokenizer.chat_template,
    }
    return {"tokenizer.json": backend.to_str(), "tokenizer_config.json": _json(settings)}


def world_tokenizer_files() -> dict[str, str]:
    """The synthetic world's vocabulary as transformers' files: a word a token, and chats as the world writes them.

    A word that the world does not have is an error, as it is here.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel(dict(world.ID)))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in world.SPECIALS])
    settings = {
        "tokenizer_class": _TOKENIZER_CLASS,
        "model_max_length": world.LENGTH,
        "clean_up_tokenization_spaces": False,
        "bos_token": world.VOCABULARY[world.BOS],
        "eos_token": world.VOCABULARY[world.END],
        "pad_token": world.VOCABULARY[world.PAD],
        "chat_template": _WORLD_TEMPLATE,
    }
    return {"tokenizer.json": backend.to_str(), "tokenizer_config.json": _json(settings)}


def _json(settings: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in settings.items() if value is not None}, indent=2, sort_keys=True)
