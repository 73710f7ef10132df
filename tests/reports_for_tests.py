"""Reports of runs that never were, with numbers that are easy to reckon with."""

from workflows.evaluation.cost import Throughput, Traffic, cost
from workflows.evaluation.gates import judge
from workflows.evaluation.latency import Footprint, PairedTiming, Shape, Timing
from workflows.evaluation.quality import Quality, WindowScore
from workflows.recipe import Gates
from workflows.reports.report import Measured, Report, Size, StageHistory

HOSTILE = "<script>alert(1)</script>"


def quality(loss: float) -> Quality:
    return Quality(
        windows=tuple(
            WindowScore(slice=name, tokens=100, loss=100 * loss + spread, right=40)
            for name in ("chat", HOSTILE)
            for spread in (-5, 0, 5)
        )
    )


def timing(phase: str, ratio: float, noise: float = 0.001) -> PairedTiming:
    rounds = [1 + noise * (-1) ** i for i in range(10)]
    dense = Timing(seconds=tuple(ratio * one for one in rounds), tokens=100)
    compressed = Timing(seconds=(1.0,) * 10, tokens=100)
    return PairedTiming(phase=phase, shape=Shape(batch=1, prompt=100, new_tokens=8), dense=dense, compressed=compressed)


def make_report(prefill: float = 1.2, stages: int = 1, zeros: int = 0, bad_loss: float = 4.0) -> Report:
    dense, tuned = quality(3.0), quality(2.95)
    passed = judge(dense, tuned, Gates())
    history = [
        StageHistory(
            stage=1, sparsity=0.2, parameters=800, pruned=quality(3.2), tuned=tuned, retried=False, verdict=passed
        )
    ]
    if stages == 2:
        bad = quality(bad_loss)
        failed = judge(dense, bad, Gates())
        history.append(
            StageHistory(stage=2, sparsity=0.4, parameters=600, pruned=bad, tuned=bad, retried=True, verdict=failed)
        )
    speed, faster_speed = Throughput(prefill=100, decode=100), Throughput(prefill=100 * prefill, decode=100)
    return Report(
        name="chat",
        run="chat-1",
        model=HOSTILE,
        source_digest="a" * 64,
        model_digest="b" * 64,
        pattern="ffn",
        stage=1,
        stages=stages,
        dense=dense,
        history=tuple(history),
        dense_size=Size(parameters=1000, block_parameters=600, zeros=0, weight_bytes=2000, compact_bytes=None),
        compressed_size=Size(
            parameters=1000 if zeros else 800,
            block_parameters=600 if zeros else 400,
            zeros=zeros,
            weight_bytes=1600,
            compact_bytes=900 if zeros else None,
        ),
        measured=Measured(
            timings=(timing("prefill", prefill), timing("decode", 1.0, noise=0.1)),
            dense_footprint=Footprint(load_seconds=1, peak_bytes=1 << 30),
            compressed_footprint=Footprint(load_seconds=1, peak_bytes=1 << 29),
            machine={"processor": "test"},
            threads=2,
        ),
        cost=cost(speed, faster_speed, Traffic(), 1.0, "nowhere", 10, 1, "x"),
        step_seconds={"prune 1": 3.0},
        recipe={"model": HOSTILE},
        karikomi="0",
        created="today",
    )
