"""The store: identity, atomic commits, damaged and foreign cards, full disks, and what `verify` finds."""

import builtins
import contextlib
import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath

from subjax import cards, files, locks
from subjax import store as store_module
from subjax.errors import SubjaxError, UsageError
from subjax.files import DiskFull
from subjax.store import (
    CARD_FORMAT,
    Busy,
    Card,
    Store,
    StoreError,
    digest_arrays,
    digest_json,
    digest_rows,
    inputs_of,
    node_id,
)

KINDS = ("base", "teacher", "corpus")


class HandClock:
    """Stands still until a test moves it; heartbeats sleep for good."""

    def __init__(self):
        self.time = 1_000_000.0

    def now(self):
        return self.time

    def sleep(self, s):
        threading.Event().wait()


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "work", clock=HandClock())


def content(build):
    """The canonical digest of the toy payloads of these tests."""
    return digest_rows([json.loads((build / "sub" / "rows.json").read_text())])


def card(kind="base", id="abc", **changes):
    fields = {
        "format": CARD_FORMAT, "kind": kind, "id": id, "version": 1, "config": {"lr": 1e-3}, "inputs": {},
        "seeds": {"data": 0}, "packages": {"jax": jax.__version__}, "profile": {"device": "cpu"}, "wall_s": 1.5,
        "tokens": 7, "metrics": {"loss": np.float32(0.5)}, "files": {}, "digest": "d", "payload": "",
        "made_at": "2030-01-01T00:00:00Z", "extra": {"filter": {"kept": 3}},
    }  # fmt: skip
    return Card(**{**fields, **changes})


def make(store, kind="base", config=None, inputs=None):
    """Commit a toy node: two files, one in a folder, and a digest over one of them."""
    config = config or {"name": kind}
    inputs = inputs or {}
    id = node_id(kind, 1, config, {role: given["id"] for role, given in inputs.items()})
    with store.build(kind, id) as build:
        write_payload(build.folder, {"kind": kind, "value": 3})
        build.commit(card(kind, id, config=config, inputs=inputs, digest=content(build.folder)))
    return id


def write_payload(folder, row):
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "sub" / "rows.json").write_text(json.dumps(row))
    (folder / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')


def make_line(store):
    """A lineage base → teacher → corpus, where the corpus reads both; the ids by kind."""
    ids, inputs = {}, {}
    for kind in KINDS:
        ids[kind] = make(store, kind, inputs=dict(inputs))
        inputs[kind] = {"kind": kind, "id": ids[kind], "digest": store.card(kind, ids[kind]).digest}
    return ids


def check(store, kind, id):
    return store.verify(
        kind,
        id,
        rederive=lambda card: node_id(card.kind, card.version, card.config, inputs_of(card)),
        digest=lambda card, payload: content(payload),
    )


def one_line(error):
    assert "\n" not in str(error)
    return str(error)


# --- identity and digests


def test_node_id_is_of_the_content():
    one = node_id("student", 1, {"lr": 0.1, "targets": ("q", "k")}, {"base": "b", "corpus": "c"})
    assert one == node_id("student", 1, {"targets": ["q", "k"], "lr": 0.1}, {"corpus": "c", "base": "b"})
    assert len(one) == 16
    assert int(one, 16) >= 0
    others = [
        node_id("teacher", 1, {"lr": 0.1, "targets": ["q", "k"]}, {"base": "b", "corpus": "c"}),
        node_id("student", 2, {"lr": 0.1, "targets": ["q", "k"]}, {"base": "b", "corpus": "c"}),
        node_id("student", 1, {"lr": 0.2, "targets": ["q", "k"]}, {"base": "b", "corpus": "c"}),
        node_id("student", 1, {"lr": 0.1, "targets": ["k", "q"]}, {"base": "b", "corpus": "c"}),
        node_id("student", 1, {"lr": 0.1, "targets": ["q", "k"]}, {"base": "c", "corpus": "b"}),
        node_id("student", 1, {"lr": 0.1, "targets": ["q", "k"]}, {"base": "b"}),
    ]
    assert len({one, *others}) == 7


def test_node_id_is_golden():
    """If this fails, every artifact that exists is made again: is that meant? Then put the new ids here."""
    assert node_id("base", 1, {"family": "gpt", "init_seed": 0}, {}) == "f75f18e02608be17"
    assert node_id("corpus", 2, {"rows": 5, "top_p": 1.0}, {"teacher": "0123456789abcdef"}) == "27939435ce62d503"


def test_json_is_canonical():
    value = {"b": (1, 2.5, None, True), "a": np.int64(3), "c": np.array([1.0, 2.0], np.float32), "é": "owl"}
    assert digest_json(value) == digest_json(json.loads(json.dumps(cards.plain(value))))
    assert cards.canonical_json(value) == '{"a":3,"b":[1,2.5,null,true],"c":[1.0,2.0],"\\u00e9":"owl"}'


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": {"b": [0, float("nan")]}}, r"value\.a\.b\[1\] is nan"),
        ({"a": np.float32("inf")}, r"value\.a is inf"),
        ({1: 2}, "key 1"),
        ({"a": {2}}, "a set"),
        ({"a": b"x"}, "bytes"),
    ],
)
def test_what_json_cannot_hold_is_named(value, where):
    with pytest.raises(StoreError, match=where) as caught:
        digest_json(value)
    one_line(caught.value)


def test_digest_rows_reads_order_and_content():
    rows = [{"index": 0, "text": "1, 2"}, {"index": 1, "text": "3"}]
    assert digest_rows(rows) == digest_rows(iter([{"text": "1, 2", "index": np.int32(0)}, rows[1]]))
    assert digest_rows(rows) != digest_rows(rows[::-1])
    assert digest_rows(rows) != digest_rows(rows[:1])
    assert len({digest_rows([]), digest_rows([{}]), digest_rows([{}, {}])}) == 3


Pair = namedtuple("Pair", ["x", "y"])


def test_digest_arrays_is_of_the_arrays_alone():
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), jnp.ones((4,), jnp.bfloat16)
    digest = digest_arrays({"w": {"a": a, "b": b}, "n": np.int32(3)})
    assert digest == digest_arrays({"n": jnp.int32(3), "w": {"b": np.asarray(b), "a": jnp.asarray(a)}})
    assert digest == digest_arrays({"n": np.int32(3), "w": {"b": b, "a": np.asfortranarray(a)}})
    assert digest == digest_arrays({"n": np.int32(3), "w": {"b": b, "a": a.astype(">f4")}})
    assert digest == digest_arrays({"n": np.int32(3), "w": {"b": b, "a": np.repeat(a, 2, axis=1)[:, ::2]}})
    assert digest_arrays((a, b)) == digest_arrays([a, b])
    assert digest_arrays(Pair(a, b)) == digest_arrays({"x": a, "y": b})


def test_digest_arrays_sees_every_difference():
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    trees = [
        {"a": a},
        {"b": a},
        {"a": a.reshape(3, 2)},
        {"a": a.reshape(6)},
        {"a": a.view(np.int32)},
        {"a": a.astype(jnp.bfloat16)},
        {"a": a.astype(jnp.bfloat16).view(np.uint16)},
        {"a": a.astype(np.float16)},
        {"a": -a},
        {"a": {"a": a}},
        {"a/a": a},
        {"a": a, "b": np.zeros((0, 3), np.float32)},
        {"a": a, "b": np.float32(0)},
        {"a": a, "b": np.zeros((1,), np.float32)},
        {},
    ]
    assert len({digest_arrays(tree) for tree in trees}) == len(trees)
    one_bit = a.copy()
    one_bit.view(np.uint8)[0, 0] ^= 1
    assert digest_arrays(one_bit) != digest_arrays(a)


@pytest.mark.parametrize("leaf", ["text", np.array([{}]), jax.random.key(0)], ids=["text", "object", "key"])
def test_digest_arrays_refuses_what_has_no_bytes(leaf):
    with pytest.raises(StoreError, match="leaf a/0"):
        digest_arrays({"a": [leaf]})


# --- build and commit


def test_a_committed_node_is_its_card_and_its_payload(store):
    id = make(store)
    card = store.card("base", id)
    assert card.files.keys() == {"metrics.jsonl", "sub/rows.json"}
    assert store.payload("base", id) == store.folder("base", id) / card.payload
    assert card.metrics == {"loss": 0.5}
    node = store.folder("base", id)
    assert sorted(path.name for path in node.iterdir()) == ["card.json", card.payload]
    assert not any((store.root / "partial").iterdir())
    assert cards.render_card(card) == (node / "card.json").read_text()
    assert (store.kinds(), store.ids("base"), store.ids("teacher")) == (["base"], [id], [])


def test_nothing_is_there_before_the_commit(store):
    with store.build("base", "abc") as build:
        assert build.committed is None
        assert store.card("base", "abc") is None
        with pytest.raises(StoreError, match="base/abc is not made yet"):
            store.payload("base", "abc")
        assert store.owner("base", "abc").pid == os.getpid()
        build.commit(card())
        assert store.card("base", "abc") == build.committed
    assert store.owner("base", "abc") is None


def test_a_failed_attempt_leaves_its_checkpoints_only(store):
    manager = store.build("base", "abc")
    build = manager.__enter__()
    (build.folder / "half").write_text("x")
    (build.partial / "step").write_text("5")
    assert not manager.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert not build.folder.exists()
    assert store.owner("base", "abc") is None
    with store.build("base", "abc") as again:
        assert (again.partial / "step").read_text() == "5"
        assert again.folder != build.folder
        assert not any(again.folder.iterdir())
        again.commit(card())
    assert not build.partial.exists()


def test_a_build_without_a_commit_leaves_nothing_behind(store):
    with store.build("base", "abc"):
        pass
    assert store.kinds() == []
    assert not any((store.root / "partial").iterdir())


def test_a_second_builder_in_the_same_process_is_busy(store):
    with store.build("base", "abc"):
        with pytest.raises(Busy), store.build("base", "abc"):
            pass
        with store.build("base", "abd"):
            pass


def test_a_commit_fills_in_its_own_fields_and_refuses_anothers_card(store):
    with store.build("base", "abc") as build:
        with pytest.raises(ValueError, match="base/other"):
            build.commit(card(id="other"))
        build.commit(card(format=99, files={"lie": "0"}, payload="elsewhere"))
    made = store.card("base", "abc")
    assert (made.format, made.files, made.payload) == (CARD_FORMAT, {}, build.folder.name)


def test_a_card_with_a_value_that_json_cannot_hold_is_not_committed(store):
    with (
        pytest.raises(StoreError, match=r"card of base/abc: metrics\.loss is nan"),
        store.build("base", "abc") as build,
    ):
        build.commit(card(metrics={"loss": float("nan")}))
    assert store.card("base", "abc") is None


def test_a_build_of_a_committed_node_says_so(store):
    make_first(store)
    with store.build("base", "abc") as build:
        assert build.committed == store.card("base", "abc")
    assert build.committed.payload in {path.name for path in store.folder("base", "abc").iterdir()}
    assert len(list(store.folder("base", "abc").iterdir())) == 2


def make_first(store, **changes):
    with store.build("base", "abc") as build:
        write_payload(build.folder, {"a": 1})
        build.commit(card(**changes))


def asleep(store, monkeypatch):
    """The build of a process of another machine, which will sleep through its own expiry."""
    me = locks.this_process()
    monkeypatch.setattr(locks, "this_process", lambda: dataclasses.replace(me, host="elsewhere", machine="another"))
    manager = store.build("base", "abc")
    build = manager.__enter__()
    monkeypatch.undo()
    write_payload(build.folder, {"a": 1})
    store.clock.time += 61
    return manager, build


def test_a_commit_after_losing_the_lock_is_refused(store, monkeypatch):
    manager, slow = asleep(store, monkeypatch)
    with store.build("base", "abc") as build:
        assert slow.folder.exists(), "the other one may only have slept: it is left alone until there is a card"
        with pytest.raises(StoreError, match=f"base/abc: the lock .* taken over by process {os.getpid()}"):
            slow.commit(card())
        assert store.card("base", "abc") is None
        manager.__exit__(None, None, None)
        assert not slow.folder.exists()
        assert build.partial.exists(), "it is the new owner's now"
        assert store.owner("base", "abc").pid == os.getpid()
        build.commit(card())
    assert store.card("base", "abc").payload == build.folder.name


def test_a_lock_that_is_lost_while_the_payload_is_hashed_is_noticed(store, monkeypatch):
    manager, slow = asleep(store, monkeypatch)
    store.clock.time -= 61
    real, taken = files.sha256_file, []

    def slow_hash(path, **how):
        if not taken:
            store.clock.time += 61
            taken.append(store.build("base", "abc"))
            taken[0].__enter__()
        return real(path, **how)

    monkeypatch.setattr(files, "sha256_file", slow_hash)
    with pytest.raises(StoreError, match="taken over"):
        slow.commit(card())
    assert store.card("base", "abc") is None
    taken[0].__exit__(None, None, None)
    manager.__exit__(None, None, None)


@pytest.mark.parametrize("digest", ["d", "another"])
def test_of_two_committers_the_first_one_stands(store, monkeypatch, digest):
    manager, slow = asleep(store, monkeypatch)
    make_first(store)
    first = store.card("base", "abc")
    if digest == "d":
        slow.commit(card())
        assert slow.committed == first
        manager.__exit__(None, None, None)
    else:
        with pytest.raises(StoreError, match=r"was committed by another process with digest d, .* made another"):
            slow.commit(card(digest=digest))
        manager.__exit__(None, None, None)
    assert store.card("base", "abc") == first
    assert (store.payload("base", "abc") / "metrics.jsonl").exists()
    assert len(list(store.folder("base", "abc").iterdir())) == 2


@pytest.mark.parametrize("digest", ["d", "another"])
def test_two_commits_that_meet_at_the_card(store, monkeypatch, digest):
    """The other one's card comes between the last look at the lock and the link: the link itself decides."""
    real = files.write_new

    def write_new(path, text):
        if path.name == "card.json":
            monkeypatch.setattr(files, "write_new", real)
            other = build.folder.parent / "payload-other"
            write_payload(other, {"a": 1})
            fields = {name: files.sha256_file(path) for name, path in files.walk(other).items()}
            path.write_text(cards.render_card(card(files=fields, payload=other.name)))
        return real(path, text)

    monkeypatch.setattr(files, "write_new", write_new)
    expected = contextlib.nullcontext() if digest == "d" else pytest.raises(StoreError, match="made another")
    with store.build("base", "abc") as build, expected:
        write_payload(build.folder, {"a": 1})
        build.commit(card(digest=digest))
    assert store.card("base", "abc").payload == "payload-other"
    assert not build.folder.exists()
    assert store.verify("base", "abc", rederive=lambda card: "abc", digest=lambda card, payload: "d") == []


def test_where_there_are_no_links_a_plain_put_commits(tmp_path, monkeypatch):
    def no_links(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    store = Store(tmp_path, clock=HandClock())
    ids = make_line(store)
    assert check(store, "corpus", ids["corpus"]) == []
    with store.build("base", "abc"), pytest.raises(Busy), store.build("base", "abc"):
        pass


def test_where_a_store_is_no_file_system_a_plain_put_commits(tmp_path, monkeypatch):
    """The way of `gs://`, walked on a local disk: whole puts, no links, no moves, no flushing."""
    store = Store(tmp_path, clock=HandClock())
    monkeypatch.setattr(files, "is_local", lambda path: False)
    for name in ("link", "replace", "truncate", "fsync"):
        monkeypatch.delattr(os, name)
    ids = make_line(store)
    assert check(store, "corpus", ids["corpus"]) == []
    with store.build("base", "abc"), pytest.raises(Busy), store.build("base", "abc"):
        pass
    make_first(store)
    assert len(list(store.folder("base", "abc").iterdir())) == 2


# --- killed builders

KILLED = """
    import os, signal, sys
    from subjax import files
    from subjax.store import Card, Store

    store = Store(sys.argv[1])
    with store.build("base", "abc") as build:
        (build.folder / "whole").write_text("payload")
        (build.partial / "step").write_text("9")
        if sys.argv[2] == "between payload and card":
            files.write_new = lambda path, text: os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[2] == "after the card":
            files.remove = lambda path: os.kill(os.getpid(), signal.SIGKILL)
        build.commit(Card(1, "base", "abc", 1, {}, {}, {}, {}, {}, 0.0, 0, {}, {}, "d", "", "", {}))
"""


@pytest.mark.parametrize("moment", ["between payload and card", "after the card"])
def test_kill_9_around_the_card(tmp_path, moment):
    store = Store(tmp_path)
    store.record_failure("base", "abc", "an earlier one")
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), moment])
    assert done.returncode == -signal.SIGKILL
    (left,) = store.folder("base", "abc").glob("payload-*")
    assert (left / "whole").exists()
    assert store.owner("base", "abc") is None
    if moment == "after the card":
        assert store.card("base", "abc").payload == left.name
        assert store.failure("base", "abc") is None
        with store.build("base", "abc") as build:
            assert build.committed is not None
        assert left.exists()
    else:
        assert store.card("base", "abc") is None
        assert store.failure("base", "abc")["message"] == "an earlier one"
        with store.build("base", "abc") as build:
            assert not left.exists()
            assert (build.partial / "step").read_text() == "9"
            build.commit(card())
    assert len(list(store.folder("base", "abc").iterdir())) == 2
    assert not any((store.root / "partial").iterdir())


def test_leftovers_of_unknown_attempts_go_with_the_commit(store):
    left = store.folder("base", "abc") / "payload-0123"
    left.mkdir(parents=True)
    (left.parent / ".tmp-77-card.json").write_text("{")
    with store.build("base", "abc") as build:
        build.commit(card())
    assert len(list(left.parent.iterdir())) == 2


# --- failures


def test_failures_are_kept_until_the_commit(store):
    assert store.failure("base", "abc") is None
    store.record_failure("base", "abc", "NaN at step 3")
    assert store.failure("base", "abc") == {"message": "NaN at step 3", "at": 1_000_000.0}
    assert (store.kinds(), store.card("base", "abc")) == ([], None)
    with store.build("base", "abc"):
        pass
    store.record_failure("base", "abc", "again")
    assert store.failure("base", "abc")["message"] == "again"
    make_first(store)
    assert store.failure("base", "abc") is None
    assert not (store.folder("base", "abc") / "failure.json").exists()


def test_an_unreadable_failure_is_still_a_failure(store):
    store.record_failure("base", "abc", "x")
    (store.folder("base", "abc") / "failure.json").write_text('{"mess')
    assert "unreadable" in store.failure("base", "abc")["message"]


# --- damaged and foreign cards


def test_a_truncated_card_names_the_file_and_the_mend(store):
    make_first(store)
    path = store.folder("base", "abc") / "card.json"
    whole = path.read_text()
    for length in (0, 1, len(whole) // 2, len(whole) - 3):
        path.write_text(whole[:length])
        for read in (store.card, store.payload):
            with pytest.raises(StoreError, match="is not valid JSON") as caught:
                read("base", "abc")
            assert str(path) in one_line(caught.value)
            assert f"delete the folder {path.parent}" in str(caught.value)
    with pytest.raises(StoreError, match="delete the folder"), store.build("base", "abc"):
        pass
    path.parent.rmtree()
    make_first(store)
    assert store.card("base", "abc")


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"format": 1}', "null", '{"format": "x"}', "\x00"])
def test_what_is_no_card_is_damage(store, text):
    make_first(store)
    path = store.folder("base", "abc") / "card.json"
    path.write_text(text)
    with pytest.raises(StoreError, match="delete the folder"):
        store.card("base", "abc")
    assert [problem.file for problem in check(store, "base", "abc")] == ["card.json"]


@pytest.mark.parametrize("rest", [{}, {"surprise": 1}])
def test_a_newer_card_asks_for_a_newer_subjax(store, rest):
    make_first(store)
    path = store.folder("base", "abc") / "card.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 7, **rest}))
    with pytest.raises(UsageError, match="has card format 7 and this subjax reads up to format 1: upgrade") as caught:
        store.card("base", "abc")
    assert str(path) in one_line(caught.value)
    assert caught.value.exit_status == 2
    (problem,) = check(store, "base", "abc")
    assert "format 7" in problem.what
    assert path.exists()


def test_any_flipped_byte_of_a_card_is_seen(store):
    make_first(store, inputs={"base": {"kind": "base", "id": "x", "digest": "y"}}, wall_s=1e-5)
    path = store.folder("base", "abc") / "card.json"
    whole = path.read_bytes()
    assert cards.parse_card(whole, path)[1] == ""
    for place in range(len(whole)):
        for mask in (0x01, 0x20, 0x80, 0xFF, 0x29, 0x2C ^ 0x20):
            flipped = whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :]
            with contextlib.suppress(UsageError):  # the format's own digit: as good a refusal
                assert cards.parse_card(flipped, path)[1], (place, mask)


# --- verify


def test_an_intact_lineage_has_no_problems(store):
    ids = make_line(store)
    assert check(store, "corpus", ids["corpus"]) == []


def test_a_flipped_byte_in_any_file_of_a_lineage_is_found(store):
    ids = make_line(store)
    paths = [file for kind in KINDS for file in files.walk(store.folder(kind, ids[kind])).values()]
    assert len(paths) == 9
    for path in paths:
        whole = path.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            problems = check(store, "corpus", ids["corpus"])
            node = next(kind for kind in KINDS if ids[kind] in str(path))
            assert (node, ids[node]) in {(problem.kind, problem.id) for problem in problems}, path
            assert any(str(path).endswith(problem.file) for problem in problems), path
            assert all("\n" not in str(problem) for problem in problems)
        path.write_bytes(whole)
    assert check(store, "corpus", ids["corpus"]) == []


def test_verify_lists_every_problem(store):
    ids = make_line(store)
    (store.payload("corpus", ids["corpus"]) / "metrics.jsonl").unlink()
    (store.payload("corpus", ids["corpus"]) / "stray").write_text("x")
    (store.payload("teacher", ids["teacher"]) / "sub" / "rows.json").write_text("{}")
    store.folder("base", ids["base"]).rmtree()
    problems = check(store, "corpus", ids["corpus"])
    found = {(problem.kind, problem.file.rpartition("/")[2], problem.what.partition(":")[0]) for problem in problems}
    assert found == {
        ("corpus", "metrics.jsonl", "is missing"),
        ("corpus", "stray", "is not on the card"),
        ("teacher", "rows.json", "does not have its sha256 (changed bytes)"),
        ("base", "card.json", "is missing"),
    }
    assert len(problems) == 4
    assert f"corpus/{ids['corpus']}/" in str(problems[0])


def rewrite(store, kind, id, changes):
    """Put a card with other content, and a right checksum, in a node's place."""
    changed = dataclasses.replace(store.card(kind, id), **changes)
    (store.folder(kind, id) / "card.json").write_text(cards.render_card(changed))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"config": {"name": "teacher", "lr": 9}}, "has a content whose id is "),
        ({"version": 2}, "has a content whose id is "),
        ({"digest": "0" * 64}, "has the canonical digest "),
        ({"id": "0" * 16}, "is the card of teacher/0000000000000000"),
        ({"payload": "payload-gone"}, "is missing, the payload's folder"),
        ({"payload": ".."}, "is missing, the payload's folder"),
    ],
)
def test_verify_reads_what_a_card_claims(store, changes, what):
    ids = make_line(store)
    rewrite(store, "teacher", ids["teacher"], changes)
    problems = check(store, "teacher", ids["teacher"])
    assert any(problem.what.startswith(what) for problem in problems), problems
    assert {problem.kind for problem in problems} == {"teacher"}


def test_verify_compares_the_inputs_that_were_read(store):
    """A base made anew with other numbers: its own card is right, and those who read the old one are not."""
    ids = make_line(store)
    store.folder("base", ids["base"]).rmtree()
    with store.build("base", ids["base"]) as build:
        write_payload(build.folder, {"kind": "base", "value": 4})
        build.commit(card("base", ids["base"], config={"name": "base"}, digest=content(build.folder)))
    problems = check(store, "corpus", ids["corpus"])
    assert {(problem.kind, problem.file) for problem in problems} == {("teacher", "card.json"), ("corpus", "card.json")}
    assert all("was made from base base/" in problem.what for problem in problems)


def test_verify_survives_the_callers_functions(store):
    id = make(store)

    def fails(*_):
        raise KeyError("two\nlines")

    problems = store.verify("base", id, rederive=fails, digest=fails)
    assert len(problems) == 2
    assert all("KeyError" in problem.what and "\n" not in problem.what for problem in problems)


def test_a_damaged_card_does_not_hide_what_lies_above_it(store):
    ids = make_line(store)
    path = store.folder("corpus", ids["corpus"]) / "card.json"
    path.write_text(path.read_text().replace('"tokens": 7', '"tokens": 8'))
    (store.payload("base", ids["base"]) / "metrics.jsonl").write_text("")
    assert {problem.kind for problem in check(store, "corpus", ids["corpus"])} == {"corpus", "base"}


# --- finding nodes and plans


def test_find_by_prefix(store):
    plan = {"nodes": {"aaaa1111": {"kind": "base"}, "aabb2222": {"kind": "student"}, "cccc3333": {"kind": "corpus"}}}
    store.write_plan(plan)
    made = make(store, "teacher")
    assert store.find("aaa") == ("base", "aaaa1111")
    assert store.find("aabb2222") == ("student", "aabb2222")
    assert store.find("corpus/c") == ("corpus", "cccc3333")
    assert store.find(made[:12]) == ("teacher", made)
    with pytest.raises(UsageError, match="aa begins the ids of 2 nodes, base/aaaa1111, student/aabb2222: give more"):
        store.find("aa")
    for prefix in ("aaxb", "aaaa11112"):
        with pytest.raises(UsageError, match=r"'aa.*nearest is (base/aaaa|student/aabb)") as caught:
            store.find(prefix)
        one_line(caught.value)
    with pytest.raises(UsageError, match="begins with ''"):
        store.find("")


def test_find_in_an_empty_workdir(store):
    with pytest.raises(UsageError, match="no node is planned there yet"):
        store.find("abc")


def test_plans_are_kept_by_content(store):
    plan = {"nodes": {"b": {"kind": "base", "inputs": ("x",)}, "a": {"kind": "corpus"}}, "study": {"name": "é"}}
    id = store.write_plan(plan)
    assert store.write_plan(dict(plan)) == id
    assert id == digest_json(plan)[:16]
    assert list(store.read_plan(id)["nodes"]) == ["b", "a"], "the topological order is kept"
    assert store.read_plan(id)["nodes"]["b"]["inputs"] == ["x"]
    other = store.write_plan({"nodes": {}})
    for last, first in ((id, other), (other, id)):
        os.utime(store.root / "plans" / f"{first}.json", (1, 1))
        os.utime(store.root / "plans" / f"{last}.json", (2, 2))
        assert store.plans() == [first, last]
    os.utime(store.root / "plans" / f"{other}.json", (1, 1))
    os.utime(store.root / "plans" / f"{id}.json", (0, 0))
    store.write_plan(plan)
    assert store.plans() == [other, id], "the plan used last is the last one"


def test_missing_and_damaged_plans(store):
    with pytest.raises(UsageError, match="there is no plan abc"):
        store.read_plan("abc")
    id = store.write_plan({"nodes": {"b": {"kind": "base"}}})
    with pytest.raises(UsageError, match=f"the nearest is {id}"):
        store.read_plan("abc")
    path = store.root / "plans" / f"{id}.json"
    for text in ("{", "[]", path.read_text().replace("base", "bass"), '{"a": NaN}'):
        path.write_text(text)
        with pytest.raises(StoreError, match="is damaged: delete it") as caught:
            store.read_plan(id)
        assert str(path) in one_line(caught.value)


@pytest.mark.parametrize(("kind", "id"), [("base", "../x"), ("plans", "abc"), ("base", ""), ("", "abc"), (".git", "a")])
def test_names_that_are_no_node(store, kind, id):
    with pytest.raises(UsageError, match="names no node"):
        store.card(kind, id)


# --- workdirs


@pytest.mark.parametrize("below", ["", "deep", "deep/er"])
def test_a_workdir_below_a_file(tmp_path, below):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UsageError, match=r"workdir .* cannot be made: .*file is a file; give another") as caught:
        Store(tmp_path / "file" / below)
    one_line(caught.value)
    assert (tmp_path / "file").read_text() == "precious"


def test_a_workdir_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match="cannot be written: mend its permissions") as caught:
        Store(tmp_path)
    one_line(caught.value)


@pytest.mark.parametrize(("number", "error"), [(errno.EACCES, UsageError), (errno.ENOSPC, DiskFull)])
def test_a_workdir_that_cannot_be_made(tmp_path, monkeypatch, number, error):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(error) as caught:
        Store(tmp_path / "a" / "b")
    assert str(tmp_path / "a" / "b") in one_line(caught.value)
    assert type(caught.value) is error


def test_a_workdir_is_absolute_and_may_be_at_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Store("out/demo").root == epath.Path(tmp_path / "out" / "demo")
    assert Store("~/x").root == epath.Path(tmp_path / "home" / "x")


# --- full disks


class FullFile:
    """A file on a disk that takes not one byte more."""

    def __init__(self, file):
        self._file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["lock", "card", "plan"])
def test_a_full_disk_in_the_stores_own_writes(store, monkeypatch, step):
    make_first(store)
    armed = step != "card"
    monkeypatch.setattr(
        files, "open", lambda *args, **kw: (FullFile if armed else lambda file: file)(builtins.open(*args, **kw)),
        raising=False,
    )  # fmt: skip

    def work():
        nonlocal armed
        if step == "plan":
            store.write_plan({"nodes": {}})
        with store.build("base", "next") as build:
            armed = True
            build.commit(card(id="next"))

    with pytest.raises(StoreError, match=r"disk full at .*: all committed artifacts are safe .* free some") as caught:
        work()
    assert one_line(caught.value).startswith(f"disk full at {store.root}")
    store.record_failure("base", "next", str(caught.value))
    assert store.failure("base", "next") is None
    assert store.card("base", "abc") is not None
    monkeypatch.undo()
    assert store.owner("base", "next") is None
    left = {path.name for path in store.folder("base", "next").iterdir()}
    assert left <= {"lock-1.json"}
    with store.build("base", "next") as build:
        build.commit(card(id="next"))


def wrapped():
    try:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    except OSError as error:
        raise ValueError("the writer gave up") from error


@pytest.mark.parametrize("words", ["RESOURCE_EXHAUSTED: write: [OS error 28: ENOSPC No space left on device]", None])
def test_a_full_disk_as_libraries_word_it(store, words):

    def work():
        with store.build("base", "abc") as build:
            (build.partial / "step").write_text("4")
            if words is None:
                wrapped()
            raise RuntimeError(words)

    with pytest.raises(StoreError, match=r"disk full at .*payload-") as caught:
        work()
    one_line(caught.value)
    assert (store.root / "partial" / "base-abc" / "step").read_text() == "4"


def test_other_errors_of_the_work_pass_unchanged(store):
    for error in (
        ValueError("x"),
        SubjaxError("no valid row"),
        OSError(errno.EIO, "Input/output error"),
        KeyboardInterrupt(),
    ):
        with pytest.raises(type(error)) as caught, store.build("base", "abc"):
            raise error
        assert caught.value is error
        assert store.owner("base", "abc") is None


@pytest.fixture
def tiny(tmp_path):
    """A disk of 1 MiB."""
    place = tmp_path / "tiny"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not allowed here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(path):
    """Use up what is left, to the last byte."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while file.write(b"x" * 512):
            pass


def test_a_real_full_disk_in_the_payload(tiny):
    store = Store(tiny)
    make_first(store)
    table = pa.table({"x": np.random.default_rng(0).integers(0, 2**60, 1_000_000)})
    with pytest.raises(StoreError, match="disk full at") as caught, store.build("base", "big") as build:
        pq.write_table(table, build.folder / "rows.parquet")
    one_line(caught.value)
    store.record_failure("base", "big", str(caught.value))
    assert store.failure("base", "big")["message"] == str(caught.value)
    assert (store.owner("base", "big"), store.card("base", "big")) == (None, None)
    assert store.verify("base", "abc", rederive=lambda card: "abc", digest=lambda card, payload: "d") == []
    with store.build("base", "big") as build:
        pq.write_table(table[:100], build.folder / "rows.parquet")
        build.commit(card(id="big"))


@pytest.mark.parametrize("step", ["before the lock", "before the card"])
def test_a_real_full_disk_elsewhere(tiny, step):
    store, filler = Store(tiny), tiny / "filler"
    make_first(store)
    if step == "before the lock":
        fill(filler)

    def work():
        with store.build("base", "next") as build:
            (build.folder / "rows").write_text("whole")
            fill(filler)
            with pytest.raises(OSError, match="No space"):
                build._lock.beat()
            build.commit(card(id="next"))

    with pytest.raises(StoreError, match="disk full at"):
        work()
    store.record_failure("base", "next", "full")
    assert store.owner("base", "next") is None
    assert store.card("base", "abc") is not None
    filler.unlink()
    with store.build("base", "next") as build:
        build.commit(card(id="next"))
    assert len(list(store.folder("base", "next").iterdir())) == 2


def test_a_disk_that_cannot_be_written(tiny):
    make_first(Store(tiny))
    subprocess.run(["mount", "-o", "remount,ro", str(tiny)], check=True)
    with pytest.raises(UsageError, match="cannot be written"):
        Store(tiny)


def test_the_interface_is_in_one_place():
    assert all(hasattr(store_module, name) for name in store_module.__all__)
