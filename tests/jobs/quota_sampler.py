"""What tenants hold of a cluster, looked at again and again from outside, by what Ray itself says."""

import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Self

from cluster.ray_jobs import RayJobs
from jobs.following import wait_for

EVERY = 0.2  # seconds
SUPERVISOR = "_ray_internal_job_actor_"  # Ray's name, before a submission's, of the actor whose child the driver is
ALIVE = ("ALIVE", "PENDING_CREATION")  # the second holds its resources as soon as it has a node


@dataclass(frozen=True)
class Sample:
    """One moment.

    Attributes:
        at: Unix time.
        drivers: attempts whose driver has its place, by tenant.
        quota: what these hold of their tenant's custom resource.
        gang_gpus: GPUs that the gangs of a tenant's runs have reserved.
    """

    at: float
    drivers: Mapping[str, tuple[str, ...]]
    quota: Mapping[str, float]
    gang_gpus: Mapping[str, float]


@dataclass
class Sampler:
    """Looks every 0.2 s, in a thread of its own, from entering to leaving."""

    jobs: RayJobs
    samples: list[Sample] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="sampler")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(EVERY):
            try:
                self.samples.append(sample(self.jobs))
            except Exception as error:  # the test looks at them at the end
                self.errors.append(error)

    def highest(self, what: str, tenant: str) -> float:
        """The most that a tenant was seen to hold."""
        return max((getattr(one, what).get(tenant, 0.0) for one in self.samples), default=0.0)

    def first_seen(self) -> dict[str, float]:
        """When each attempt's driver was first seen in its place."""
        seen: dict[str, float] = {}
        for one in self.samples:
            for attempts in one.drivers.values():
                for attempt in attempts:
                    seen.setdefault(attempt, one.at)
        return seen


def sample(jobs: RayJobs) -> Sample:
    """Asks Ray once. Gangs and drivers come first: whose they are does not change afterwards."""
    gangs = jobs._state("placement_groups")
    supervisors = jobs._state("actors", class_name="JobSupervisor")
    at = time.time()
    told = {one["submission_id"]: one for one in jobs._get("/api/jobs/") if one["submission_id"]}
    tenant_of = {one["job_id"]: one["metadata"]["tenant"] for one in told.values() if one["job_id"]}
    drivers: dict[str, list[str]] = {}
    quota: Counter[str] = Counter()
    for one in supervisors:
        attempt = (one["name"] or "").removeprefix(SUPERVISOR)
        if one["state"] in ALIVE and one["node_id"] and attempt in told:
            tenant = told[attempt]["metadata"]["tenant"]
            drivers.setdefault(tenant, []).append(attempt)
            quota[tenant] += one["required_resources"].get(f"tenant-{tenant}", 0.0)
    gpus: Counter[str] = Counter()
    for one in gangs:
        if one["state"] == "CREATED":
            gpus[tenant_of[one["creator_job_id"]]] += sum(b["unit_resources"].get("GPU", 0.0) for b in one["bundles"])
    return Sample(at, {name: tuple(those) for name, those in drivers.items()}, dict(quota), dict(gpus))


def most_gpus_of_tasks(jobs: RayJobs) -> dict[str, float]:
    """The most GPUs that a tenant's tasks outside of its gangs held at once, by the tasks' own times. Once all ended."""
    told = [one for one in jobs._get("/api/jobs/") if one["submission_id"]]
    tenant_of = {one["job_id"]: one["metadata"]["tenant"] for one in told if one["job_id"]}
    tasks: list[dict[str, Any]] = []

    def all_told() -> bool:  # workers tell of their tasks' ends every second
        tasks[:] = [one for one in jobs._state("tasks") if one["job_id"] in tenant_of and _gpus(one)]
        return all(one["end_time_ms"] for one in tasks)

    assert wait_for(all_told, 60), "Ray does not tell when tasks ended"
    changes: dict[str, list[tuple[float, float]]] = {}
    for one in tasks:
        both = [(one["start_time_ms"], _gpus(one)), (one["end_time_ms"], -_gpus(one))]
        changes.setdefault(tenant_of[one["job_id"]], []).extend(both)
    return {tenant: max(accumulate(change for _, change in sorted(those))) for tenant, those in changes.items()}


def _gpus(task: Mapping[str, Any]) -> float:
    outside = not task["placement_group_id"] and task["type"] == "NORMAL_TASK" and task["start_time_ms"]
    return float((task["required_resources"] or {}).get("GPU", 0.0)) if outside else 0.0
