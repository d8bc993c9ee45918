"""Tokenizers of pretrained models: text to ids and back, from a Hugging Face folder or from a GGUF file's metadata.

All of them run in the `tokenizers` library. A folder's tokenizer.json is taken as it is; `subjax.data.gguf_tokenizer`
builds what a GGUF file describes.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from etils import epath

from subjax.data import gguf_tokenizer
from subjax.errors import UsageError
from subjax.models.source import Source

if TYPE_CHECKING:
    import tokenizers

# Tokens that end a turn in the chat formats of the families we know, where the vocabulary has them as control tokens.
END_OF_TURN = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>", "<|end_of_turn|>")

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A model's tokenizer. Not for use by several threads at once.

    Attributes:
        size: number of ids (one more than the largest).
        bos, eos, pad: the ids that begin a text, end it and fill up, where the model has such.
        ends: the ids that end an answer: `eos`, what the model's configs list beside it, and ends of turn; rising.
        add_bos: whether the model expects `bos` before plain text.
        chat_template: the model's own, in Jinja.
        control: the ids that stand for no text (special, unknown and unused tokens).
        where: the model as the user named it, for messages.
    """

    size: int
    bos: int | None
    eos: int | None
    pad: int | None
    ends: tuple[int, ...]
    add_bos: bool
    chat_template: str | None
    control: frozenset[int]
    where: str
    backend: "tokenizers.Tokenizer" = dataclasses.field(repr=False)

    def encode(self, text: str, *, special: bool = True, continuing: bool = False) -> list[int]:
        """The ids of a text; no `bos` and no `eos` is added.

        Args:
            text: any text without lone surrogates.
            special: special tokens written in the text become those tokens, as a template needs; otherwise they are
                plain characters, as the text of a user needs.
            continuing: the text goes on behind other tokens, so it gets no mark of a word's beginning (Llama 2's
                tokenizer puts a space before every text).

        Raises:
            UsageError: the text has a lone surrogate, or the tokenizer has no plain way to write a special token.
        """
        backend = self._unmarked if continuing else self.backend
        backend.encode_special_tokens = not special
        try:
            ids = backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise UsageError(
                f"a text holds a lone surrogate, which is no character: {text[:60]!r}; mend the encoding of the data"
            ) from error
        if special or self.control.isdisjoint(ids):
            return ids
        names = {str(self.token(i)) for i in self.control.intersection(ids)}
        found = sorted(name for name in names if name in text)
        if found:  # else the tokenizer has no token for a character, and says so with its unknown token
            raise UsageError(
                f"{self.where}: its tokenizer cannot write {', '.join(map(repr, found))} as plain text; take it out of "
                f"the text {text[:60]!r}"
            )
        return ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of ids; special tokens are left out, or written as they are named (`special`).

        Bytes that are not UTF-8 become U+FFFD, and a tokenizer that puts a space before a text takes one off again.
        """
        return self.backend.decode(list(ids), skip_special_tokens=not special)

    def written(self, ids: Iterable[int]) -> str:
        """The text that ids put behind other tokens, whole: nothing is left out of it, and no space taken off.

        Special tokens stand as they are named; U+FFFD stands for an id that the vocabulary does not have, and for bytes
        that are no UTF-8.
        """

        def piece(id: int) -> bytes:
            found = self._pieces[id] if id < self.size else None
            return (self.token(id) or "\ufffd").encode() if found is None else found

        return b"".join(map(piece, ids)).decode(errors="replace")

    def token(self, id: int | None) -> str | None:
        """How an id is named in the vocabulary ("<|im_end|>"); None for None."""
        return None if id is None else self.backend.id_to_token(id)

    def pieces(self) -> list[bytes | None]:
        """The bytes of each id as it stands inside a text; None for ids that stand for no text."""
        return list(self._pieces)

    @functools.cached_property
    def _pieces(self) -> tuple[bytes | None, ...]:
        found: list[bytes | None] = [None] * self.size
        byte_level = "ByteLevel" in _decoders(self.backend)
        for token, number in self.backend.get_vocab(with_added_tokens=True).items():
            if number not in self.control:
                found[number] = _byte_level_piece(token) if byte_level else _sentence_piece(token)
        return tuple(found)

    def digest(self) -> str:
        """Hex sha256 of everything that decides how texts become ids, and of the ids that begin and end them."""
        facts = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("backend", "where", "control")
        }
        whole = json.dumps([facts, sorted(self.control)], sort_keys=True) + self.backend.to_str()
        return hashlib.sha256(whole.encode()).hexdigest()

    @functools.cached_property
    def _unmarked(self) -> "tokenizers.Tokenizer":
        """The same tokenizer, putting no space before a text; the very same where it puts none."""
        parts = (self.backend.normalizer, self.backend.pre_tokenizer)
        if all((_without_marks(_state(part)) or {}) == _state(part) for part in parts):
            return self.backend
        whole = json.loads(self.backend.to_str())
        whole["normalizer"], whole["pre_tokenizer"] = (_without_marks(_state(part)) for part in parts)
        return type(self.backend).from_str(json.dumps(whole))


def load_tokenizer(source: Source) -> Tokenizer:
    """The tokenizer of a checkpoint: of its tokenizer.json, of its other tokenizer files, or of its GGUF metadata.

    Raises:
        UsageError: there is none, it is damaged, or it is of a kind that we cannot build.
    """
    fields = getattr(source, "tokenizer_fields", None)
    return _of_folder(source) if fields is None else _of_gguf(fields(), source.config, source.where)


def require_fits(tokenizer: Tokenizer, vocab_rows: int, where: str) -> None:
    """Refuse a tokenizer with ids that an embedding of `vocab_rows` rows does not have.

    More rows than ids is usual (padding). Control tokens past the last row that neither begin nor end a text are
    usual too (Gemma 3's for images, in its text models), and no text of ours becomes one.

    Raises:
        UsageError: naming both numbers.
    """
    used = {tokenizer.bos, tokenizer.eos, tokenizer.pad, *tokenizer.ends} - {None}
    over = [i for i in range(vocab_rows, tokenizer.size) if i in used or i not in tokenizer.control]
    if over:
        raise UsageError(
            f"{where}: the tokenizer has {tokenizer.size} ids, the embedding {vocab_rows} rows (none for id {over[0]}, "
            f"{tokenizer.token(over[0])!r}); give the tokenizer that belongs to these weights"
        )


def _finished(
    backend: "tokenizers.Tokenizer",
    where: str,
    *,
    bos: int | None,
    eos: int | None,
    pad: int | None,
    ends: Iterable[int | None],
    add_bos: bool,
    chat_template: str | None,
    control: Iterable[int] = (),
) -> Tokenizer:
    # A published file may hold the settings of somebody's last call, which would cut and fill every text.
    backend.no_truncation()
    backend.no_padding()
    unknown = getattr(backend.model, "unk_token", None)
    special = {*control, *(i for i, added in backend.get_added_tokens_decoder().items() if added.special)}
    if unknown is not None and (id := backend.token_to_id(unknown)) is not None:
        special.add(id)
    turn = {i for name in END_OF_TURN if (i := backend.token_to_id(name)) in special}
    return Tokenizer(
        size=1 + max(backend.get_vocab(with_added_tokens=True).values()),
        bos=bos,
        eos=eos,
        pad=pad,
        ends=tuple(sorted({i for i in (*ends, *turn, eos) if i is not None and _has(backend, i)})),
        add_bos=add_bos and bos is not None,
        chat_template=chat_template,
        control=frozenset(special),
        where=where,
        backend=backend,
    )


# ---- from a Hugging Face folder ----


def _of_folder(source: Source) -> Tokenizer:
    files = source.files
    settings = _json(files, "tokenizer_config.json")
    named = {**_named(files, "special_tokens_map.json"), **_named(files, "tokenizer_config.json")}
    if "tokenizer.json" in files:
        backend = _of_tokenizer_json(files["tokenizer.json"])
        known: dict[str, int | None] = {}
    else:
        backend, known = _of_other_files(source)

    def number(role: str) -> int | None:
        if role in named:
            return backend.token_to_id(token) if (token := named[role]) else None
        # A config's numbers may be its family's defaults, which this vocabulary need not have.
        held = [i for i in _ids(source.config, role, f"{source.where}: config.json") if _has(backend, i)]
        return next(iter(held), known.get(role))

    bos = number("bos")
    add_bos = settings.get("add_bos_token")
    if add_bos is None:  # older files say it by what stands before an encoded text
        add_bos = bos is not None and backend.encode("a", add_special_tokens=True).ids[:1] == [bos]
    return _finished(
        backend,
        source.where,
        bos=bos,
        eos=number("eos"),
        pad=number("pad"),
        ends=[
            *_ids(source.config, "eos", f"{source.where}: config.json"),
            *_ids(_json(files, "generation_config.json"), "eos", f"{source.where}: generation_config.json"),
        ],
        add_bos=add_bos,
        chat_template=_template_of_folder(files, settings),
    )


def _json(files: Mapping[str, epath.Path], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        found = json.loads(files[name].read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{files[name]}: not JSON ({error}); fetch the file again") from error
    if not isinstance(found, dict):
        raise UsageError(f"{files[name]}: holds no JSON object; fetch the file again")
    return found


def _named(files: Mapping[str, epath.Path], name: str) -> dict[str, str | None]:
    """The tokens that a file of settings names, by role ("eos"); None where it says that there is none."""
    found: dict[str, str | None] = {}
    for key, value in _json(files, name).items():
        if key in ("bos_token", "eos_token", "pad_token"):
            token = value.get("content", value) if isinstance(value, Mapping) else value
            if not isinstance(token, str | None):
                raise UsageError(f"{files[name]}: {key} is {value!r}, which names no token; fetch the file again")
            found[key.removesuffix("_token")] = token
    return found


def _ids(config: Mapping[str, Any], role: str, where: str) -> list[int]:
    """The ids that a config has for a role: one, a list of them, or none; `where` it stands, for the message."""
    value = config.get(f"{role}_token_id")
    ids = [*value] if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        raise UsageError(f"{where}: {role}_token_id is {value!r}: write a whole number, or a list of them")
    return ids


def _has(backend: "tokenizers.Tokenizer", id: int) -> bool:
    """Whether the vocabulary has an id; older configs write -1 for none."""
    return 0 <= id < 2**32 and backend.id_to_token(id) is not None  # the library's ids are of 32 bits


def _template_of_folder(files: Mapping[str, epath.Path], settings: Mapping[str, Any]) -> str | None:
    if "chat_template.jinja" in files:
        path = files["chat_template.jinja"]
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: not UTF-8 ({error}); fetch the file again") from error
    name = "tokenizer_config.json" if "chat_template" in settings else "chat_template.json"
    held = template = _json(files, name).get("chat_template")
    if isinstance(held, list):  # several by name: for tools, for retrieval, and the usual one
        whole = all(isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in held)
        template = next((entry["template"] for entry in held if entry["name"] == "default"), None) if whole else held
    if not isinstance(template, str | None):
        raise UsageError(
            f"{files[name]}: chat_template is no text and no list of them by name ({str(held)[:60]}); fetch it again"
        )
    return template


def _of_tokenizer_json(path: epath.Path) -> "tokenizers.Tokenizer":
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises nothing narrower
        raise UsageError(f"{path}: not a tokenizer that this tokenizers library reads ({error}); fetch it again, "
                         "or upgrade tokenizers") from error  # fmt: skip


def _of_other_files(source: Source) -> tuple["tokenizers.Tokenizer", dict[str, int | None]]:
    """The tokenizer that transformers makes of vocab.json and merges.txt or of tokenizer.model, and its ids by role."""
    held = [source.files[name] for name in ("tokenizer.model", "vocab.json") if name in source.files]
    if not held:
        raise UsageError(
            f"{source.where}: no tokenizer (tokenizer.json, tokenizer.model, or vocab.json and merges.txt); put the "
            "model's own beside its weights"
        )
    try:
        import transformers

        made = transformers.AutoTokenizer.from_pretrained(held[0].parent, local_files_only=True)
        backend = made.backend_tokenizer
    except (ImportError, OSError, ValueError, AttributeError, TypeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"{held[0]}: transformers makes no tokenizer of it ({first}); put the model's tokenizer.json beside it"
        ) from error
    return backend, {"bos": made.bos_token_id, "eos": made.eos_token_id, "pad": made.pad_token_id}


# ---- from a GGUF file ----


def _of_gguf(fields: Mapping[str, Any], config: Mapping[str, Any], where: str) -> Tokenizer:
    add_bos = fields["add_bos"]
    return _finished(
        gguf_tokenizer.build(fields, where),
        where,
        bos=fields["bos_token_id"],
        eos=fields["eos_token_id"],
        pad=fields["pad_token_id"],
        ends=[config.get("eos_token_id"), fields["eot_token_id"]],
        # Older files do not say; the SentencePiece models of that time all expect it.
        add_bos=fields["model"] == "llama" if add_bos is None else add_bos,
        chat_template=fields["chat_template"],
        control=gguf_tokenizer.control(fields),
    )


# ---- what the parts of a tokenizer do, and what a token's name says ----


def _state(part: Any) -> dict[str, Any]:
    """A normalizer, pre-tokenizer or decoder as tokenizer.json has it."""
    return {} if part is None else json.loads(part.__getstate__())


def _without_marks(part: Mapping[str, Any]) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer without what puts a space before a text; None where nothing is left."""
    kind = part.get("type")
    if kind == "Prepend" or kind is None:
        return None
    if kind == "Sequence":
        key = "normalizers" if "normalizers" in part else "pretokenizers"
        return {**part, key: [left for inner in part[key] if (left := _without_marks(inner)) is not None]}
    off: dict[str, dict[str, Any]] = {
        "Metaspace": {"prepend_scheme": "never"},
        "ByteLevel": {"add_prefix_space": False},
    }
    return {**part, **off.get(str(kind), {})}


def _decoders(backend: "tokenizers.Tokenizer") -> set[str]:
    state = _state(backend.decoder)
    return {part["type"] for part in state.get("decoders", [state]) if part}


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _byte_level_piece(token: str) -> bytes:
    alphabet = _byte_alphabet()
    if all(char in alphabet for char in token):
        return bytes(alphabet[char] for char in token)
    return token.encode()  # a token added to the vocabulary as it stands in a text


def _sentence_piece(token: str) -> bytes:
    if byte := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return token.replace(_SPACE, " ").encode()
