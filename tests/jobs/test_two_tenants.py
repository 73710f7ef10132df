"""Two tenants, five jobs each, one cluster, one S3 server: quotas hold at every moment, nobody starves, all adds up."""

import csv
import io
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack

import pytest
from clusters_for_tests import NodeOf, RayCluster
from jobs_for_tests import tiny_job
from models_for_tests import write_tiny_model
from quota_sampler import Sampler, most_gpus_of_tasks

from cluster.errors import InputError
from cluster.local_s3 import LocalS3
from cluster.ray_jobs import RayJobs
from cluster.storage import open_store
from jobs.following import look
from jobs.ledger import read_ledger
from jobs.pricing import Account
from jobs.records import list_runs, log_key, read_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
BUCKET = "shared"
QUOTAS = {"retail": 2, "finance": 2}
WORKERS = {"retail": (1, 1, 1, 1, 1), "finance": (1, 2, 1, 2, 1)}  # of each job, with a GPU each
GPUS = 6  # more than the quotas together: what waits, waits for its quota
PATIENCE = 1500  # seconds for all ten
ACTIONS = ("Read", "Write", "List", "Tagging")
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
SUBMIT = """
import sys
from pathlib import Path
from jobs.job import read_job
from jobs.submission import submit
for path in sys.argv[2:]:
    done = submit(read_job(Path(path)), sys.argv[1])
    print(done.started.attempt, *done.sentences, sep="\\n  ", flush=True)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    may = {name: [f"{action}:{BUCKET}/{name}/*" for action in ACTIONS] for name in QUOTAS}
    with LocalS3(tmp_path_factory.mktemp("tenants"), bucket=BUCKET, tenants=may) as server:
        yield server


@pytest.fixture(scope="module")
def cluster(server):
    """A node for drivers and two with GPUs; they keep both tenants' keys, and none that are nobody's."""
    keys = {f"{name.upper()}_{key}": server.environment(name)[key] for name in QUOTAS for key in KEYS}
    place = {key: value for key, value in server.environment().items() if key not in KEYS}
    quotas = {f"tenant-{name}": quota for name, quota in QUOTAS.items()}
    drivers = NodeOf(cpus=6, resources=quotas, labels={"karikomi": "driver"})
    worker = NodeOf(cpus=4, gpus=GPUS // 2)
    with RayCluster(drivers, worker, worker, environment=place | keys | dict.fromkeys(KEYS, "nobody")) as one:
        yield one


@pytest.fixture(scope="module")
def environments(server, cluster):
    """What each tenant has in its shell; the test itself looks at everything as the store's owner."""
    return {name: cluster.client_environment() | server.environment(name) for name in (*QUOTAS, "owner")}


@pytest.fixture(scope="module")
def asked(environments, tmp_path_factory):
    """The tenants file, and five job files of each; every tenant's model is in its own place."""
    directory = tmp_path_factory.mktemp("asked")
    model = write_tiny_model(directory / "model")
    tenants = {
        name: {
            "business_unit": name.title(), "members": ["*"], "prefixes": [f"s3://{BUCKET}/{name}"],
            "store": f"s3://{BUCKET}/{name}", "credentials": {"environment": name.upper()}, "gpus": quota,
            "monthly_budget_usd": 100, "prices": {"cpu-local": 0.25} if name == "retail" else {},
        } for name, quota in QUOTAS.items()
    }  # fmt: skip
    (directory / "tenants.yaml").write_text(json.dumps({"tenants": tenants}))
    files = {}
    with as_one_who_has(environments["owner"]):
        for name, workers in WORKERS.items():
            place = open_store(f"s3://{BUCKET}/{name}/in-house/chat")
            for path in model.iterdir():
                place.put(path.name, path)
            files[name] = [directory / f"{name}-{number}.yaml" for number in range(1, len(workers) + 1)]
            for path, count in zip(files[name], workers, strict=True):
                path.write_text(json.dumps(job_of(name, path.stem, count)))
    return directory / "tenants.yaml", files


def job_of(tenant, name, workers):
    machines = {"workers": workers, "gpus_per_worker": 1, "wait_seconds": PATIENCE}
    place = f"s3://{BUCKET}/{tenant}"
    return tiny_job(f"{place}/in-house/chat", place, name=name, tenant=tenant, cluster=machines)


class as_one_who_has(ExitStack):
    """Variables of the environment, as long as the block goes on."""

    def __init__(self, variables):
        super().__init__()
        for name, value in variables.items():
            before = os.environ.get(name)
            self.callback(lambda n=name, b=before: os.environ.pop(n) if b is None else os.environ.update({n: b}))
            os.environ[name] = value


@pytest.fixture(scope="module")
def played(cluster, environments, asked):
    """All ten jobs, from the first submission to the last end, with a sampler beside them."""
    tenants, files = asked
    with as_one_who_has(environments["owner"]):
        jobs = RayJobs(cluster.url)
        stores = {name: open_store(f"s3://{BUCKET}/{name}") for name in QUOTAS}
        told = {"jobs": jobs, "stores": stores, "runs": {}, "waits": {name: set() for name in QUOTAS}}
        began = time.monotonic()
        with Sampler(jobs) as told["sampler"], ExitStack() as stack:
            submitters = {
                name: subprocess.Popen(
                    [sys.executable, "-c", SUBMIT, cluster.url, *map(str, paths)],
                    env=os.environ | environments[name] | {"KARIKOMI_TENANTS": str(tenants)},
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                ) for name, paths in files.items()
            }  # fmt: skip
            for one in submitters.values():
                stack.callback(one.kill)
            while len(told["runs"]) < sum(map(len, files.values())):
                pending = look_once(told)
                failed = {name: one.stderr.read() for name, one in submitters.items() if one.poll()}
                assert not failed, failed
                assert time.monotonic() - began < PATIENCE, f"not all ended: {pending}"
                time.sleep(1.0)
            told["submitted"] = {name: one.communicate()[0] for name, one in submitters.items()}
        told["seconds"] = time.monotonic() - began
        told["tasks"] = most_gpus_of_tasks(jobs)
        yield told


def look_once(told):
    """Looks at every run that is not over: keeps the ends, and why the queued ones wait; what the others are at."""
    pending = {}
    for name, store in told["stores"].items():
        for run in store.folders("runs/"):
            if run in told["runs"] or read_run(store, run) is None:  # over, or just being claimed
                continue
            view = look(store, run, told["jobs"])
            pending[run] = view.explain().sentence
            if view.state == "queued":
                told["waits"][name].add(pending[run].partition(": ")[2])
            if view.over:
                told["runs"][run] = view.run
    return pending


def of(runs, tenant):
    return sorted((run for run in runs.values() if run.last.started.tenant == tenant), key=lambda run: run.run)


def test_all_end_and_nobody_starves(played):
    runs = played["runs"]
    told = {name: played["stores"][run.last.started.tenant].get(log_key(run.last.started)) for name, run in runs.items()
            if run.last.ended.result != "done"}  # fmt: skip
    assert not told
    seen = played["sampler"].first_seen()
    waited = {name: seen[run.last.started.attempt] - run.last.started.at.timestamp() for name, run in runs.items()}
    for tenant in QUOTAS:
        order = sorted(of(runs, tenant), key=lambda run: seen[run.last.started.attempt])
        print(f"{tenant} began in the order {[run.last.started.name for run in order]}")
        places = [int(run.last.started.name[-1]) - 1 for run in order]
        assert all(abs(place - turn) <= 2 for turn, place in enumerate(places)), "one was passed over again and again"
    print(
        f"{len(runs)} jobs ended in {played['seconds']:.0f} s; the longest wait for a place {max(waited.values()):.0f} s"
    )


def test_quotas_hold_at_every_sampled_moment_and_are_reached(played):
    sampler = played["sampler"]
    assert not sampler.errors, sampler.errors[:3]
    gaps = [after.at - before.at for before, after in zip(sampler.samples, sampler.samples[1:], strict=False)]
    print(f"{len(sampler.samples)} samples, {sum(gaps) / len(gaps):.2f} s apart on average, {max(gaps):.2f} s at most")
    for tenant, quota in QUOTAS.items():
        held, gangs = sampler.highest("quota", tenant), sampler.highest("gang_gpus", tenant)
        tasks = played["tasks"][tenant]
        print(
            f"{tenant}: quota {quota} GPUs; most held: quota {held:g}, gangs {gangs:g}, tasks without a gang {tasks:g}"
        )
        assert held == quota, "the quota was never reached, or broken"
        assert 0 < gangs <= quota
        assert 0 < tasks <= quota
        blocked = [why for why in played["waits"][tenant] if f"tenant-{tenant}: asked " in why]
        assert any(f"cluster has {quota}, free " in why for why in blocked), played["waits"][tenant]
        print(f"{tenant}: {sorted(blocked)[0]}")
    together = max(len([one for those in sample.drivers.values() for one in those]) for sample in sampler.samples)
    assert together > max(QUOTAS.values()), "the tenants never ran side by side"


def test_the_ledger_adds_up(played, environments, asked):
    for tenant, store in played["stores"].items():
        rows = read_ledger(store).to_pylist()
        records = list(list_runs(store, pytest.fail))
        assert {row["tenant"] for row in rows} == {tenant}
        assert sorted(row["run"] for row in rows) == [run.run for run in records]
        assert len(records) == len(WORKERS[tenant])
        dollars = []
        for run in records:
            (one,) = run.attempts
            account = Account.model_validate_json(store.get(f"runs/{run.run}/attempts/1/account.json"))
            assert account.usd_per_hour == (0.25 if tenant == "retail" else 0.1008)
            dollars.append(account.dollars(one.usage))
        used = {
            name: math.fsum(getattr(run.usage, name) for run in records)
            for name in ("seconds", "cpu_seconds", "gpu_seconds")
        } | {"usd": math.fsum(dollars)}
        for name, total in used.items():
            assert math.isclose(math.fsum(row[name] for row in rows), total, rel_tol=1e-9), name
        assert used["gpu_seconds"] > 0
        shown = subprocess.run(
            [sys.executable, "-m", "jobs.cli", "usage", "--from", store.uri, "--by", "tenant", "--format", "csv"],
            capture_output=True, text=True, check=False, timeout=PATIENCE, env=os.environ | environments[tenant],
        )  # fmt: skip
        (row,) = csv.DictReader(io.StringIO(shown.stdout))
        assert (row["tenant"], row["runs"], row["published"]) == (tenant, "5", "5"), shown.stderr
        for name, total in used.items():
            assert float(row[name]) == pytest.approx(total, abs=1e-3), name
        print(f"{tenant}: {', '.join(f'{name} {total:.6g}' for name, total in used.items())}; usage says the same")


@pytest.mark.parametrize(("me", "other"), [("retail", "finance"), ("finance", "retail")])
def test_one_tenants_keys_read_and_list_nothing_of_what_the_others_runs_left(played, environments, me, other):
    theirs = played["stores"][other]
    keys = list(theirs.keys("runs/"))
    assert len(keys) > 50
    with as_one_who_has(environments[me]):
        assert len(open_store(f"s3://{BUCKET}/{me}").folders("runs/")) == 5
        for act in (lambda: theirs.get(keys[0]), lambda: list(theirs.keys("")), lambda: theirs.folders("runs/"),
                    lambda: list(theirs.keys("ledger/")), lambda: theirs.folders("models/")):  # fmt: skip
            with pytest.raises(InputError, match="refuses"):
                pytest.fail(f"{me} got {act()!r}")


def test_no_secret_is_told_by_ray_or_kept_in_the_store(played, server, cluster):
    secrets = {name: server.environment(name)["AWS_SECRET_ACCESS_KEY"] for name in (*QUOTAS, "owner")}
    secrets["token"] = cluster.token
    jobs = played["jobs"]
    told = json.dumps(
        [jobs._get("/api/jobs/"), jobs._state("actors"), jobs._state("runtime_envs"), played["submitted"]]
    )
    assert "KARIKOMI_CREDENTIALS" in told
    assert [name for name, secret in secrets.items() if secret in told] == []
    kinds = Counter()
    for store in played["stores"].values():
        for key in store.keys(""):
            content = store.get(key)
            kinds[key.partition("/")[0]] += 1
            assert [name for name, secret in secrets.items() if secret.encode() in content] == [], key
    assert set(kinds) == {"in-house", "runs", "models", "ledger"}
