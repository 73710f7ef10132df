"""Tenants on one real S3 server: with our own check off, keys of one open nothing of the other's."""

from contextlib import suppress

import pytest

from cluster.credentials import adopt
from cluster.errors import InputError
from cluster.local_s3 import LocalS3
from cluster.storage import open_store

BUCKET = "shared"
TENANTS = ("retail", "retail-evil", "finance")  # the second: a neighbour by name
ACTIONS = ("Read", "Write", "List", "Tagging")
MAY = {name: [f"{action}:{BUCKET}/{name}/*" for action in ACTIONS] for name in TENANTS}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with LocalS3(tmp_path_factory.mktemp("tenants"), bucket=BUCKET, tenants=MAY) as server:
        yield server


@pytest.fixture
def become(server, monkeypatch):
    """Makes this process a tenant, the way a driver and its workers do."""
    for identity in (*TENANTS, "owner"):
        environment = server.environment(identity)
        name = identity.replace("-", "_").upper()
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(f"{name}_{key}", environment[key])
            monkeypatch.setenv(key, "nobody")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", environment["AWS_ENDPOINT_URL_S3"])
        monkeypatch.setenv("AWS_REGION", environment["AWS_REGION"])

    def as_tenant(identity: str) -> None:
        monkeypatch.setenv("KARIKOMI_CREDENTIALS", f"environment:{identity.replace('-', '_').upper()}")
        assert adopt()

    return as_tenant


@pytest.fixture
def places(become):
    """Every tenant's own store, with a model, a release, a run and a ledger in it."""
    stores = {}
    for name in TENANTS:
        become(name)
        stores[name] = open_store(f"s3://{BUCKET}/{name}")
        for key in KEYS:
            stores[name].put(key, name.encode())
    return stores


KEYS = ("models/chat/versions/1.json", "runs/chat-1/attempts/1/started.json", "ledger/tenant=x/month=2026-11/r.parquet")


def acts(others, mine, mine_uri):
    """Everything that a store can do, tried on somebody else's."""
    key = KEYS[0]
    whole = open_store(f"s3://{BUCKET}")
    theirs = others.uri.removeprefix(f"s3://{BUCKET}/")
    own = mine_uri.removeprefix(f"s3://{BUCKET}/")
    return {
        "get": lambda: others.get(key),
        "read": lambda: others.read(key, 0, 1),
        "size": lambda: others.size(key),
        "get_tagged": lambda: others.get_tagged(key),
        "keys": lambda: list(others.keys("")),
        "keys of a folder": lambda: list(others.keys("models/")),
        "keys of the bucket": lambda: list(whole.keys("")),
        "folders": lambda: others.folders("runs/"),
        "put": lambda: others.put(key, b"mine"),
        "put a new one": lambda: others.put("runs/evil/job.yaml", b"mine"),
        "create": lambda: others.create("models/chat/versions/2.json", b"mine"),
        "swap": lambda: others.swap(key, b"mine", '"tag"'),
        "delete": lambda: others.delete(key),
        "copy out": lambda: whole.copy(f"{theirs}/{key}", f"{own}/stolen"),
        "copy in": lambda: whole.copy(f"{own}/{key}", f"{theirs}/planted"),
        "check_writable": others.check_writable,
    }


@pytest.mark.parametrize("me", TENANTS)
@pytest.mark.parametrize("other", TENANTS)
def test_one_tenants_keys_open_nothing_of_anothers(places, become, me, other):
    if me == other:
        become(me)
        assert places[me].get(KEYS[0]) == me.encode()
        assert sorted(places[me].keys("")) == sorted(KEYS)
        assert places[me].folders("models/") == ["chat"]
        places[me].check_writable()
        return
    become(me)
    for name, act in acts(places[other], places[me], places[me].uri).items():
        with pytest.raises(InputError, match="refuses"):
            pytest.fail(f"{me} did {name} at {other}'s and got {act()!r}")
    for owner in (me, other):
        become(owner)
        assert {key: places[owner].get(key) for key in places[owner].keys("")} == dict.fromkeys(KEYS, owner.encode())


def test_a_key_that_climbs_reaches_nobody_else(places, become):
    """Our own stores take no such key; here the server is asked directly."""
    from boto3.session import Session
    from botocore.exceptions import ClientError

    become("retail")
    client = Session().client("s3", region_name="us-east-1")
    for key in (f"retail/../finance/{KEYS[0]}", f"retail//../finance/{KEYS[0]}", f"retail/%2e%2e/finance/{KEYS[0]}"):
        with pytest.raises(ClientError):
            pytest.fail(str(client.get_object(Bucket=BUCKET, Key=key)["Body"].read()))
        with suppress(ClientError):  # one that takes it keeps it as the tenant's own, under this very name
            client.put_object(Bucket=BUCKET, Key=key, Body=b"planted")
    become("owner")
    planted = [
        key for key in open_store(f"s3://{BUCKET}").keys("") if open_store(f"s3://{BUCKET}").get(key) == b"planted"
    ]
    assert all(key.startswith("retail/") for key in planted)
    become("finance")
    assert {key: places["finance"].get(key) for key in places["finance"].keys("")} == dict.fromkeys(KEYS, b"finance")


def test_a_stranger_opens_nothing(places, become, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "stranger")
    for store in places.values():
        with pytest.raises(InputError, match="refuses"):
            store.get(KEYS[0])
