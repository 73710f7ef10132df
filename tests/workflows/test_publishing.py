"""Publishing by its protocol: one winner, nothing half-done visible, every byte verified. Directory and real S3."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from faulty_proxy import FaultyProxy, Once

from cluster import s3_store
from cluster.errors import InputError, Unavailable
from cluster.storage import open_store
from workflows.publishing import publish, pull
from workflows.release import find_version, model_digest

DOCUMENTS = {"REPORT.json": b"{}", "PROVENANCE.json": b"{}"}


def model(store, text: str = "weights"):
    """Some model files, already in the store, as a run has them."""
    return {
        "model-outer.safetensors": store.put(f"runs/{text}/outer", text.encode() * 100),
        "config.json": store.put(f"runs/{text}/config", b"{}"),
    }


def test_publish_then_pull(store, tmp_path):
    files = model(store)
    done = publish(store, "chat", "auto", files, DOCUMENTS, "run-1")
    assert (done.version, done.already, done.digest) == ("1", False, model_digest(files))
    pulled = pull(store, "chat", None, tmp_path / "out")
    assert pulled.version == "1"
    assert (tmp_path / "out" / "model-outer.safetensors").read_bytes() == b"weights" * 100
    assert (tmp_path / "out" / "REPORT.json").read_bytes() == b"{}"


def test_publishing_again_changes_nothing(store):
    first = publish(store, "chat", "auto", model(store), DOCUMENTS, "run-1")
    pointer = find_version(store, "chat", "1")
    again = publish(store, "chat", "auto", model(store), {"REPORT.json": b"other timings"}, "run-2")
    assert again.already
    assert again.version == first.version
    assert find_version(store, "chat", "1") == pointer
    assert find_version(store, "chat", "2") is None


def test_another_model_is_another_version_and_never_the_same_one(store):
    publish(store, "chat", "auto", model(store), DOCUMENTS, "run-1")
    second = publish(store, "chat", "auto", model(store, "other"), DOCUMENTS, "run-2")
    assert second.version == "2"
    assert find_version(store, "chat", None).version == "2"
    with pytest.raises(InputError, match=r"chat@1 holds another model .*run-1"):
        publish(store, "chat", "1", model(store, "third"), DOCUMENTS, "run-3")


@pytest.mark.parametrize("racers", [2, 8])
def test_one_version_has_one_winner(store, racers):
    def race(number: int):
        mine = open_store(store.uri)
        files = model(mine, f"racer-{number}")
        start.wait()
        try:
            return publish(mine, "chat", "gold", files, DOCUMENTS, f"run-{number}")
        except InputError as error:
            return error

    start = threading.Barrier(racers)
    with ThreadPoolExecutor(racers) as pool:
        results = list(pool.map(race, range(racers)))
    winners = [one for one in results if not isinstance(one, InputError)]
    assert len(winners) == 1
    assert find_version(store, "chat", "gold").digest == winners[0].digest
    assert all("holds another model" in str(one) for one in results if isinstance(one, InputError))


def killed_publisher(store, files, at: str, after: int):
    """A publisher in a process of its own that SIGKILL hits before its next write of this kind."""
    program = textwrap.dedent(
        """
        import os, signal, sys, json
        from cluster.storage import Stored, open_store
        from workflows import publishing
        store = open_store(sys.argv[1])
        files = {name: Stored(**one) for name, one in json.loads(sys.argv[2]).items()}
        left = int(sys.argv[4])
        def dying(write):
            def wrapped(*arguments):
                global left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return write(*arguments)
            return wrapped
        for name in sys.argv[3].split():
            setattr(store, name, dying(getattr(store, name)))
        publishing.publish(store, "chat", "auto", files, {"REPORT.json": b"{}"}, "run-1")
        """
    )
    description = json.dumps({name: stored.model_dump() for name, stored in files.items()})
    arguments = [sys.executable, "-c", program, store.uri, description, at, str(after)]
    return subprocess.run(arguments, env=os.environ, check=False, capture_output=True, timeout=120)


@pytest.mark.parametrize("after_writes", [0, 1, 2, 3, 4])
def test_a_publisher_killed_half_way_leaves_nothing_visible(store, tmp_path, after_writes):
    files = model(store)
    killed = killed_publisher(store, files, "put copy create", after_writes)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert find_version(store, "chat", None) is None
    with pytest.raises(InputError, match="no release"):
        pull(store, "chat", None, tmp_path / "out")
    assert publish(store, "chat", "auto", files, DOCUMENTS, "run-1").version == "1"
    pull(store, "chat", "1", tmp_path / "out")


def test_a_wrong_byte_is_caught_and_leaves_no_directory(store, tmp_path):
    done = publish(store, "chat", "auto", model(store), DOCUMENTS, "run-1")
    key = f"models/chat/{done.digest[:12]}/model-outer.safetensors"
    damaged = bytearray(store.get(key))
    damaged[50] ^= 1
    store.put(key, bytes(damaged))
    with pytest.raises(InputError, match=r"model-outer\.safetensors is not what the manifest says"):
        pull(store, "chat", "1", tmp_path / "out")
    assert list(tmp_path.glob("out*")) + list(tmp_path.glob(".pull*")) == []


def test_a_changed_manifest_is_caught(store, tmp_path):
    publish(store, "chat", "auto", model(store), DOCUMENTS, "run-1")
    pointer = find_version(store, "chat", "1")
    key = f"models/chat/{pointer.digest[:12]}/{pointer.manifest.key}"
    store.put(key, store.get(key).replace(b"config.json", b"../evil.json"))
    with pytest.raises(InputError, match="changed after it was published"):
        pull(store, "chat", "1", tmp_path / "out")


def test_pull_does_not_write_into_a_full_directory(store, tmp_path):
    publish(store, "chat", "auto", model(store), DOCUMENTS, "run-1")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(InputError, match="not empty"):
        pull(store, "chat", "1", tmp_path / "mine")


def test_an_upload_over_damaged_leftovers_is_verified(store):
    files = model(store)
    digest = model_digest(files)
    store.put(f"models/chat/{digest[:12]}/config.json", b"[]")  # left by an interrupted upload, same size
    publish(store, "chat", "auto", files, DOCUMENTS, "run-1")
    assert store.get(f"models/chat/{digest[:12]}/config.json") == b"{}"


def test_a_lost_reply_to_the_commit_is_recognised_as_our_own_success(s3, monkeypatch):
    lost = Once("PUT", "/versions/", lambda body: None)
    with FaultyProxy(s3.endpoint, fault=lost) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        store = open_store(s3.make_prefix())
        done = publish(store, "chat", "auto", model(store), DOCUMENTS, "run-1")
        assert lost.happened, "no reply was lost, so this test showed nothing"
        assert (done.version, done.already) == ("1", False)
        assert find_version(store, "chat", "1") == find_version(store, "chat", None)
        assert find_version(store, "chat", "2") is None


@pytest.mark.parametrize("damage", [lambda body: b"W" + body[1:], lambda body: body[:-1]], ids=["changed", "cut"])
def test_damage_on_the_way_is_caught_and_leaves_no_directory(s3, monkeypatch, tmp_path, damage):
    def fault(request, body):
        return damage(body) if request.startswith("GET") and "model-outer" in request else body

    monkeypatch.setattr(s3_store, "PAUSES", (0.01,))
    store = open_store(s3.make_prefix())
    publish(store, "chat", "auto", model(store), DOCUMENTS, "run-1")
    with FaultyProxy(s3.endpoint, fault=fault) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        with pytest.raises((InputError, Unavailable), match=r"model-outer|out of reach"):
            pull(store, "chat", "1", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_two_processes_race_for_one_version(store, tmp_path):
    program = textwrap.dedent(
        """
        import sys
        from cluster.errors import InputError
        from cluster.storage import open_store
        from workflows.publishing import publish
        store, me = open_store(sys.argv[1]), sys.argv[2]
        files = {"config.json": store.put(f"runs/{me}/config", me.encode())}
        print("ready", flush=True)
        sys.stdin.readline()
        try:
            print("won", publish(store, "chat", "gold", files, {"REPORT.json": me.encode()}, me).digest)
        except InputError as error:
            print("lost", error.message)
        """
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", program, store.uri, f"run-{number}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    said = sorted(racer.communicate(timeout=60)[0] for racer in racers)
    assert [one.split()[0] for one in said] == ["lost", "won"], said
    pointer = find_version(store, "chat", "gold")
    assert "holds another model" in said[0]
    assert pointer.run in said[0]
    assert pointer.digest == said[1].split()[1]
    pull(store, "chat", "gold", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == pointer.run


def together(count, act):
    """What `act(number)` gives, all started at once."""
    start = threading.Barrier(count)

    def one(number):
        start.wait()
        return act(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_eight_models_take_eight_numbers_and_latest_is_the_last(store):
    files = [model(store, f"racer-{number}") for number in range(8)]
    done = together(8, lambda n: publish(open_store(store.uri), "chat", "auto", files[n], DOCUMENTS, f"run-{n}"))
    assert sorted(int(one.version) for one in done) == list(range(1, 9))
    assert find_version(store, "chat", None) == find_version(store, "chat", "8")


def test_eight_publishers_of_one_model_make_one_version_with_one_ones_reports(store, tmp_path):
    publish(store, "chat", "auto", model(store, "before"), DOCUMENTS, "run-0")
    files = model(store)
    reports = [f"timings of {number}".encode() for number in range(8)]
    done = together(
        8, lambda n: publish(open_store(store.uri), "chat", "auto", files, {"REPORT.json": reports[n]}, f"run-{n}")
    )
    assert {one.version for one in done} == {"2"}
    assert [one.already for one in done].count(False) == 1
    assert find_version(store, "chat", "3") is None
    pull(store, "chat", "2", tmp_path / "out")
    winner = [one.already for one in done].index(False)
    assert (tmp_path / "out" / "REPORT.json").read_bytes() == reports[winner]


def test_latest_never_goes_back(store):
    first, second = model(store), model(store, "other")
    publish(store, "chat", "auto", first, DOCUMENTS, "run-1")
    publish(store, "chat", "auto", second, DOCUMENTS, "run-2")
    publish(store, "chat", "auto", first, DOCUMENTS, "run-3")
    assert find_version(store, "chat", None).version == "2"
    for name, files in (("gold", model(store, "gold")), ("silver", model(store, "silver"))):
        publish(store, "chat", name, files, DOCUMENTS, "run-4")
        assert find_version(store, "chat", None).version == name
    publish(store, "chat", "gold", model(store, "gold"), DOCUMENTS, "run-5")
    assert find_version(store, "chat", None).version == "silver"


def test_a_publisher_killed_before_it_moves_latest_is_made_up_for(store):
    files = model(store)
    killed = killed_publisher(store, files, at="swap", after=0)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert find_version(store, "chat", "1") is not None, "the commit was made"
    assert find_version(store, "chat", None) is None
    again = publish(store, "chat", "auto", files, DOCUMENTS, "run-1")
    assert (again.version, again.already) == ("1", True)
    assert find_version(store, "chat", None) == find_version(store, "chat", "1")


def test_pull_takes_an_empty_directory_and_refuses_what_cannot_be_one(store, tmp_path):
    publish(store, "chat", "auto", model(store), DOCUMENTS, "run-1")
    (tmp_path / "empty").mkdir()
    pull(store, "chat", None, tmp_path / "empty")
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == [
        *("MANIFEST.json", "PROVENANCE.json", "REPORT.json"),
        *("config.json", "model-outer.safetensors"),
    ]
    with pytest.raises(InputError, match="cannot be written"):
        pull(store, "chat", None, tmp_path / "empty" / "config.json" / "below")


def test_a_lost_file_is_named(store, tmp_path):
    done = publish(store, "chat", "auto", model(store), DOCUMENTS, "run-1")
    store.delete(f"models/chat/{done.digest[:12]}/config.json")
    with pytest.raises(InputError, match=r"config\.json is gone"):
        pull(store, "chat", "1", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files.update({"../evil": files["config.json"]}), "plain file names"),
        (lambda files: files.update({"/evil": files["config.json"]}), "plain file names"),
        (lambda files: files.update({"..": files["config.json"]}), "plain file names"),
        (lambda files: files["config.json"].update(key="../../other/config.json"), "plain file names"),
        (lambda files: files.update({"CONFIG.json": files["config.json"]}), "two files"),
        (lambda files: files.update({"MANIFEST.json": files["config.json"]}), "two files"),
        (lambda files: files.pop("config.json"), "another model"),
        (lambda files: files["config.json"].update(sha256="0" * 64), "another model"),
    ],
)
def test_a_manifest_is_not_trusted_even_when_its_pointer_vouches_for_it(store, tmp_path, change, message):
    publish(store, "chat", "auto", model(store), DOCUMENTS, "run-1")
    pointer = find_version(store, "chat", "1")
    root = f"models/chat/{pointer.digest[:12]}"
    manifest = store.get_json(f"{root}/{pointer.manifest.key}")
    change(manifest["files"])
    forged = store.put_json(f"{root}/{pointer.manifest.key}", manifest)
    vouched = pointer.model_copy(update={"manifest": forged.model_copy(update={"key": pointer.manifest.key})})
    store.put("models/chat/versions/1.json", vouched.model_dump_json().encode())
    with pytest.raises(InputError, match=message):
        pull(store, "chat", "1", tmp_path / "out")
    assert list(tmp_path.glob("out*")) == []


def test_a_pointer_in_anothers_place_is_refused(store):
    publish(store, "chat", "auto", model(store), DOCUMENTS, "run-1")
    store.copy("models/chat/versions/1.json", "models/other/versions/1.json")
    with pytest.raises(InputError, match="was put there"):
        find_version(store, "other", "1")
    store.put("models/chat/versions/2.json", b"{}")
    with pytest.raises(InputError, match="no version pointer"):
        find_version(store, "chat", "2")


@pytest.mark.parametrize(("name", "version"), [("../x", "1"), ("chat", "../x"), ("chat", "a/b"), ("", "1"), ("c", "")])
def test_names_that_cannot_be_one(store, name, version):
    with pytest.raises(InputError, match="names no release or version"):
        publish(store, name, version, model(store), DOCUMENTS, "run-1")
    with pytest.raises(InputError, match="names no release or version"):
        find_version(store, name, version)


def test_the_digest_is_of_the_model_only(store):
    files = model(store)
    moved = {name: stored.model_copy(update={"key": "elsewhere"}) for name, stored in reversed(files.items())}
    assert model_digest(moved) == model_digest(files)
    assert model_digest({**files, "more": files["config.json"]}) != model_digest(files)
