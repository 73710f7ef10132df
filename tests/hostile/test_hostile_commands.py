"""The same refusals through the real command line: exit code 2, one message, no traceback, nothing left behind."""

import subprocess
import sys

import pytest
from hostile import job_files, model_directories, releases
from hostile.cases import CANARY, Case
from hostile.test_hostile import files_below

from jobs.cli import main


def named(cases: list[Case], name: str) -> Case:
    return next(case for case in cases if case.name == name)


@pytest.mark.parametrize("name", ["billion laughs", "os.system by a tag"])
def test_run_of_a_hostile_job_file_in_a_process_of_its_own(name, tmp_path):
    case = named(job_files.CASES, name)
    path = case.build(tmp_path)
    before = files_below(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "run", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr + done.stdout
    assert files_below(tmp_path) == before
    assert not CANARY.exists()


def refused(arguments, monkeypatch, capsys):
    """The command in this process, which is warm: what it printed, once it has ended with code 2."""
    capsys.readouterr()  # what the making of the model printed
    monkeypatch.setattr(sys, "argv", ["karikomi", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert "Traceback" not in printed.err + printed.out
    assert not CANARY.exists()
    return printed.err


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize("name", ["code by auto_map", "only pytorch_model.bin", "a tokenizer of a TiB"])
def test_a_hostile_model(command, name, tmp_path, monkeypatch, capsys):
    case = named(model_directories.CASES, name)
    job = tmp_path / "job.yaml"
    job.write_text(
        job_files.TEXT.replace("some/dir", str(case.build(tmp_path))).replace("/tmp/x", str(tmp_path / "out"))
    )
    before = files_below(tmp_path)
    printed = refused([command, job], monkeypatch, capsys)
    for words in case.mentions:
        assert words in printed.replace("\n", " ")
    assert files_below(tmp_path) == before, "no record of an attempt, no store"


@pytest.mark.parametrize("name", ["a file named as a way out", "weights that grew to a TiB", "a pointer of 20 MB"])
def test_pull_of_a_hostile_release(name, tmp_path, monkeypatch, capsys):
    store = named(releases.CASES, name).build(tmp_path)
    before = files_below(tmp_path)
    refused(["pull", "chat@1", tmp_path / "pulled", "--from", store], monkeypatch, capsys)
    assert files_below(tmp_path) == before
