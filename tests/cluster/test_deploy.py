"""The deploy files: valid by the published schemas, and true in what they promise."""

import configparser
import json
import os
import re
import shutil
import signal
import subprocess
import time
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubernetes_schemas import check, cluster_of, pod_templates
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from policy_sentry.querying.actions import get_action_data
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.version import VERSION
from jobs.job import load_yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "cluster" / "deploy"
MANIFESTS = ["kuberay/raycluster.yaml", "kuberay/rayjob.yaml", "kueue/queues.yaml", "network/policy.yaml"]


def manifests(file: str) -> list[dict]:
    return list(yaml.safe_load_all((DEPLOY / file).read_text()))


def only(file: str, kind: str) -> dict:
    [found] = [one for one in manifests(file) if one["kind"] == kind]
    return found


def ray_specs() -> list[dict]:
    return [
        cluster_of(only("kuberay/raycluster.yaml", "RayCluster")),
        cluster_of(only("kuberay/rayjob.yaml", "RayJob")),
    ]


@pytest.mark.parametrize("file", MANIFESTS)
def test_every_manifest_follows_the_published_schemas(file):
    for manifest in manifests(file):
        check(manifest)


def test_the_check_notices_slips():
    job = only("kuberay/rayjob.yaml", "RayJob")
    job["spec"]["shutdownAfterJobFinish"] = True
    with pytest.raises(jsonschema.ValidationError, match="shutdownAfterJobFinish"):
        check(job)
    job = only("kuberay/rayjob.yaml", "RayJob")
    pod_templates(job)[1]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="volumeMount"):
        check(job)
    policy = manifests("network/policy.yaml")[1]
    policy["spec"]["ingres"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="ingres"):
        check(policy)


@pytest.mark.parametrize("spec", ray_specs(), ids=["raycluster", "rayjob"])
def test_a_ray_cluster_is_closed_and_its_head_runs_nothing(spec):
    assert spec["authOptions"]["mode"] == "token"
    head = spec["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert (head["serviceType"], head["enableIngress"]) == ("ClusterIP", False)
    environment = {one["name"]: one["value"] for one in head["template"]["spec"]["containers"][0]["env"]}
    assert int(environment["RAY_JOB_START_TIMEOUT_SECONDS"]) > 900  # Ray's own: a queued run would be failed by it
    drivers = [group for group in spec["workerGroupSpecs"] if group.get("labels") == {"karikomi": "driver"}]
    assert len(drivers) == 1
    replicas = {drivers[0][name] for name in ("replicas", "minReplicas", "maxReplicas")}
    assert replicas == {1}, "more than one would hold every quota more than once"
    quotas = [name for group in spec["workerGroupSpecs"] for name in group.get("resources", {}) if "tenant-" in name]
    assert quotas == [name for name in drivers[0]["resources"] if name.startswith("tenant-")]


@pytest.mark.parametrize("file", ["kuberay/raycluster.yaml", "kuberay/rayjob.yaml"])
def test_pods_run_without_rights_and_with_limits(file):
    [manifest] = [one for one in manifests(file) if one["kind"].startswith("Ray")]
    for template in pod_templates(manifest):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert re.fullmatch(rf"registry\.example\.com/karikomi:{VERSION}(-cuda)?", container["image"])
            cuda = "nvidia.com/gpu" in container["resources"]["limits"]
            assert container["image"].endswith("-cuda") == cuda
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounted <= {volume["name"] for volume in pod.get("volumes", [])}


def test_a_rayjob_is_never_retried_by_kubernetes_and_leaves_nothing():
    job = only("kuberay/rayjob.yaml", "RayJob")["spec"]
    assert job["backoffLimit"] == 0  # it could not tell bad input from a lost machine
    assert job["entrypoint"].startswith("again-when-lost ")
    assert job["shutdownAfterJobFinishes"]
    assert job["suspend"]
    assert "clusterSelector" not in job  # Kueue refuses these two
    assert not job["rayClusterSpec"]["enableInTreeAutoscaling"]
    [driver] = [one for one in job["rayClusterSpec"]["workerGroupSpecs"] if "driver" in one.get("resources", {})]
    assert json.loads(job["entrypointResources"]) == {"driver": float(driver["resources"]["driver"])}
    grace = load_yaml(job["runtimeEnvYAML"], "runtimeEnvYAML")["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]
    assert int(grace) <= driver["template"]["spec"]["terminationGracePeriodSeconds"]
    assert job["preRunningDeadlineSeconds"] < job["activeDeadlineSeconds"]


def test_the_job_waits_in_a_queue_that_is_there_and_has_room_for_it():
    queues = manifests("kueue/queues.yaml")
    job = only("kuberay/rayjob.yaml", "RayJob")
    labels = job["metadata"]["labels"]
    [local] = [
        one
        for one in queues
        if one["kind"] == "LocalQueue" and one["metadata"]["name"] == labels["kueue.x-k8s.io/queue-name"]
    ]
    assert labels["kueue.x-k8s.io/priority-class"] in names(queues, "WorkloadPriorityClass")
    [queue] = [
        one
        for one in queues
        if one["kind"] == "ClusterQueue" and one["metadata"]["name"] == local["spec"]["clusterQueue"]
    ]
    quota = {
        flavor["name"]: {one["name"]: one["nominalQuota"] for one in flavor["resources"]}
        for flavor in queue["spec"]["resourceGroups"][0]["flavors"]
    }
    gpus = [group for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"] if group["groupName"] == "l4"]
    assert sum(group["maxReplicas"] for group in gpus) <= int(quota["karikomi-l4"]["nvidia.com/gpu"])


def test_queues_hang_together():
    queues = manifests("kueue/queues.yaml")
    flavors = names(queues, "ResourceFlavor")
    clusters = [one for one in queues if one["kind"] == "ClusterQueue"]
    assert {one["metadata"]["name"] for one in clusters} == {"karikomi-retail", "karikomi-research"}
    assert {one["spec"]["cohortName"] for one in clusters} == {"karikomi"}
    for queue in clusters:
        for group in queue["spec"]["resourceGroups"]:
            for flavor in group["flavors"]:  # Kueue wants every covered resource, in the same order
                assert flavor["name"] in flavors
                assert [one["name"] for one in flavor["resources"]] == group["coveredResources"]
        selected = queue["spec"]["namespaceSelector"]["matchLabels"]
        [space] = [
            one
            for one in queues
            if one["kind"] == "Namespace" and selected.items() <= one["metadata"]["labels"].items()
        ]
        locals_here = [
            one
            for one in queues
            if one["kind"] == "LocalQueue" and one["metadata"]["namespace"] == space["metadata"]["name"]
        ]
        assert [one["spec"]["clusterQueue"] for one in locals_here] == [queue["metadata"]["name"]]


def names(found: list[dict], kind: str) -> set[str]:
    return {one["metadata"]["name"] for one in found if one["kind"] == kind}


def test_only_own_pods_and_the_operator_reach_a_head():
    """Whatever is not named by a rule is shut: one policy selects every pod and allows nothing."""
    policies = {one["metadata"]["name"]: one["spec"] for one in manifests("network/policy.yaml")}
    assert policies["nothing-by-default"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    others = [source for spec in policies.values() for rule in spec.get("ingress", []) for source in rule["from"]]
    assert {"podSelector": {}} in others
    outside = [one for one in others if "namespaceSelector" in one]
    spaces = {one["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for one in outside}
    assert spaces == {"kuberay-system", "monitoring"}
    dashboard = [
        spec["podSelector"]
        for spec in policies.values()
        for rule in spec.get("ingress", [])
        if "ports" not in rule or any(one["port"] == 8265 for one in rule["ports"])
    ]
    assert dashboard == [
        {"matchLabels": {"ray.io/is-ray-node": "yes"}},
        {"matchLabels": {"ray.io/node-type": "head"}},
    ]
    blocks = [
        target["ipBlock"]
        for rule in policies["names-store-and-own-pods"]["egress"]
        for target in rule["to"]
        if "ipBlock" in target
    ]
    assert [one["except"] for one in blocks] == [["169.254.0.0/16"]], "a machine's own role is no tenant's"


def test_the_launcher_file_follows_rays_own_schema():
    config = load_yaml((DEPLOY / "ray-up" / "aws.yaml").read_text(), "aws.yaml")
    validate_config(prepare_config(config | {"cluster_synced_files": []}))
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config | {"cluster_synced_files": [], "head_node": {}})
    nodes = config["available_node_types"]
    assert nodes[config["head_node_type"]]["resources"]["CPU"] == 0
    assert sum(node.get("max_workers", 0) for node in nodes.values()) == config["max_workers"]
    assert nodes["driver"]["labels"] == {"karikomi": "driver"}
    assert (nodes["driver"]["min_workers"], nodes["driver"]["max_workers"]) == (1, 1)
    [start] = [line for line in config["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in start
    assert "RAY_JOB_START_TIMEOUT_SECONDS=2592000" in start
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]


# ---- what a tenant may do in S3 ------------------------------------------------------------------------------------

HERE = {"TENANT": "retail", "MODELS_BUCKET": "models", "SOURCES_BUCKET": "in-house", "ACCOUNT": "111122223333"}


def policy(file: str) -> dict:
    text = (DEPLOY / "aws" / file).read_text()
    for name, value in HERE.items():
        text = text.replace(name, value)
    return json.loads(text)


def holds(operator: str, key: str, wanted: str | list[str], request: dict) -> bool:
    """A condition of a statement, by the rules of the IAM reference for these four operators."""
    values = [wanted] if isinstance(wanted, str) else wanted
    given = request.get(key)
    if operator == "Null":
        return (given is None) == (values == ["true"])
    if operator == "ArnNotLike":
        return given is None or not any(fnmatchcase(given, one) for one in values)
    assert operator in ("StringLike", "Bool")
    return given is not None and any(fnmatchcase(given, one) for one in values)


def verdict(document: dict, action: str, arn: str, request: dict) -> set[str]:
    """The effects of all statements that apply."""
    found = set()
    for statement in document["Statement"]:
        actions, resources = (
            [value] if isinstance(value, str) else value for value in (statement["Action"], statement["Resource"])
        )
        conditions = [
            holds(operator, key, wanted, request)
            for operator, pairs in statement.get("Condition", {}).items()
            for key, wanted in pairs.items()
        ]
        named = any(fnmatchcase(action, one) for one in actions) and any(fnmatchcase(arn, one) for one in resources)
        if named and all(conditions):
            found.add(statement["Effect"])
    return found


def allowed(role: str, action: str, arn: str, **request: str) -> bool:
    """Whether retail's role (with its own policy) or another (with all rights of its own) may do this."""
    given = {
        "aws:PrincipalArn": f"arn:aws:iam::111122223333:role/karikomi-{role}",
        "aws:SecureTransport": "true",
        **{key.replace("_", ":", 1).replace("_", "-"): value for key, value in request.items()},
    }
    own = {"Allow"} if role != "retail" else verdict(policy("tenant-policy.json"), action, arn, given)
    both = own | verdict(policy("bucket-policy.json"), action, arn, given)
    return "Allow" in both and "Deny" not in both


RELEASE = "arn:aws:s3:::models/retail/models/support-chat"


def test_a_tenant_works_under_its_own_prefix():
    for action in ("GetObject", "PutObject", "DeleteObject", "AbortMultipartUpload", "ListMultipartUploadParts"):
        assert allowed("retail", f"s3:{action}", f"{RELEASE}/0123456789ab/model.safetensors"), action
    assert allowed("retail", "s3:PutObject", "arn:aws:s3:::models/retail/runs/x/steps/y.json")
    assert allowed("retail", "s3:ListBucket", "arn:aws:s3:::models", s3_prefix="retail/models/")
    assert allowed("retail", "s3:GetObject", "arn:aws:s3:::in-house/retail/support-chat/config.json")
    assert allowed("retail", "s3:ListBucket", "arn:aws:s3:::in-house", s3_prefix="retail/support-chat/")


@pytest.mark.parametrize("other", ["research", "retail-evil", "Retail", "retai"])
def test_and_nowhere_else(other):
    for action in ("GetObject", "PutObject", "DeleteObject", "AbortMultipartUpload", "ListMultipartUploadParts"):
        for bucket in ("models", "in-house"):
            assert not allowed("retail", f"s3:{action}", f"arn:aws:s3:::{bucket}/{other}/models/a/b"), action
    for bucket in ("models", "in-house"):
        assert not allowed("retail", "s3:ListBucket", f"arn:aws:s3:::{bucket}", s3_prefix=f"{other}/")


def test_nor_lists_everything_nor_writes_to_the_models_that_it_reads():
    assert not allowed("retail", "s3:ListBucket", "arn:aws:s3:::models")
    assert not allowed("retail", "s3:ListBucket", "arn:aws:s3:::models", s3_prefix="")
    assert not allowed("retail", "s3:PutObject", "arn:aws:s3:::in-house/retail/support-chat/config.json")
    assert not allowed("retail", "s3:DeleteObject", "arn:aws:s3:::in-house/retail/support-chat/config.json")
    assert not allowed("retail", "s3:PutBucketPolicy", "arn:aws:s3:::models")


def test_a_version_is_written_once_even_by_a_program_that_is_not_ours():
    version = f"{RELEASE}/versions/3.json"
    assert allowed("retail", "s3:PutObject", version, **{"s3_if-none-match": "*"})
    assert not allowed("retail", "s3:PutObject", version)
    assert not allowed("platform", "s3:PutObject", version)
    assert allowed("retail", "s3:PutObject", f"{RELEASE}/latest.json")  # moves, by If-Match


def test_the_bucket_itself_keeps_others_and_open_connections_out():
    file = f"{RELEASE}/0123456789ab/model.safetensors"
    assert allowed("platform", "s3:GetObject", file)
    assert not allowed("research", "s3:GetObject", file)
    assert not allowed("retail", "s3:GetObject", file, **{"aws_SecureTransport": "false"})


@pytest.mark.parametrize("file", ["tenant-policy.json", "bucket-policy.json"])
def test_every_action_is_one_of_s3_and_knows_the_conditions_it_is_given(file):
    """By AWS's published table of actions; a slip in a name would silently allow or forbid nothing."""
    for statement in policy(file)["Statement"]:
        actions = [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
        keys = {key for pairs in statement.get("Condition", {}).values() for key in pairs if key.startswith("s3:")}
        for action in actions:
            if action == "s3:*":
                assert keys == set()
                continue
            entries = get_action_data("s3", action.removeprefix("s3:"))["s3"]
            assert keys <= {key for entry in entries for key in entry["condition_keys"]}, action


def test_the_lifecycle_is_one_that_s3_takes_and_spares_the_journal():
    """By the model that boto3 checks requests with; the journal's records are small, and only large files expire."""
    import boto3
    from botocore.stub import Stubber

    rules = json.loads((DEPLOY / "aws" / "lifecycle.json").read_text())
    client = boto3.session.Session().client("s3", region_name="us-east-1")
    with Stubber(client) as stub:
        stub.add_response("put_bucket_lifecycle_configuration", {})
        client.put_bucket_lifecycle_configuration(Bucket="models", LifecycleConfiguration=rules)
    for rule in rules["Rules"]:
        if "Expiration" in rule:
            assert rule["Filter"]["And"]["Prefix"].endswith("/runs/")  # never releases, never the ledger
            assert rule["Filter"]["And"]["ObjectSizeGreaterThan"] >= 1 << 20
    assert any(rule.get("AbortIncompleteMultipartUpload") for rule in rules["Rules"])


# ---- the image -----------------------------------------------------------------------------------------------------


def test_the_image_is_pinned_and_runs_as_nobody_special():
    lines = joined_lines((DEPLOY / "image" / "Dockerfile").read_text())
    bases = [line.split()[1] for line in lines if line.startswith("FROM")]
    assert all(re.fullmatch(r"python:3\.11\.\d+-slim-\w+|base|torch-\$\{ACCELERATOR\}", base) for base in bases)
    stages = {line.split()[3] for line in lines if line.startswith("FROM") and " AS " in line}
    assert {"torch-cpu", "torch-cuda"} <= stages  # what ACCELERATOR can be
    for line in lines:
        if "pip install" in line:
            assert "--constraint" in line, line
        assert not line.startswith("ADD"), line
        if "apt-get install" in line:
            assert "--no-install-recommends" in line
            assert "rm -rf /var/lib/apt/lists/*" in line
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000:1000"]
    after = lines[lines.index("USER 1000:1000") :]
    assert not any(line.startswith(("RUN", "COPY")) for line in after)
    for line in lines:
        if line.startswith("COPY"):
            for source in [one for one in line.split()[1:-1] if not one.startswith("--")]:
                assert (ROOT / source).exists(), source


def joined_lines(dockerfile: str) -> list[str]:
    plain = "\n".join(line for line in dockerfile.splitlines() if not line.startswith("#"))
    return [line for line in plain.replace("\\\n", " ").splitlines() if line.strip()]


def test_every_package_of_the_image_is_pinned_within_pyprojects_bounds():
    pins = dict(
        line.split("==") for line in (DEPLOY / "image" / "constraints.txt").read_text().splitlines() if "==" in line
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in [*project["dependencies"], *project["optional-dependencies"]["gguf"]]:
        requirement = Requirement(line)
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin, f"{requirement.name} is not pinned: run cluster/deploy/image/pin.py"
        assert requirement.specifier.contains(pin), f"{requirement} but {pin}: run cluster/deploy/image/pin.py"


# ---- the retry by exit code ------------------------------------------------------------------------------------------

AGAIN = DEPLOY / "image" / "again-when-lost"


def again(command: str, tmp_path: Path, attempts: int = 3) -> tuple[int, int]:
    """Runs a command that leaves a line per run; gives exit code and number of runs."""
    trace = tmp_path / "trace"
    trace.touch()
    done = subprocess.run(
        [AGAIN, "bash", "-c", f"echo run >> {trace}; {command}"],
        env=os.environ | {"LOST_ATTEMPTS": str(attempts), "LOST_WAIT": "0"},
        capture_output=True,
        timeout=60,
    )
    return done.returncode, len(trace.read_text().splitlines())


@pytest.mark.parametrize("code", [0, 1, 2, 3, 130])
def test_what_a_retry_cannot_help_is_not_retried(code, tmp_path):
    assert again(f"exit {code}", tmp_path) == (code, 1)


def test_lost_machines_are_retried_until_it_works_or_the_attempts_are_spent(tmp_path):
    assert again("exit 75", tmp_path) == (75, 3)
    second = tmp_path / "second"
    second.mkdir()
    assert again(f"[ $(wc -l < {second}/trace) -ge 2 ] && exit 0; exit 75", second) == (0, 2)


def test_a_stop_is_waited_for_and_not_followed_by_another_attempt(tmp_path):
    """Ray sends the signal to the whole group: the run drains, and its exit code is what counts."""
    ready = tmp_path / "ready"
    script = f"trap 'sleep 0.5; echo drained > {ready}; exit 75' TERM; touch {ready}; while true; do sleep 0.05; done"
    process = subprocess.Popen(
        [AGAIN, "bash", "-c", script], start_new_session=True, env=os.environ | {"LOST_WAIT": "0"}
    )
    try:
        deadline = time.monotonic() + 60
        while not ready.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == 75
        assert ready.read_text() == "drained\n"
    finally:
        process.kill()


def test_a_stop_while_it_waits_ends_it_at_once(tmp_path):
    process = subprocess.Popen(
        [AGAIN, "bash", "-c", "exit 75"],
        start_new_session=True,
        env=os.environ | {"LOST_WAIT": "600"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert "attempt 2 of 3" in process.stderr.readline()
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == 130
    finally:
        process.kill()


# ---- systemd ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_systemd_takes_the_units(tmp_path):
    for file in (DEPLOY / "systemd").iterdir():
        text = re.sub(r"^ExecStart=.*", "ExecStart=/bin/true", file.read_text(), flags=re.MULTILINE)
        (tmp_path / file.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, tmp_path.iterdir())],
        capture_output=True,
        text=True,
        timeout=60,
    )
    complaints = [line for line in done.stderr.splitlines() if "karikomi" in line]
    assert complaints == []


def test_the_service_is_what_the_timer_starts():
    timer, service = (DEPLOY / "systemd" / f"karikomi-schedule.{kind}" for kind in ("timer", "service"))
    assert timer.stem == service.stem
    units = configparser.ConfigParser(strict=False, interpolation=None)
    units.optionxform = str
    units.read_string(service.read_text())
    assert units["Service"]["ExecStart"].endswith("karikomi schedule run-due")
    assert units["Service"]["SuccessExitStatus"] == "75"
