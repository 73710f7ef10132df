"""What all tests share: a quiet environment, a real S3 server, a store in a directory and one on S3."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "token")  # before anybody imports Ray, which reads it once
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="karikomi-tests-")  # what tests keep is not the user's

import pytest
import structlog
from hypothesis import settings

from cluster.local_s3 import LocalS3
from cluster.storage import open_store
from jobs.cli import main
from jobs.logs import LATE, OURS, QUIET

HERE = Path(__file__).parent

# `pytest --hypothesis-profile=default` looks further. A busy machine is no failure.
settings.register_profile("same every time", derandomize=True, deadline=None)
settings.load_profile("same every time")


@pytest.fixture(scope="module")
def embedded_ray():
    """Ray as a run without a cluster starts it, for all tests of a file."""
    from cluster.session import session  # imports Ray, which most tests do without
    from cluster.spec import ClusterSpec

    with session(ClusterSpec(), cpus=4):
        yield


@pytest.fixture(scope="session")
def trained_model(tmp_path_factory):
    """The directory of a tiny model of three layers that has learnt a little English; nobody writes there."""
    from models_for_tests import write_trained_model  # imports transformers, which many tests do without

    return write_trained_model(tmp_path_factory.mktemp("trained") / "model", layers=3)


@pytest.fixture(scope="session", autouse=True)
def cache_goes_with_the_tests():
    """Nothing of it is left."""
    yield
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def workers_find_the_tests():
    """Ray's workers import classes that tests define."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *(str(p) for p in HERE.iterdir() if p.is_dir()), *sys.path])


class S3ForTests(LocalS3):
    """A real server, and a fresh place on it for every test."""

    def make_prefix(self) -> str:
        return f"s3://{self.bucket}/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    """A real SeaweedFS on loopback; the environment names it and its owner's keys."""
    with S3ForTests(tmp_path_factory.mktemp("s3"), bucket="tests") as server:
        before = {name: os.environ.get(name) for name in server.environment()}
        os.environ.update(server.environment())
        yield server
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(params=["directory", "s3"])
def store(request, tmp_path):
    """An empty store, of both kinds."""
    if request.param == "directory":
        return open_store(str(tmp_path / "store"))
    return open_store(request.getfixturevalue("s3").make_prefix())


@pytest.fixture
def logging_as_it_was():
    """What a command changes about logging is put back."""
    loggers = [logging.getLogger(name) for name in (None, *OURS, *QUIET, *LATE)]
    before = [(one, list(one.handlers), one.level, one.propagate, list(one.filters)) for one in loggers]
    yield
    for one, handlers, level, propagate, filters in before:
        one.handlers, one.propagate, one.filters = handlers, propagate, filters
        one.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    logging.captureWarnings(False)


@pytest.fixture
def karikomi(capfd, logging_as_it_was):
    """The command line in this process, whose libraries are imported already: `karikomi("plan", job, NAME="value")`."""

    def run(*arguments, **environment) -> subprocess.CompletedProcess:
        capfd.readouterr()
        command = ["karikomi", *map(str, arguments)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", command)
            for name, value in environment.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as ended:
                main()
        return subprocess.CompletedProcess(command, ended.value.code or 0, *capfd.readouterr())

    return run
