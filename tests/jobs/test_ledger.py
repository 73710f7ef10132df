"""The ledger: rows made of runs' records alone, read by partition, and sums that equal those records."""

import csv
import io
from datetime import UTC, datetime, timedelta

import pyarrow.dataset as ds
import pytest
import yaml

from cluster.errors import Cancelled, InputError
from cluster.hardware.profiles import load_profile
from cluster.storage import open_store
from jobs.closing import close
from jobs.estimating import STEP_SECONDS, let_in, operations, usage_from_size
from jobs.job import dump_job, parse_job
from jobs.ledger import committed, open_account, read_ledger, rebuild, write_row
from jobs.ledger_row import shape_digest
from jobs.pricing import Account
from jobs.records import Ended, Figures, Progress, Started, Usage, claim, list_runs, note_end, note_progress, read_run
from jobs.running import AttemptLog
from jobs.usage import as_csv, as_html, sums, total
from workflows.events import StepEnded, StepStarted
from workflows.memory import worker_memory

NOW = datetime.now(UTC)
MONTH = f"{NOW:%Y-%m}"
TWO_CORES = Account(business_unit="Retail", hardware="cpu-local", cores=2, gpus=0, usd_per_hour=3600.0)
CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 259,
}  # fmt: skip


def job(store, name="chat", tenant="retail", **changes):
    content = {
        "name": name,
        "tenant": tenant,
        "model": "s3://in-house/chat",
        "target": {"pattern": "2:4", "sparsity": 0.5},
        "publish": {"to": store.uri},
    } | changes
    return parse_job(yaml.safe_dump(content), "job.yaml")


def claimed(store, one, account=TWO_CORES) -> Started:
    started = claim(store, one.run, one.tenant, one.name, "ann@host", "embedded", dump_job(one))
    open_account(store, one, started, {"KARIKOMI_ACCOUNT": account.model_dump_json()})
    return started


def finish(store, started, seconds, **changes):
    usage = Usage(seconds=seconds, cpu_seconds=2 * seconds)
    ended = {"at": NOW, "code": 0, "result": "done", "sentence": "fine", "usage": usage}
    note_end(store, started, Ended(**ended | changes))
    return write_row(store, started.run)


def record_steps(store, run):
    """As the journal writes them, cut short."""
    block = {"key": f"runs/{run}/blocks/0.safetensors", "sha256": "0" * 64, "size": 100}
    windows = {"key": f"runs/{run}/data/w.parquet", "sha256": "1" * 64, "size": 11}
    steps = {
        "a": {"step": "windows", "inputs": {"source": "old"}, "result": {"stored": windows}, "ended": "2026-01-01"},
        "b": {"step": "windows", "inputs": {"source": "new"}, "result": {"stored": windows}, "ended": "2026-01-02"},
        "c": {"step": "prune", "inputs": {}, "result": {"blocks": [block, block]}, "ended": "2026-01-03"},
        "d": {"step": "format", "inputs": {}, "result": {"files": {"m": block}}, "ended": "2026-01-04"},
    }
    for key, step in steps.items():
        store.put_json(f"runs/{run}/steps/{key}.json", step | {"key": key})


def test_a_row_is_made_of_the_runs_records(store):
    one = job(store)
    started = claimed(store, one)
    record_steps(store, one.run)
    figures = Figures(stages=1, sparsity=0.5, perplexity_increase=0.02, worst_slice_increase=0.05)
    finish(store, started, 10, release="chat@1", digest="d" * 64, figures=figures)
    (row,) = read_ledger(store, MONTH, "retail").to_pylist()
    expected = {
        "tenant": "retail", "month": MONTH, "business_unit": "Retail", "run": one.run, "name": "chat",
        "model": "s3://in-house/chat", "source_digest": "new", "model_digest": "d" * 64, "release": "chat@1",
        "pattern": "2:4", "sparsity": 0.5, "stages": 1, "perplexity_increase": 0.02, "worst_slice_increase": 0.05,
        "attempts": 1, "state": "done", "seconds": 10.0, "cpu_seconds": 20.0, "gpu_seconds": 0.0,
        "stored_bytes": 111, "usd": 10.0,
    }  # fmt: skip
    assert {name: row[name] for name in expected} == expected
    assert row["ended"] == NOW.replace(microsecond=NOW.microsecond // 1000 * 1000)


def test_writing_twice_changes_nothing_and_rebuilding_makes_the_same(store):
    finish(store, claimed(store, job(store)), 3)
    key = f"ledger/tenant=retail/month={MONTH}/{job(store).run}.parquet"
    first = store.get(key)
    write_row(store, job(store).run)
    assert store.get(key) == first
    store.delete(key)
    assert rebuild(store, pytest.fail) == 1
    assert store.get(key) == first
    assert [key] == list(store.keys("ledger/"))


def test_an_attempt_is_closed_once_and_its_row_is_made_up_for(store):
    """Who records the end first may die before the row is written; the next one writes it, by the first one's word."""
    one = job(store)
    started = claimed(store, one)
    lost, done = (Ended(at=NOW, code=code, result=what, sentence=what) for code, what in ((75, "lost"), (0, "done")))
    assert note_end(store, started, lost)
    key = f"ledger/tenant=retail/month={MONTH}/{one.run}.parquet"
    store.delete(key)
    assert not close(store, started, done)
    assert read_run(store, one.run).last.ended == lost
    assert [row["state"] for row in read_ledger(store, MONTH).to_pylist()] == ["lost"]
    again = claimed(store, one)
    assert close(store, again, done)
    assert [row["state"] for row in read_ledger(store, MONTH).to_pylist()] == ["done"]


def test_a_row_is_of_the_month_of_its_first_attempt(store):
    one = job(store)
    first = Started(
        run=one.run, number=1, tenant="retail", name="chat", by="ann", cluster="embedded",
        at=datetime(2026, 1, 31, 23, 59, tzinfo=UTC),
    )  # fmt: skip
    store.put(f"runs/{one.run}/job.yaml", dump_job(one))
    store.put(f"runs/{one.run}/attempts/1/started.json", first.model_dump_json().encode())
    finish(store, first, 5, code=75, result="lost")
    finish(store, claimed(store, one), 7)
    assert read_ledger(store, MONTH).num_rows == 0
    (row,) = read_ledger(store, "2026-01").to_pylist()
    assert (row["attempts"], row["seconds"], row["state"]) == (2, 12.0, "done")


def test_a_killed_attempt_counts_by_its_last_heartbeat(store):
    started = claimed(store, job(store))
    note_progress(store, started, Progress(at=NOW, usage=Usage(seconds=4, cpu_seconds=8)))
    (row,) = read_ledger(store, MONTH, now=NOW + timedelta(seconds=61)).to_pylist()
    assert (row["state"], row["cpu_seconds"], row["usd"]) == ("lost", 8.0, 4.0)
    finish(store, claimed(store, job(store)), 10)
    (row,) = read_ledger(store, MONTH).to_pylist()
    assert (row["state"], row["attempts"], row["cpu_seconds"], row["usd"]) == ("done", 2, 28.0, 14.0)


def test_a_later_price_changes_no_attempt_that_was(store):
    one = job(store)
    finish(store, claimed(store, one), 10, code=75, result="lost")
    dearer = TWO_CORES.model_copy(update={"usd_per_hour": 7200.0})
    finish(store, claimed(store, one, dearer), 10)
    (row,) = read_ledger(store, MONTH).to_pylist()
    assert row["usd"] == 10 + 20
    started = read_run(store, one.run).attempts[0].started
    open_account(store, one, started, {"KARIKOMI_ACCOUNT": dearer.model_dump_json()})
    assert read_ledger(store, MONTH).to_pylist()[0]["usd"] == 30, "an account is opened once"


@pytest.mark.parametrize(
    ("usage", "dollars"),
    [
        (Usage(cpu_seconds=8), 1.0),
        (Usage(gpu_seconds=4), 2.0),
        (Usage(cpu_seconds=8, gpu_seconds=4), 2.0),
        (Usage(seconds=99), 0.0),
    ],
)
def test_a_machine_is_paid_for_by_its_scarcest_part(usage, dollars):
    machine = Account(business_unit="", hardware="h", cores=8, gpus=2, usd_per_hour=3600)
    assert machine.dollars(usage) == dollars


def many(store):
    """Runs of two tenants in several states."""
    for tenant in ("retail", "finance"):
        for number in range(3):
            one = job(store, name=f"run-{number}", tenant=tenant, model=f"s3://in-house/{number % 2}")
            started = claimed(store, one)
            if number < 2:
                finish(store, started, 1.1 * (number + 1), release=f"run-{number}@1" if number else "")
            else:
                note_progress(store, started, Progress(at=NOW, usage=Usage(seconds=0.3, cpu_seconds=0.7)))


@pytest.mark.parametrize("by", ["tenant", "model", "business-unit", "run"])
def test_sums_equal_the_runs_own_records(store, by):
    many(store)
    used = sums(read_ledger(store, MONTH), by)
    runs = list(list_runs(store, pytest.fail))
    whole = total(used)
    assert whole.runs == len(runs) == 6
    assert whole.published == 2
    for name in ("seconds", "cpu_seconds", "gpu_seconds"):
        assert getattr(whole, name) == pytest.approx(sum(getattr(one.usage, name) for one in runs), rel=1e-12)
    assert whole.usd == pytest.approx(sum(one.usage.cpu_seconds / 2 for one in runs), rel=1e-12)
    assert len(used) == {"tenant": 2, "model": 2, "business-unit": 1, "run": 6}[by]
    if by == "tenant":
        for one in used:
            theirs = [run for run in runs if run.last.started.tenant == one.who]
            assert one.cpu_seconds == pytest.approx(sum(run.usage.cpu_seconds for run in theirs), rel=1e-12)


def test_any_tool_that_knows_hive_partitions_reads_it_and_skips_the_others(tmp_path):
    store = open_store(str(tmp_path))
    many(store)
    everything = ds.dataset(str(tmp_path / "ledger"), partitioning="hive", format="parquet")
    wanted = (ds.field("tenant") == "retail") & (ds.field("month") == MONTH)
    assert len(list(everything.get_fragments(filter=wanted))) == 3
    rows = {row["run"]: row for row in everything.to_table(filter=wanted).to_pylist()}
    ours = {row["run"]: row for row in read_ledger(store, MONTH, "retail").to_pylist()}
    assert rows.keys() == ours.keys()
    for run, row in rows.items():
        assert (row["tenant"], row["month"]) == ("retail", MONTH)
        assert row == ours[run] or ours[run]["state"] != "done", "only of unfinished runs more is known by now"


def test_reading_touches_no_other_partition(tmp_path):
    store = open_store(str(tmp_path))
    many(store)
    store.put(f"ledger/tenant=finance/month={MONTH}/broken.parquet", b"PAR1 not")
    store.put("ledger/tenant=retail/month=2020-01/broken.parquet", b"")
    assert read_ledger(store, MONTH, "retail").num_rows == 3
    with pytest.raises(InputError, match=r"tenant=finance/.*broken\.parquet is no row") as refused:
        read_ledger(store, MONTH)
    assert "usage --rebuild" in refused.value.hint


def test_what_is_committed_counts_estimates_of_runs_on_their_way(store):
    promised = TWO_CORES.model_copy(update={"estimated_usd": 50.0})
    waiting, done = job(store, name="waiting"), job(store, name="done")
    claimed(store, waiting, promised)
    finish(store, claimed(store, done, promised), 10)
    assert committed(store, "retail", MONTH, besides="") == (60.0, 0.0)
    assert committed(store, "retail", MONTH, besides=done.run) == (60.0, 10.0)
    assert committed(store, "retail", MONTH, besides=waiting.run) == (10.0, 0.0)
    assert committed(store, "finance", MONTH, besides="") == (0.0, 0.0)


def test_a_run_is_estimated_as_its_like_took_and_refused_when_that_is_too_much(tmp_path):
    store = open_store(str(tmp_path / "store"))
    one = job(store, model=str(tmp_path))
    _, first = let_in(one, CONFIG, "ann")
    assert "no run of the same model and shape" in first.basis
    finish(store, claimed(store, one), 1000, figures=None)
    again = one.model_copy(update={"seed": 1})
    _, second = let_in(again, CONFIG, "ann")
    assert one.run in second.basis
    assert second.usage.cpu_seconds == 2000
    assert second.usd == pytest.approx(2000 / 2 * 0.1008 / 3600), "at today's price, not that of the run"
    rules = {"members": ["*"], "prefixes": [str(tmp_path)], "monthly_budget_usd": 1000.02}
    (tmp_path / "tenants.yaml").write_text(yaml.safe_dump({"tenants": {"retail": rules}}))
    with pytest.raises(InputError, match=r"\$1,000\.00 of \$1,000\.02 is spent .* estimated at \$0\.0280"):
        let_in(again, CONFIG, "ann", str(tmp_path / "tenants.yaml"))
    admission, _ = let_in(one, CONFIG, "ann", str(tmp_path / "tenants.yaml"))
    assert "$0.0200 left" in " ".join(admission.sentences), "what the run cost already is not asked for again"


def test_an_attempt_writes_its_row_when_it_begins_and_when_it_ends(tmp_path):
    store = open_store(str(tmp_path))
    one = job(store)

    def work(attempt):
        with attempt.alive():
            attempt(StepEnded("windows", 0, 1.0, resumed=False))
            assert read_ledger(store, MONTH)["state"].to_pylist() == ["running"]
            attempt(StepStarted("prune", 1))
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        work(AttemptLog(one, store, None))
    (row,) = read_ledger(store, MONTH).to_pylist()
    assert row["state"] == "cancelled"
    assert row["cpu_seconds"] == read_run(store, one.run).usage.cpu_seconds > 0
    account = Account.model_validate_json(store.get(f"runs/{one.run}/attempts/1/account.json"))
    assert (account.hardware, account.business_unit, account.usd_per_hour) == ("cpu-local", "retail", 0.1008)


def test_csv_and_html_are_safe_to_open(store):
    evil = '=cmd|"/c calc"!A1<script>'
    finish(store, claimed(store, job(store, model=evil)), 3600)
    used = sums(read_ledger(store, MONTH), "model")
    (row,) = csv.DictReader(io.StringIO(as_csv(used, "model", MONTH)))
    assert row["model"] == f"'{evil}"
    assert (float(row["usd"]), row["month"]) == (3600.0, MONTH)
    page = as_html(used, "model", MONTH, store.uri)
    assert "<script>" not in page
    assert "$3,600.00" in page
    assert "http" not in page.replace(store.uri, "")


def test_the_command(karikomi, tmp_path):
    store = open_store(str(tmp_path))
    many(store)
    assert "finance" in karikomi("usage", "--from", tmp_path).stdout
    store.delete(next(store.keys("ledger/")))
    rebuilt = karikomi("usage", "--from", tmp_path, "--rebuild", "--format", "csv", "--by", "run", "--month", MONTH)
    assert (rebuilt.returncode, len(rebuilt.stdout.splitlines())) == (0, 7), rebuilt.stderr
    wrong = karikomi("usage", "--from", tmp_path, "--month", "November")
    assert (wrong.returncode, "--month" in wrong.stderr) == (2, True)


@pytest.mark.parametrize(("policy", "more"), [("uniform", True), ("owl", True), ("composite", False)])
def test_weighed_tokens_cost_a_gradient_pass_unless_there_is_one_already(store, policy, more):
    fields = {"target": {"pattern": "unstructured", "sparsity": 0.5}, "allocation": policy}
    plain, weighed = (job(store, **fields, token_weights=kind) for kind in ("equal", "gradient"))
    profile = load_profile(plain.hardware)
    seconds = [usage_from_size(one, CONFIG, profile).seconds for one in (plain, weighed)]
    kept = [worker_memory(CONFIG, one.recipe, one.cluster).boundaries for one in (plain, weighed)]
    assert (seconds[1] - seconds[0] >= STEP_SECONDS) == more
    assert (operations(weighed.recipe, CONFIG) > operations(plain.recipe, CONFIG)) == more
    assert kept[1] > 0
    assert (kept[0] == 0) == more
    assert shape_digest(plain) != shape_digest(weighed)
