"""Logs: on a terminal only what a person must see, elsewhere one line of JSON for every event of a run.

Every line holds what it belongs to – tenant, run, attempt, stage, step – and no secret. What libraries log takes the
same way, from the level at which it concerns anybody.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TextIO

import structlog
from structlog.contextvars import bind_contextvars, bound_contextvars, unbind_contextvars
from structlog.typing import EventDict, Processor, WrappedLogger

from jobs.redacting import redact_all
from workflows.events import Advanced, Event, GateJudged, StepEnded, StepStarted

Form = Literal["console", "json"]
OURS = ("jobs", "workflows", "cluster")
QUIET = ("ray", "transformers", "huggingface_hub", "botocore", "boto3", "s3transfer", "urllib3", "stamina")
LATE = ("DeepSpeed", "ray.data")  # give their loggers handlers of their own, whenever they are imported

log = structlog.get_logger("jobs.run")


def configure(form: Form) -> None:
    """Sets logging up for this process; call it after the libraries are imported, whose handlers it takes away.

    Args:
        form: console: warnings and errors, as text; json: all events of a run too, a JSON object on each line.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: Any = structlog.processors.JSONRenderer(sort_keys=False)
    if form == "console":
        colours = sys.stderr.isatty()
        renderer = structlog.dev.ConsoleRenderer(colors=colours, exception_formatter=structlog.dev.plain_traceback)
    handler = Stderr()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                without_secrets,
                renderer,
            ],
        )
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    for name in OURS:
        logging.getLogger(name).setLevel(logging.INFO if form == "json" else logging.WARNING)
    for name in QUIET + LATE:
        take_over(name)
    for name in LATE:
        logging.getLogger(name).filters = [Detour(handler)]
    logging.captureWarnings(form == "json")


class Stderr(logging.StreamHandler[TextIO]):
    """Writes to whatever is `sys.stderr` now: a progress bar puts itself there while it is shown."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """Where it writes."""
        return sys.stderr


class Detour(logging.Filter):
    """Sends a logger's errors to our handler, and nothing to its own ones."""

    def __init__(self, handler: logging.Handler) -> None:
        super().__init__()
        self.handler = handler

    def filter(self, record: logging.LogRecord) -> bool:
        """Never lets a record pass."""
        if record.levelno >= logging.ERROR:
            self.handler.handle(record)
        return False


def take_over(name: str) -> None:
    """Quiets a library, and leads what it still says to our handler."""
    logger = logging.getLogger(name)
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.ERROR)


def without_secrets(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """A structlog processor: hides secrets in every field, the text of an exception included."""
    hidden: EventDict = redact_all(event)
    return hidden


@contextmanager
def bound(run: str, tenant: str, attempt: str) -> Iterator[None]:
    """Every line within is of this run."""
    with bound_contextvars(tenant=tenant, run=run, attempt=attempt):
        try:
            yield
        finally:
            unbind_contextvars("stage", "step")


def bind_attempt(attempt: str) -> None:
    """From here on the attempt has a name."""
    bind_contextvars(attempt=attempt)


def bind_place(event: Event) -> None:
    """From here on lines belong to the step that has begun, or to none."""
    if isinstance(event, StepStarted):
        bind_contextvars(stage=event.stage, step=event.name)
    elif isinstance(event, StepEnded):
        unbind_contextvars("stage", "step")


def log_event(event: Event) -> None:
    """A listener: a line for every event."""
    if isinstance(event, StepStarted):
        log.info("step started", stage=event.stage, step=event.name)
    elif isinstance(event, StepEnded):
        seconds = round(event.seconds, 3)
        log.info("step ended", stage=event.stage, step=event.name, seconds=seconds, resumed=event.resumed)
    elif isinstance(event, Advanced):
        names = ("block", "blocks") if event.name in ("score", "prune") else ("done", "total")
        counts = dict(zip(names, (event.done, event.total), strict=True))
        log.info("advanced", stage=event.stage, step=event.name, **counts, **event.numbers)
    elif isinstance(event, GateJudged):
        log.info("gate judged", stage=event.stage, passed=event.passed, sentence=event.sentence)


def log_failure() -> None:
    """A line for an error that nobody foresaw, with where it came from; call it where the error is handled."""
    log.error("unexpected error", exc_info=True)
