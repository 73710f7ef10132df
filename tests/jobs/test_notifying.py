"""Who is told of a run's end, and what: against a real HTTP server that refuses, hangs and leads astray."""

import hashlib
import hmac
import json
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from structlog.testing import capture_logs

from cluster.errors import InputError
from cluster.storage import open_store
from jobs.closing import close
from jobs.job import dump_job, parse_job
from jobs.messages import as_slack, message
from jobs.notice import checked_url
from jobs.notifying import read_notified, tell, tell_for
from jobs.records import Ended, claim, note_end, read_run
from jobs.running import AttemptLog
from jobs.webhooks import Patience
from workflows.events import StepEnded
from workflows.publishing import publish

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
QUICK = Patience(answer=0.5, first_wait=0.01, longest_wait=0.02, tries=4)
SECRET_PATH = "/services/T000/B000/mostsecretpath"
JOB = """
name: chat
tenant: retail
model: somewhere
target: {pattern: "2:4", sparsity: 0.5}
publish: {to: STORE}
notify: NOTIFY
"""


class Receiver(ThreadingHTTPServer):
    """A webhook on loopback. `answers` are given in turn, the last one for ever: a status, or a function."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = [200]
        self.got = []
        self.over = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}{SECRET_PATH}"

    @property
    def bodies(self):
        return [json.loads(body) for _, body in self.got]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((dict(self.headers), body))
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if callable(answer):
            answer(self)
            return
        self.send_response(answer)
        if 300 <= answer < 400:
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *_):
        pass


def hang(handler):
    handler.server.over.wait(60)


def drip(handler):
    """A header for ever, byte by byte: no single read ever runs out."""
    while not handler.server.over.wait(0.05):
        try:
            handler.wfile.write(b"H")
        except OSError:
            return


@pytest.fixture
def receiver():
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def place(tmp_path):
    return open_store(str(tmp_path / "store"))


def job_for(place, *notices):
    return parse_job(JOB.replace("STORE", place.uri).replace("NOTIFY", json.dumps(notices)), "job.yaml")


def attempt(place, job):
    return claim(place, job.run, job.tenant, job.name, "ann@host", "embedded", dump_job(job))


def ended(result="done", code=0, **changes):
    digest = "d" * 64 if result in ("done", "rolled back") else ""
    fields = {"at": NOW, "code": code, "result": result, "sentence": "perplexity rose 1 %", "digest": digest}
    return Ended(**fields | {"release": "chat@1" if digest else ""} | changes)


def test_a_receiver_that_fails_twice_gets_the_message_signed(place, receiver, monkeypatch):
    monkeypatch.setenv("KARIKOMI_WEBHOOK_SECRET", "shared between two")
    receiver.answers = [500, 503, 200]
    job = job_for(place, {"url": receiver.url})
    (delivery,) = tell(job, place, attempt(place, job), ended(), QUICK)
    assert (delivery.delivered, delivery.answer, len(receiver.got)) == (True, "200", 3)
    headers, body = receiver.got[-1]
    expected = hmac.new(b"shared between two", headers["X-Karikomi-Timestamp"].encode() + b"." + body, hashlib.sha256)
    assert headers["X-Karikomi-Signature"] == f"sha256={expected.hexdigest()}"
    assert len({headers["X-Karikomi-Delivery"] for headers, _ in receiver.got}) == 1
    told = json.loads(body)
    assert (told["event"], told["tenant"], told["name"], told["release"]) == ("done", "retail", "chat", "chat@1")
    assert told["next"] == f"karikomi pull chat@1 DIR --from {place.uri}"


@pytest.mark.parametrize(
    ("answer", "requests", "said"),
    [(410, 1, "answered 410"), (404, 1, "answered 404"), (302, 1, "redirects are not followed"),
     (307, 1, "redirects are not followed"), (500, 4, "answered 500"), (429, 4, "answered 429"),
     (hang, 4, "no answer within 0.5 s")],
)  # fmt: skip
def test_who_does_not_take_it_is_let_be(place, receiver, answer, requests, said):
    receiver.answers = [answer]
    job = job_for(place, {"url": receiver.url})
    started = attempt(place, job)
    began = time.monotonic()
    with capture_logs() as logged:
        (delivery,) = tell(job, place, started, ended(), QUICK)
    assert time.monotonic() - began < QUICK.in_all + 10
    assert not delivery.delivered
    assert said in delivery.answer
    assert len(receiver.got) == requests
    assert read_notified(place, job.run, 1).deliveries == (delivery,)
    everything = json.dumps(logged, default=str) + "".join(
        place.get(key).decode() for key in place.keys("") if key.endswith((".json", ".yaml"))
    )
    assert "mostsecretpath" not in everything


def test_hanging_receivers_cost_no_more_than_one_of_them(place, receiver):
    assert Patience().in_all < 30
    receiver.answers = [drip]
    job = job_for(place, *[{"url": receiver.url} for _ in range(5)])
    began = time.monotonic()
    deliveries = tell(job, place, attempt(place, job), ended(), QUICK)
    assert time.monotonic() - began < QUICK.in_all + 10
    assert [one.delivered for one in deliveries] == [False] * 5


def test_nobody_there_and_no_variable_fail_nothing(place, monkeypatch):
    monkeypatch.delenv("NO_SUCH_HOOK", raising=False)
    monkeypatch.setenv("NO_URL", "just-a-password")
    job = job_for(place, {"url": "http://127.0.0.1:9/x"}, {"url_from": "NO_SUCH_HOOK"}, {"url_from": "NO_URL"})
    nobody, unset, no_url = tell(job, place, attempt(place, job), ended(), QUICK)
    assert nobody.answer == "not reached (ConnectionError)"
    assert unset.answer == "the variable NO_SUCH_HOOK is not set on this machine"
    assert "https" in no_url.answer
    assert "just-a-password" not in str(no_url)


def test_a_broken_store_fails_nothing(tmp_path, receiver):
    (tmp_path / "file").write_text("no directory")
    broken = open_store(str(tmp_path / "file"))
    job = job_for(broken, {"url": receiver.url})
    there = open_store(str(tmp_path / "store"))
    tell(job, broken, attempt(there, job), ended("failed", 1), QUICK)  # raises nothing


@pytest.mark.parametrize(
    ("result", "code", "event"),
    [("done", 0, "done"), ("rolled back", 3, "rolled back"), ("gate not met", 3, "needs decision"),
     ("bad input", 2, "failed"), ("failed", 1, "failed"), ("lost", 75, "failed"), ("cancelled", 130, "cancelled")],
)  # fmt: skip
def test_everybody_hears_what_they_asked_for(place, receiver, monkeypatch, result, code, event):
    monkeypatch.setenv("TEAM_HOOK", receiver.url)
    everything = ["done", "rolled back", "failed", "needs decision", "cancelled"]
    others = [one for one in everything if one != event]
    job = job_for(place, {"url_from": "TEAM_HOOK", "on": [event]}, {"url_from": "TEAM_HOOK", "on": others})
    deliveries = tell(job, place, attempt(place, job), ended(result, code), QUICK)
    assert [(one.target, one.event) for one in deliveries] == [("1 json TEAM_HOOK", event)]
    assert receiver.bodies[0]["state"] == result


def test_a_cancelled_run_is_told_only_if_asked(place, receiver):
    job = job_for(place, {"url": receiver.url})
    assert tell(job, place, attempt(place, job), ended("cancelled", 130), QUICK) == ()
    assert receiver.got == []


def test_a_lost_attempt_is_told_when_nobody_will_try_again(place, receiver, monkeypatch):
    job = job_for(place, {"url": receiver.url})
    monkeypatch.setenv("KARIKOMI_RETRIES_LEFT", "1")
    assert tell(job, place, attempt(place, job), ended("lost", 75), QUICK) == ()
    monkeypatch.setenv("KARIKOMI_RETRIES_LEFT", "0")
    assert len(tell(job, place, attempt(place, job), ended("lost", 75), QUICK)) == 1


def test_who_finds_a_run_lost_tells_for_its_driver(place, receiver, monkeypatch):
    monkeypatch.setenv("TEAM_HOOK", receiver.url)
    job = job_for(place, {"url_from": "TEAM_HOOK"})
    started = attempt(place, job)
    assert tell_for(place, job.run) == (), "it has not ended"
    note_end(place, started, ended("lost", 75, sentence="the driver was killed"))
    assert [one.delivered for one in tell_for(place, job.run)] == [True]
    assert tell_for(place, job.run) == ()
    assert [one["sentence"] for one in receiver.bodies] == ["the driver was killed"]
    place.put(f"runs/{job.run}/job.yaml", b"\xff")
    assert tell_for(place, job.run) == tell_for(place, "no-such-run") == ()


def test_a_release_is_told_once_a_failure_every_time(place, receiver):
    job = job_for(place, {"url": receiver.url})
    first, second = attempt(place, job), attempt(place, job)
    assert len(tell(job, place, first, ended(), QUICK)) == 1
    assert tell(job, place, first, ended(), QUICK) == ()
    assert tell(job, place, second, ended(), QUICK) == (), "found done again, but that is no news"
    assert len(tell(job, place, first, ended("failed", 1), QUICK)) == 1
    assert tell(job, place, first, ended("failed", 1), QUICK) == ()
    assert len(tell(job, place, second, ended("failed", 1), QUICK)) == 1
    assert len(receiver.got) == 3


def test_what_was_not_delivered_is_tried_again_by_the_next_attempt(place, receiver):
    receiver.answers = [410, 200]
    job = job_for(place, {"url": receiver.url})
    assert not tell(job, place, attempt(place, job), ended(), QUICK)[0].delivered
    assert tell(job, place, attempt(place, job), ended(), QUICK)[0].delivered


def test_bad_input_is_told_and_leaves_no_trace(place, receiver):
    job = job_for(place, {"url": receiver.url})
    log = AttemptLog(job, place, None)

    def refused():
        with log.alive():
            raise InputError("model: /nowhere is not there", "Give a model.")

    with pytest.raises(InputError):
        refused()
    assert [(one["event"], one["code"], one["next"]) for one in receiver.bodies] == [("failed", 2, "Give a model.")]
    assert list(place.keys("")) == []


def test_who_was_taken_for_lost_and_comes_to_its_end_tells_of_it(place, receiver):
    """The first end stands in the record; but a release that is there after all is news."""
    job = job_for(place, {"url": receiver.url})
    started = attempt(place, job)
    log = AttemptLog(job, place, started)
    with log.alive():
        assert close(place, started, ended("lost", 75))
        log.ended(ended())
    assert read_run(place, job.run).last.ended.result == "lost"
    assert [one["event"] for one in receiver.bodies] == ["done"]


def test_an_attempt_tells_and_keeps_no_secret_of_its_error(place, receiver, monkeypatch):
    monkeypatch.setenv("WAREHOUSE_PASSWORD", "correct horse battery")
    job = job_for(place, {"url": receiver.url}, {"url": receiver.url, "form": "slack"})
    log = AttemptLog(job, place, None)

    def fails():
        with log.alive():
            log(StepEnded("windows", 0, 1.0, resumed=False))
            raise RuntimeError(f"POST {receiver.url} as correct horse battery, Authorization: Bearer abcdefghijkl")

    with pytest.raises(RuntimeError):
        fails()
    assert len(receiver.got) == 2
    kept = "".join(place.get(key).decode(errors="replace") for key in place.keys(""))
    said = kept + "".join(body.decode() for _, body in receiver.got)
    for secret in ("correct horse battery", "mostsecretpath", "abcdefghijkl"):
        assert secret not in said
    assert "RuntimeError: POST [hidden] as [hidden]" in said


def test_the_report_is_found_in_the_release(place, receiver, tmp_path):
    files = {"model.safetensors": place.put("work/model", b"weights")}
    done = publish(place, "chat", "auto", files, {"REPORT.html": b"<html>"}, "chat-1")
    job = job_for(place, {"url": receiver.url})
    tell(job, place, attempt(place, job), ended(digest=done.digest), QUICK)
    (told,) = receiver.bodies
    assert told["release_uri"] == done.uri
    assert told["report_uri"].startswith(f"{done.uri}/REPORT.")
    assert place.get(told["report_uri"].removeprefix(f"{place.uri}/")) == b"<html>"


def test_slack_takes_the_message_whole_and_nothing_in_it_is_a_command():
    nasty = "<!channel> & <https://evil.example|click> " + "&" * 5000
    told = message(
        "chat-1", "retail", "chat", None, ended(sentence=nasty, hint=nasty, result="failed", code=1), "s3://b/p"
    )
    form = as_slack(told)
    header, sentence, facts, following = form["blocks"]
    assert header == {"type": "header", "text": {"type": "plain_text", "text": "chat: failed", "emoji": False}}
    assert "&lt;!channel&gt; &amp; &lt;https" in sentence["text"]["text"]
    texts = [sentence["text"], following["text"], *facts["fields"]]
    assert all(one["type"] == "mrkdwn" and "<" not in one["text"] for one in texts)
    assert all(0 < len(one["text"]) <= 3000 for one in texts)
    assert len(facts["fields"]) <= 10
    assert all(len(one["text"]) <= 2000 for one in facts["fields"])
    assert form["text"].startswith("chat: failed – ")


@pytest.mark.parametrize(
    "url",
    ["http://hooks.example.com/x", "http://169.254.169.254/latest/meta-data", "http://10.0.0.1/", "ftp://127.0.0.1/",
     "file:///etc/passwd", "https://user:pass@example.com/", "https://", "https:///x", "//example.com/x", "", " https://a.b/",
     "http://127.0.0.1.evil.example/", "http://localhost.evil.example/", "https://a.b/\r\nX: y", "https://a.b:port/",
     "http://0.0.0.0/", "http://[::ffff:10.0.0.1]/", "http://2130706433/"],
)  # fmt: skip
def test_other_addresses_are_refused(url):
    with pytest.raises(ValueError, match="webhook"):
        checked_url(url)


def test_addresses_that_may_be_called():
    for url in (
        "https://hooks.slack.com/services/x",
        "http://127.0.0.1:8000/x",
        "http://[::1]/x",
        "http://localhost:1/",
    ):
        assert checked_url(url) == url


def test_a_url_in_a_job_file_stays_out_of_records_and_errors(place):
    job = job_for(place, {"url": "https://hooks.example.com/mostsecretpath"})
    assert "mostsecretpath" not in dump_job(job).decode() + repr(job) + job.model_dump_json()
    again = parse_job(dump_job(job).decode(), "kept")
    assert again.run == job.run == job_for(place).run, "who is told is no part of the run's identity"
    (delivery,) = tell(again, place, attempt(place, again), ended(), QUICK)
    assert "url_from" in delivery.answer
    for wrong in ({"url": "http://hooks.example.com/mostsecretpath"}, {"url_from": "https://x/mostsecretpath"},
                  {"url": "https://x/mostsecretpath", "url_from": "X"}, {"uri": "https://x/mostsecretpath"}):  # fmt: skip
        with pytest.raises(InputError, match=r"notify\.0") as refused:
            job_for(place, wrong)
        assert "mostsecretpath" not in str(refused.value)


def test_on_is_a_name_and_not_a_truth_value():
    text = JOB.replace("STORE", "/tmp/x").replace("NOTIFY", "[{url_from: HOOK, on: [done, rolled back]}]")
    assert parse_job(text, "job.yaml").notify[0].on == ("done", "rolled back")
