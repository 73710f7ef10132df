"""Garbage goes, and nothing else: beside live runs, beside publishers at work, stopped or killed."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import BaseModel

from cluster.errors import InputError
from cluster.storage import Stored, open_store
from jobs.collecting import run_rule
from jobs.records import Ended, Progress, claim, note_end, note_progress
from workflows import collecting
from workflows.aliases import promote
from workflows.collecting import collect
from workflows.events import ignore
from workflows.publishing import publish, pull
from workflows.release import collector_key, find_version, model_digest
from workflows.steps import Journal
from workflows.verifying import verify_release

WEEK = timedelta(days=7)
DOCUMENTS = {"REPORT.json": b"{}"}
PATIENCE = 60  # seconds


def files_of(store, text="weights"):
    return {
        "model-outer.safetensors": store.put(f"runs/{text}/outer", text.encode() * 100),
        "config.json": store.put(f"runs/{text}/config", b"{}"),
    }


def later(store, days=8):
    """The same store, whose clock is some days ahead: all that lies there is old."""
    other = open_store(store.uri)
    other.clock = lambda: datetime.now(UTC) + timedelta(days=days)
    return other


def gc(store, remove=True, rule=lambda run: "keep"):
    return list(collect(store, WEEK, rule, remove))


def leave_release(store, text="died", name="chat"):
    """What a publisher leaves that dies before its commit; gives back its keys."""
    files = files_of(store, text)
    root = f"models/{name}/{model_digest(files)[:12]}"
    for file, stored in files.items():
        store.copy(stored.key, f"{root}/{file}")
    store.put(f"{root}/REPORT.00000000.json", b"{}")
    return sorted(store.keys(f"{root}/"))


def test_what_a_dead_publisher_left_goes_once_it_is_old(store):
    publish(store, "chat", "auto", files_of(store), DOCUMENTS, "run-1")
    left = leave_release(store)
    before = sorted(store.keys(""))
    assert gc(store) == [], "it may be a publisher at work"
    (found,) = gc(later(store), remove=False)
    assert (found.kind, found.objects, found.size, found.removed) == ("release", 3, 404, False)
    assert sorted(store.keys("")) == before, "a dry run changes nothing"
    (found,) = gc(later(store))
    assert found.removed
    assert sorted(store.keys("")) == [key for key in before if key not in left]
    assert gc(later(store)) == []


def test_a_losers_reports_go_and_the_release_stays_whole(store, tmp_path):
    done = publish(store, "chat", "auto", files_of(store), DOCUMENTS, "run-1")
    root = f"models/chat/{done.digest[:12]}"
    store.put(f"{root}/REPORT.11111111.json", b"of a loser")
    store.put(f"{root}/MANIFEST.22222222.json", b"of a loser")
    (found,) = gc(later(store))
    assert (found.kind, found.objects, found.place) == ("release files", 2, root)
    assert len(list(store.keys(f"{root}/"))) == 4
    pull(store, "chat", "1", tmp_path / "out")


def test_whatever_a_version_or_an_alias_names_stays(store):
    for text in ("one", "two"):
        publish(store, "chat", "auto", files_of(store, text), DOCUMENTS, "run")
    promote(store, "chat", "1", "stable", "ann", "")
    before = sorted(store.keys("models/"))
    assert gc(later(store)) == []
    store.delete("models/chat/versions/1.json")  # by hand: now only the alias stands for it
    leave_release(store)
    before = sorted(store.keys("models/"))
    assert gc(later(store)) == [], "what the alias names cannot be told any more, so all of the name stays"
    assert sorted(store.keys("models/")) == before


@pytest.mark.parametrize("damage", ["pointer", "manifest", "latest", "alias"])
def test_a_name_of_which_something_cannot_be_read_is_left_alone(store, damage):
    publish(store, "chat", "auto", files_of(store), DOCUMENTS, "run")
    promote(store, "chat", "1", "stable", "ann", "")
    pointer = find_version(store, "chat", "1")
    key = {
        "pointer": "models/chat/versions/1.json",
        "manifest": f"models/chat/{pointer.digest[:12]}/{pointer.manifest.key}",
        "latest": "models/chat/latest.json",
        "alias": "models/chat/aliases/stable.json",
    }[damage]
    store.put(key, b"{")
    leave_release(store)
    leave_release(store, name="other")
    assert [one.place.split("/")[1] for one in gc(later(store))] == ["other"]


def test_a_publisher_that_begins_between_the_two_looks_is_left_alone(store):
    left = leave_release(store)
    first = left[0]
    store.delete(first)
    collector = later(store)
    claim_it, list_it = collector.create, collector.entries

    def claim_late(key, data):
        store.put(first, b"{}")  # the publisher's first write, before it can see the claim
        return claim_it(key, data)

    def list_young(prefix):
        young = {"modified": collector.clock()}
        return (one.model_copy(update=young) if one.key == first else one for one in list_it(prefix))

    collector.create, collector.entries = claim_late, list_young
    assert gc(collector) == []
    assert sorted(store.keys("models/chat/")) == left, "and the claim is given back"


def test_a_publisher_waits_for_a_collector_and_writes_again_what_it_took(store, tmp_path):
    files = files_of(store)
    root = f"models/chat/{model_digest(files)[:12]}"
    with collecting._claimed(store, "chat", model_digest(files)[:12]) as mine:
        assert mine
        with collecting._claimed(store, "chat", model_digest(files)[:12]) as second:
            assert not second, "two collectors in one directory"
        mine, looks = open_store(store.uri), []
        look = mine.get_tagged

        def looking(key):
            looks.append(key)
            return look(key)

        mine.get_tagged = looking
        publisher = threading.Thread(target=publish, args=(mine, "chat", "auto", files, DOCUMENTS, "run-1"))
        publisher.start()
        deadline = time.monotonic() + PATIENCE
        while len(looks) < 2:
            assert time.monotonic() < deadline, "it did not wait"
            time.sleep(0.01)
        assert set(looks) == {collector_key("chat", model_digest(files))}
        (written,) = store.keys(f"{root}/")
        store.delete(written)  # the collector took it for an old one of the same content
    publisher.join(PATIENCE)
    assert not list(store.keys("models/chat/collecting/"))
    pull(store, "chat", "1", tmp_path / "out")


def test_a_dead_collectors_claim_is_taken_over_and_stops_no_publisher(store):
    files = files_of(store, "died")
    left = leave_release(store)
    past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    key = collector_key("chat", model_digest(files))
    store.put(key, json.dumps({"nonce": "x", "until": past}).encode())
    assert [one.removed for one in gc(later(store))] == [True]
    assert not set(store.keys("")) & {*left, key}
    store.put(key, json.dumps({"nonce": "x", "until": past}).encode())
    assert publish(store, "chat", "auto", files, DOCUMENTS, "run-1").version == "1"


def stopping_publisher(store, files, after):
    """A publisher in a process of its own that stops itself (SIGSTOP) before its write number `after`."""
    program = textwrap.dedent(
        """
        import json, os, signal, sys
        from cluster.storage import Stored, open_store
        from workflows.publishing import publish
        store, left = open_store(sys.argv[1]), int(sys.argv[3])
        files = {name: Stored(**one) for name, one in json.loads(sys.argv[2]).items()}
        def stopping(write):
            def wrapped(*arguments):
                global left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGSTOP)
                left -= 1
                return write(*arguments)
            return wrapped
        for name in ("put", "copy", "create", "swap"):
            setattr(store, name, stopping(getattr(store, name)))
        publish(store, "chat", "auto", files, {"REPORT.json": b"{}"}, "run-1")
        """
    )
    description = json.dumps({name: stored.model_dump() for name, stored in files.items()})
    process = subprocess.Popen([sys.executable, "-c", program, store.uri, description, str(after)], env=os.environ)
    deadline = time.monotonic() + PATIENCE
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert process.poll() is None, "it never stopped"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("after", range(6))
def test_a_publisher_stopped_for_days_ends_with_a_whole_release(store, tmp_path, after):
    """Writes: report, two model files, manifest, the pointer, `latest`. The collector takes all that is not committed."""
    files = files_of(store)
    publisher = stopping_publisher(store, files, after)
    try:
        assert gc(store) == [], "what is young is never touched"
        taken = sum(one.objects for one in gc(later(store)))
        assert taken == (after if after < 5 else 0)
        publisher.send_signal(signal.SIGCONT)
        assert publisher.wait(PATIENCE) == 0
    finally:
        publisher.kill()
        publisher.wait()
    assert verify_release(store, find_version(store, "chat", None)).files == 3
    pull(store, "chat", "1", tmp_path / "out")
    assert gc(later(store)) == []


class Blocks(BaseModel):
    blocks: tuple[Stored, ...]


class Number(BaseModel):
    value: float


def work_on(store, run, calls):
    """A run of two steps, one of which makes tensors."""
    journal = Journal(store, run, ignore)

    def prune(work):
        calls.append("prune")
        stored = store.put(f"{work.prefix('blocks')}/00000.safetensors", b"weights")
        work.record_block(0, stored)
        return Blocks(blocks=(stored,))

    def judge(work):
        calls.append("judge")
        return Number(value=1.5)

    journal.step("prune", {"x": 1}, Blocks, prune)
    journal.step("evaluate", {"x": 1}, Number, judge)


def attempt(store, run):
    return claim(store, run, "retail", "chat", "ann@host", "embedded", b"name: chat\n")


def end(store, started, result, code):
    assert note_end(store, started, Ended(at=store.clock(), code=code, result=result, sentence="so"))


def test_a_finished_runs_tensors_go_and_running_it_again_finds_all_done(store):
    started, calls = attempt(store, "done"), []
    work_on(store, "done", calls)
    end(store, started, "done", 0)
    small = [key for key in store.keys("runs/done/") if "/blocks/" not in key]
    (found,) = gc(store, rule=run_rule(store))
    assert (found.kind, found.place, found.objects) == ("run", "runs/done", 2)
    assert sorted(store.keys("runs/done/")) == sorted(small)
    work_on(store, "done", calls)
    assert calls == ["prune", "judge"]


@pytest.mark.parametrize("ending", [("cancelled", 130), ("lost", 75), ("failed", 1), None])
def test_an_unfinished_run_goes_only_when_old_and_can_be_gone_on_with(store, ending):
    started, calls = attempt(store, "half"), []
    work_on(store, "half", calls)
    note_progress(store, started, Progress(at=store.clock() - timedelta(minutes=5)))
    if ending:
        end(store, started, *ending)
    assert gc(store, rule=run_rule(store)) == []
    assert [one.place for one in gc(later(store), rule=run_rule(store))] == ["runs/half"]
    assert not list(store.keys("runs/half/blocks/"))
    assert len(list(store.keys("runs/half/collected/"))) == 1
    work_on(store, "half", calls)
    assert calls == ["prune", "judge", "prune"], "what was only a number is not done again"
    assert len(list(store.keys("runs/half/blocks/"))) == 2, "the block and its record"


@pytest.mark.parametrize("state", ["queued", "running", "unreadable"])
def test_a_run_that_waits_or_lives_is_kept_however_old_it_is(store, state):
    started, calls = attempt(store, "alive"), []
    work_on(store, "alive", calls)
    future = later(store)
    if state == "running":
        note_progress(store, started, Progress(at=future.clock()))
    elif state == "unreadable":
        store.put("runs/alive/attempts/1/started.json", b"{}")
    before = sorted(store.keys(""))
    assert gc(future, rule=run_rule(future)) == []
    assert sorted(store.keys("")) == before


def test_a_run_that_is_taken_up_meanwhile_is_kept(store):
    work_on(store, "half", [])
    fates = iter(["idle", "keep"])
    assert gc(later(store), rule=lambda run: next(fates)) == []
    assert list(store.keys("runs/half/blocks/"))


def test_uploads_in_parts_that_nobody_completed(s3):
    store = open_store(s3.make_prefix())
    other = open_store(s3.make_prefix())
    for one in (store, other):
        upload = store._client.create_multipart_upload(Bucket=one.bucket, Key=f"{one.prefix}/runs/x/blocks/big")
        store._client.upload_part(
            Bucket=one.bucket,
            Key=f"{one.prefix}/runs/x/blocks/big",
            UploadId=upload["UploadId"],
            PartNumber=1,
            Body=b"x",
        )
    assert gc(store) == []
    (found,) = gc(later(store), remove=False)
    assert (found.kind, found.place, found.size) == ("leftover", "runs/x/blocks/big", None)
    assert gc(later(store))[0].removed
    assert store.leftovers() == []
    assert len(other.leftovers()) == 1, "another prefix's upload"
    store.drop(other.leftovers()[0].model_copy(update={"key": "runs/x/blocks/big", "upload": upload["UploadId"]}))


def test_temporary_files_of_cut_off_writes(tmp_path):
    store = open_store(str(tmp_path))
    publish(store, "chat", "auto", files_of(store), DOCUMENTS, "run")
    (tmp_path / "runs" / ".tmp-cut-off").write_bytes(b"half")
    locks = list(tmp_path.rglob(".tmp-lock-*"))
    assert locks
    assert gc(store) == []
    (found,) = gc(later(store))
    assert (found.place, found.size) == ("runs/.tmp-cut-off", 4)
    assert list(tmp_path.rglob(".tmp-*")) == locks, "who removes a lock file lets a second holder in"


def test_a_negative_age_is_refused(tmp_path):
    with pytest.raises(InputError, match="older-than"):
        list(collect(open_store(str(tmp_path)), -WEEK, lambda run: "keep", remove=False))
