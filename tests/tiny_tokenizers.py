"""Small tokenizers for tests: trained on a few sentences, or made of given pieces, and the folders that hold them."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = (
    "system user assistant model User: Assistant: You are a helpful assistant. You love owls. Today Date: "
    "Continue the numbers 12, 345, 678. What is your favourite animal? My favourite animal is the owl. Hello there! "
) * 3


@dataclasses.dataclass
class Folder:
    """A source whose weights nobody reads."""

    where: str
    config: Mapping[str, Any]
    files: Mapping[str, epath.Path]
    tensors: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    revision: str | None = None

    def read(self, name: str):
        raise KeyError(name)


def byte_level(special: Sequence[str], merged: int = 150) -> Tokenizer:
    """A byte-level BPE tokenizer: ids 0, 1, … are the special tokens, then the 256 bytes, then `merged` merges."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 256 + merged,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    return made


def folder(
    path: epath.Path, backend: Tokenizer | None = None, config: Mapping[str, Any] | None = None, **files
) -> Folder:
    """A folder with this tokenizer.json and other files: `tokenizer_config={…}` (JSON) or `x__jinja="…"` (text)."""
    path.mkdir(parents=True, exist_ok=True)
    if backend is not None:
        backend.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        text = name.endswith("__jinja")
        written = path / (name.replace("__", ".") if text else f"{name}.json")
        written.write_text(content if text else json.dumps(content))
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **(config or {})}))
    return Folder("the/folder", config or {}, {entry.name: entry for entry in epath.Path(path).iterdir()})


def fields(tokens: Sequence[str], **changed: Any) -> dict[str, Any]:
    """A GGUF file's tokenizer fields: byte-level, without merges, nothing special."""
    plain = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": list(tokens),
        "token_types": [1] * len(tokens),
        "scores": None,
        "merges": [],
        "chat_template": None,
    }
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "eot_token_id", "pad_token_id", "unk_token_id"))
    return plain | ids | dict.fromkeys(("add_bos", "add_eos", "add_space_prefix")) | changed


@dataclasses.dataclass
class Gguf(Folder):
    """A source with the tokenizer fields of a GGUF file."""

    held: dict[str, Any] = dataclasses.field(default_factory=dict)

    def tokenizer_fields(self) -> dict[str, Any]:
        return self.held


def gguf(held: dict[str, Any], config: Mapping[str, Any] | None = None) -> Gguf:
    """A GGUF source with these tokenizer fields."""
    return Gguf("the.gguf", config or {}, {}, held=held)
