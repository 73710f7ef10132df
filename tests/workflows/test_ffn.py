"""Structured removal against the optimum recomputed from scratch, in double precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from workflows.pruning.ffn import keep_count, remove_channels
from workflows.scoring.gram import add_inputs, damped, mirror

DAMPING = 0.01


def problem(out: int, channels: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator) / channels**0.5 + torch.eye(channels)
    gram = torch.zeros(channels, channels)
    add_inputs(gram, torch.randn(4 * channels, channels, generator=generator) @ mixing)
    return torch.randn(out, channels, generator=generator), mirror(gram)


def optimum(down: torch.Tensor, hessian: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Least-squares projection that uses only the kept channels: W H_:K (H_KK)⁻¹."""
    return torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ down.T).T


def squared_error(change: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(((change @ hessian) * change).sum())


def naive_removal(down: torch.Tensor, hessian: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One channel at a time; weights and inverse of what is left are recomputed from scratch each time."""
    kept = torch.arange(down.shape[1])
    while len(kept) > keep:
        weight = optimum(down, hessian, kept)
        inverse = torch.linalg.inv(hessian[kept][:, kept])
        cheapest = (weight.square().sum(0) / inverse.diagonal()).argmin()
        kept = torch.cat([kept[:cheapest], kept[cheapest + 1 :]])
    return kept, optimum(down, hessian, kept)


@pytest.mark.parametrize(("out", "channels", "keep"), [(6, 40, 25), (16, 64, 8), (3, 10, 1), (4, 12, 12)])
@pytest.mark.parametrize("seed", range(3))
def test_one_by_one_removal_is_the_naive_optimum(out: int, channels: int, keep: int, seed: int) -> None:
    down, gram = problem(out, channels, seed)
    expected_kept, expected = naive_removal(down.double(), damped(gram, DAMPING).double(), keep)
    kept, repaired = remove_channels(down, gram, keep, DAMPING, batch=1)
    assert torch.equal(kept, expected_kept)
    torch.testing.assert_close(repaired.double(), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 48), st.integers(1, 20), st.data())
def test_any_batch_keeps_exactly_as_many_and_repairs_them_optimally(
    seed: int, channels: int, batch: int, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(1, channels))
    down, gram = problem(5, channels, seed)
    kept, repaired = remove_channels(down, gram, keep, DAMPING, batch)
    assert kept.dtype == torch.int64
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert repaired.shape == (5, keep)
    expected = optimum(down.double(), damped(gram, DAMPING).double(), kept)
    torch.testing.assert_close(repaired.double(), expected, rtol=1e-3, atol=1e-3)


def test_choice_and_repair_beat_magnitude_and_cutting_off() -> None:
    down, gram = problem(24, 96)
    hessian = damped(gram, DAMPING).double()

    def error(kept: torch.Tensor, columns: torch.Tensor) -> float:
        full = torch.zeros(24, 96, dtype=torch.double)
        full[:, kept] = columns.double()
        return squared_error(full - down, hessian)

    kept, repaired = remove_channels(down, gram, 64, DAMPING)
    by_norm = down.norm(dim=0).topk(64).indices.sort().values
    assert error(kept, repaired) < error(kept, down[:, kept])
    assert error(kept, repaired) < error(by_norm, optimum(down.double(), hessian, by_norm))


def test_inputs_are_left_alone_and_results_are_the_same_bits_each_time() -> None:
    down, gram = problem(8, 50)
    before = down.clone(), gram.clone()
    first = remove_channels(down, gram, 30, DAMPING)
    second = remove_channels(down, gram, 30, DAMPING)
    assert torch.equal(down, before[0])
    assert torch.equal(gram, before[1])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_channels_that_were_never_active_go_first_and_change_nothing() -> None:
    down, gram = problem(6, 30)
    dead = [2, 11, 29]
    gram[dead, :] = 0
    gram[:, dead] = 0
    down[:, dead] = 100
    kept, repaired = remove_channels(down, gram, 27, DAMPING, batch=2)
    assert not set(dead) & set(kept.tolist())
    assert torch.equal(repaired, down[:, kept])


def test_a_copy_of_a_channel_goes_and_its_twin_takes_over() -> None:
    down, gram = problem(6, 20)
    source = torch.arange(21)
    source[20] = 4  # channel 20 repeats channel 4
    gram, down = gram[source][:, source], down[:, source]
    kept, repaired = remove_channels(down, gram, 20, 1e-4, batch=1)
    assert len({4, 20} & set(kept.tolist())) == 1
    expected = down.clone()
    expected[:, 4] += down[:, 20]
    twin = 4 if 4 in kept else 20
    torch.testing.assert_close(repaired[:, kept == twin], expected[:, [4]], rtol=1e-2, atol=1e-2)


def test_a_gram_too_close_to_singular_gets_more_damping() -> None:
    down, _ = problem(4, 32)
    gram = torch.ones(32, 32)
    with capture_logs() as logs:
        kept, repaired = remove_channels(down, gram, 16, 1e-9)
    assert logs
    assert len(kept) == 16
    # All channels carry one and the same signal: what matters is that its total weight stays.
    torch.testing.assert_close(repaired.sum(1), down.sum(1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("keep", [0, -1, 11])
def test_impossible_counts_are_an_error(keep: int) -> None:
    down, gram = problem(2, 10)
    with pytest.raises(ValueError, match=f"cannot keep {keep} of 10 channels"):
        remove_channels(down, gram, keep, DAMPING)


@pytest.mark.parametrize(
    ("channels", "sparsity", "kept"), [(2048, 0.25, 1536), (2048, 0.15, 1741), (1000, 0.9985, 1), (8, 0.5, 4)]
)
def test_share_becomes_whole_channels(channels: int, sparsity: float, kept: int) -> None:
    assert keep_count(channels, sparsity) == kept


@pytest.mark.parametrize(
    ("channels", "sparsity", "nearest"), [(10, 0.25, "0.3"), (2048, 0.9999, "0.999512"), (1, 0.5, "0")]
)
def test_share_that_whole_channels_cannot_meet_names_the_nearest(channels: int, sparsity: float, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"of {channels}; the nearest that can is {nearest}$"):
        keep_count(channels, sparsity)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40_000), st.floats(0.001, 0.999))
def test_share_is_met_within_a_tenth_of_a_point_or_refused(channels: int, sparsity: float) -> None:
    try:
        kept = keep_count(channels, sparsity)
    except ValueError:
        assert channels < 1000
    else:
        assert 1 <= kept <= channels
        assert abs(1 - kept / channels - sparsity) <= 0.001 + 1e-9


@pytest.mark.gpu
def test_removal_on_a_gpu_is_the_naive_optimum() -> None:
    down, gram = problem(16, 64)
    expected_kept, expected = naive_removal(down.double(), damped(gram, DAMPING).double(), 40)
    kept, repaired = remove_channels(down.cuda(), gram.cuda(), 40, DAMPING, batch=1)
    assert torch.equal(kept.cpu(), expected_kept)
    torch.testing.assert_close(repaired.cpu().double(), expected, rtol=1e-4, atol=1e-5)
