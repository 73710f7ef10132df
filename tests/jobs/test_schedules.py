"""The schedule file: read strictly, every mistake named, the same on any machine."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from schedules_for_tests import JOB

from cluster.errors import InputError
from jobs.schedules import Schedule, read_schedule

ALL = {"name": "weekly", "job": JOB | {"publish": {"to": "s3://models/retail"}}, "cron": "0 3 * * 1"}
CHECK = {"data": {"source": "s3://in-house/today.parquet"}, "check": "0 2 * * *"}


def written(tmp_path: Path, content) -> Path:
    path = tmp_path / "schedule.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_the_example_is_valid():
    plan = read_schedule(Path(__file__).parents[2] / "jobs" / "examples" / "schedule.yaml")
    assert (plan.missed, plan.overlap, plan.timezone) == ("once", "skip", "Europe/Berlin")
    assert plan.job.name == "gemma-3-270m-2-4"


def test_a_job_by_its_path_starts_at_the_schedule_file(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "job.yaml").write_text(yaml.safe_dump(JOB | {"model": "model", "publish": {"to": "out"}}))
    monkeypatch.chdir(tmp_path)
    plan = read_schedule(written(tmp_path / "plans", ALL | {"job": "job.yaml"}))
    assert plan.job.model == str(tmp_path / "model"), "cron starts it elsewhere"
    assert plan.job.publish.to == str(tmp_path / "out")
    assert plan.job.data.evaluation.source == "builtin:python-docs"
    assert read_schedule(written(tmp_path, ALL)).job.model == "org/model", "what is no path here stays as it is"


@pytest.mark.parametrize(("text", "paused"), [("", None), ("paused: true", True), ("paused: false", False)])
def test_a_schedule_may_say_whether_it_is_paused(tmp_path, text, paused):
    assert read_schedule(written(tmp_path, f"{yaml.safe_dump(ALL)}{text}\n")).paused is paused


def test_it_survives_being_kept(tmp_path):
    plan = read_schedule(written(tmp_path, ALL | {"when_gate_fails": CHECK}))
    assert Schedule.model_validate_json(plan.model_dump_json()) == plan


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"cron": None}, "nothing would ever start it"),
        ({"cron": "0 3 * *"}, "cron: a cron expression has five fields"),
        ({"cron": "0 0 3 * * *"}, "cron: a cron expression has five fields"),
        ({"cron": "0 25 * * *"}, "cron: no cron expression: Bad hour"),
        ({"cron": "0 0 30 2 *"}, "cron: no cron expression"),
        ({"cron": "@reboot"}, "cron: a cron expression has five fields"),
        ({"cron": 5}, "cron: "),
        ({"timezone": "Berlin"}, "timezone: no IANA time zone"),
        ({"timezone": "../../etc/passwd"}, "timezone: no IANA time zone"),
        ({"timezone": ""}, "timezone: no IANA time zone"),
        ({"missed": "twice"}, "missed: "),
        ({"overlap": "kill"}, "overlap: "),
        ({"name": "../x"}, "name: "),
        ({"colour": "red"}, "colour: unknown field; allowed here: name, job, cron"),
        ({"when_gate_fails": {"check": "0 2 * * *"}}, "when_gate_fails.data: "),
        ({"when_gate_fails": CHECK | {"check": "x"}}, "when_gate_fails.check: "),
        ({"when_gate_fails": CHECK | {"limit": 1}}, "when_gate_fails.limit: unknown field; allowed here: data, check"),
        ({"job": JOB}, "job: publish"),
        ({"job": ALL["job"] | {"colour": "red"}}, "job: colour: unknown field; allowed here: model, data"),
        ({"job": ALL["job"] | {"publish": {"to": "s3://b/c", "version": "v1"}}}, "job.publish.version"),
        ({"job": "nowhere.yaml"}, "nowhere.yaml: cannot be read"),
        ({"job": 7}, "job: "),
    ],
)
def test_mistakes_are_named(tmp_path, changes, named):
    path = written(tmp_path, {key: value for key, value in (ALL | changes).items() if value is not None})
    with pytest.raises(InputError) as raised:
        read_schedule(path)
    assert named in raised.value.message
    assert raised.value.hint


@pytest.mark.parametrize("text", ["- a list", "name: [", "\x00", "name: a\nname: b", "a: 1\n" * 70_000])
def test_what_is_no_schedule_file_is_refused(tmp_path, text):
    with pytest.raises(InputError, match=r"schedule\.yaml"):
        read_schedule(written(tmp_path, text))


def test_a_missing_job_and_file_are_named(tmp_path):
    with pytest.raises(InputError, match="job: Field required"):
        read_schedule(written(tmp_path, {key: value for key, value in ALL.items() if key != "job"}))
    with pytest.raises(InputError, match="cannot be read"):
        read_schedule(tmp_path / "nothing.yaml")


def test_reading_a_schedule_imports_neither_torch_nor_ray(tmp_path):
    path = written(tmp_path, ALL)
    code = (
        "import sys; from pathlib import Path; from jobs.schedules import read_schedule; import jobs.commands.schedule; "
        f"read_schedule(Path({str(path)!r})); assert not {{'torch', 'ray'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("model", ["~nobody-there/model", "/a" * 2000])
def test_a_model_that_can_be_no_path_here_stays_as_it_is(tmp_path, model):
    assert read_schedule(written(tmp_path, ALL | {"job": ALL["job"] | {"model": model}})).job.model == model
