"""MNIST-like sets from a folder of IDX files, through a tfds builder of ours and grain, without TensorFlow.

The IDX format: two zero bytes, a type byte (8 is unsigned byte), the number of dimensions, each dimension as a
big-endian 32-bit integer, then the values in C order. A set is four files, plain or gzipped:
{train,t10k}-images-idx3-ubyte and {train,t10k}-labels-idx1-ubyte (a dot before "idx" is taken too).
"""

import contextlib
import gzip
import io
import logging
import math
import secrets
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import grain.python as grain
import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from subjax.errors import SubjaxError, UsageError, one_line
from subjax.files import disk_full, full_error

Split = tuple[UInt8[np.ndarray, "rows height width"], UInt8[np.ndarray, " rows"]]
SPLITS = {"train": "train", "test": "t10k"}  # name of a split -> the beginning of its files' names
_GZIP = b"\x1f\x8b"
_STALE_S = 3600.0  # a preparation takes a minute; one that has lain for an hour was killed
_PAGE = 1000  # rows


def read_folder(folder: str) -> dict[str, Split]:
    """Images and labels of both splits, as the files hold them.

    Raises:
        UsageError: a missing folder or file, a truncated or damaged file, one that is no IDX file of its kind, numbers
            of images and labels that differ, two sizes of images, or labels other than 0 to 9.
    """
    root = epath.Path(folder).expanduser()
    if not root.is_dir():
        raise UsageError(f"data={folder!r}: no such folder; give 'digits' or the folder of a set's four IDX files")
    found: dict[str, Split] = {}
    for split, stem in SPLITS.items():
        images, labels = _read(root, f"{stem}-images", 3), _read(root, f"{stem}-labels", 1)
        if len(images) != len(labels):
            raise UsageError(
                f"data={folder!r}: {len(images)} images and {len(labels)} labels in {stem}-*; take both from one set"
            )
        if labels.size == 0 or labels.max() > 9:
            what = f"the label {labels.max()}" if labels.size else "no images"
            raise UsageError(f"data={folder!r}: {what} in {stem}-*; the experiment wants ten classes, labels 0 to 9")
        found[split] = (images, labels)
    shapes = [images.shape[1:] for images, _ in found.values()]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"data={folder!r}: train images are {shapes[0]}, test images {shapes[1]}; take both from one set"
        )
    return found


def _read(root: epath.Path, stem: str, dimensions: int) -> np.ndarray:
    """The array of the one file `stem`-idxN-ubyte, plain before gzipped."""
    names = [f"{stem}{dot}idx{dimensions}-ubyte{end}" for end in ("", ".gz") for dot in "-."]
    path = next((root / name for name in names if (root / name).exists()), None)
    if path is None:
        raise UsageError(f"data={str(root)!r}: no file {names[0]} or {names[2]}; put the set's four IDX files there")
    try:
        content = path.read_bytes()
        if content.startswith(_GZIP):
            content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{path}: truncated or damaged gzip ({error}); fetch the file again") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error}); mend that first") from error
    magic, size = bytes((0, 0, 8, dimensions)), 4 + 4 * dimensions
    if content[:4] != magic:
        raise UsageError(
            f"{path}: begins with {content[:4].hex()}, an IDX file of its kind with {magic.hex()}; replace it"
        )
    shape = tuple(int(n) for n in np.frombuffer(content[4:size], ">u4", count=len(content[4:size]) // 4))
    if len(content) != size + math.prod(shape) or len(shape) != dimensions:
        wanted = size + math.prod(shape)
        raise UsageError(f"{path}: holds {len(content)} bytes where its header says {wanted}; fetch the file again")
    return np.frombuffer(content, np.uint8, offset=size).reshape(shape)


class IdxImages(tfds.core.GeneratorBasedBuilder):
    """A tfds data set of 'image' and 'label' over a folder of IDX files, in the array_record format."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, splits: Mapping[str, Split] | None = None, **kwargs: Any):
        """`splits` holds what `read_folder` gave; it is needed to prepare the set, and not to read a prepared one."""
        self._splits = dict(splits or {})
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {"image": tfds.features.Image(shape=(None, None, 1)), "label": tfds.features.ClassLabel(num_classes=10)}
        )
        about = "Images and labels of a folder of IDX files."
        # In the files' own order, because each training run shuffles by a seed of its own.
        return tfds.core.DatasetInfo(builder=self, description=about, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, dict]]]:
        return {split: self._generate_examples(*arrays) for split, arrays in self._splits.items()}

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict]]:
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG")
            png.seek(0)
            yield row, {"image": png, "label": int(label)}  # a numpy image would be encoded by TensorFlow


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep tfds from writing to the terminal that belongs to the command: its lines, bars and advice on packages."""
    tfds.disable_progress_bar()
    absl, level = logging.getLogger("absl"), logging.getLogger("absl").level
    absl.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl.setLevel(level)


def prepare(splits: Mapping[str, Split], target: epath.Path) -> None:
    """Write the set as array_record files under `target`, which appears whole or not at all.

    Of two that prepare one target at once both succeed: the first to end puts its folder there. Raises StoreError where
    the disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for old in target.parent.glob(f"{target.name}.tmp-*"):
        if time.time() - old.stat().mtime > _STALE_S:
            shutil.rmtree(old, ignore_errors=True)
    scratch = target.parent / f"{target.name}.tmp-{secrets.token_hex(4)}"
    try:
        scratch.mkdir()
        with _quiet():
            # Without this the builder asks Google's bucket first whether it has the set prepared.
            config = tfds.download.DownloadConfig(try_download_gcs=False)
            IdxImages(splits=splits, data_dir=scratch).download_and_prepare(download_config=config)
        try:
            scratch.rename(target)
        except OSError:
            if not target.exists():
                raise
    except Exception as error:
        if disk_full(error):
            raise full_error(target) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_prepared(target: epath.Path) -> dict[str, Split]:
    """Images and labels of both splits of a prepared set, in an order that is the same for one prepared folder.

    Raises:
        SubjaxError: the prepared files are damaged or incomplete.
    """
    try:
        with _quiet():
            return {split: _read_split(split, target) for split in SPLITS}
    except Exception as error:  # array_record, tfds and PIL each have their own errors for damaged bytes
        line = one_line(error)[:120]
        raise SubjaxError(
            f"{target}: the prepared images cannot be read ({line}); delete that folder and run again"
        ) from error


class _Pages(grain.RandomAccessDataSource):
    """A tfds source seen as pages of rows: one call of the source a page, which costs a third of one call a row."""

    def __init__(self, source: Any):
        self._source = source

    def __len__(self) -> int:
        return -(-len(self._source) // _PAGE)

    def __getitem__(self, page: Any) -> Split:
        rows = range(int(page) * _PAGE, min((int(page) + 1) * _PAGE, len(self._source)))
        records = self._source.__getitems__(rows)
        images = np.stack([record["image"][..., 0] for record in records])
        return images, np.array([record["label"] for record in records], np.uint8)


def _read_split(split: str, target: epath.Path) -> Split:
    pages = grain.MapDataset.source(
        _Pages(tfds.data_source("idx_images", split=split, data_dir=target, download=False))
    )
    # By index: the iterator of a MapDataset reads ahead in threads, which is only overhead for a source this light.
    images, labels = zip(*(pages[page] for page in range(len(pages))), strict=True)
    return np.concatenate(images), np.concatenate(labels)
