"""Looks at a machine, a store and a cluster, and says of each thing how it is and what to do."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from jobs.checks import machine, ray_cluster, software
from jobs.checks.finding import Finding, fail
from jobs.checks.store import store as look_at_store

Check = Callable[[], list[Finding]]


def examine(store: str | None = None, cluster: str | None = None) -> list[Finding]:
    """All findings, in a fixed order; the checks themselves run side by side.

    Args:
        store: s3://bucket/prefix or a directory; None: no store is looked at.
        cluster: address of a job server, http://HOST:8265; None: no cluster is looked at.

    Raises:
        InputError: one of the two is no address.
    """
    checks: dict[str, Check] = {
        "Python": software.python,
        "packages": software.packages,
        "compiler": software.compiler,
        "Ray": software.ray,
        "Ray token": lambda: software.ray_token(cluster),
        "DeepSpeed": software.deepspeed,
        "CUDA": software.cuda,
        "disk": lambda: machine.disk(store),
        "shared memory": machine.shared_memory,
        "open files": machine.descriptors,
    }
    if store is not None:
        from cluster.storage import open_store

        open_store(store)  # an address with a slip in it is the user's mistake, not a finding
        checks["store"] = lambda: look_at_store(store)
    if cluster is not None:
        ray_cluster.checked_address(cluster)
        checks["cluster"] = lambda: ray_cluster.ray_cluster(cluster)
    with ThreadPoolExecutor(len(checks)) as threads:
        looking = [threads.submit(carefully, name, check) for name, check in checks.items()]
        return [finding for one in looking for finding in one.result()]


def carefully(name: str, check: Check) -> list[Finding]:
    """A check's findings; that it broke is one too, and keeps the others from nothing."""
    try:
        return check()
    except Exception as error:
        return [fail(name, f"the check itself failed: {type(error).__name__}: {error}", "Please report this.")]


def is_well(findings: list[Finding]) -> bool:
    """Whether nothing failed."""
    return all(one.state != "fail" for one in findings)
