"""Logs: a JSON object a line, each with what it belongs to, and no secret wherever it was planted."""

import json
import logging
import os
import subprocess
import sys

import pytest
import structlog
import yaml
from models_for_tests import write_tiny_model

from cluster.errors import Cancelled
from cluster.storage import open_store
from jobs.job import parse_job
from jobs.logs import LATE, configure, log_event, log_failure
from jobs.notice import Notice
from jobs.notifying import address
from jobs.records import read_run
from jobs.redacting import HIDDEN, redact, redact_all
from jobs.running import AttemptLog
from workflows.events import Advanced, GateJudged, StepEnded, StepStarted

AWS_SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
SECRETS = [
    f"aws_secret_access_key={AWS_SECRET}",
    f"{{'SecretAccessKey': '{AWS_SECRET}', 'AccessKeyId': 'AKIAIOSFODNN7EXAMPLE'}}",
    "AKIAIOSFODNN7EXAMPLE",
    "ASIAIOSFODNN7EXAMPLE",
    "Authorization: Bearer planted-abcdef.123",
    "authorization='Basic cGxhbnRlZDpwbGFudGVk'",
    '"Authorization": "AWS4-HMAC-SHA256 Credential=planted/20261124, Signature=planted0123"',
    "https://hooks.slack.com/services/T0planted/B0planted/planted",
    "https://contoso.webhook.office.com/webhookb2/planted@x/IncomingWebhook/planted",
    "https://discord.com/api/webhooks/1234/planted",
    "s3.amazonaws.com/b/k?X-Amz-Credential=planted%2F2026&X-Amz-Signature=planted&X-Amz-Security-Token=planted",
    "https://user:planted@proxy.example.com:3128/",
    "hf_plantedplantedplanted",
    "ghp_plantedplantedplantedplanted",
    "xoxb-planted-planted-planted",
    "token eyJplantedhead.eyJplantedbody.plantedsignature",
    "password: planted",
    "-----BEGIN RSA PRIVATE KEY-----\nplanted\nplanted\n-----END RSA PRIVATE KEY-----",
]
HARMLESS = [
    "runs/chat-0123456789ab/steps/" + "0a" * 32 + ".json is no record of this version",
    "s3://in-house/chat.parquet: 1200 tokens, 3 windows; key 'text' is missing",
    "karikomi pull chat@1 DIR --from s3://models/retail",
    "no Ray cluster at ray://10.0.0.1:10001: refused",
    "perplexity rose 1.6 % (limit +10 %); worst slice types rose 4.0 %",
    "tokenizer: the secretary's tokens; author: Ann; monkey: 3",
]


pytestmark = pytest.mark.usefixtures("logging_as_it_was")


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


@pytest.mark.parametrize("text", SECRETS)
def test_planted_secrets_are_hidden(text):
    for found in (redact(text), redact(f"it said: {text}, and ended"), json.dumps(redact_all({"what": [{"x": text}]}))):
        assert HIDDEN in found
        assert "planted" not in found.replace("planted@proxy", "")
        assert AWS_SECRET not in found
        assert "IOSFODNN7" not in found


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


def test_known_values_are_hidden_wherever_they_are(monkeypatch):
    monkeypatch.setenv("RETAIL_AWS_SECRET_ACCESS_KEY", AWS_SECRET)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef")
    monkeypatch.setenv("TEAM_TELLS", "https://chat.in-house.example/in/mostsecretpath")
    monkeypatch.setenv("KARIKOMI_CREDENTIALS", "WHOLESALE")
    address(Notice(url_from="TEAM_TELLS"))
    text = f"x{AWS_SECRET}y 0123456789abcdef https://chat.in-house.example/in/mostsecretpath"
    assert redact(text) == f"x{HIDDEN}y {HIDDEN} {HIDDEN}"
    assert redact("tenant WHOLESALE") == "tenant WHOLESALE"


def test_fields_that_are_named_like_a_secret_are_hidden_whole():
    told = {"password": "abc", "api_key": "abc", "key": "runs/x", "tokens": 3, "Authorization": "abc", "path": None}
    shown = {"password": HIDDEN, "api_key": HIDDEN, "key": "runs/x", "tokens": 3, "Authorization": HIDDEN, "path": None}
    assert redact_all(told) == shown


def test_every_line_is_json_without_secrets_also_of_libraries_and_errors(capsys):
    configure("json")
    secret = f"SecretAccessKey={AWS_SECRET}"
    structlog.get_logger("jobs.x").info("went on", detail={"deep": [secret]}, error=ValueError(secret))
    logging.getLogger("ray.data").error("ray says %s", secret)
    logging.getLogger("some.library").warning("a warning: %s", secret)
    logging.getLogger("botocore.hooks").warning("chatter")
    try:
        raise RuntimeError(secret)
    except RuntimeError:
        log_failure()
    found = lines(capsys)
    assert [one["logger"] for one in found] == ["jobs.x", "ray.data", "some.library", "jobs.run"]
    assert "RuntimeError: SecretAccessKey=[hidden]" in found[-1]["exception"]
    assert AWS_SECRET not in json.dumps(found)
    assert {"timestamp", "level", "event"} <= found[0].keys()


@pytest.mark.parametrize("name", LATE)
def test_a_library_with_a_handler_of_its_own_says_nothing_beside_ours(capsys, name):
    library = logging.getLogger(name)
    configure("json")
    own = logging.StreamHandler(sys.stdout)  # as it does when it is imported
    library.addHandler(own)
    library.setLevel(logging.WARNING)
    library.propagate = False
    library.warning("Setting accelerator to CPU")
    library.error("an op failed")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [json.loads(line)["event"] for line in shown.err.splitlines()] == ["an op failed"]


def test_on_a_terminal_only_warnings_are_told(capsys):
    configure("console")
    log_event(StepStarted("prune", 1))
    structlog.get_logger("jobs.x").warning("look", password="planted")
    shown = capsys.readouterr().err
    assert "step started" not in shown
    assert "look" in shown
    assert "planted" not in shown


def test_lines_say_what_they_belong_to(capsys, tmp_path):
    configure("json")
    text = (
        f'name: tiny\nmodel: x\ntenant: retail\ntarget: {{pattern: "2:4", sparsity: 0.5}}\npublish: {{to: {tmp_path}}}'
    )
    job = parse_job(text, "job.yaml")
    attempt = AttemptLog(job, open_store(str(tmp_path)), None)

    def go():
        from jobs.logs import bound

        with bound(job.run, job.tenant, ""), attempt.alive():
            for event in (
                StepStarted("windows"),
                StepEnded("windows", 0, 1.25, resumed=False),
                StepStarted("prune", 1),
                Advanced("prune", 1, 3, 18),
            ):
                attempt(event)
                log_event(event)
            structlog.get_logger("workflows.scoring").warning("damping raised")
            attempt(StepEnded("prune", 1, 2.0, resumed=False))
            log_event(GateJudged(1, True, "perplexity rose 1 %"))
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        go()
    found = lines(capsys)
    assert {(one["run"], one["tenant"]) for one in found} == {(job.run, "retail")}
    assert {one["attempt"] for one in found[2:]} == {f"{job.run}-a1"}
    by_event = {one["event"]: one for one in found}
    assert (by_event["step ended"]["seconds"], by_event["step ended"]["step"]) == (1.25, "windows")
    assert [by_event["advanced"][name] for name in ("stage", "step", "block", "blocks")] == [1, "prune", 3, 18]
    assert [by_event["damping raised"][name] for name in ("stage", "step")] == [1, "prune"]
    assert "step" not in by_event["gate judged"]
    assert (by_event["ended"]["result"], by_event["ended"]["code"]) == ("cancelled", 130)
    structlog.get_logger("jobs.x").info("afterwards")
    assert "run" not in lines(capsys)[0]


@pytest.mark.parametrize(("terminal", "disabled"), [(False, "1"), (True, None)])
def test_progress_bars_of_libraries_are_for_terminals(monkeypatch, terminal, disabled):
    from jobs.commands.console import quiet_libraries

    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("os.environ", {})
    quiet_libraries()
    assert os.environ.get("TQDM_DISABLE") == disabled


def test_tqdm_heeds_it():
    plain = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    program = "from tqdm.auto import tqdm\nfor _ in tqdm(range(3)): pass"
    loud, quiet = (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=plain | more, check=True)
        for more in ({}, {"TQDM_DISABLE": "1"})
    )
    assert (bool(loud.stderr), quiet.stderr) == (True, "")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_run_writes_json_lines_and_nothing_else(tmp_path):
    model = write_tiny_model(tmp_path / "model", layers=2)
    part = {"source": "builtin:python-docs", "length": 32}
    job = {
        "name": "tiny",
        "model": str(model),
        "target": {"pattern": "2:4", "sparsity": 0.5},
        "gates": {"perplexity_increase": 9.0, "worst_slice_increase": 9.0},
        "publish": {"to": str(tmp_path / "out")},
        "data": {
            "calibration": part | {"part": [0, 0.3], "windows": 4},
            "tuning": part | {"part": [0.3, 0.4]},
            "evaluation": part | {"part": [0.8, 1], "windows": 4},
        },
        "traffic": {"prompt_tokens": 32, "output_tokens": 8},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "run", str(tmp_path / "job.yaml")],
        capture_output=True, text=True, check=False, env=os.environ | {"KARIKOMI_LOG": "json"}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stderr.splitlines()]
    (run,) = {one["run"] for one in found}
    record = read_run(open_store(str(tmp_path / "out")), run)
    assert record is not None
    assert record.last.ended is not None
    assert "tiny: as many parameters" in record.last.ended.sentence
    blocks = [(one["block"], one["blocks"]) for one in found if one["event"] == "advanced" and one["step"] == "prune"]
    assert blocks == [(1, 2), (2, 2)]
    assert [one["step"] for one in found if one["event"] == "step ended"][-2:] == ["measure", "publish"]
    assert found[-1]["event"] == "ended"
    assert found[-1]["attempt"] == f"{run}-a1"
