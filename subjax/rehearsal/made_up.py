"""Chats and prompts of the right lengths, made up, so that those who lay out a run's arrays can lay out a plan's."""

import dataclasses
import functools
from collections.abc import Mapping

from subjax.data.packed import PackedChats, PackedCohort
from subjax.models.architecture import DecoderConfig
from subjax.rehearsal.arrays import Rows
from subjax.sample import reading
from subjax.sample.drawing import Sampling
from subjax.sample.prefixes import common_prefix
from subjax.schema_pretrained import Compute
from subjax.stages import text_tuning
from subjax.train.cohort import Cohort
from subjax.train.losses import Loss, PackedNextToken

STEPS = 256  # whose chats are dealt to packed rows: the longest rows of these are as good as those of all


@dataclasses.dataclass(frozen=True)
class Chats:
    """A next-token term over chats, which each mesh packs in its own way.

    Attributes:
        prefix: tokens that all prompts begin with. lengths: tokens of prompt and answer of some chats, which stand for
            all `count` of them. batch: chats a step.
    """

    name: str
    prefix: int
    lengths: tuple[tuple[int, int], ...]
    count: int
    batch: int
    steps: int

    def made_up(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Chats of these lengths, of which no two have more than the prefix in common."""
        lengths = self.lengths if len(self.lengths) > 1 else self.lengths * 2
        some = [
            ((0,) * min(self.prefix, prompt - 1) + (1 + at,) * max(prompt - self.prefix, 1), (0,) * answer)
            for at, (prompt, answer) in enumerate(lengths)
        ]
        return [some[i % len(some)] for i in range(max(self.count, 2))]


@functools.lru_cache(maxsize=64)
def packed(
    chats: Chats,
    config: DecoderConfig,
    compute: Compute,
    mesh: tuple[int, int, int],
    limit: float | None,
    members: int | None,
) -> Rows:
    """The term as a run would have it, in the largest shape of its steps.

    Args:
        mesh: sizes of (replica, fsdp, tensor). limit: bytes of a device's memory; None on CPU. members: of a cohort.

    Raises:
        UsageError: a chat is longer than the model's context.
    """
    sizes = dict(zip(("replica", "fsdp", "tensor"), mesh, strict=True))
    made = chats.made_up()
    lengths = [len(prompt) + len(answer) for prompt, answer in made] * (members or 1)
    layout = text_tuning.layout(
        config, compute, sizes, limit, lengths, batch=chats.batch, steps=min(chats.steps, STEPS), members=members
    )
    if members is None:
        stream: PackedChats | PackedCohort = PackedChats(made, seed=0, **layout)
    else:
        stream = PackedCohort([{"chats": made, "seed": seed} for seed in range(members)], **layout)
    loss: Loss = PackedNextToken(stream.layout.prefix, stream.layout.lines)
    batch = stream.largest()
    arrays = tuple((name, array.shape, str(array.dtype)) for name, array in batch.items())
    rows = batch["tokens"].size // batch["tokens"].shape[-1]
    return Rows(
        chats.name, 1.0, loss if members is None else Cohort(loss), arrays, rows, batch["tokens"].shape[-1],
        batch["targets"].shape[-1],
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of one call of the sampler.

    Attributes:
        prefix: tokens that all begin with. own: of each prompt that differs, its tokens behind those, and how often it
            is asked.
    """

    prefix: int
    own: tuple[tuple[int, int], ...]

    def plan(self, sampling: Sampling, batch: int, ways: int, on_cpu: bool) -> reading.Layout:
        """How the sampler reads them, for `batch` rows at a time on a mesh whose batch axes are `ways`."""
        made = [
            (0,) * self.prefix + (1 + at,) * length for at, (length, times) in enumerate(self.own) for _ in range(times)
        ]
        return reading.plan(made, sampling, batch, ways, on_cpu)


def prompts_of(prompts: Mapping[tuple[int, ...], int]) -> Prompts:
    """What the sampler sees of prompts and how often each is asked."""
    each = [prompt for prompt, times in prompts.items() for _ in range(times)]
    prefix = len(common_prefix(each))
    return Prompts(prefix, tuple((len(prompt) - prefix, times) for prompt, times in prompts.items()))
