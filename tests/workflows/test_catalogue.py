"""What is published, and aliases: every move kept, no lost one, nothing damaged is ever promoted."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from reports_for_tests import make_report

from cluster.errors import InputError, Unavailable
from cluster.storage import open_store
from jobs.pulling import find_release, pull_release, verify_pulled, verify_stored
from workflows import aliases as module
from workflows.aliases import find_alias, list_aliases, promote, resolve, rollback
from workflows.catalogue import latest_version, list_names, list_versions
from workflows.publishing import publish
from workflows.release import find_version
from workflows.reports.documents import documents


def release(store, text, version="auto", name="chat", papers=None):
    files = {
        "model-outer.safetensors": store.put(f"runs/{text}/outer", text.encode() * 100),
        "config.json": store.put(f"runs/{text}/config", b"{}"),
    }
    return publish(store, name, version, files, papers or {"REPORT.json": b"{}"}, f"run-{text}")


@pytest.fixture
def three(store):
    """Three versions of one name."""
    for text in ("one", "two", "three"):
        release(store, text)
    return store


def moved(store, *versions):
    for version in versions:
        promote(store, "chat", version, "stable", "ann@host", f"because of {version}")
    return find_alias(store, "chat", "stable")


def test_names_and_versions_with_their_numbers(store):
    release(store, "one", papers=documents(make_report()))
    release(store, "gold", version="gold")
    release(store, "other", name="tiny")
    store.put("models/broken/0123456789ab/config.json", b"{}")  # of a publisher that died
    assert list_names(store) == ["chat", "tiny"]
    one, gold = list_versions(store, "chat")
    assert (one.pointer.version, one.pointer.run, gold.pointer.version) == ("1", "run-one", "gold")
    assert (one.numbers.pattern, one.numbers.parameters) == ("ffn", 800)
    assert one.numbers.increase == pytest.approx(-0.0488, abs=1e-4)
    assert "perplexity fell 4.9 %" in one.numbers.gate
    assert gold.numbers is None, "its report holds nothing"
    assert one.size > 300
    assert latest_version(store, "chat").pointer == gold.pointer
    with pytest.raises(InputError, match="no release nothing"):
        list_versions(store, "nothing")


def test_versions_come_by_their_number(store):
    for number in range(11):
        release(store, str(number))
    assert [one.pointer.version for one in list_versions(store, "chat")] == [str(n) for n in range(1, 12)]


def test_an_alias_keeps_its_whole_history_and_goes_back_step_by_step(three):
    alias = moved(three, "1", "2", "3")
    assert [(move.before, move.to, move.by, move.reason) for move in alias.history] == [
        (None, "1", "ann@host", "because of 1"),
        ("1", "2", "ann@host", "because of 2"),
        ("2", "3", "ann@host", "because of 3"),
    ]
    assert all(move.at.tzinfo for move in alias.history)
    assert rollback(three, "chat", "stable", "bob@host", "slow").now.to == "2"
    assert rollback(three, "chat", "stable", "bob@host", "still").now.to == "1"
    with pytest.raises(InputError, match="named no other version before 1"):
        rollback(three, "chat", "stable", "bob@host", "")
    assert moved(three, "3").path == ["1", "3"]
    assert rollback(three, "chat", "stable", "bob@host", "").now.to == "1"
    kinds = [(move.kind, move.before, move.to) for move in find_alias(three, "chat", "stable").history]
    assert kinds[3:] == [
        ("rollback", "3", "2"), ("rollback", "2", "1"), ("promote", "1", "3"), ("rollback", "3", "1"),
    ]  # fmt: skip
    stored = three.get_json("models/chat/aliases/stable.json")
    assert stored["history"][3]["from"] == "3"


def test_promoting_where_it_is_already_is_no_move(three):
    assert len(moved(three, "2", "2").history) == 1


def test_aliases_resolve_and_a_version_wins(three, tmp_path):
    moved(three, "2")
    assert find_release(three, "chat@stable").version == "2"
    assert find_release(three, "chat").version == find_release(three, "chat@latest").version == "3"
    pulled = pull_release(three.uri, "chat@stable", tmp_path / "out")
    assert (pulled.version, (tmp_path / "out" / "model-outer.safetensors").read_bytes()) == ("2", b"two" * 100)
    with pytest.raises(InputError, match=r"There are: 1, 2, 3, stable \(alias\)") as error:
        resolve(open_store(three.uri), "chat", "nothing")
    assert error.value.exit_code == 2
    three.copy("models/chat/aliases/stable.json", "models/chat/aliases/3.json")  # by hand
    assert find_release(three, "chat@3").version == "3"


@pytest.mark.parametrize("alias", ["latest", "auto", "7", "../x", "a/b", ""])
def test_names_that_an_alias_cannot_have(three, alias):
    with pytest.raises(InputError, match="cannot be an alias"):
        promote(three, "chat", "1", alias, "ann", "")


def test_a_name_is_a_version_or_an_alias(three):
    moved(three, "1")
    release(three, "gold", version="gold")
    with pytest.raises(InputError, match="chat@gold is a version"):
        promote(three, "chat", "1", "gold", "ann", "")
    for taken in ("stable", "latest"):
        with pytest.raises(InputError, match=f"chat@{taken} is an alias"):
            release(three, "more", version=taken)
    assert find_version(three, "chat", "stable") is None


def test_a_missing_version_and_another_alias_are_not_promoted(three):
    moved(three, "1")
    for version in ("4", "stable"):
        with pytest.raises(InputError, match=f"no version chat@{version}"):
            promote(three, "chat", version, "canary", "ann", "")
    with pytest.raises(InputError, match=r"no alias canary\nThere are: stable"):
        rollback(three, "chat", "canary", "ann", "")


@pytest.mark.parametrize("damage", ["changed", "gone", "manifest"])
def test_nothing_damaged_is_promoted_or_rolled_back_to(three, damage):
    moved(three, "1", "2")
    pointer = find_version(three, "chat", "1")
    root = f"models/chat/{pointer.digest[:12]}"
    if damage == "changed":
        three.put(f"{root}/model-outer.safetensors", b"eno" * 100)
    elif damage == "gone":
        three.delete(f"{root}/config.json")
    else:
        three.put(f"{root}/{pointer.manifest.key}", b"{}")
    with pytest.raises(InputError, match=r"was published|was changed"):
        promote(three, "chat", "1", "canary", "ann", "")
    with pytest.raises(InputError, match=r"was published|was changed"):
        rollback(three, "chat", "stable", "ann", "")
    assert find_alias(three, "chat", "canary") is None
    assert find_alias(three, "chat", "stable").now.to == "2"
    with pytest.raises(InputError, match=r"was published|was changed"):
        verify_stored(three.uri, "chat@1", None)
    assert verify_stored(three.uri, "chat@2", None)[0].files == 3


def test_concurrent_moves_are_all_kept(three):
    start = threading.Barrier(6)

    def act(number):
        mine = open_store(three.uri)
        start.wait()
        return [promote(mine, "chat", version, "stable", f"user-{number}", "") for version in ("1", "2", "3")]

    with ThreadPoolExecutor(6) as pool:
        seen = [one for mine in pool.map(act, range(6)) for one in mine]
    alias = find_alias(three, "chat", "stable")
    assert len(alias.history) >= 3
    assert all(alias.history[: len(one.history)] == one.history for one in seen), "a move that was told is lost"
    for before, after in zip(alias.history, alias.history[1:], strict=False):
        assert (after.before, after.to != before.to) == (before.to, True)


def test_a_rollback_that_somebody_was_faster_than_is_told(three, monkeypatch):
    moved(three, "1", "2")
    verified = module.verify_release

    def slow(*arguments):
        monkeypatch.setattr(module, "verify_release", verified)
        moved(three, "3")
        return verified(*arguments)

    monkeypatch.setattr(module, "verify_release", slow)
    with pytest.raises(Unavailable, match="somebody else moved"):
        rollback(three, "chat", "stable", "ann", "")
    assert find_alias(three, "chat", "stable").now.to == "3"


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{}", b"[]", b'{"name": "chat", "alias": "stable", "history": []}',
        {"name": "other"}, {"alias": "canary"}, {"extra": 1}, {"kind": "rollback"}, {"to": "9"},
    ],
)  # fmt: skip
def test_an_alias_file_is_not_trusted(three, content):
    moved(three, "1", "2")
    key = "models/chat/aliases/stable.json"
    if isinstance(content, dict):
        alias = json.loads(three.get(key))
        target = (
            alias if set(content) <= {"name", "alias", "extra"} else alias["history"][0 if "kind" in content else 1]
        )
        target.update(content)
        content = json.dumps(alias).encode()
    three.put(key, content)
    if b'"9"' in content:
        with pytest.raises(InputError, match="no version chat@9"):
            resolve(three, "chat", "stable")
        return
    with pytest.raises(InputError, match=r"is no alias|it was put there"):
        list_aliases(three, "chat")


def test_a_pointer_swapped_under_an_alias_is_noticed(three):
    moved(three, "1")
    pointer = find_version(three, "chat", "2").model_copy(update={"version": "1"})
    three.put("models/chat/versions/1.json", pointer.model_dump_json().encode())
    with pytest.raises(InputError, match="another model than stable was moved to"):
        resolve(three, "chat", "stable")


def test_a_pulled_directory_is_verified(store, tmp_path):
    release(store, "one")
    release(store, "two")
    out = tmp_path / "out"
    pull_release(store.uri, "chat@1", out)
    assert verify_pulled(out, None, None)[0].files == 3
    assert verify_pulled(out, store.uri, None)[1] == f"chat@1 in {out}"
    (out / "extra.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match=r"no files of the release: extra\.safetensors"):
        verify_pulled(out, None, None)
    (out / "extra.safetensors").unlink()
    (out / "config.json").write_bytes(b"[]")
    (out / "model-outer.safetensors").unlink()
    with pytest.raises(InputError, match=r"config\.json, model-outer\.safetensors"):
        verify_pulled(out, None, None)
    with pytest.raises(InputError, match="no pulled release"):
        verify_pulled(tmp_path, None, None)


def test_a_directory_made_to_agree_with_itself_is_caught_by_the_store(store, tmp_path):
    release(store, "one")
    forged = open_store(str(tmp_path / "forged"))
    release(forged, "evil")
    pull_release(forged.uri, "chat", tmp_path / "out")
    assert verify_pulled(tmp_path / "out", None, None)
    with pytest.raises(InputError, match="not that of any version of chat"):
        verify_pulled(tmp_path / "out", store.uri, None)
