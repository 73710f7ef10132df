"""What a Ray cluster says of its nodes and submissions, as plain values. Light: no ray here."""

import re
from dataclasses import dataclass, field
from typing import Literal

USAGE = re.compile(
    r"(?P<used>[\d.]+)/[\d.]+ (?P<name>\S+)"
    r"(?: \((?P<in_groups>[\d.]+) used of (?P<reserved>[\d.]+) reserved in placement groups\))?"
)
Status = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]


@dataclass(frozen=True)
class RayNode:
    """A living node.

    Attributes:
        node_id: Ray's id.
        head: whether it is the head.
        total: resources by name.
        free: of these, what nobody holds; the cluster tells it every few seconds.
        labels: by key.
    """

    node_id: str
    head: bool
    total: dict[str, float]
    free: dict[str, float]
    labels: dict[str, str]


@dataclass(frozen=True)
class RayJob:
    """What Ray says of a submission.

    Attributes:
        status: as Ray names it.
        message: its last words.
        exit_code: the driver's; None while it lives, and when nobody saw it end.
        error_type: Ray's kind of failure, such as JOB_SUPERVISOR_ACTOR_START_TIMEOUT.
        job_id: Ray's own id of the driver; empty before it has connected.
        metadata: what it was submitted with.
    """

    status: Status
    message: str
    exit_code: int | None
    error_type: str | None
    job_id: str = ""
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        """Whether it will not change any more."""
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


@dataclass(frozen=True)
class Cluster:
    """A cluster as it was seen at one moment.

    Attributes:
        job: what Ray says of one submission; None when it knows none of that name.
        nodes: the living ones.
        gangs: groups of bundles (resources by name) that the submission asked for and waits for.
    """

    job: RayJob | None
    nodes: tuple[RayNode, ...] = ()
    gangs: tuple[tuple[dict[str, float], ...], ...] = ()


def free_of(total: dict[str, float], usage: str) -> dict[str, float]:
    """What is free on a node; what a placement group has reserved is not, used or not.

    Args:
        total: what it has.
        usage: lines of Ray's, "1.0/4.0 CPU (0.5 used of 2.0 reserved in placement groups)": 1.0 is used, of that 0.5
            in groups, which have reserved 2.0 – so 1.5 are free. What is not named is free.
    """
    taken = {}
    for line in usage.splitlines():
        found = USAGE.fullmatch(line.strip())
        if found:  # memory is told in GiB and does not match; nobody asks for it here
            in_groups, reserved = float(found["in_groups"] or 0), float(found["reserved"] or 0)
            taken[found["name"]] = float(found["used"]) - in_groups + reserved
    return {name: max(0.0, amount - taken.get(name, 0.0)) for name, amount in total.items()}
