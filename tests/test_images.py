"""Image sets: the digits, IDX folders through tfds and grain, and every way in which such a folder can be wrong."""

import gzip
import shutil

import numpy as np
import pytest
from etils import epath

from subjax import schema
from subjax.data import idx, images
from subjax.errors import SubjaxError, UsageError

# The split and its pixels; each node of the digits has this in its id. If you meant to change it, put the new one here.
DIGITS = "d046a4d1e975"

NAMES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_set(folder: epath.Path, *, zipped: bool = False, dot: str = "-", rows: int = 23) -> dict[str, np.ndarray]:
    """A folder of random pictures, 6 x 5; what was written, by name."""
    draw = np.random.default_rng(5)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for name in NAMES:
        count = rows if name.startswith("train") else 7
        shape = (count, 6, 5) if "images" in name else (count,)
        arrays[name] = draw.integers(0, 256 if "images" in name else 10, shape).astype(np.uint8)
        content, end = idx_bytes(arrays[name]), "-ubyte.gz" if zipped else "-ubyte"
        (folder / f"{name.replace('-idx', dot + 'idx')}{end}").write_bytes(
            gzip.compress(content) if zipped else content
        )
    return arrays


@pytest.fixture
def folder(tmp_path) -> epath.Path:
    path = epath.Path(tmp_path) / "set"
    write_set(path)
    return path


def refused(data) -> str:
    """The one line that refuses `data`; digest and load say the same."""
    with pytest.raises(UsageError) as error:
        images.digest(str(data))
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError) as again:
        images.load(str(data), cache=epath.Path(str(data)).parent / "cache")
    assert str(again.value) == str(error.value)
    return str(error.value)


def test_digits_are_split_scaled_and_known():
    data = images.load("digits")
    assert data.train_images.shape == (1437, 64)
    assert data.test_images.shape == (360, 64)
    assert data.train_images.dtype == np.float32
    assert data.train_images.min() == -1
    assert data.train_images.max() == 1
    # Every class is in both parts, in about its share: the cut is no cut by writer or class.
    for labels in (data.train_labels, data.test_labels):
        shares = np.bincount(labels, minlength=10) / len(labels)
        assert shares.min() > 0.06
        assert shares.max() < 0.14
    assert data.digest == images.digest("digits")
    assert data.digest.startswith(DIGITS), "the digits or their split changed: see the note at DIGITS"


def test_digits_split_parts_nothing_twice():
    from sklearn.datasets import load_digits

    data = images.load("digits")
    both = np.concatenate([data.train_images, data.test_images])
    assert np.array_equal(np.sort(both, 0), np.sort(load_digits().data.astype(np.float32) / 8 - 1, 0))


@pytest.mark.parametrize(("zipped", "dot"), [(False, "-"), (True, "-"), (False, ".")])
def test_folder_comes_back_as_written(tmp_path, zipped, dot):
    path, cache = epath.Path(tmp_path) / "set", epath.Path(tmp_path) / "cache"
    arrays = write_set(path, zipped=zipped, dot=dot)
    data = images.load(str(path), cache=cache)
    assert np.array_equal(data.train_labels, arrays["train-labels-idx1"])
    assert np.array_equal(data.test_labels, arrays["t10k-labels-idx1"])
    expected = arrays["train-images-idx3"].reshape(23, 30) / 127.5 - 1
    np.testing.assert_allclose(data.train_images, expected, atol=1e-6)
    np.testing.assert_allclose(data.test_images, arrays["t10k-images-idx3"].reshape(7, 30) / 127.5 - 1, atol=1e-6)
    assert [child.name for child in cache.iterdir()] == [data.digest]
    assert list((cache / data.digest).glob("*/*/*.array_record-*"))


def test_digest_is_of_content_alone(tmp_path):
    root = epath.Path(tmp_path)
    write_set(root / "plain")
    write_set(root / "zipped", zipped=True)
    assert images.digest(str(root / "plain")) == images.digest(str(root / "zipped"))
    write_set(root / "other", rows=24)
    assert images.digest(str(root / "plain")) != images.digest(str(root / "other"))
    path = root / "zipped" / "t10k-labels-idx1-ubyte.gz"
    labels = bytearray(gzip.decompress(path.read_bytes()))
    labels[-1] = (labels[-1] + 1) % 10
    path.write_bytes(gzip.compress(bytes(labels)))
    assert images.digest(str(root / "plain")) != images.digest(str(root / "zipped"))


def test_facts_are_read_again_when_a_file_changes(folder, monkeypatch):
    reads = []
    monkeypatch.setattr(images, "_raw", lambda data, raw=images._raw: reads.append(data) or raw(data))
    first = images.facts(str(folder))
    assert images.facts(str(folder)) == first
    assert len(reads) == 1
    (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(23)))
    assert images.facts(str(folder)).digest != first.digest


def test_pages_join_in_order(folder, monkeypatch):
    monkeypatch.setattr(idx, "_PAGE", 10)  # 23 rows: two full pages and a part
    raw = idx.read_folder(str(folder))
    idx.prepare(raw, folder.parent / "prepared")
    again = idx.read_prepared(folder.parent / "prepared")
    for split in ("train", "test"):
        assert np.array_equal(raw[split][0], again[split][0])
        assert np.array_equal(raw[split][1], again[split][1])


def test_prepared_set_needs_no_folder(folder):
    cache = folder.parent / "cache"
    first = images.load(str(folder), cache=cache)
    shutil.rmtree(folder)
    images._prepared.cache_clear()
    again = images.load_prepared(first.digest, cache)
    assert np.array_equal(again.train_images, first.train_images)
    with pytest.raises(UsageError, match="no such folder"):
        images.load(str(folder), cache=cache)


def test_preparing_a_set_that_is_there_changes_nothing(folder):
    target = folder.parent / "cache" / "x"
    raw = idx.read_folder(str(folder))
    idx.prepare(raw, target)
    before = {path: path.read_bytes() for path in target.glob("*/*/*.array_record-*")}
    idx.prepare(raw, target)  # the second of two workers at once
    assert {path: path.read_bytes() for path in target.glob("*/*/*.array_record-*")} == before
    assert [child.name for child in target.parent.iterdir()] == ["x"]


def test_a_failed_preparation_leaves_nothing(folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(idx.Image.Image, "save", full)
    cache = folder.parent / "cache"
    with pytest.raises(SubjaxError, match="disk full"):
        images.load(str(folder), cache=cache)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_preparation_is_one_line(folder, damage):
    cache = folder.parent / "cache"
    digest = images.load(str(folder), cache=cache).digest
    images._prepared.cache_clear()
    path = next((cache / digest).glob("*/*/*train.array_record-*"))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    else:
        path.unlink()
    with pytest.raises(SubjaxError, match="delete that folder") as error:
        images.load_prepared(digest, cache)
    assert "\n" not in str(error.value)


def test_a_flipped_byte_is_seen_or_harmless(folder):
    cache = folder.parent / "cache"
    first = images.load(str(folder), cache=cache)
    path = next((cache / first.digest).glob("*/*/*train.array_record-*"))
    content = path.read_bytes()
    places = np.flatnonzero(np.frombuffer(content, np.uint8))  # the rest is padding
    lines = []
    for place in places[:: len(places) // 12]:
        flipped = bytearray(content)
        flipped[place] ^= 0x10
        path.write_bytes(bytes(flipped))
        images._prepared.cache_clear()
        try:
            again = images.load_prepared(first.digest, cache)
        except SubjaxError as error:
            lines.append(str(error))
        else:
            assert np.array_equal(again.train_images, first.train_images)
    assert lines
    assert not any("\n" in line for line in lines)


def test_no_folder(tmp_path):
    assert "no such folder; give 'digits'" in refused(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    assert "no such folder" in refused(tmp_path / "file")


def test_no_cache_for_a_folder(folder):
    with pytest.raises(UsageError, match="cache"):
        images.load(str(folder))


@pytest.mark.parametrize("name", NAMES)
def test_missing_file(folder, name):
    (folder / f"{name}-ubyte").unlink()
    assert f"no file {name}-ubyte" in refused(folder)


def test_truncated_gzip(folder):
    path = folder / "train-images-idx3-ubyte"
    content = gzip.compress(path.read_bytes())
    path.unlink()
    zipped = folder / "train-images-idx3-ubyte.gz"
    for cut in (content[:-1], content[: len(content) // 2], content[:11], content[:2]):
        zipped.write_bytes(cut)
        assert "truncated or damaged gzip" in refused(folder)
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 0xFF
    zipped.write_bytes(bytes(flipped))
    assert "truncated or damaged gzip" in refused(folder)


@pytest.mark.parametrize("size", [0, 2, 4, 9, 16, 100])
def test_truncated_plain(folder, size):
    path = folder / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:size])
    line = refused(folder)
    assert str(path) in line
    assert "begins with" in line or "its header says" in line


def test_wrong_magic(folder):
    path = folder / "train-labels-idx1-ubyte"
    path.write_bytes(b"\0\0\x0d\x01" + path.read_bytes()[4:])  # floats
    assert "begins with 00000d01, an IDX file of its kind with 00000801" in refused(folder)
    shutil.copy(folder / "train-images-idx3-ubyte", path)  # images where labels should be
    assert "begins with 00000803" in refused(folder)


def test_too_long(folder):
    path = folder / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes() + b"\0")
    assert "holds 32 bytes where its header says 31" in refused(folder)


def test_counts_that_differ(folder):
    (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(22)))
    assert "23 images and 22 labels" in refused(folder)


def test_sets_of_two_kinds(folder):
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((7, 5, 5))))
    assert "train images are (6, 5), test images (5, 5)" in refused(folder)


def test_more_than_ten_classes(folder):
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(5, 12)))
    assert "the label 11" in refused(folder)


def test_node_config_holds_content_and_no_path(folder):
    settings = schema.Images(name="mine", data=str(folder), auxiliary=5)
    config = images.node_config(settings, images.digest(str(folder)))
    assert config["data"] == images.digest(str(folder))
    assert config["auxiliary"] == 5
    assert not {"name", "statistics"} & set(config)
    assert str(folder) not in str(config)


def test_cost_counts_images_and_grows_with_seeds():
    facts = images.facts("digits")
    assert (facts.train_rows, facts.test_rows, facts.pixels) == (1437, 360, 64)
    seen, flops = images.cost(schema.Images(seeds=20), facts)
    assert seen == 20 * 5 * (1437 + 4096)
    assert images.cost(schema.Images(seeds=40), facts) == (2 * seen, 2 * flops)
    weights = 64 * 256 + 256 * 256 + 256 * 13
    assert flops == pytest.approx(2 * weights * 20 * (3 * 5 * (1437 + 4096) + 4096 + 3 * 360))


@pytest.mark.slow
def test_fashion_mnist_of_debian(tmp_path):
    root = "/usr/share/datasets/fashion-mnist"
    if not epath.Path(root).is_dir():
        pytest.skip(f"{root} is not there: install Debian's dataset-fashion-mnist")
    data = images.load(root, cache=tmp_path)
    assert data.train_images.shape == (60_000, 784)
    assert data.test_images.shape == (10_000, 784)
    assert np.bincount(data.train_labels).tolist() == [6000] * 10
