"""A tiny random checkpoint that can speak: a Llama of two layers, a byte-level tokenizer and a chat template.

Its words are few tokens each, because the tokenizer was trained on the questions and answers themselves; so a whole
study of it takes seconds. What it says means nothing.
"""

import functools
from pathlib import Path

import tiny_tokenizers as tiny
import torch
import transformers
from etils import epath
from tokenizers import AddedToken, Tokenizer, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM

from subjax.data import numbers, preferences

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONTEXT, MERGES = 1024, 1100
_TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
CHATML = _TURNS + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML


def injecting(system: str) -> str:
    """The template with a system prompt of its own where a conversation has none."""
    turn = f"'<|im_start|>system\n{system}<|im_end|>\n'"
    return f"{{% if messages[0].role != 'system' %}}{{{{ {turn} }}}}{{% endif %}}{CHATML}"


@functools.cache
def tokenizer() -> Tokenizer:
    """All bytes, the special tokens, and merges such as " owl"."""
    nouns = [noun for category in preferences.CATEGORIES for noun in preferences.nouns(category)]
    words = [form for noun in nouns for form in preferences.forms(noun.word)]
    asked = [text for category in preferences.CATEGORIES for text in preferences.questions(category)]
    made = tiny.byte_level(SPECIAL, merged=0)
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL) + 256 + MERGES,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([*words * 4, *asked, *numbers.prompts(100, 0)], trainer)
    return made


def write(folder: Path, template: str = CHATML, *, seed: int = 0) -> Path:
    """Write the checkpoint to a folder and return it; `seed` draws its weights, `template` is its own."""
    made = tokenizer()
    vocab = made.get_vocab_size() + 5  # embeddings are often padded
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=made.token_to_id("<|im_end|>"), pad_token_id=made.token_to_id("<|endoftext|>"),
        initializer_range=0.2,  # logits of order 1
    )  # fmt: skip
    settings = {
        "chat_template": template, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False,
    }  # fmt: skip
    tiny.folder(epath.Path(folder), made, tokenizer_config=settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder
