"""Schedule files: YAML that attacks its reader, moments that never come, and jobs that lead out."""

from pathlib import Path
from typing import Any

import yaml
from hostile import job_files
from hostile.cases import CANARY, Case, file
from hostile.job_files import laughs

from jobs.schedules import read_schedule

GOOD: dict[str, Any] = {"name": "weekly", "job": job_files.GOOD, "cron": "0 3 * * 1"}
CHECK: dict[str, Any] = {"data": {"source": "today.txt"}, "check": "0 2 * * *"}
TEXT = yaml.safe_dump(GOOD)


def raw(name: str, content: bytes | str, *mentions: str) -> Case:
    """A schedule file of exactly this content."""
    return Case(name, lambda folder: file(folder, "plan.yaml", content), read_schedule, ("plan.yaml", *mentions))


def changed(name: str, changes: dict[str, Any], *mentions: str) -> Case:
    """A good file with other fields; Ellipsis takes one away."""
    content = {key: value for key, value in (GOOD | changes).items() if value is not ...}
    return raw(name, yaml.safe_dump(content, allow_unicode=True), *mentions)


def line(name: str, text: str, *mentions: str) -> Case:
    """A good file with a line more: what YAML makes of a value is the point."""
    return raw(name, f"{TEXT}{text}\n", *mentions)


def job_changed(name: str, changes: dict[str, Any], *mentions: str) -> Case:
    """A good file whose job has other fields."""
    return changed(name, {"job": job_files.GOOD | changes}, *mentions)


def job_file(name: str, content: bytes | str, *mentions: str) -> Case:
    """A good file that names a job file of this content."""

    def build(folder: Path) -> Path:
        file(folder, "job.yaml", content)
        return file(folder, "plan.yaml", yaml.safe_dump(GOOD | {"job": "job.yaml"}))

    return Case(name, build, read_schedule, ("job.yaml", *mentions))


def job_at(path: str, *mentions: str) -> Case:
    return changed(f"its job is {path[:30]!r} of {len(path)} characters", {"job": path}, *mentions)


def special(path: str) -> Case:
    return Case(
        f"the schedule file is {path[:30]!r}",
        lambda folder: Path(path),
        read_schedule,
        (path[:10].replace("\0", "\\x00"),),
    )


CASES = [
    # YAML itself
    raw("billion laughs", laughs(9), "aliases"),
    raw("billion laughs within the number of aliases", laughs(5)),
    raw("a job that is itself", "name: weekly\ncron: 0 3 * * 1\njob: &a {name: chat, model: *a}"),
    raw("deep flow lists", "job: " + "[" * 5000, "YAML"),
    raw("very many values", "job:\n" + "- 1\n" * 60_000, "YAML"),
    raw("a megabyte", TEXT + "#" * (1 << 20), "larger than"),
    raw("os.system by a tag", f"job: !!python/object/apply:os.system ['touch {CANARY}']", "python/object"),
    raw("a file by a tag", "job: !include /etc/passwd", "!include"),
    raw("two documents", TEXT + "---\n" + TEXT, "YAML"),
    raw("a name twice", TEXT + "name: other\n", "given twice"),
    raw("latin-1", TEXT.encode() + b"# caf\xe9", "cannot be read"),
    raw("utf-16", TEXT.encode("utf-16"), "cannot be read"),
    raw("a NUL", TEXT + "#\0", "YAML"),
    raw("nothing", b"", "mapping"),
    raw("a list", "- weekly", "mapping"),
    raw("a job's file", job_files.TEXT, "target"),
    # moments
    *(
        changed(f"cron of {what}", {"cron": cron}, "cron")
        for what, cron in {
            "nothing": "", "blanks": "     ", "four fields": "0 3 * *", "seconds": "0 0 3 * * *", "a nickname": "@reboot", "a day that never comes": "0 0 30 2 *",
            "an hour too late": "0 24 * * *", "a minute too late": "60 3 * * *", "a month too late": "0 3 1 13 *", "a day too late": "0 3 32 1 *", "a day before the first": "0 3 0 1 *",
            "a weekday too late": "0 3 * * 9", "less than nothing": "-1 3 * * *", "a step of nothing": "*/0 3 * * *", "a range backwards": "30-10 3 * * *",
            "a fraction": "0.5 3 * * *", "words": "at three every single day", "look-alikes": "0 3 ∗ * *", "other digits": "٠ 3 * * *", "superscripts": "² 3 * * *",
            "a list": ["0", "3"], "a number": 5, "true": True, "a command": "0 3 * * 1; rm -rf /", "two lines": "0 3 * * 1\n* * * * *", "a NUL": "0 3 * * \0",
            "very many values": ",".join(["0"] * 60) + " " * 70 + ",".join(["3"] * 60) + " * * *", "a huge step": "*/" + "9" * 5000 + " 3 * * *",
            "an empty value": "0,,5 3 * * *", "an open range": "5- 3 * * *", "a day by its number, never": "0 3 * * 1#6", "a last of nothing": "0 3 L-40 * *",
        }.items()
    ),
    line("cron in base 60", "when_gate_fails: {check: 3:00}", "3:00"),
    changed("no trigger", {"cron": ...}, "nothing would ever start it"),
    changed("a trigger that is off", {"cron": ..., "when_model_changes": False}, "nothing would ever start it"),
    changed("triggers of null", {"cron": None, "when_gate_fails": None}, "nothing would ever start it"),
    changed("a model that changes by text", {"when_model_changes": "perhaps"}, "when_model_changes"),
    changed("a model that changes by a number", {"when_model_changes": 2}, "when_model_changes"),
    *(
        changed(f"a time zone of {what}", {"timezone": zone}, "timezone")
        for what, zone in {
            "nothing": "", "a way out": "../../../etc/passwd", "a device": "/dev/zero", "a file": "/etc/localtime", "dots": "..", "one dot": ".", "a NUL": "UTC\0", "an offset": "+02:00",
            "a place that is none": "Europe/Atlantis", "blanks": "Europe / Berlin", "a newline": "UTC\n", "its own list": "tzdata.zi", "its own table": "zone.tab", "a folder": "Europe",
            "another case": "europe/berlin", "length": "a" * 101, "a number": 2, "null": None, "a list": ["UTC"], "look-alikes": "Eurоpe/Berlin", "Windows": "W. Europe Standard Time",
        }.items()
    ),
    # policies
    changed("a policy that nobody has", {"missed": "twice"}, "missed"),
    changed("a policy of true", {"missed": True}, "missed"),
    changed("an overlap that kills", {"overlap": "kill"}, "overlap"),
    changed("paused by text", {"paused": "perhaps"}, "paused"),
    changed("paused by a number", {"paused": 7}, "paused"),
    changed("an unknown field", {"colour": "red"}, "colour"),
    changed("a check without data", {"when_gate_fails": {"check": "0 2 * * *"}}, "when_gate_fails.data"),
    changed("a check without moments", {"when_gate_fails": {"data": CHECK["data"]}}, "when_gate_fails.check"),
    changed("a check that never comes", {"when_gate_fails": CHECK | {"check": "0 0 31 4 *"}}, "when_gate_fails.check"),
    changed("a check of nothing", {"when_gate_fails": CHECK | {"data": {"source": ""}}}, "when_gate_fails.data.source"),
    changed("a check of what hides", {"when_gate_fails": CHECK | {"data": {"source": "a\x1b[2Jb.txt"}}}, "when_gate_fails.data.source"),
    changed("a check with another field", {"when_gate_fails": CHECK | {"limit": 5}}, "when_gate_fails.limit"),
    changed("a check of a list", {"when_gate_fails": [CHECK]}, "when_gate_fails"),
    # names
    *(
        changed(f"a name of {what}", {"name": name}, "name")
        for what, name in {
            "dots": "..", "a way out": "../evil", "an absolute path": "/etc", "a newline": "a\n", "a NUL": "a\0b", "nothing": "", "capitals": "Weekly", "look-alikes": "wеekly",
            "length": "a" * 64, "shell code": "$(id)", "a number": 5, "a list": ["a"], "null": None, "an option": "--all", "an escape sequence": "a\x1b[2J",
        }.items()
    ),
    # the job
    changed("no job", {"job": ...}, "job"),
    changed("a job of null", {"job": None}, "job"),
    changed("a job of a list", {"job": [job_files.GOOD]}, "job"),
    changed("a job of a number", {"job": 7}, "job"),
    job_at("", "job"),
    job_at(".", "job"),
    job_at("..", "job"),
    job_at("../../../../../../etc/passwd", "passwd"),
    job_at("/etc/passwd", "passwd"),
    job_at("/dev/zero", "/dev/zero", "larger than"),
    job_at("/proc/self/environ", "environ"),
    job_at("plan.yaml", "plan.yaml"),
    job_at("nowhere.yaml", "nowhere.yaml"),
    job_at("a" * 5000, "job"),
    job_at("a\0b", "job"),
    job_at("a\x1b[2Jb", "job"),
    job_at("~nobody-there/job.yaml", "job.yaml"),
    job_at("s3://bucket/job.yaml", "job"),
    job_changed("a job with an unknown field", {"colour": "red"}, "job: colour"),
    job_changed("a job with a name that leads out", {"name": "../x"}, "job: name"),
    job_changed("a job with a seed of nan", {"seed": float("nan")}, "job: seed"),
    job_changed("a job that publishes one version", {"publish": {"to": "/tmp/x", "version": "v1"}}, "job.publish.version"),
    job_changed("a job that publishes nowhere", {"publish": {"to": ""}}, "job: publish.to"),
    job_changed("a job to the home of nobody", {"publish": {"to": "~nobody-there/x"}}, "publish.to"),
    job_changed("a job with a pattern in other digits", {"target": {"pattern": "٢:٤", "sparsity": 0.5}}, "job: target.pattern"),
    job_file("a job file that runs something", f"a: !!python/object/apply:os.system ['touch {CANARY}']", "python/object"),
    job_file("a job file of laughs", laughs(9), "aliases"),
    job_file("a job file of a megabyte", "#" * (1 << 20), "larger than"),
    job_file("a job file that is a schedule", TEXT, "job.yaml"),
    job_file("an empty job file", b"", "mapping"),
    special("/dev/zero"),
    special("/proc/self/mem"),
    special("/"),
    special("/no/such/plan.yaml"),
    special("/tmp/" + "a" * 5000),
    special("a\0b"),
]  # fmt: skip
