"""One run's junk hides no other run: commands that look at all of them name it, go on, and end well."""

import os
import sys
from datetime import UTC, datetime, timedelta

import pytest

from cluster.errors import InputError
from cluster.storage import open_store
from jobs.cli import main
from jobs.job import dump_job, parse_job
from jobs.ledger import write_row
from jobs.records import LARGEST_RECORD, Ended, claim, list_runs, note_end, read_run

JOB = "name: {name}\nmodel: some/dir\ntarget: {{pattern: '2:4', sparsity: 0.5}}\npublish: {{to: {to}}}\n"
BAD = "runs/b/attempts/1/started.json"


@pytest.fixture
def runs(tmp_path):
    """Three runs, of which somebody spoilt the one in the middle after it was accounted for."""
    store = open_store(str(tmp_path))
    for name in ("a", "b", "c"):
        job = parse_job(JOB.format(name=name, to=tmp_path), "job.yaml")
        started = claim(store, name, "retail", name, "ann@host", "embedded", dump_job(job))
        if name != "b":
            note_end(store, started, Ended(at=datetime.now(UTC), code=0, result="done", sentence="fine"))
        write_row(store, name)
        store.put(f"runs/{name}/blocks/x/00000.safetensors", b"tensor")
    store.put(BAD, b'{"run": 7}')
    old = (datetime.now(UTC) - timedelta(days=30)).timestamp()
    for path in tmp_path.rglob("*.safetensors"):
        os.utime(path, (old, old))
    return store


def test_the_others_are_listed_and_the_bad_one_is_told(runs):
    told = []
    assert [one.run for one in list_runs(runs, told.append)] == ["a", "c"]
    assert [BAD in one.message for one in told] == [True]


def test_a_record_without_end_is_not_fetched(runs, monkeypatch):
    runs.put(BAD, b" " * (LARGEST_RECORD + 1))
    monkeypatch.setattr(runs, "get", lambda key: pytest.fail(f"{key} was fetched"))
    with pytest.raises(InputError, match=r"started\.json is larger than"):
        read_run(runs, "b")


@pytest.mark.parametrize(
    ("command", "good", "bad"),
    [
        (("list",), "c ", BAD),
        (("list", "--json"), '"run": "c"', BAD),
        (("usage", "--by", "run"), "c ", BAD),
        (("usage", "--by", "run", "--rebuild"), "c ", BAD),
        (("metrics",), 'name="c"', BAD),
        (("gc",), "runs/c: 1 object", BAD),
    ],
    ids=" ".join,
)
def test_commands_go_on_and_name_it(runs, monkeypatch, capsys, command, good, bad):
    monkeypatch.setattr(sys, "argv", ["karikomi", *command, "--from", runs.uri])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr()
    assert ended.value.code in (0, None), shown
    assert good in shown.out
    assert bad in shown.err
    assert "runs/b: 1 object" not in shown.out, "what cannot be told is not garbage"
