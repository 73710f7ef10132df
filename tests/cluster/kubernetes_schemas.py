"""Checks a manifest against the published schemas: Kubernetes' own, KubeRay's and Kueue's."""

from pathlib import Path

import jsonschema
import kubernetes_validate
import yaml

KUBERNETES = "1.33"
OURS = yaml.safe_load((Path(__file__).parent / "schemas" / "custom_resources.yaml").read_text())


def check(manifest: dict) -> None:
    """Raises when a field is unknown, missing, or of the wrong type; pod templates within are looked at too."""
    kind = f"{manifest['apiVersion']} {manifest['kind']}"
    if kind not in OURS["kinds"]:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        return
    fields = OURS["kinds"][kind]
    schema = {
        "definitions": OURS["definitions"],
        "type": "object",
        "additionalProperties": False,
        "required": ["apiVersion", "kind", "metadata"],
        "properties": {"apiVersion": {}, "kind": {}, "metadata": {"$ref": "#/definitions/metadata"}, **fields},
    }
    jsonschema.validate(manifest, schema)
    for template in pod_templates(manifest):
        as_kind = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "in-it"}, "template": template}
        kubernetes_validate.validate(as_kind, KUBERNETES, strict=True)


def cluster_of(manifest: dict) -> dict:
    """The Ray cluster's spec in a RayCluster or a RayJob."""
    return manifest["spec"] if manifest["kind"] == "RayCluster" else manifest["spec"]["rayClusterSpec"]


def pod_templates(manifest: dict) -> list[dict]:
    """All pod templates of a RayCluster or RayJob; none of other kinds."""
    if manifest["kind"] not in ("RayCluster", "RayJob"):
        return []
    cluster = cluster_of(manifest)
    submitter = manifest["spec"].get("submitterPodTemplate")
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"] for group in groups] + ([submitter] if submitter else [])
