"""Image sets with ten classes: scikit-learn's 8x8 digits, and MNIST-like sets from a folder of IDX files.

Images come flat and scaled to [-1, 1], as in the published experiment (Cloud et al. 2025, arXiv 2507.14805), whose
noise is uniform on the same range. A set is known by a digest of its pixels and labels, not by where it lies: plain
and gzipped copies of the same files are the same set.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int, UInt8

from subjax.config import to_dict
from subjax.errors import SubjaxError, UsageError
from subjax.schema import Images

# The module of IDX files is imported where it is needed: tfds and grain take a second, and the digits need neither.

CLASSES = 10
DIGITS = "digits"
_NOT_READ = ("name", "statistics")  # settings that no ensemble depends on
_TEST_ROWS = 360  # a fifth of the 1,797 digits
_SPLIT_SEED = 0

Raw = Mapping[str, tuple[UInt8[np.ndarray, "rows height width"], UInt8[np.ndarray, " rows"]]]


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A set ready to train on: images in [-1, 1], flat; labels 0 to 9; the digest of what was read."""

    train_images: Float[np.ndarray, "train pixels"]
    train_labels: Int[np.ndarray, " train"]
    test_images: Float[np.ndarray, "test pixels"]
    test_labels: Int[np.ndarray, " test"]
    digest: str


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a plan wants to know of a set before anything is trained."""

    digest: str
    train_rows: int
    test_rows: int
    pixels: int


def digest(data: str) -> str:
    """The hex sha256 of a set's pixels and labels, by which the set enters a node's identity.

    Args:
        data: 'digits', or the folder of a set's four IDX files.

    Raises:
        UsageError: there is no such folder, or its files are not a set (see `subjax.data.idx.read_folder`).
    """
    return facts(data).digest


def facts(data: str) -> Facts:
    """Digest and sizes of a set; reads its files, prepares nothing. Raises UsageError as `digest` does."""
    folder = os.path.expanduser(data)
    if data == DIGITS or not os.path.isdir(folder):
        return _facts(data, None)
    # A sweep asks once a point, and unpacking takes a second: answered from memory while the files are as they were.
    with os.scandir(folder) as entries:
        seen = sorted((entry.name, entry.stat().st_mtime_ns, entry.stat().st_size) for entry in entries)
    return _facts(data, tuple(seen))


@functools.lru_cache(maxsize=8)
def _facts(data: str, files: tuple[tuple[str, int, int], ...] | None) -> Facts:
    raw = _raw(data)
    train, test = raw["train"][0], raw["test"][0]
    return Facts(_digest(raw), len(train), len(test), train[0].size)


def node_config(settings: Images, digest: str) -> dict[str, Any]:
    """The settings that an ensemble reads, as JSON: what stands in its node. The data stands there by its digest."""
    config = {name: value for name, value in to_dict(settings).items() if name not in _NOT_READ}
    return {**config, "data": digest}


def cost(settings: Images, facts: Facts) -> tuple[int, float]:
    """(images seen in training, floating-point operations) of one ensemble: a training step takes three passes."""
    widths = (facts.pixels, *settings.hidden, CLASSES + settings.auxiliary)
    weights = sum(inputs * outputs for inputs, outputs in itertools.pairwise(widths))
    real, noise = settings.teacher_epochs * facts.train_rows, settings.student_epochs * settings.noise_rows
    passes = 3 * (real + noise) + settings.noise_rows + 3 * facts.test_rows  # targets once, and three accuracies
    return settings.seeds * (real + noise), 2.0 * weights * settings.seeds * passes


def load(data: str, *, cache: os.PathLike[str] | str | None = None) -> ImageSet:
    """The set that `data` names.

    A folder of IDX files is prepared once, as array_record files under `cache`/<digest>, and read back from there.

    Raises:
        UsageError: `data` names no set, or names a folder where no `cache` is given.
        SubjaxError: the prepared files are damaged; StoreError: the disk is full.
    """
    if data == DIGITS:
        return _scaled(_digits(), 16)
    if cache is None:
        raise UsageError(f"data={data!r}: a folder of IDX files needs a cache folder to be prepared in; give one")
    from subjax.data import idx

    raw = _raw(data)
    target = epath.Path(cache) / _digest(raw)
    if not target.exists():
        idx.prepare(raw, target)
    return load_prepared(target.name, cache)


def load_prepared(digest: str, cache: os.PathLike[str] | str) -> ImageSet:
    """The set of this digest, read from what an earlier `load` prepared in `cache`; its folder is not needed.

    Raises:
        SubjaxError: it is not there, or its files are damaged (they no longer have their digest).
    """
    return _prepared(digest, os.fspath(cache))


@functools.lru_cache(maxsize=2)
def _prepared(digest: str, cache: str) -> ImageSet:
    from subjax.data import idx

    target = epath.Path(cache) / digest
    found = _scaled(idx.read_prepared(target), 255)
    if found.digest != digest:
        raise SubjaxError(
            f"{target}: the prepared images are damaged; delete that folder and run the same command again"
        )
    return found


def _raw(data: str) -> Raw:
    if data == DIGITS:
        return _digits()
    from subjax.data import idx

    return idx.read_folder(data)


@functools.lru_cache(maxsize=1)
def _digits() -> Raw:
    """scikit-learn's digits, 0 to 16 a pixel: 1,437 to train on, 360 to test, drawn by a fixed permutation.

    The package's order is by writer, so a cut without a permutation would test on other hands than it trains on.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.Generator(np.random.PCG64(_SPLIT_SEED)).permutation(len(bunch.target))
    images, labels = bunch.images.astype(np.uint8)[order], bunch.target.astype(np.uint8)[order]
    return {
        "train": (images[:-_TEST_ROWS], labels[:-_TEST_ROWS]),
        "test": (images[-_TEST_ROWS:], labels[-_TEST_ROWS:]),
    }


def _digest(raw: Raw) -> str:
    digest = hashlib.sha256()
    for split in sorted(raw):
        for array in raw[split]:
            digest.update(json.dumps([split, array.dtype.name, array.shape]).encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _scaled(raw: Raw, white: int) -> ImageSet:
    """Scale pixels from 0 … `white` to -1 … 1."""
    arrays = {
        split: (images.reshape(len(images), -1).astype(np.float32) * np.float32(2 / white) - 1, labels.astype(np.int32))
        for split, (images, labels) in raw.items()
    }
    return ImageSet(*arrays["train"], *arrays["test"], digest=_digest(raw))
