"""Money: from a price, a measured throughput and the user's traffic. Imports no torch: job files use it."""

from pydantic import BaseModel, ConfigDict, Field

from cluster.strict import Strict

SECONDS_PER_HOUR = 3600
DAYS_PER_MONTH = 365.25 / 12


class Traffic(Strict):
    """What the model serves."""

    requests_per_day: float = Field(100_000, gt=0, description="Requests that the model answers in a day.")
    prompt_tokens: float = Field(
        500, gt=0, description="Tokens in a mean prompt, or in a text that a classifier reads."
    )
    output_tokens: float = Field(100, gt=0, description="Tokens in a mean answer; a classifier gives none.")


class Throughput(BaseModel):
    """Tokens per second of one machine, as measured; `decode` is None for a model that writes none."""

    model_config = ConfigDict(frozen=True)

    prefill: float
    decode: float | None


class Cost(BaseModel):
    """What both models cost, in US dollars; every assumption is a sentence.

    Attributes:
        dense_per_million, compressed_per_million: a million tokens in the traffic's mix of prompt and output.
        dense_prompt_per_million, compressed_prompt_per_million: a million tokens read.
        dense_output_per_million, compressed_output_per_million: a million tokens written; None where none are.
        run: the compression itself, once.
        months_to_pay_back: None means never, nothing is saved.
    """

    model_config = ConfigDict(frozen=True)

    price_per_hour: float
    dense_per_million: float
    compressed_per_million: float
    dense_prompt_per_million: float
    compressed_prompt_per_million: float
    dense_output_per_million: float | None
    compressed_output_per_million: float | None
    dense_per_month: float
    compressed_per_month: float
    run: float
    months_to_pay_back: float | None
    assumptions: tuple[str, ...]


def seconds_per_request(throughput: Throughput, traffic: Traffic) -> float:
    """Seconds of one machine for a mean request."""
    written = traffic.output_tokens / throughput.decode if throughput.decode else 0.0
    return traffic.prompt_tokens / throughput.prefill + written


def cost(
    dense: Throughput,
    compressed: Throughput,
    traffic: Traffic,
    price_per_hour: float,
    price_origin: str,
    run_seconds: float,
    machines: int,
    measured_at: str,
) -> Cost:
    """Cost of serving with either model, of the run itself, and how soon it pays back.

    Args:
        dense: measured throughput of one machine with the dense model.
        compressed: the same with the compressed one.
        traffic: the job's.
        price_per_hour: of one machine, in US dollars.
        price_origin: source and date of the price.
        run_seconds: wall time of the run.
        machines: that it took.
        measured_at: the shape at which throughput was measured.
    """
    per_request = {
        "dense": seconds_per_request(dense, traffic),
        "compressed": seconds_per_request(compressed, traffic),
    }
    tokens = traffic.prompt_tokens + (traffic.output_tokens if dense.decode else 0.0)
    per_second = price_per_hour / SECONDS_PER_HOUR
    million = {name: seconds * per_second / tokens * 1e6 for name, seconds in per_request.items()}
    month = {
        name: seconds * per_second * traffic.requests_per_day * DAYS_PER_MONTH for name, seconds in per_request.items()
    }
    run = run_seconds * machines * per_second
    saved = month["dense"] - month["compressed"]
    return Cost(
        price_per_hour=price_per_hour,
        dense_per_million=million["dense"],
        compressed_per_million=million["compressed"],
        dense_prompt_per_million=per_second / dense.prefill * 1e6,
        compressed_prompt_per_million=per_second / compressed.prefill * 1e6,
        dense_output_per_million=per_second / dense.decode * 1e6 if dense.decode else None,
        compressed_output_per_million=per_second / compressed.decode * 1e6 if compressed.decode else None,
        dense_per_month=month["dense"],
        compressed_per_month=month["compressed"],
        run=run,
        months_to_pay_back=run / saved if saved > 0 else None,
        assumptions=(
            f"A machine costs ${price_per_hour:g} an hour ({price_origin}).",
            f"Traffic: {traffic.requests_per_day:,.0f} requests a day of {traffic.prompt_tokens:,.0f} "
            + (f"prompt and {traffic.output_tokens:,.0f} output tokens" if dense.decode else "tokens")
            + ", from the job.",
            f"Throughput as measured at {measured_at}; no batching across requests.",
            "Machines are paid for the seconds they work (full utilisation); real bills are higher for both alike.",
            f"The run took {run_seconds:,.0f} s on {machines} machine(s); people's time is not counted.",
        ),
    )
