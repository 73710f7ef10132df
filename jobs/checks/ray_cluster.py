"""A Ray cluster as its job server tells of it: reachable, closed, its head free, its quotas in one place."""

import os
from pathlib import Path
from typing import Any

import requests

from cluster.errors import InputError
from jobs.checks.finding import Finding, fail, ok, warn

ANSWER_WITHIN = 8.0  # seconds
QUOTA = "tenant-"  # + a tenant's name: the custom resource that its runs' drivers take
TOKEN_ADVICE = "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token to the cluster's token."


def checked_address(url: str) -> str:
    """The job server's address without a slash at its end.

    Raises:
        InputError: it is none.
    """
    if not url.startswith(("http://", "https://")):
        raise InputError(f"--cluster {url}: not the address of a job server", "Write http://HOST:8265.")
    return url.rstrip("/")


def ray_cluster(url: str) -> list[Finding]:
    """All that is looked at in one cluster."""
    address = checked_address(url)
    try:
        closed = asks_for_token(address)
        version = requests.get(f"{address}/api/version", headers=headers(), timeout=ANSWER_WITHIN)
        listing = requests.get(f"{address}/api/v0/nodes?detail=1&limit=10000", headers=headers(), timeout=ANSWER_WITHIN)
    except requests.RequestException as error:
        return [
            fail("cluster", f"{address} is out of reach: {type(error).__name__}",
                 "Check the address, and the tunnel to it: kubectl port-forward service/karikomi-head-svc 8265, "
                 "or: ray dashboard FILE"),
        ]  # fmt: skip
    if version.status_code in (401, 403):
        return [fail("cluster", f"{address} does not take this token", TOKEN_ADVICE)]
    try:
        ray_version = version.json()["ray_version"]
        nodes = [one for one in listing.json()["data"]["result"]["result"] if one["state"] == "ALIVE"]
    except (ValueError, KeyError, TypeError):
        return [fail("cluster", f"{address} answers, but not as a Ray job server does", "Write http://HOST:8265.")]
    return [reached(address, ray_version, local_ray()), closedness(address, closed), *judged(nodes)]


def reached(address: str, there: str, here: str) -> Finding:
    """The cluster's version against ours."""
    if there != here:
        return fail(
            "cluster",
            f"{address} runs Ray {there}, this machine has {here}",
            f"Give both the same: an image with ray=={here}, or here: pip install ray=={there}",
        )
    return ok("cluster", f"{address} answers, Ray {there}")


def closedness(address: str, closed: bool) -> Finding:
    """Whether anybody who reaches it may run code on it."""
    if not closed:
        return warn(
            "cluster's token",
            f"{address} asks for none: whoever reaches it can run anything on it",
            "Start its nodes with RAY_AUTH_MODE=token (docs/deploy.md).",
        )
    return ok("cluster's token", "asked for, and ours is right")


def judged(nodes: list[dict[str, Any]]) -> list[Finding]:
    """Nodes, drivers and quotas.

    Args:
        nodes: of Ray's state API, alive ones: is_head_node, resources_total, labels.
    """
    total = {
        name: sum((one.get("resources_total") or {}).get(name, 0) for one in nodes) for name in ("CPU", "GPU")
    }  # fmt: skip
    count = f"{len(nodes)} nodes, {total['CPU']:g} CPUs, {total['GPU']:g} GPUs"
    findings = [ok("cluster's nodes", count)]
    if not total["CPU"]:
        findings = [
            warn("cluster's nodes", f"{count}: nothing can run now", "Add worker nodes, or wait for the autoscaler.")
        ]
    head_cpus = sum((one.get("resources_total") or {}).get("CPU", 0) for one in nodes if one.get("is_head_node"))
    if head_cpus and len(nodes) > 1:
        findings.append(
            warn("cluster's head", f"offers {head_cpus:g} CPUs: a driver or task there can take the cluster down",
                 "ray start --head --num-cpus=0")
        )  # fmt: skip
    drivers = [one for one in nodes if (one.get("labels") or {}).get("karikomi") == "driver"]
    if drivers:
        findings.append(
            ok("cluster's drivers", f"run on {len(drivers)} node{'s' if len(drivers) > 1 else ''} of their own")
        )
    else:
        findings.append(
            warn("cluster's drivers", "no node is labelled karikomi=driver: they run where there is room",
                 'ray start --labels="karikomi=driver" on one CPU node')
        )  # fmt: skip
    return [*findings, quotas(nodes)]


def quotas(nodes: list[dict[str, Any]]) -> Finding:
    """What each tenant may hold at once, and whether one node holds it all."""
    held: dict[str, list[float]] = {}
    for node in nodes:
        for name, amount in (node.get("resources_total") or {}).items():
            if name.startswith(QUOTA):
                held.setdefault(name.removeprefix(QUOTA), []).append(amount)
    if not held:
        return ok("cluster's quotas", "none: every tenant may take all there is")
    text = ", ".join(f"{tenant} {sum(amounts):g}" for tenant, amounts in sorted(held.items()))
    split = sorted(tenant for tenant, amounts in held.items() if len(amounts) > 1)
    if split:
        return warn(
            "cluster's quotas",
            f"{text}; several nodes offer {', '.join(split)}, and no run can take more than one of them has",
            "Let one node, the drivers', offer a tenant's whole quota.",
        )
    return ok("cluster's quotas", text)


def asks_for_token(address: str) -> bool:
    """Whether a request without a token is turned away."""
    answer = requests.get(f"{address}/api/v0/nodes?limit=1", timeout=ANSWER_WITHIN)
    return answer.status_code in (401, 403)


def headers() -> dict[str, str]:
    """The token as Ray's own clients send it; none where there is none."""
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if not token:
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        try:
            token = path.read_text().strip()
        except OSError:
            return {}
    return {"Authorization": f"Bearer {token}"} if token else {}


def local_ray() -> str:
    """Ray's version here."""
    from importlib.metadata import version

    return version("ray")
