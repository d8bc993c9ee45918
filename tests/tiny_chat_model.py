"""A tiny checkpoint that speaks: random Llama weights of `hf_tiny`, a byte-level tokenizer and a chat template."""

import functools
import json
from pathlib import Path
from unittest import mock

import hf_tiny
import tiny_tokenizers

SPECIAL = ("<bos>", "<eos>", "<turn>", "<end>")
VOCAB = 432  # rows of the embedding: more than the tokenizer has ids, as usual

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<turn>{{ message.role + '\\n' + message.content }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
# As Gemma's: no turn for a system prompt, and words of its own for whoever gives one.
REFUSING = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    + TEMPLATE.removeprefix("{{ bos_token }}")
)


def write(folder: Path, template: str | None = TEMPLATE, vocab: int = VOCAB) -> Path:
    """Write the checkpoint and its tokenizer, and give the folder."""
    model = functools.partial(hf_tiny.FAMILIES["llama"], vocab_size=vocab, max_position_embeddings=1024)
    with mock.patch.dict(hf_tiny.FAMILIES, {"chat": model}):
        hf_tiny.write("chat", folder)
    backend = tiny_tokenizers.byte_level(SPECIAL)
    assert backend.get_vocab_size() <= VOCAB
    backend.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": True}
    settings = roles if template is None else {**roles, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
