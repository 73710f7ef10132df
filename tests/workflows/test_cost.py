"""Money per token, apart for what is read and what is written."""

import pytest

from workflows.evaluation.cost import Throughput, Traffic, cost


def test_prompt_and_output_prices_make_up_the_mix():
    dense, compressed = Throughput(prefill=1000, decode=10), Throughput(prefill=2000, decode=10)
    traffic = Traffic(requests_per_day=1000, prompt_tokens=500, output_tokens=100)
    found = cost(dense, compressed, traffic, 3.6, "somewhere", 1000, 2, "a shape")
    assert found.dense_prompt_per_million == pytest.approx(1.0)  # 1000 s at a tenth of a cent
    assert found.compressed_prompt_per_million == pytest.approx(0.5)
    assert found.dense_output_per_million == found.compressed_output_per_million == pytest.approx(100.0)
    mix = (500 * found.compressed_prompt_per_million + 100 * found.compressed_output_per_million) / 600
    assert found.compressed_per_million == pytest.approx(mix)


def test_a_slower_model_never_pays_back():
    dense, compressed = Throughput(prefill=1000, decode=10), Throughput(prefill=900, decode=10)
    assert cost(dense, compressed, Traffic(), 3.6, "x", 1, 1, "y").months_to_pay_back is None
