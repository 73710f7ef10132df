"""Tenants: a file that is read strictly, and rules that let a job in or refuse it with the figures."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from faulty_proxy import FaultyProxy
from hypothesis import given
from hypothesis import strategies as st
from models_for_tests import write_tiny_model
from schedules_for_tests import schedule

from cluster.errors import InputError
from cluster.storage import open_store
from jobs.admitting import admit
from jobs.closing import close
from jobs.estimating import admitted
from jobs.job import dump_job, parse_job
from jobs.ledger import committed
from jobs.ledger_row import month_of
from jobs.metering import most_held
from jobs.prefixes import within
from jobs.pricing import Account
from jobs.records import Ended, read_run
from jobs.scheduling import under_rules
from jobs.submission import claimed
from jobs.tenants import load_tenants, parse_tenants

EXAMPLE = Path(__file__).parents[2] / "jobs" / "examples" / "tenants.yaml"
RETAIL = {
    "business_unit": "Retail Banking",
    "members": ["ann"],
    "prefixes": ["s3://models/retail", "s3://in-house/retail"],
    "credentials": {"environment": "RETAIL"},
    "gpus": 4,
    "cpus": 6,
    "monthly_budget_usd": 10,
    "gates": {"perplexity_increase": 0.05},
    "prices": {"h100-sxm": 3.0},
}
SECRET = "hunter2/ABCDEFGHIJKLMNOPQRSTUVWXYZabcdef"


def tenants(**changes):
    return parse_tenants(yaml.safe_dump({"tenants": {"retail": RETAIL | changes}}), "tenants.yaml")


def job(**changes):
    content = {
        "name": "chat",
        "tenant": "retail",
        "model": "s3://in-house/retail/chat",
        "target": {"pattern": "2:4", "sparsity": 0.5},
        "publish": {"to": "s3://models/retail"},
    } | changes
    return parse_job(yaml.safe_dump(content), "job.yaml")


def test_the_example_is_valid():
    found = load_tenants(str(EXAMPLE))
    assert list(found.tenants) == ["retail", "research"]
    assert found.tenants["retail"].quotas("retail") == {
        "gpus": ("tenant-retail", 4),
        "cpus": ("tenant-retail-cpus", 16),
    }


def test_a_tenants_file_in_the_store(s3, monkeypatch):
    prefix = s3.make_prefix()
    open_store(prefix).put("tenants.yaml", EXAMPLE.read_bytes())
    monkeypatch.setenv("KARIKOMI_TENANTS", f"{prefix}/tenants.yaml")
    assert "retail" in load_tenants().tenants
    with pytest.raises(InputError, match=r"other.yaml: no tenants file is there"):
        load_tenants(f"{prefix}/other.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "tenants.retail.colour: unknown field"),
        ({"members": []}, "tenants.retail.members"),
        ({"prefixes": ["s3://b/../a"]}, "tenants.retail.prefixes: s3://b/../a"),
        ({"prefixes": ["retail"]}, "absolute directory"),
        ({"prefixes": ["s3://"]}, "no empty parts"),
        ({"gpus": True}, "tenants.retail.gpus: true/false is given"),
        ({"gpus": -1}, "tenants.retail.gpus"),
        ({"monthly_budget_usd": float("nan")}, "tenants.retail.monthly_budget_usd"),
        ({"prices": {"abacus": 1}}, "no profile abacus"),
        ({"prices": {"l4": 0}}, "tenants.retail.prices.l4"),
        ({"store": "s3://models/retail-evil"}, "outside of its prefixes"),
        ({"credentials": {}}, "exactly one of environment, role, profile"),
        ({"credentials": {"environment": "A", "profile": "b"}}, "exactly one"),
        ({"credentials": {"role": "admin"}}, "tenants.retail.credentials.role"),
        ({"credentials": {"aws_secret_access_key": SECRET}}, "aws_secret_access_key: a key itself"),
        ({"credentials": {"environment": "AKIAIOSFODNN7EXAMPLE"}}, "environment: a key itself"),
        ({"credentials": {"environment": SECRET}}, "tenants.retail.credentials.environment"),
    ],
)
def test_a_wrong_file_is_refused_by_tenant_and_field_and_no_secret_is_shown(changes, message):
    with pytest.raises(InputError) as refused:
        tenants(**changes)
    assert message in str(refused.value)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("content", ["", "[]", "tenants: {}", "tenants: {Retail: {}}", "a: &a [*a]"])
def test_what_is_no_tenants_file(content):
    with pytest.raises(InputError, match=r"tenants\.yaml"):
        parse_tenants(content, "tenants.yaml")


def test_a_line_that_is_no_yaml_is_named_and_not_shown():
    content = f"tenants:\n  retail: {{members: [x]}}\n  key: '{SECRET}\n"
    with pytest.raises(InputError, match=r"tenants\.yaml: no valid YAML: line \d") as refused:
        parse_tenants(content, "tenants.yaml")
    assert SECRET not in str(refused.value)


PART = st.text(st.characters(codec="utf-8", exclude_characters="/\\\0"), min_size=1).filter(
    lambda x: x not in (".", "..")
)
PARTS = st.lists(PART, min_size=1, max_size=4)


@given(PARTS, PARTS, st.text(st.characters(codec="utf-8", exclude_characters="/\\\0"), min_size=1))
def test_a_prefix_admits_what_lies_below_it_and_no_neighbour(prefix, below, more):
    place = "s3://" + "/".join(prefix)
    assert within(place, place)
    assert within(f"{place}/", place)
    assert within(f"{place}/{'/'.join(below)}", place)
    assert not within(place + more, place), "s3://b/retail must not admit s3://b/retail-evil"
    assert not within(place, f"{place}/{'/'.join(below)}")


@given(PARTS, PARTS)
def test_an_s3_address_is_within_just_as_its_parts_begin(one, other):
    assert within("s3://" + "/".join(one), "s3://" + "/".join(other)) == (one[: len(other)] == other)


@pytest.mark.parametrize("address", ["s3://b/retail/../x", "s3://b//retail", "s3://", "s3://b/./retail", "gs://b/x"])
def test_addresses_that_are_not_followed(address):
    with pytest.raises(InputError):
        within(address, "s3://b/retail")


def test_directories_are_compared_where_their_links_lead(tmp_path):
    (tmp_path / "retail").mkdir()
    (tmp_path / "finance").mkdir()
    (tmp_path / "retail" / "link").symlink_to(tmp_path / "finance")
    assert within(f"file://{tmp_path}/retail/x", str(tmp_path / "retail"))
    assert not within(str(tmp_path / "retail" / "link" / "x"), str(tmp_path / "retail"))
    assert not within(str(tmp_path / "retail"), "s3://b/retail")
    with pytest.raises(InputError, match=r"has no '\.\.'"):
        within(f"{tmp_path}/retail/../finance", str(tmp_path / "retail"))


def test_without_a_tenants_file_everything_is_allowed():
    one = job(tenant="anybody", publish={"to": "/anywhere"})
    admission = admit(one, None, "eve@host", spent=0)
    assert admission.job == one
    assert admission.resources == {}
    assert "KARIKOMI_CREDENTIALS" not in admission.environment


def test_what_a_run_is_let_in_with():
    one = job(hardware="h100-sxm", cluster={"workers": 3, "gpus_per_worker": 0.5})
    admission = admit(one, tenants(), "ann@laptop", spent=2.5, estimated=1.25)
    assert admission.resources == {"tenant-retail": 2.0}, "whole GPUs"
    assert admission.environment["KARIKOMI_CREDENTIALS"] == "environment:RETAIL"
    account = Account.model_validate_json(admission.environment["KARIKOMI_ACCOUNT"])
    assert (account.business_unit, account.usd_per_hour, account.estimated_usd) == ("Retail Banking", 3.0, 1.25)
    said = " ".join(admission.sentences)
    for words in ("Holds 2 of tenant retail's 4 GPUs", "$7.50 left of $10.00", "about $6.25"):
        assert words in said
    again = parse_job(dump_job(admission.job).decode(), "kept")
    assert admit(again, tenants(), "ann@laptop", 2.5).job == again, "letting in twice changes nothing"


def test_a_run_without_gpus_takes_cpus():
    one = job(cluster={"workers": 4}, stages=[{"sparsity": 0.5, "tune": {"ranks": 5}}])
    assert most_held(one) == (5, 0)
    assert admit(one, tenants(), "ann", 0).resources == {"tenant-retail-cpus": 5.0}
    assert admit(one, tenants(gpus=None), "ann", 0).resources == {"tenant-retail": 5.0}
    assert admit(one, tenants(cpus=None), "ann", 0).resources == {}


@pytest.mark.parametrize(
    ("changes", "by", "spent", "message"),
    [
        ({"tenant": "finance"}, "ann", 0, "tenant: finance is no tenant here"),
        ({}, "eve@laptop", 0, "retail does not have eve@laptop among its members"),
        ({"model": "s3://in-house/retail-evil/chat"}, "ann", 0, "model: s3://in-house/retail-evil/chat is outside"),
        ({"model": "s3://in-house/retail/../finance"}, "ann", 0, "model: "),
        ({"model": "/etc"}, "ann", 0, "model: /etc is outside"),
        ({"model": "/no/such/model.gguf"}, "ann", 0, "model: "),
        ({"publish": {"to": "s3://models/finance"}}, "ann", 0, "publish.to: s3://models/finance is outside"),
        ({"data": {"evaluation": {"source": "s3://x/y.txt"}}}, "ann", 0, "data.evaluation.source: s3://x/y.txt"),
        ({"data": {"tuning": {"source": "/etc/passwd"}}}, "ann", 0, "data.tuning.source: /etc/passwd"),
        ({"cluster": {"workers": 5, "gpus_per_worker": 1}}, "ann", 0, "holds 5 GPUs at once, the quota is 4"),
        ({"cluster": {"workers": 7}}, "ann", 0, "holds 7 CPUs at once, the quota is 6"),
        (
            {},
            "ann",
            9.5,
            "$9.50 of $10.00 is spent or promised this month, the run is estimated at $1.00, $0.50 is left",
        ),
        ({"gates": {"perplexity_increase": 0.06}}, "ann", 0, "gates.perplexity_increase: 0.06 is looser"),
        ({"hardware": "cheap.yaml"}, "ann", 0, "hardware: cheap.yaml is outside"),
    ],
)
def test_what_is_refused(changes, by, spent, message):
    with pytest.raises(InputError) as refused:
        admit(job(**changes), tenants(), by, spent, estimated=1.0)
    assert message in str(refused.value)
    assert refused.value.hint or "model: " in message


def test_a_tenant_with_a_store_publishes_nowhere_else():
    strict = tenants(store="s3://models/retail")
    assert admit(job(publish={"to": "s3://models/retail/"}), strict, "ann", 0)
    with pytest.raises(InputError, match="is not tenant retail's store"):
        admit(job(publish={"to": "s3://models/retail/elsewhere"}), strict, "ann", 0)


def test_gates_are_defaults_and_limits():
    assert admit(job(), tenants(), "ann", 0).job.gates.perplexity_increase == 0.05
    stricter = admit(job(gates={"perplexity_increase": 0.01}), tenants(), "ann", 0).job.gates
    assert (stricter.perplexity_increase, stricter.worst_slice_increase) == (0.01, 0.20)
    loose = tenants(gates={"perplexity_increase": 0.05, "may_loosen": True})
    assert admit(job(gates={"perplexity_increase": 0.5}), loose, "ann", 0).job.gates.perplexity_increase == 0.5


def test_under_a_budget_the_price_is_not_the_jobs_to_say(tmp_path):
    own = job(hardware=str(tmp_path / "cheap.yaml"))
    with pytest.raises(InputError, match="is a file of one's own"):
        admit(own, tenants(prefixes=[*RETAIL["prefixes"], str(tmp_path)]), "ann", 0)


def test_members_are_users_schedules_or_everybody():
    for members, by in (
        (["ann"], "ann@host"),
        (["schedule:nightly"], "schedule:nightly 20261124T0300Z"),
        (["*"], "eve@host"),
    ):
        assert admit(job(), tenants(members=members), by, 0)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model and text in a tenant's directory."""
    place = tmp_path_factory.mktemp("tenant") / "retail"
    write_tiny_model(place / "model", layers=1)
    return place


def command(karikomi, name, place, tmp_path, **changes):
    """Plans or runs a job of a tenant with these rules."""
    rules = RETAIL | {"members": ["*"], "prefixes": [str(place)]} | changes
    (tmp_path / "tenants.yaml").write_text(yaml.safe_dump({"tenants": {"retail": rules}}))
    one = job(model=str(place / "model"), publish={"to": str(place / "out")})
    (tmp_path / "job.yaml").write_bytes(dump_job(one.model_copy(update={"gates": job().gates})))
    return karikomi(name, tmp_path / "job.yaml", KARIKOMI_TENANTS=str(tmp_path / "tenants.yaml"))


def test_plan_shows_the_estimate_against_what_is_left(karikomi, place, tmp_path):
    shown = command(karikomi, "plan", place, tmp_path, gates={"may_loosen": True})
    assert shown.returncode == 0, shown.stderr
    for words in ("Estimate: $0.0", "no run of the same model and shape", "left of $10.00 this month", "Holds 2 of"):
        assert words in shown.stdout
    assert not (place / "out").exists()


@pytest.mark.parametrize("name", ["plan", "run"])
def test_what_is_over_budget_is_refused_with_the_figures(karikomi, place, tmp_path, name):
    shown = command(karikomi, name, place, tmp_path, monthly_budget_usd=0.0001, gates={"may_loosen": True})
    assert shown.returncode == 2
    assert "over budget: $0.00 of $0.0001 is spent or promised this month, the run is estimated at" in shown.stderr
    assert "Traceback" not in shown.stderr
    assert not (place / "out").exists()


def test_two_requests_at_one_moment_do_not_both_pass_a_budget_for_one(place, tmp_path, monkeypatch):
    two = [
        job(name=name, model=str(place / "model"), publish={"to": str(tmp_path / "retail")}) for name in ("one", "two")
    ]
    _, expected = admitted(two[0], "ann")
    rules = RETAIL | {"prefixes": [str(place), str(tmp_path)], "monthly_budget_usd": 1.5 * expected.usd}
    rules["gates"] = {"may_loosen": True}
    (tmp_path / "tenants.yaml").write_text(yaml.safe_dump({"tenants": {"retail": rules}}))
    monkeypatch.setenv("KARIKOMI_TENANTS", str(tmp_path / "tenants.yaml"))
    first, second = (admitted(one, "ann")[0] for one in two)  # both, before either has claimed
    store = open_store(first.job.publish.to)
    assert claimed(store, first, 1, "http://cluster:8265", "ann")
    with pytest.raises(InputError, match="over budget"):
        claimed(store, second, 1, "http://cluster:8265", "ann")
    refused = read_run(store, second.job.run)
    assert refused is not None
    assert refused.last.ended is not None
    assert refused.last.ended.result == "bad input"
    assert committed(store, "retail", month_of(datetime.now(UTC)), "")[0] == pytest.approx(expected.usd, rel=0.01)


def test_after_the_claim_the_budget_is_counted_again_and_the_model_is_not_read(place, s3, tmp_path, monkeypatch):
    home = s3.make_prefix()
    for file in (place / "model").iterdir():
        open_store(home).put(f"model/{file.name}", file.read_bytes())
    two = [job(name=name, model=f"{home}/model", publish={"to": f"{home}/out"}) for name in ("one", "two")]
    with FaultyProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)

        def reads(what: str) -> int:
            return sum(request.startswith("GET ") and what in request for request in proxy.requests)

        _, expected = admitted(two[0], "ann")
        rules = RETAIL | {"prefixes": [home], "monthly_budget_usd": 1.5 * expected.usd, "gates": {"may_loosen": True}}
        (tmp_path / "tenants.yaml").write_text(yaml.safe_dump({"tenants": {"retail": rules}}))
        monkeypatch.setenv("KARIKOMI_TENANTS", str(tmp_path / "tenants.yaml"))
        first, second = (admitted(one, "ann")[0] for one in two)
        assert reads("/model/") > 0, "it is read to be estimated, or this test shows nothing"
        proxy.requests.clear()
        store = open_store(f"{home}/out")
        assert claimed(store, first, 1, "http://cluster:8265", "ann")
        looked = reads("/ledger/")
        with pytest.raises(InputError, match="over budget"):
            claimed(store, second, 1, "http://cluster:8265", "ann")
        assert reads("/ledger/") > looked > 0, "what was spent is counted anew"
        assert [one for one in proxy.requests if "model" in one] == [], "nor is it listed, or asked for its size"


def test_a_run_that_is_tried_again_needs_room_only_for_the_rest(place, tmp_path, monkeypatch):
    one = job(model=str(place / "model"), publish={"to": str(tmp_path / "retail")})
    _, expected = admitted(one, "ann")
    rules = RETAIL | {"prefixes": [str(place), str(tmp_path)], "monthly_budget_usd": 1.1 * expected.usd}
    rules["gates"] = {"may_loosen": True}
    (tmp_path / "tenants.yaml").write_text(yaml.safe_dump({"tenants": {"retail": rules}}))
    monkeypatch.setenv("KARIKOMI_TENANTS", str(tmp_path / "tenants.yaml"))
    admission, _ = admitted(one, "ann")
    store = open_store(one.publish.to)
    started = claimed(store, admission, 1, "http://cluster:8265", "ann")
    half = expected.usage.model_copy(update={"cpu_seconds": expected.usage.cpu_seconds / 2})
    close(store, started, Ended(at=datetime.now(UTC), code=75, result="lost", sentence="lost", usage=half))
    again, _ = admitted(one, "ann")
    assert again.estimated == pytest.approx(expected.usd / 2)
    assert claimed(store, again, 2, "http://cluster:8265", "ann")


def test_a_schedule_is_put_in_force_as_its_tenants_rules_make_it(tmp_path):
    one = job(model=str(tmp_path / "model"), publish={"to": str(tmp_path)})
    nightly = schedule(str(tmp_path), name="nightly").model_copy(update={"job": one})
    with pytest.raises(InputError, match="does not have schedule:nightly among its members"):
        under_rules(nightly, tenants(prefixes=[str(tmp_path)]))
    ruled = under_rules(nightly, tenants(members=["schedule:nightly"], prefixes=[str(tmp_path)]))
    assert ruled.job.gates.perplexity_increase == 0.05
    assert under_rules(nightly, None) == nightly


def test_the_command_shows_the_file_and_what_nodes_must_carry(karikomi):
    shown = karikomi("tenants", "--tenants", EXAMPLE)
    assert shown.returncode == 0, shown.stderr
    assert '"tenant-retail": 4.0' in shown.stdout
    assert "credentials: environment:RETAIL" in shown.stdout
    nothing = karikomi("tenants", KARIKOMI_TENANTS="")
    assert (nothing.returncode, "KARIKOMI_TENANTS" in nothing.stderr) == (2, True)
