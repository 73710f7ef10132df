"""What a submitted run is let in with: its job under the tenant's rules, and what its driver takes and is told."""

from dataclasses import dataclass, field

from jobs.job import Job


@dataclass(frozen=True)
class Admission:
    """A job that may be submitted.

    Attributes:
        job: with the tenant's defaults filled in.
        resources: custom resources that its driver takes as long as it lives; Ray's scheduler holds quotas by them.
        environment: variables of the driver and of its tasks. They are shown by Ray's dashboard, so they never hold
            a secret, only the names of variables that do.
        sentences: what was decided and by which figures, for `plan` and `submit --dry-run`.
        estimated: US dollars that it was let in for.
    """

    job: Job
    resources: dict[str, float] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    sentences: tuple[str, ...] = ()
    estimated: float = 0.0
