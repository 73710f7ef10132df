"""The edge to Ray's Jobs API: submit, look, stop, read logs, and what the cluster has. Speaks HTTP to the head only.

A cluster that asks for its token gets the one of RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token, the places
in which Ray itself looks.
"""

import asyncio
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import requests
from ray.dashboard.modules.dashboard_sdk import SubmissionClient
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from cluster.errors import InputError, KarikomiError, Unavailable
from cluster.ray_facts import Cluster, RayJob, RayNode, free_of

ANSWER_WITHIN = 30.0  # seconds
CONNECT_WITHIN = 5.0


@dataclass(frozen=True)
class Entrypoint:
    """What is submitted.

    Attributes:
        name: the submission's id; Ray takes each only once.
        command: a shell command, run in `directory` on one of the nodes.
        directory: travels to the cluster, by content.
        environment: variables of the command and of its tasks; everybody on the cluster can see them.
        cpus, resources: what the command holds as long as it lives.
        labels: what its node must be labelled with.
        metadata: kept beside it.
    """

    name: str
    command: str
    directory: Path
    environment: dict[str, str]
    cpus: float
    resources: dict[str, float]
    labels: dict[str, str]
    metadata: dict[str, str]


class RayJobs:
    """A cluster's job server.

    Raises, in every method:
        InputError: the token is missing or wrong, or the address is none.
        Unavailable: it is out of reach.
    """

    def __init__(self, url: str) -> None:
        """Connects.

        Args:
            url: http(s)://HOST:PORT of the head's dashboard, 8265 by default.
        """
        if not url.startswith(("http://", "https://")):
            raise InputError(
                f"{url!r} is no address of a job server", "Write http://HOST:8265, the address of the Ray dashboard."
            )
        self.url = url.rstrip("/")
        with self._errors():
            self._client = _Client(self.url)

    def submit(self, what: Entrypoint) -> bool:
        """Submits; False when this name was submitted before.

        Raises:
            KarikomiError: the cluster refuses it.
        """
        with self._errors():
            try:
                self._client.submit_job(
                    entrypoint=what.command,
                    submission_id=what.name,
                    runtime_env={"working_dir": str(what.directory), "env_vars": dict(what.environment)},
                    metadata=dict(what.metadata),
                    entrypoint_num_cpus=what.cpus,
                    entrypoint_resources=what.resources or None,
                    entrypoint_label_selector=what.labels or None,
                )
            except RuntimeError as error:
                if "already exists" in str(error):
                    return False
                raise
        return True

    def look(self, name: str) -> RayJob | None:
        """What Ray says of a submission; None when it knows none of this name."""
        found = self._get(f"/api/jobs/{name}")
        if found is None:
            return None
        return RayJob(
            status=found["status"],
            message=found.get("message") or "",
            exit_code=found.get("driver_exit_code"),
            error_type=found.get("error_type"),
            job_id=found.get("job_id") or "",
            metadata=found.get("metadata") or {},
        )

    def see(self, name: str) -> Cluster:
        """A submission and all that it may be waiting for."""
        job = self.look(name)
        if job is None or job.over:
            return Cluster(job)
        pending = [one for one in self._groups(job.job_id) if one["state"] == "PENDING"] if job.job_id else []
        gangs = tuple(tuple(bundle["unit_resources"] for bundle in one["bundles"]) for one in pending)
        return Cluster(job, tuple(self.nodes()), gangs)

    def holds(self, job_id: str) -> list[str]:
        """What a driver still holds of the cluster: its gangs and its actors, as words; nothing once all is free."""
        gangs = [f"gang {one['placement_group_id'][:8]}" for one in self._groups(job_id) if one["state"] != "REMOVED"]
        actors = self._state("actors", job_id=job_id)
        return gangs + [f"actor {one['class_name']}" for one in actors if one["state"] != "DEAD"]

    def _groups(self, job_id: str) -> list[dict[str, Any]]:
        return self._state("placement_groups", creator_job_id=job_id)

    def _state(self, kind: str, **equal: str) -> list[dict[str, Any]]:
        """Rows of Ray's state API whose columns have these values."""
        question = [("detail", "true"), ("limit", "10000")]
        for column, value in equal.items():
            question += [("filter_keys", column), ("filter_predicates", "="), ("filter_values", value)]
        answer = self._get(f"/api/v0/{kind}?{urlencode(question)}")
        if answer is None:
            raise Unavailable(f"{self.url} does not tell its {kind}", "Is it the address of a Ray dashboard?")
        rows: list[dict[str, Any]] = answer["data"]["result"]["result"]
        return rows

    def stop(self, name: str) -> None:
        """Asks a submission to end: its command gets SIGTERM, and SIGKILL after RAY_JOB_STOP_WAIT_TIME_S."""
        with self._errors():
            self._client.stop_job(name)

    def log(self, name: str) -> str:
        """All that the command has written."""
        with self._errors():
            return str(self._client.get_job_logs(name))

    def follow(self, name: str) -> Iterator[str]:
        """What the command writes, as it comes, until it ends."""
        pieces = self._client.tail_job_logs(name)
        with self._errors(), asyncio.Runner() as runner:
            while True:
                try:
                    yield runner.run(anext(pieces))
                except StopAsyncIteration:
                    return

    def nodes(self) -> list[RayNode]:
        """The living nodes, with what they have and what of it is free."""
        rows = self._state("nodes")
        usage = self._get("/nodes?view=summary")
        used = usage["data"].get("nodeLogicalResources") or {} if usage else {}
        return [
            RayNode(
                node_id=one["node_id"],
                head=bool(one["is_head_node"]),
                total=one["resources_total"] or {},
                free=free_of(one["resources_total"] or {}, used.get(one["node_id"], "")),
                labels=one["labels"] or {},
            )
            for one in rows
            if one["state"] == "ALIVE"
        ]

    def _get(self, path: str) -> Any:
        with self._errors():
            answer = self._client._do_request("GET", path)
            if answer.status_code == requests.codes.not_found:
                return None
            answer.raise_for_status()
            return answer.json()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What goes wrong on the way, as a user's error."""
        try:
            yield
        except AuthenticationError as error:
            raise InputError(
                f"the Ray cluster at {self.url} refuses the token",
                "Set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that holds it; whoever runs the cluster has it.",
            ) from error
        except (requests.RequestException, ConnectionError, OSError) as error:
            raise Unavailable(
                f"the Ray cluster at {self.url} is out of reach: {type(error).__name__}",
                "Check the address (--cluster) and the way to it; nothing is lost, the store keeps every run.",
            ) from error
        except (RuntimeError, ValueError) as error:
            raise KarikomiError(f"the Ray cluster at {self.url} refuses: {str(error)[:500]}") from error


class _Client(JobSubmissionClient):
    """Ray's client, but it goes where it is told (the environment overrides Ray's own), and does not wait for ever."""

    def __init__(self, url: str) -> None:
        import ray

        self._client_ray_version = ray.__version__
        for module in ("dashboard_sdk", "job.sdk"):  # they tell every upload and every closed connection
            logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
        logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
        token = find_token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        SubmissionClient.__init__(self, address=url, headers=headers)
        self._check_connection_and_version("2.49", "Karikomi needs Ray 2.49 or later on the cluster.")

    def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> requests.Response:
        return super()._do_request(method, endpoint, timeout=(CONNECT_WITHIN, ANSWER_WITHIN), **kwargs)


def find_token() -> str | None:
    """The cluster's token, from where Ray keeps it; None when there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text().strip() or None
    except OSError:
        return None
