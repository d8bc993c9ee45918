"""The tokenizer of a GGUF file's metadata, built in the `tokenizers` library.

The metadata have the vocabulary and the merges (or scores) in full, but only a name for how text is split into words
and normalized before. What the names mean is written here as the models' own tokenizer.json files have it.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from subjax.errors import UsageError

if TYPE_CHECKING:
    import tokenizers

_SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # types of tokens

# The split into words that GPT-4's tokenizer brought up; the families differ in how many digits make a word.
_WORDS_4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{digits}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Words change where the case does: Mistral's since NeMo.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class _Words:
    """How a byte-level tokenizer makes the words that it then merges bytes in."""

    regex: str | None = None  # None: GPT-2's, which the library's ByteLevel has
    lone_digits: bool = False  # every digit is cut out before the regex sees the text
    compose: bool = False  # Unicode's composed form (NFC) first
    whole: bool = False  # a word that is in the vocabulary is one token, whatever the merges say


# By `tokenizer.ggml.pre`. Each as in the tokenizer.json of the models that llama.cpp's converter names so.
_WORDS = {
    "gpt-2": _Words(),
    "olmo": _Words(compose=True),  # OLMo 1 and GPT-NeoX, whose tokenizer it is (Pythia)
    "smollm": _Words(lone_digits=True),
    "llama-bpe": _Words(_WORDS_4.replace("{digits}", "{1,3}"), whole=True),  # Llama 3
    "dbrx": _Words(_WORDS_4.replace("{digits}", "{1,3}")),  # OLMo 2
    "qwen2": _Words(_WORDS_4.replace("{digits}", ""), compose=True),  # and Qwen 2.5 and 3
    "tekken": _Words(_WORDS_TEKKEN, whole=True),
}


def build(fields: Mapping[str, Any], where: str) -> "tokenizers.Tokenizer":
    """The tokenizer that the metadata describe, with their special tokens.

    Args:
        fields: with the keys of `subjax.models.gguf_file.GgufSource.tokenizer_fields`.
        where: the file as the user named it, for messages.

    Raises:
        UsageError: it is of a kind or splits words in a way that we do not know, or is damaged.
    """
    import tokenizers

    tokens, types = fields["tokens"], _types(fields)
    builders = {"gpt2": _byte_level, "llama": _sentence_pieces}
    if fields["model"] not in builders:
        raise UsageError(
            f"{where}: its tokenizer is of the kind {fields['model']!r}; of GGUF files we read 'gpt2' (byte-level BPE) "
            "and 'llama' (SentencePiece BPE): give the model as a Hugging Face folder"
        )
    if fields["model"] == "gpt2" and fields["pre"] not in _WORDS:
        raise UsageError(
            f"{where}: its tokenizer splits words in the way {fields['pre']!r} (tokenizer.ggml.pre), which is none of "
            f"{', '.join(_WORDS)}; give the model as a Hugging Face folder"
        )
    if len(types) != len(tokens):
        raise UsageError(f"{where}: {len(tokens)} tokens but {len(types)} types of tokens; fetch the file again")
    for role in ("bos", "eos", "eot", "pad", "unk"):
        number = fields[f"{role}_token_id"]
        if number is not None and not 0 <= number < len(tokens):
            raise UsageError(f"{where}: its {role} token is id {number} of {len(tokens)} ids; fetch the file again")
    try:
        backend = builders[fields["model"]](fields, tokens, types)
    except Exception as error:  # the library raises nothing narrower where merges do not fit the vocabulary
        first = str(error).partition("\n")[0]
        raise UsageError(f"{where}: its tokenizer is damaged ({first}); fetch the file again") from error
    held = backend.get_vocab(with_added_tokens=False)
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [token for token, of in zip(tokens, types, strict=True) if of == wanted and token in held]
        backend.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False) for token in added])
    return backend


def control(fields: Mapping[str, Any]) -> list[int]:
    """The ids that stand for no text."""
    return [i for i, of in enumerate(_types(fields)) if of in (_UNKNOWN, _CONTROL, _UNUSED)]


def _types(fields: Mapping[str, Any]) -> Sequence[int]:
    return fields["token_types"] or [_NORMAL] * len(fields["tokens"])


def _byte_level(fields: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> "tokenizers.Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    words = _WORDS[fields["pre"]]
    merges = [tuple(merge.split(" ")) for merge in fields["merges"] or ()]
    backend = Tokenizer(models.BPE(dict(_numbered(tokens)), merges, ignore_merges=words.whole))
    if words.compose:
        backend.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words.regex is None)
    if words.regex is not None:
        splits = [pre_tokenizers.Split(Regex(words.regex), behavior="isolated"), byte_level]
    else:
        splits = [*([pre_tokenizers.Digits(individual_digits=True)] if words.lone_digits else []), byte_level]
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_pieces(fields: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> "tokenizers.Tokenizer":
    """SentencePiece's BPE in the `tokenizers` library, as the published files of Llama 2, Mistral and Gemma have it."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    # The converter writes runs of spaces as they are in a text; the merges need them as they are in the vocabulary.
    tokens = [_SPACE * len(token) if token.strip(" ") == "" else token for token in tokens]
    unknown = fields["unk_token_id"]
    backend = Tokenizer(
        models.BPE(
            dict(_numbered(tokens)),
            _merges_by_score(tokens, types, fields["scores"] or [-i for i in range(len(tokens))]),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    begins = fields["add_space_prefix"] is not False  # SentencePiece's default; Gemma has it off
    replace = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if begins else replace
    strip = [decoders.Strip(" ", 1, 0)] if begins else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges_by_score(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that give SentencePiece's BPE: it joins the two neighbours whose joined piece scores best.

    User-defined pieces are found before anything is joined, so theirs come first. Control tokens are never joined to.
    """
    number = {token: i for i, token in enumerate(tokens) if types[i] in (_NORMAL, _USER_DEFINED)}
    order = sorted(number, key=lambda token: (types[number[token]] == _NORMAL, -scores[number[token]], number[token]))
    merges = []
    for token in order:
        # Where a piece can be made in several ways, the longest left part goes first, as in transformers' converter.
        for cut in range(len(token) - 1, 0, -1):
            if token[:cut] in number and token[cut:] in number:
                merges.append((token[:cut], token[cut:]))
    return merges


def _numbered(tokens: Sequence[str]) -> Iterable[tuple[str, int]]:
    return ((token, i) for i, token in enumerate(tokens))
