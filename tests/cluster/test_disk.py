"""A full disk, for real: told as such, and never as bad input, wherever it is met."""

import tempfile

import pytest
from models_for_tests import write_tiny_model
from small_disk import SmallDisk, can_mount
from transformers import AutoModelForCausalLM

from cluster.errors import Unavailable
from cluster.storage import open_store
from workflows.models import gguf
from workflows.models.source import load_tokenizer, resolve_source
from workflows.publishing import publish, pull

pytestmark = pytest.mark.skipif(not can_mount(), reason="needs the right to mount a small file system")


@pytest.fixture
def disk(tmp_path):
    with SmallDisk(tmp_path / "disk", 1 << 20) as disk:
        yield disk


def full():
    return pytest.raises(Unavailable, match=r"cannot be written: No space left on device\nFree some disk space")


def test_a_store(disk):
    store = open_store(str(disk.path / "store"))
    kept = store.put("x", b"1" * 1000)
    disk.leave(0)
    for write in (store.check_writable, lambda: store.put("y", b"2" * 100_000), lambda: store.create("z", b"3" * 9000)):
        with full():
            write()
    assert store.verify(kept)
    assert list(store.keys("")) == ["x"]
    disk.make_room()
    assert store.verify(store.put("y", b"2" * 100_000))


def test_a_pull(disk, tmp_path):
    store = open_store(str(tmp_path / "store"))
    publish(store, "chat", "1", {"weights": store.put("w", bytes(2 << 20))}, {}, "run-1")
    with full():
        pull(store, "chat", "1", disk.path / "release")
    assert list(disk.path.iterdir()) == []


def test_the_cache_of_converted_models(disk, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(write_tiny_model(tmp_path / "model", layers=8, ffn=512))
    monkeypatch.setattr(gguf, "look_through", lambda file: None)  # the file is no GGUF; only the room is looked at
    monkeypatch.setattr(gguf, "convert", lambda file, directory: model.save_pretrained(directory))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with full():
        gguf.converted(tmp_path / "model.gguf", disk.path)
    assert list((disk.path / "gguf").iterdir()) == []


def test_temporary_files(disk, tmp_path, monkeypatch):
    source = resolve_source(str(write_tiny_model(tmp_path / "model")), tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(disk.path))
    disk.leave(0)
    with full():
        load_tokenizer(source)
