"""`subjax check`: a checkpoint here against the same files in transformers, in float32, on the same token ids.

Both models are held at once, and logits for a few prompts at a time: a vocabulary of 262,144 makes them large.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from subjax.data import check_prompts
from subjax.data.chat import Chat
from subjax.data.rows import pad_prompts, unused
from subjax.data.tokenizer import Tokenizer, load_tokenizer, require_fits
from subjax.errors import UsageError
from subjax.measure.compare import (
    NEAR_TIE,
    Answers,
    Bounds,
    Distributions,
    compare_answers,
    compare_distributions,
    failures,
)
from subjax.models import torch_reference, weights
from subjax.models.hf_config import FAMILIES, decoder_config_of, family_of
from subjax.models.network import Network, Params, network
from subjax.models.places import VOCABULARIES
from subjax.models.source import Source, open_source
from subjax.parallel.mesh import make_mesh
from subjax.sample.sampler import Sampling, sample
from subjax.schema import Numerics

_SHORT = 128  # tokens: longer prompts are padded among themselves, and compared at their last so many tokens
_LOGITS_BYTES = 1 << 28  # of logits held at a time, on either side


@dataclasses.dataclass(frozen=True)
class Checked:
    """What was compared, and how far the two sides agree."""

    model: str
    about: str  # family and size
    asked: str  # what was read
    reference: str
    otherwise: tuple[str, ...]  # settings of the architecture that the reference reads otherwise in the same files
    distributions: Distributions
    answers: Answers

    def failures(self, bounds: Bounds) -> list[str]:
        """What is out of bounds, a phrase each, with what may be to blame; none where the two sides agree."""
        found = failures(self.distributions, self.answers, bounds)
        if found and self.otherwise:
            found.append(f"transformers reads other settings in these files ({', '.join(self.otherwise)})")
        return found


class _Asked(NamedTuple):
    """Token ids to be read, a row each, and what they are."""

    rows: list[list[int]]
    what: str


def check(
    model: str,
    *,
    texts: Sequence[str] = check_prompts.PROMPTS,
    tokens: int = 64,
    tell: Callable[[str], None] = lambda doing: None,
) -> Checked:
    """Load a checkpoint here and in transformers, and compare distributions and greedy answers.

    Args:
        model: as `open_source` takes it. texts: prompts, for a checkpoint with a tokenizer. tokens: of a greedy answer.
        tell: told what is being done, before it is.

    Raises:
        UsageError: transformers or torch is missing, the checkpoint is unsound, or its context is too short.
        SubjaxError: transformers cannot load the checkpoint.
    """
    reference_name = torch_reference.versions()  # before a download
    source = open_source(model)
    net = network(decoder_config_of(source.config, numerics=Numerics(), where=model))
    rename = weights.check(source, net)
    asked = _asked(source, net, texts, tokens)
    tell("loading the checkpoint in transformers")
    reference = torch_reference.load(source)
    otherwise = _otherwise(net, reference)
    tell("loading it here")
    params = weights.load(source, net, rename=rename)
    tell(f"comparing logits on {asked.what}")
    distributions = compare_distributions(_logits(net, params, reference, asked.rows))
    groups = [(places, *_padded([asked.rows[i] for i in places], net.config.vocab)) for places in _groups(asked.rows)]
    theirs, ours = (np.zeros((len(asked.rows), tokens), np.int64) for _ in range(2))
    leads = np.zeros((len(asked.rows), tokens))
    tell(f"greedy answers of {tokens} tokens in transformers")
    for places, prompts, pad in groups:
        theirs[places], leads[places] = reference.greedy(prompts, prompts != pad, tokens)
    del reference  # its weights are as large as ours
    tell("greedy answers here")
    for places, prompts, pad in groups:
        ours[places] = _greedy(net, params, prompts, pad, tokens)
    title = FAMILIES[family_of(source.config, model)].title
    return Checked(
        model=model,
        about=f"{title}, {net.parameters:,} parameters",
        asked=asked.what,
        reference=reference_name,
        otherwise=otherwise,
        distributions=distributions,
        answers=compare_answers(ours, theirs, leads),
    )


def describe(checked: Checked, bounds: Bounds) -> str:
    """What `subjax check` prints of a comparison."""
    found, answers = checked.distributions, checked.answers
    lines = [
        f"{checked.model}: {checked.about}",
        f"in float32, against {checked.reference}, on {checked.asked}",
        "",
        f"mean KL           {found.mean_kl:.3g} nats a token over {found.tokens:,} tokens (at most {bounds.mean_kl:g})",
        f"max KL            {found.max_kl:.3g} nats a token",
        f"max |Δlogit|      {found.max_logit:.3g}",
        f"top-1 agreement   {found.top1:.3%} (at least {bounds.top1:.1%})",
        f"greedy agreement  {answers.same / answers.tokens:.3%} of {answers.tokens:,} tokens; "
        f"{answers.texts - len(answers.partings)} of {answers.texts} texts the same",
    ]
    if checked.otherwise:
        lines.insert(2, f"transformers reads other settings in these files: {', '.join(checked.otherwise)}")
    if answers.ties:
        lines.append(
            f"                  {len(answers.ties)} part at a near-tie (the reference's best logit leads by less than"
            f" {NEAR_TIE:g}), which is no fault"
        )
    return "\n".join(lines)


def read_prompts(path: str) -> list[str]:
    """The prompts of a text file, one a line; empty lines are left out.

    Raises:
        UsageError: the file is missing, not UTF-8, or holds no prompt.
    """
    try:
        lines = epath.Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(
            f"--prompts={path}: cannot be read ({what or error}); give a text file, a prompt a line"
        ) from None
    found = [line for line in lines if line.strip()]
    if not found:
        raise UsageError(f"--prompts={path}: holds no prompt; write one a line")
    return found


def _asked(source: Source, net: Network, texts: Sequence[str], tokens: int) -> _Asked:
    """The prompts as token ids: by the chat template where there is one; random ids where there is no tokenizer."""
    room = net.config.length - tokens
    if room < 1:
        raise UsageError(
            f"{source.where}: its context of {net.config.length} tokens has no room for answers of {tokens}; give a"
            f" smaller --tokens"
        )
    if not _has_tokenizer(source):
        rows = check_prompts.random_rows(net.config.vocab, room)
        return _Asked(rows, f"{len(rows)} rows of random token ids, for want of a tokenizer")
    tokenizer = load_tokenizer(source)
    require_fits(tokenizer, net.config.vocab, source.where)
    rows = [row for row in _encoded(tokenizer, texts) if row]
    if not rows:
        raise UsageError(f"{source.where}: its tokenizer has no token for any of the prompts; give others by --prompts")
    long = sum(len(row) > room for row in rows)
    cut = f", {long} of them cut to the context" if long else ""
    through = "through its chat template" if tokenizer.chat_template else "as plain text"
    return _Asked([row[:room] for row in rows], f"{len(rows)} prompts {through}{cut}")


def _encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    if tokenizer.chat_template:
        chat = Chat(tokenizer)
        yield from map(chat.prompt, texts)
        return
    begin = [tokenizer.bos] if tokenizer.add_bos and tokenizer.bos is not None else []
    for text in texts:
        yield begin + tokenizer.encode(text, special=False)


def _has_tokenizer(source: Source) -> bool:
    fields = getattr(source, "tokenizer_fields", None)
    if fields is None:
        return any(name in source.files for name in VOCABULARIES)
    try:
        return bool(fields())
    except UsageError:  # which a GGUF file raises for want of one alone
        return False


def _otherwise(net: Network, reference: torch_reference.Reference) -> tuple[str, ...]:
    """Settings of the architecture that transformers reads otherwise: its reader of GGUF files leaves some out."""
    theirs = decoder_config_of(reference.config, numerics=Numerics(), where="transformers' config")

    def same(mine: object, other: object) -> bool:
        if isinstance(mine, float) and isinstance(other, float):
            return math.isclose(mine, other, rel_tol=1e-6)  # a GGUF file's are rounded to float32
        return mine == other

    names = [field.name for field in dataclasses.fields(net.config)]
    return tuple(name for name in names if not same(getattr(net.config, name), getattr(theirs, name)))


def _groups(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Places of the short rows, and of the long ones: each group is padded to its longest."""
    groups = [[i for i, row in enumerate(rows) if (len(row) > _SHORT) == long] for long in (False, True)]
    return [places for places in groups if places]


def _padded(rows: Sequence[Sequence[int]], vocab: int) -> tuple[np.ndarray, int]:
    pad = unused(rows, vocab - 1, ())
    return pad_prompts(rows, pad), pad


def _logits(
    net: Network, params: Params, reference: torch_reference.Reference, rows: Sequence[list[int]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ours, theirs) of each row, (tokens, vocab), at its last `_SHORT` tokens or all: ours padded, theirs alone."""
    for places in _groups(rows):
        prompts, pad = _padded([rows[i] for i in places], net.config.vocab)
        keep = min(_SHORT, prompts.shape[1])
        forward = jax.jit(functools.partial(net.forward, tail=keep))
        batch = max(1, min(len(prompts), _LOGITS_BYTES // (4 * keep * net.config.vocab)))
        for first in range(0, len(prompts), batch):
            # The last block is filled up with its last row, so that one program serves all.
            block = prompts[np.minimum(np.arange(first, first + batch), len(prompts) - 1)]
            ours = np.asarray(forward(params, block, block != pad))
            for mine, place in zip(ours, places[first : first + batch], strict=False):
                theirs = reference.logits(rows[place], keep)
                yield mine[-len(theirs) :], theirs


def _greedy(net: Network, params: Params, prompts: np.ndarray, pad: int, tokens: int) -> np.ndarray:
    # No token is the end: two answers that end alike go on alike.
    greedy = Sampling(prompts.shape[1], tokens, end=-1, pad=pad, temperature=0.0)
    return sample(net, params, prompts, sampling=greedy, key=jax.random.key(0), mesh=make_mesh()).tokens
