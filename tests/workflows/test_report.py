"""The report says what was measured and claims nothing else."""

import pytest
from reports_for_tests import HOSTILE, make_report, timing

from workflows.reports.documents import documents
from workflows.reports.page import payback
from workflows.reports.report import Report
from workflows.reports.summary import comparison, faster, verdict


def test_the_verdict_states_size_speed_with_interval_and_quality():
    sentence = verdict(make_report())
    assert sentence.startswith("chat: 20.0% fewer parameters, prefill 1.20 times as fast (1.20 to 1.20)")
    assert "decode not measurably faster" in sentence
    assert "perplexity 4.9% lower than the dense model's" in sentence


def test_no_speed_is_claimed_that_was_not_measured():
    assert faster(timing("prefill", 1.0, noise=0.1)).startswith("not measurably faster")
    assert faster(timing("prefill", 0.8)).startswith("slower: 0.80 times as fast")


def test_a_rollback_is_told():
    sentence = verdict(make_report(stages=2))
    assert "Stage 2 of 2 missed its gate (perplexity rose 171.8 % (limit +10 %)" in sentence
    assert "stage 1 is published instead" in sentence


def test_zeros_are_not_called_smaller():
    assert "as many parameters, 50% of the pruned matrices are zero" in verdict(make_report(zeros=300))


def test_the_table_has_both_models_side_by_side():
    rows = {row.label.strip(): row for row in comparison(make_report())}
    assert rows["parameters"][1:] == ("1,000", "800", "-20.0%")
    assert rows["peak memory, MiB"][1:] == ("1,024", "512", "-50.0%")
    assert f"slice {HOSTILE}" in rows


@pytest.mark.parametrize("stages", [1, 2])
def test_all_documents_are_made_and_the_page_escapes_what_users_wrote(stages):
    made = documents(make_report(stages=stages))
    assert set(made) == {"REPORT.json", "REPORT.parquet", "REPORT.html"}
    page = made["REPORT.html"].decode()
    assert HOSTILE not in page
    assert "&lt;script&gt;" in page
    assert "<svg" in page
    assert 'src="' not in page
    assert Report.model_validate_json(made["REPORT.json"]) == make_report(stages=stages)


def test_no_pay_back_is_promised_from_noise():
    measured = make_report(prefill=1.2)
    assert payback(measured) == "within a day"
    assert payback(make_report(prefill=0.8)) == "never: nothing is saved"
    noise = measured.measured.model_copy(update={"timings": (timing("prefill", 1.0, 0.1), timing("decode", 1.0, 0.1))})
    assert payback(measured.model_copy(update={"measured": noise})).startswith("cannot be told")


def test_a_stage_beyond_all_numbers_still_makes_a_page():
    made = documents(make_report(stages=2, bad_loss=800.0))
    assert "broken" in made["REPORT.html"].decode()
    assert b"NaN" not in made["REPORT.json"]


def test_the_page_tells_increase_with_interval_and_both_token_prices():
    page = documents(make_report())["REPORT.html"].decode()
    assert "-4.9 % (" in page
    assert "a million prompt tokens" in page
    assert "median of the ratios of 10 rounds" in page
    assert 'role="img" aria-label="' in page
