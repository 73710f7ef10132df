"""A real Ray cluster on this machine: a head with its job server, and raylets with pretended GPUs, labels, resources.

Every node is a process tree of its own (`ray start --block`), so that one can die alone. Nothing of this repository is
on the nodes' Python path: what runs there has travelled there. The token is the cluster's own.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from urllib.request import Request, urlopen

import psutil

PATIENCE = 120  # seconds for a node to come up on a busy machine
FAST = {  # deaths are noticed in seconds, what is free is told every second, a job may wait as long as it must
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_JOB_START_TIMEOUT_SECONDS": "86400",
}


@dataclass(frozen=True)
class NodeOf:
    """What one node pretends to have."""

    cpus: int = 2
    gpus: int = 0
    resources: dict[str, float] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)


class RayCluster:
    """A head without CPUs of its own, and nodes; up when entered, gone with all its processes when left."""

    def __init__(self, *nodes: NodeOf, head: NodeOf | None = None, environment: dict[str, str] | None = None) -> None:
        self.wanted = nodes
        self.head_node = head or NodeOf(cpus=0)
        self.token = secrets.token_hex(32)
        self.extra = environment or {}
        self.directory = Path(tempfile.mkdtemp(prefix="kr", dir="/tmp"))  # short: it holds sockets
        self.port, self.http_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.processes: list[subprocess.Popen] = []

    def __enter__(self) -> Self:
        try:
            self.processes.append(self._start(self.head_node, head=True))
            self._wait_for("head", lambda: self.alive() == 1)
            for node in self.wanted:
                self.add_node(node)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def stop(self) -> None:
        """Kills all of it at once; a second time does nothing."""
        doomed = [process for one in reversed(self.processes) for process in tree(one)]
        for process in doomed:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(doomed, timeout=PATIENCE)
        for one in self.processes:
            one.wait()

    def add_node(self, node: NodeOf) -> subprocess.Popen:
        """Starts one more node and waits for it: two that start at once take each other's socket."""
        before = self.alive()
        for again in (True, True, False):  # Ray itself gives a node 30 s, which a busy machine may not have
            process = self._start(node, head=False)
            self._wait_for("node", lambda one=process: self.alive() > before or one.poll() is not None)
            if process.poll() is None or not again:
                break
        self.processes.append(process)
        self._wait_for("node", lambda: self.alive() > before)
        return process

    def alive(self) -> int:
        """How many nodes the head counts; 0 before it answers."""
        request = Request(f"{self.url}/api/v0/nodes", headers={"Authorization": f"Bearer {self.token}"})
        try:
            with urlopen(request, timeout=10) as answer:
                found = json.load(answer)["data"]["result"]["result"]
        except (OSError, ValueError):
            return 0
        return sum(one["state"] == "ALIVE" for one in found)

    def client_environment(self) -> dict[str, str]:
        """What a client needs to speak to it."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def driver_pid(self, attempt: str) -> int | None:
        """The process id of an attempt's driver, if it runs."""
        for one in self.processes:
            for process in tree(one):
                with suppress(psutil.Error):
                    words = process.cmdline()
                    if attempt in words and "jobs.driver" in words and "-m" in words:
                        return process.pid
        return None

    def _start(self, node: NodeOf, head: bool) -> subprocess.Popen:
        # A machine has a directory of its own: agents that share one remove each other's packages under live drivers.
        temporary = self.directory / str(len(self.processes))
        if not head:
            self._share_logs(temporary)
        place = (
            ["--head", f"--port={self.port}", f"--dashboard-port={self.http_port}", "--dashboard-host=127.0.0.1",
             f"--ray-client-server-port={free_port()}"]
            if head else [f"--address=127.0.0.1:{self.port}"]
        )  # fmt: skip
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *place, "--node-ip-address=127.0.0.1",
            f"--temp-dir={temporary}", f"--num-cpus={node.cpus}", f"--num-gpus={node.gpus}", f"--resources={json.dumps(node.resources)}",
            f"--labels={','.join(f'{key}={value}' for key, value in node.labels.items())}",
            f"--object-store-memory={150 << 20}", "--min-worker-port=0", "--max-worker-port=0",
            "--dashboard-agent-listen-port=0", "--disable-usage-stats",
        ]  # fmt: skip
        log = (self.directory / f"node-{len(self.processes)}.log").open("a")
        return subprocess.Popen(
            command, env=self._environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def _share_logs(self, temporary: Path) -> None:
        """Links a node's logs to the head's: all agents on one machine take the head for their node and look there."""
        session = next((self.directory / "0").glob("session_2*"))
        logs = temporary / session.name / "logs"
        logs.parent.mkdir(parents=True, exist_ok=True)
        if not logs.is_symlink():
            logs.symlink_to(session / "logs")

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHON"))}
        path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
        return kept | FAST | self.client_environment() | {"PATH": path} | self.extra

    def _wait_for(self, what, condition) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            for number, one in enumerate(self.processes):
                if one.poll() is not None:
                    log = (self.directory / f"node-{number}.log").read_text()
                    raise RuntimeError(f"node {number} ended with {one.returncode}: {log}")
            assert time.monotonic() < deadline, f"{what} did not come up"
            time.sleep(0.1)


def tree(root: subprocess.Popen) -> list[psutil.Process]:
    """A process and all below it."""
    try:
        top = psutil.Process(root.pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def free_port() -> int:
    """A port that nobody has just now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
