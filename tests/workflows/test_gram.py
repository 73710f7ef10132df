"""Grams and their damped inverses, against double precision."""

import os
import subprocess
import sys

import pytest
import torch
from structlog.testing import capture_logs

from cluster.freed import ALLOCATOR
from workflows.scoring import gram as grams
from workflows.scoring.gram import (
    NARROWEST,
    add_inputs,
    damped,
    factor_of,
    fold,
    full_precision,
    inverse,
    mirror,
    unfold,
)


def some_gram(width: int = 24, tokens: int = 200, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    gram = torch.zeros(width, width)
    add_inputs(gram, torch.randn(tokens, width, generator=generator) @ mixing)
    return mirror(gram)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_add_up_over_calls_and_leading_dimensions(dtype: torch.dtype) -> None:
    inputs = torch.randn(3, 2, 7, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    gram = torch.zeros(5, 5)
    storage = gram.data_ptr()
    for part in inputs:
        add_inputs(gram, part)
    tokens = inputs.double().reshape(-1, 5)
    torch.testing.assert_close(mirror(gram), (tokens.T @ tokens).float())
    assert gram.dtype == torch.float32
    assert gram.data_ptr() == storage


@pytest.mark.parametrize("width", [NARROWEST - 1, 2 * NARROWEST + 3, 9 * NARROWEST])
def test_strips_make_up_the_whole_whatever_was_below_the_diagonal(width: int) -> None:
    inputs = torch.randn(2, 20, width, generator=torch.Generator().manual_seed(1))
    gram = torch.zeros(width, width)
    gram += torch.full_like(gram, 7).tril(-1)
    for part in inputs:
        add_inputs(gram, part)
    tokens = inputs.double().reshape(-1, width)
    torch.testing.assert_close(mirror(gram), (tokens.T @ tokens).float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(gram, gram.mT)


@pytest.mark.parametrize("width", [1, 2, 3, 6, 2 * NARROWEST + 4, 9 * NARROWEST])
def test_folded_grams_are_half_as_large_add_up_and_unfold_to_the_whole(width: int) -> None:
    inputs = torch.randn(2, 20, width, generator=torch.Generator().manual_seed(1))
    first, second = torch.full((2, width, width), 7.0).tril(-1)
    for gram, part in zip((first, second), inputs, strict=True):
        add_inputs(gram, part)
    expected = mirror(first.clone()) + mirror(second.clone())
    storage = first.data_ptr()
    folded = fold(first)
    assert folded.data_ptr() == storage
    assert folded.is_contiguous()
    assert folded.shape == ((width, width) if width % 2 else (width // 2 + 1, width))
    folded += fold(second)
    assert torch.equal(unfold(folded), expected)


def test_no_tokens_add_nothing() -> None:
    gram = some_gram(4)
    before = gram.clone()
    add_inputs(gram, torch.empty(0, 4))
    assert torch.equal(gram, before)


def test_damping_is_a_share_of_the_mean_diagonal_and_leaves_the_gram_alone() -> None:
    gram = some_gram()
    before = gram.clone()
    expected = gram + 0.05 * gram.diagonal().mean() * torch.eye(len(gram))
    torch.testing.assert_close(damped(gram, 0.05), expected)
    assert torch.equal(gram, before)


def test_dead_inputs_stand_alone_with_one_on_the_diagonal() -> None:
    gram = some_gram()
    gram[[3, 9], :] = 0
    gram[:, [3, 9]] = 0
    for dead in (3, 9):
        alone = torch.eye(len(gram))[dead]
        assert torch.equal(damped(gram, 0.01)[dead], alone)
        for result in (inverse(gram, 0.01), factor_of(gram, 0.01)):
            assert torch.equal(result[dead], alone)
            assert torch.equal(result[:, dead], alone)


def test_all_inputs_dead_gives_a_usable_factor() -> None:
    assert torch.equal(factor_of(torch.zeros(3, 3), 0.01), torch.eye(3))


@pytest.mark.parametrize("width", [1, 2, 24, 130])
def test_inverse_and_factor_agree_with_double_precision(width: int) -> None:
    gram = some_gram(width, tokens=3 * width)
    expected = torch.linalg.inv(damped(gram, 0.01).double())
    factor = factor_of(gram, 0.01)
    scale = float(expected.abs().max())
    torch.testing.assert_close(inverse(gram, 0.01).double(), expected, rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(factor.T @ factor, damped(gram, 0.01), rtol=1e-5, atol=1e-5 * float(gram.max()))
    assert torch.equal(factor, factor.tril())
    assert (factor.diagonal() > 0).all()


@pytest.mark.parametrize("width", [1, 7, 130, 2 * grams.STRIP + 52])
def test_the_factor_made_in_place_has_the_bits_of_the_plain_way(width: int) -> None:
    gram = some_gram(width, tokens=2 * width)
    gram[width // 2] = gram[:, width // 2] = 0
    before = gram.clone()
    plain = torch.linalg.cholesky(damped(gram, 0.01).flip(0, 1)).flip(0, 1).T
    factor = factor_of(gram, 0.01)
    assert torch.equal(factor, plain)
    assert factor.is_contiguous()
    assert torch.equal(gram, before)


def test_beside_the_gram_a_factor_costs_one_matrix() -> None:
    width = 4 * grams.STRIP
    environment = os.environ | ALLOCATOR | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(width)], env=environment, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 1.8  # the matrix and some strips, here of a quarter of it; never two whole ones


PEAK = """
import sys, threading, torch
from workflows.scoring.gram import factor_of

def pages():
    return int(open("/proc/self/statm").read().split()[1])

def look():
    global peak
    while not over.wait(0.001):
        peak = max(peak, pages() - before)

torch.set_num_threads(1)
factor_of(torch.eye(64), 0.01)
width = int(sys.argv[1])
gram = torch.eye(width) + 1
before, peak, over = pages(), 0, threading.Event()
looker = threading.Thread(target=look)
looker.start()
factor_of(gram, 0.01)
over.set()
looker.join()
print(peak * 4096 / (4 * width ** 2))
"""


def test_fewer_tokens_than_inputs_is_fine_with_damping() -> None:
    gram = some_gram(40, tokens=5)
    with capture_logs() as logs:
        factor = factor_of(gram, 0.01)
    assert not logs
    assert torch.isfinite(factor).all()


@pytest.mark.parametrize("solve", [inverse, factor_of])
def test_failed_cholesky_raises_damping_tenfold_with_a_warning(solve) -> None:  # type: ignore[no-untyped-def]
    # Eigenvalues 3 and -1, mean diagonal 1: positive definite from λ > 1, so 0.02 and 0.2 fail, 2 does not.
    gram = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    with capture_logs() as logs:
        found = solve(gram, 0.02)
    assert [(log["log_level"], round(log["failed"], 6)) for log in logs] == [
        ("warning", 0.02),
        ("warning", 0.2),
    ]
    expected = damped(gram, 2.0)
    if solve is factor_of:
        torch.testing.assert_close(found.T @ found, expected)
    else:
        torch.testing.assert_close(found, torch.linalg.inv(expected))


@pytest.mark.parametrize("solve", [inverse, factor_of])
def test_hopeless_gram_is_an_error_and_never_an_identity(solve) -> None:  # type: ignore[no-untyped-def]
    with capture_logs() as logs, pytest.raises(ValueError, match=r"not positive definite.*solver\.damping"):
        solve(torch.tensor([[1.0, 1e9], [1e9, 1.0]]), 0.01)
    assert len(logs) == grams.DAMPING_TRIES


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_overflowed_inputs_are_an_error(value: float) -> None:
    gram = some_gram()
    gram[2, 2] = value
    with pytest.raises(ValueError, match="negative or not finite"):
        factor_of(gram, 0.01)


def test_full_precision_is_set_inside_and_restored_after() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
def test_gram_and_factor_on_a_gpu_are_full_fp32_even_when_tf32_is_on() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        inputs = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
        gram = torch.zeros(256, 256, device="cuda")
        add_inputs(gram, inputs.cuda())
        expected = inputs.double().T @ inputs.double()
        mirror(gram)
        torch.testing.assert_close(gram.cpu().double(), expected, rtol=1e-5, atol=1e-3)
        factor = factor_of(gram, 0.01)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(factor.cpu(), factor_of(gram.cpu(), 0.01), rtol=1e-4, atol=1e-6)
