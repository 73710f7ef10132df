"""A schedule as Kubernetes manifests. Kubernetes is only the alarm clock: what runs is decided by `run-due`.

Both forms start a Ray cluster that lives for one call of `run-due` and whatever that starts. Moments, missed ones and
overlaps are still those of the records in the store, so an alarm that comes twice, late or beside a running one does
no harm.
"""

import math
import re
from importlib.metadata import version
from typing import Any, Literal

import yaml

from cluster.errors import InputError
from cluster.hardware.profiles import load_profile
from jobs.schedules import Schedule
from workflows.steps import digest

KUBECTL = "registry.k8s.io/kubectl:v1.34.1"
LOOK_FOR_MODEL = "0 * * * *"  # a look costs the start of a small cluster
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
KEEP_SECONDS = 3600  # of an ended RayJob, for who wants to look at it
NO_QUEUE = """\
# KubeRay hands no labels of a RayCronJob on to its RayJobs. For Kueue to queue them, name this namespace's LocalQueue
# `default`, or use --form cronjob. It needs the operator's feature gate RayCronJob (alpha, KubeRay 1.7 for timeZone).
"""

Manifest = dict[str, Any]


def manifests(schedule: Schedule, form: Literal["raycronjob", "cronjob"], image: str, namespace: str) -> str:
    """The manifests as YAML.

    Raises:
        InputError: the schedule cannot be kept by Kubernetes; says why.
    """
    if not schedule.job.publish.to.startswith("s3://"):
        raise InputError(
            f"{schedule.name}: publish.to is {schedule.job.publish.to}, which pods cannot reach",
            "Publish to s3://bucket/prefix.",
        )
    if form == "raycronjob":
        documents = [ray_cron_job(schedule, suffix, cron, image, namespace) for suffix, cron in alarms(schedule)]
        return NO_QUEUE + written(documents)
    account = f"{resource_name(schedule)}-alarm"
    documents = [*permission(account, namespace), ray_job_in_a_config_map(schedule, image, namespace)]
    documents += [cron_job(schedule, suffix, cron, account, namespace) for suffix, cron in alarms(schedule)]
    return written(documents)


def alarms(schedule: Schedule) -> list[tuple[str, str]]:
    """When `run-due` is to be called, by the trigger it is for.

    Raises:
        InputError: Kubernetes does not know the expression.
    """
    found = [("cron", schedule.cron), ("model", LOOK_FOR_MODEL if schedule.when_model_changes else None)]
    found.append(("gate", schedule.when_gate_fails.check if schedule.when_gate_fails else None))
    for trigger, cron in found:
        if cron and (re.search(r"[LW#]", re.sub(r"JUL|WED", "", cron.upper())) or "7" in cron.split()[4]):
            raise InputError(
                f"{schedule.name}: {trigger}: Kubernetes does not know {cron!r}",
                "Write Sunday as 0, and days without L, W and #.",
            )
    return [(trigger, cron) for trigger, cron in found if cron]


def ray_cron_job(schedule: Schedule, suffix: str, cron: str, image: str, namespace: str) -> Manifest:
    """KubeRay's own form. Its template is a RayJob's spec, without metadata; it has no overlap policy."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCronJob",
        "metadata": metadata(schedule, f"{resource_name(schedule)}-{suffix}", namespace),
        "spec": {"schedule": cron, "timeZone": schedule.timezone, "jobTemplate": ray_job_spec(schedule, image)},
    }


def cron_job(schedule: Schedule, suffix: str, cron: str, account: str, namespace: str) -> Manifest:
    """Kubernetes' own form: creates a RayJob."""
    container = {
        "name": "create-rayjob",
        "image": KUBECTL,
        "args": ["create", "-f", "/rayjob/rayjob.yaml"],
        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "128Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "rayjob", "mountPath": "/rayjob", "readOnly": True}],
    }
    pod = {
        "serviceAccountName": account,
        "restartPolicy": "OnFailure",
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [{"name": "rayjob", "configMap": {"name": f"{resource_name(schedule)}-rayjob"}}],
    }
    job = {"backoffLimit": 3, "ttlSecondsAfterFinished": KEEP_SECONDS, "template": {"spec": pod}}
    return {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": metadata(schedule, f"{resource_name(schedule)}-{suffix}", namespace),
        "spec": {
            "schedule": cron,
            "timeZone": schedule.timezone,
            "concurrencyPolicy": "Forbid",
            "successfulJobsHistoryLimit": 1,
            "failedJobsHistoryLimit": 3,
            "jobTemplate": {"spec": job},
        },
    }


def ray_job_in_a_config_map(schedule: Schedule, image: str, namespace: str) -> Manifest:
    """The RayJob that the CronJob creates, under a new name each time."""
    about = metadata(schedule, "", namespace)
    queue = {QUEUE_LABEL: f"karikomi-{dns(schedule.job.tenant)}"}
    ray_job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "generateName": f"{resource_name(schedule)}-",
            "namespace": namespace,
            "labels": about["labels"] | queue,
        },
        "spec": ray_job_spec(schedule, image),
    }
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(schedule, f"{resource_name(schedule)}-rayjob", namespace),
        "data": {"rayjob.yaml": written([ray_job])},
    }


def permission(account: str, namespace: str) -> list[Manifest]:
    """An account that may create RayJobs, and nothing else."""
    about = {"name": account, "namespace": namespace}
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": about},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            "metadata": dict(about),
            "rules": [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": dict(about),
            "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": namespace}],
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": account},
        },
    ]


def ray_job_spec(schedule: Schedule, image: str) -> Manifest:
    """A Ray cluster as wide as the job, and `run-due` in it.

    KubeRay tries nothing again (backoffLimit 0): a lost run is gone on with by the next `run-due`, which knows from
    the exit contract what is worth it.
    """
    job = schedule.job
    ranks = max((stage.tune.ranks for stage in job.stages if stage.tune), default=1)
    gpus = max(job.cluster.gpus_per_worker, 1.0 if job.device == "cuda" else 0.0)
    slots = math.ceil(max(job.cluster.workers, ranks) / job.cluster.workers)
    cpus = max(job.threads * slots, load_profile(job.hardware).cores)  # latency is measured in one task
    limits: dict[str, Any] = {"cpu": str(cpus), "memory": "16Gi"}
    if gpus:
        limits["nvidia.com/gpu"] = math.ceil(gpus * slots)
    store = job.publish.to
    return {
        "entrypoint": f"karikomi schedule run-due {schedule.name} --from {store} --cluster auto",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": KEEP_SECONDS,
        "backoffLimit": 0,
        "rayClusterSpec": {
            "rayVersion": version("ray"),
            "authOptions": {"mode": "token"},
            "headGroupSpec": {
                "rayStartParams": {"num-cpus": "0"},  # the driver runs here, and nothing else
                "template": pod_template(schedule, "ray-head", image, {"cpu": "2", "memory": "16Gi"}),
            },
            "workerGroupSpecs": [
                {
                    "groupName": "workers",
                    "replicas": job.cluster.workers,
                    "minReplicas": job.cluster.workers,
                    "maxReplicas": job.cluster.workers,
                    "rayStartParams": {},
                    "template": pod_template(schedule, "ray-worker", image, limits),
                }
            ],
        },
    }


def pod_template(schedule: Schedule, name: str, image: str, limits: dict[str, Any]) -> Manifest:
    """A Ray node's pod, with the tenant's account and, where there is one, its secret with S3 keys."""
    tenant = f"karikomi-{dns(schedule.job.tenant)}"
    container = {
        "name": name,
        "image": image,
        "envFrom": [{"secretRef": {"name": tenant, "optional": True}}],
        "resources": {"requests": dict(limits), "limits": limits},
    }
    return {"spec": {"serviceAccountName": tenant, "containers": [container]}}


def metadata(schedule: Schedule, name: str, namespace: str) -> Manifest:
    """Name, namespace, and whose it is."""
    labels = {
        "app.kubernetes.io/name": "karikomi",
        "karikomi/schedule": dns(schedule.name),
        "karikomi/tenant": dns(schedule.job.tenant),
    }
    return {"name": name, "namespace": namespace, "labels": labels}


def written(documents: list[Manifest]) -> str:
    """As YAML; a file within it stays readable."""
    return yaml.dump_all(documents, Dumper=Readable, sort_keys=False)


class Readable(yaml.SafeDumper):
    """Texts of several lines as blocks, and nothing by reference: kubectl knows it, people do not."""

    def ignore_aliases(self, data: Any) -> bool:
        """Writes everything out."""
        return True


Readable.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def resource_name(schedule: Schedule) -> str:
    """Of all that belongs to a schedule; suffixes still fit."""
    return f"karikomi-{dns(schedule.name, 30)}"


def dns(name: str, longest: int = 50) -> str:
    """A name as Kubernetes takes one; where that changes it, its digest keeps it unique."""
    clean = re.sub(r"[^a-z0-9-]", "-", name).strip("-")
    return name if clean == name and len(name) <= longest else f"{clean[: longest - 7].strip('-')}-{digest(name)[:6]}"
