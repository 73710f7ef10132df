"""Faults of publishing and of the stores: killed publishers, a broken network, a full disk. No Ray in here."""

import random
import time

from faulty_proxy import Mix
from oracle import clear_refusal, nothing_lost, verified_versions
from publisher import Notes, Order
from small_disk import SmallDisk
from tally import Shown
from world import World

from cluster import s3_store
from cluster.errors import Unavailable
from cluster.storage import Store, Stored, open_store
from workflows.publishing import publish, pull
from workflows.release import model_digest

DOCUMENTS = {"REPORT.json": "{}", "REPORT.html": "<p>", "PROVENANCE.json": "{}"}
TOGETHER = {"refuse": 0.04, "fail": 0.04, "slow": 0.02, "reset": 0.04, "lose": 0.04, "cut": 0.04}


def model(store: Store, seed: int, kib: int = 64) -> dict[str, Stored]:
    """Some model files, already in the store, as a run has them."""
    weights = random.Random(seed).randbytes(kib << 10)
    return {
        "model-00000.safetensors": store.put(f"runs/r{seed}/00000", weights),
        "model-outer.safetensors": store.put(f"runs/r{seed}/outer", weights[::-1]),
        "config.json": store.put(f"runs/r{seed}/config", b"{}"),
    }


def publisher_killed_directory(seed: int, world: World) -> Shown:
    """A publisher to a directory, killed at its `seed`-th operation on the file system."""
    return publisher_killed(seed, world, open_store(str(world.fresh() / "store")), "publisher-directory", {})


def publisher_killed_s3(seed: int, world: World) -> Shown:
    """A publisher to S3, killed before request `seed / 2` is sent (even seeds) or after it was carried out (odd)."""
    return publisher_killed(seed, world, world.s3_store(), "publisher-s3", world.s3_environment)


def publisher_killed(seed: int, world: World, store: Store, kind: str, environment: dict[str, str]) -> Shown:
    """One publisher, killed at one boundary; then the same again, undisturbed."""
    s3 = store.uri.startswith("s3://")
    die_at, side = (seed // 2 + 1, ("before", "after")[seed % 2]) if s3 else (seed + 1, "before")
    files = model(store, seed)
    order = Order(
        store=store.uri, files=files, documents=DOCUMENTS, run="run-1", environment=environment,
        notes=str(world.fresh() / "notes"), die_at=die_at, side=side,
    )  # fmt: skip
    code = world.publishers.run(order)
    notes = Notes(order.notes)
    if code == 0:  # there is no such boundary: this publisher was through before
        assert notes.boundaries < die_at + (side == "after"), "the boundary was passed alive"
        assert set(verified_versions(store)) == {"chat/versions/1.json", "chat/latest.json"}
        return Shown(kind=kind, seed=seed, injected=0)
    assert code == -9, f"the publisher ended with {code}"
    nothing_lost(store, [*files.values(), *notes.acknowledged])
    seen = verified_versions(store)
    started = time.monotonic()
    before = len(world.proxy.requests) if s3 else 0
    again = order.model_copy(update={"die_at": 0, "notes": f"{order.notes}-again"})
    assert world.publishers.run(again) == 0
    seconds = time.monotonic() - started
    requests = len(world.proxy.requests) - before if s3 else 0
    now = verified_versions(store)
    assert set(now) == {"chat/versions/1.json", "chat/latest.json"}
    assert {one.digest for one in now.values()} == {model_digest(files)}
    assert all(now[key] == pointer for key, pointer in seen.items()), "what was visible has changed"
    nothing_lost(store, [*notes.acknowledged, *Notes(f"{order.notes}-again").acknowledged])
    return Shown(kind=kind, seed=seed, injected=1, resumed=1, seconds=(seconds,), requests=requests)


def broken_network(seed: int, world: World) -> Shown:
    """Publishing and pulling through a network that breaks in every way at once; the same call until it is through."""
    store = world.s3_store()
    noted: list[Stored] = []
    put = store.put

    def noted_put(key, data):
        noted.append(put(key, data))
        return noted[-1]

    store.put = noted_put
    mix = Mix(seed, {kind: rate * (1 + seed % 3) / 2 for kind, rate in TOGETHER.items()})
    pauses, s3_store.PAUSES = s3_store.PAUSES, (0.02, 0.1, 0.3)
    try:
        undisturbed = world.baseline("network", lambda: through(world.s3_store(), seed, world))
        first_request, started, refused = len(world.proxy.requests), time.monotonic(), 0
        with world.broken_network(mix):
            while True:
                s3_store.make_client.cache_clear()  # the same command again is a new process
                try:
                    pulled, digest = through(store, seed, world)
                    break
                except Unavailable as error:
                    clear_refusal(error)
                    refused += 1
                    assert refused < 20, "the same command does not get there"
    finally:
        s3_store.PAUSES = pauses
    seconds = max(0.0, time.monotonic() - started - undisturbed)
    assert pulled == digest
    nothing_lost(store, noted)
    assert set(verified_versions(store)) == {"chat/versions/1.json", "chat/latest.json"}
    faults = mix.done.total()
    return Shown(
        kind="network",
        seed=seed,
        injected=faults,
        recovered=faults - refused,
        resumed=refused,
        seconds=(seconds / max(1, faults),) * faults,
        requests=len(world.proxy.requests) - first_request,
    )


def through(store: Store, seed: int, world: World) -> tuple[str, str]:
    """Everything that a release goes through; digests of what was pulled and of what was to be published."""
    files = model(store, seed)
    publish(store, "chat", "auto", files, {"REPORT.json": b"{}"}, f"run-{seed}")
    return pull(store, "chat", "1", world.fresh() / "release").digest, model_digest(files)


def disk_full(seed: int, world: World) -> Shown:
    """Publishing to a directory on a disk with a seeded little room; then the operator makes room."""
    draw = random.Random(seed)
    with SmallDisk(world.fresh() / "disk", 2 << 20) as disk:
        store = open_store(str(disk.path / "store"))
        noted: list[Stored] = []
        put = store.put

        def noted_put(key, data):
            noted.append(put(key, data))
            return noted[-1]

        store.put = noted_put
        disk.leave(draw.randrange(1 << 12, 1 << 18, 1 << 12))
        injected = 0

        def attempt() -> str:
            files = model(store, seed)
            big = draw.randbytes(40_000)
            done = publish(store, "chat", "auto", files, {"REPORT.json": b"{}", "REPORT.html": big}, "run-1")
            assert done.digest == model_digest(files)
            return done.digest

        try:
            digest = attempt()
        except Unavailable as error:
            injected = 1
            clear_refusal(error, "No space left")
            nothing_lost(store, noted)
            seen = verified_versions(store)
            assert not [key for key in store.keys("") if ".tmp-" in key]
            disk.make_room()
            started = time.monotonic()
            digest = attempt()
            seconds = (time.monotonic() - started,)
            now = verified_versions(store)
            assert all(now[key] == pointer for key, pointer in seen.items())
            assert {one.digest for one in now.values()} == {digest}
            nothing_lost(store, noted)
            return Shown(kind="disk", seed=seed, injected=injected, resumed=injected, seconds=seconds)
        return Shown(kind="disk", seed=seed, injected=0)
