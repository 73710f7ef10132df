"""The commands about releases, as a person types them."""

import json
import re
from datetime import timedelta

import pytest
import yaml
from reports_for_tests import make_report
from safetensors.torch import save
from typer.testing import CliRunner

from cluster.errors import InputError, KarikomiError
from cluster.storage import open_store
from jobs.cli import app
from jobs.commands.releases import told_age
from jobs.job import parse_job
from workflows.formats.compact import pack_bytes
from workflows.publishing import publish
from workflows.reports.documents import documents


@pytest.fixture
def karikomi(tmp_path):
    """Runs a command on a store in a directory; gives back what it printed, or raises its error."""

    def run(*arguments):
        shown = CliRunner().invoke(app, [*map(str, arguments)], env={"KARIKOMI_STORE": str(tmp_path / "store")})
        if isinstance(shown.exception, KarikomiError):
            raise shown.exception
        assert shown.exit_code == 0, shown.output
        return shown.output

    return run


@pytest.fixture
def store(tmp_path):
    """Two versions of one name."""
    store = open_store(str(tmp_path / "store"))
    for text in ("one", "two"):
        files = {"config.json": store.put(f"runs/{text}/config", text.encode())}
        publish(store, "chat", "auto", files, documents(make_report()), f"run-{text}")
    return store


def test_a_version_on_its_way(store, karikomi, tmp_path):
    assert "stable is 1" in karikomi("promote", "chat@1", "stable", "--reason", "first [try]")
    assert "stable is 2" in karikomi("promote", "chat@2", "stable")
    shown = karikomi("models").splitlines()
    assert re.search(r"chat +2 +stable→2 .*KiB +ffn +perplexity -4\.9%", shown[1])
    assert "stable is 1" in karikomi("rollback", "chat", "stable", "--reason", "slow")
    shown = karikomi("versions", "chat")
    assert re.search(r"1 +[0-9a-f]{12} +run-one +stable ", shown)
    assert "promote – → 1 by" in shown
    assert "first [try]" in shown
    assert re.search(r"rollback 2 → 1 by \S+@\S+ – slow", shown)
    assert "chat@1 is in" in karikomi("pull", "chat@stable", tmp_path / "out")
    assert "chat@1 in" in karikomi("verify", "chat@stable")
    assert "chat@1 in" in karikomi("verify", tmp_path / "out")


def test_a_compact_release_is_verified_after_it_was_unpacked(tmp_path, karikomi):
    import torch

    weights = save({"w": torch.eye(64)})
    store = open_store(str(tmp_path / "store"))
    files = {"model-outer.safetensors": store.put("runs/x/w", pack_bytes(weights))}
    publish(store, "tiny", "auto", files, {"REPORT.json": b"{}"}, "run-1", form="compact")
    out = tmp_path / "out"
    karikomi("pull", "tiny", out)
    assert (out / "model-outer.safetensors").read_bytes() == weights
    assert "are what was published" in karikomi("verify", out)
    for damage in (weights[:-1] + b"\x01", b"none"):
        (out / "model-outer.safetensors").write_bytes(damage)
        with pytest.raises(InputError, match=r"model-outer\.safetensors"):
            karikomi("verify", out)


def test_verify_needs_something_to_verify(tmp_path, karikomi, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["verify", "chat"], env={"KARIKOMI_STORE": ""})
    assert isinstance(shown.exception, InputError)
    with pytest.raises(InputError, match="no pulled release"):
        karikomi("verify", "./chat")
    with pytest.raises(InputError, match="which version"):
        karikomi("promote", "chat", "stable")


def test_gc_lists_first_and_removes_when_told(store, karikomi, tmp_path):
    assert karikomi("gc").strip() == "Nothing to remove."
    store.put("runs/old/blocks/x/0.safetensors", b"x" * 2048)
    left = tmp_path / "store" / "runs" / "old" / "blocks" / "x" / "0.safetensors"
    assert karikomi("gc").strip() == "Nothing to remove.", "it is young"
    attempts = {
        "started": {"run": "old", "number": 1, "tenant": "t", "name": "chat", "by": "a", "cluster": "embedded"},
        "ended": {"code": 0, "result": "done", "sentence": "fine"},
    }
    for what, record in attempts.items():
        store.put_json(f"runs/old/attempts/1/{what}.json", record | {"at": "2026-11-24T12:00:00Z"})
    shown = karikomi("gc")
    assert "runs/old: 1 object, 2.0 KiB – run: the run is over" in shown
    assert "2.0 KiB can go; nothing was removed" in shown
    assert left.exists()
    assert "Removed 2.0 KiB." in karikomi("gc", "--yes")
    assert not left.exists()
    assert (tmp_path / "store" / "runs" / "old" / "attempts" / "1" / "ended.json").exists()


@pytest.mark.parametrize(
    ("text", "age"), [("7d", timedelta(days=7)), ("1h", timedelta(hours=1)), ("2w", timedelta(14))]
)
def test_ages(text, age):
    assert told_age(text) == age


@pytest.mark.parametrize("text", ["", "7", "d", "0d", "-1d", "1.5d", "7 d", "1s", "99999d", "٣d"])
def test_ages_that_are_none(text):
    with pytest.raises(InputError, match="--older-than"):
        told_age(text)


def test_who_signs_makes_no_other_run():
    job = {"name": "a", "model": "m", "target": {"pattern": "2:4", "sparsity": 0.5}, "publish": {"to": "/tmp/x"}}
    plain = parse_job(yaml.safe_dump(job), "job")
    job["publish"]["sign_with"] = "key.pem"
    signed = parse_job(yaml.safe_dump(job), "job")
    assert signed.run == plain.run
    assert signed.settings.publish.sign_with == "key.pem"
    assert "key.pem" not in json.dumps(signed.recipe.model_dump(mode="json"))
