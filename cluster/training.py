"""A DeepSpeed group on Ray Train: some ranks, all or none, that run one handed function.

It knows how ranks are launched, watched, stopped and started again, and nothing of models.
"""

import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import ray
from ray._raylet import PlacementGroupID
from ray.exceptions import RayActorError, WorkerCrashedError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from cluster.errors import Cancelled, KarikomiError, Unavailable
from cluster.gangs import shortage

ATTEMPTS = 3  # a group that lost a rank is started again, from the step's beginning, so often in all
LOOK_AGAIN = 0.5  # seconds
ROOM_WITHIN = 300  # seconds
LOST = ("died", "startup timed out", "failed to initialize")  # in what Ray Train says of a rank that is gone
GONE_WITHIN = 30  # seconds; what is left then holds no machines


@ray.remote(num_cpus=0)
class Board:
    """Where rank 0 writes how far it is and what came out, and reads whether to stop."""

    def __init__(self) -> None:
        self.news: dict[str, Any] = {}
        self.result: Any = None
        self.stop = False

    def note(self, **news: Any) -> bool:
        """Takes news; answers whether to stop."""
        self.news = news
        return self.stop

    def look(self) -> dict[str, Any]:
        """The last news."""
        return self.news

    def finish(self, result: Any) -> None:
        """Takes the result."""
        self.result = result

    def take(self) -> Any:
        """The result; None when there is none."""
        return self.result

    def ask_to_stop(self) -> None:
        """The next note is answered with True."""
        self.stop = True


def train(
    loop: Callable[[Any, Any], Any],
    argument: Any,
    ranks: int,
    cpus_per_rank: int,
    gpus_per_rank: int,
    on_news: Callable[[dict[str, Any]], None],
    stop: Callable[[], bool],
) -> Any:
    """Runs `loop(argument, board)` on every rank of a process group and returns what rank 0 gave to the board.

    Args:
        loop: importable on the workers. The process group is there when it is called; it begins anew when a rank is
            lost, so it must give the same result again.
        argument: handed to it.
        ranks: processes.
        cpus_per_rank: CPUs that each takes.
        gpus_per_rank: GPUs that each takes.
        on_news: told what rank 0 notes.
        stop: asked while waiting; the ranks end after the step at hand.

    Raises:
        Unavailable: no room, or ranks were lost again and again.
        Cancelled: `stop` said so.
    """
    bundle = {"CPU": float(cpus_per_rank)} | ({"GPU": float(gpus_per_rank)} if gpus_per_rank else {})
    total = ray.cluster_resources()
    if any(total.get(name, 0) < amount * ranks for name, amount in bundle.items()):
        raise Unavailable(
            shortage(bundle, ranks, total, ray.available_resources()),
            "Ask for fewer tune.ranks, or a larger cluster.",
        )
    for _ in range(ATTEMPTS):
        wait_for_room(bundle, ranks, stop)
        try:
            return _attempt(loop, argument, ranks, bundle, on_news, stop)
        except RankLost as error:
            lost = error
    raise Unavailable(f"tune: ranks were lost {ATTEMPTS} times over: {lost}", "Run the same command again.")


def wait_for_room(bundle: dict[str, float], ranks: int, stop: Callable[[], bool]) -> None:
    """Waits until the group fits: what used the machines before gives them back a moment after it ended.

    Raises:
        Unavailable: others keep them.
        Cancelled: `stop` said so.
    """
    deadline = time.monotonic() + ROOM_WITHIN
    while any(ray.available_resources().get(name, 0) < amount * ranks for name, amount in bundle.items()):
        if stop():
            raise Cancelled("stopped while waiting for machines")
        if time.monotonic() > deadline:
            free = ray.available_resources()
            raise Unavailable(shortage(bundle, ranks, ray.cluster_resources(), free), "Run it when machines are free.")
        time.sleep(LOOK_AGAIN)


def own_groups() -> set[str]:
    """Ids of the placement groups that this job holds; an id ends with its job's."""
    job = ray.get_runtime_context().get_job_id()
    table = placement_group_table()
    return {name for name, entry in table.items() if name.endswith(job) and entry["state"] != "REMOVED"}


class RankLost(Exception):
    """A process of the group or its machine is gone."""


def _attempt(
    loop: Callable[[Any, Any], Any],
    argument: Any,
    ranks: int,
    bundle: dict[str, float],
    on_news: Callable[[dict[str, Any]], None],
    stop: Callable[[], bool],
) -> Any:
    """One group from start to end; Ray Train runs in a thread, so that this one can look and stop.

    Raises:
        RankLost: and nothing came of it.
    """
    board = Board.remote()  # type: ignore[attr-defined]
    storage = tempfile.mkdtemp(prefix="karikomi-train-")
    failure: list[BaseException] = []
    arguments = (loop, argument, board, ranks, bundle, storage, failure)
    before = own_groups()
    thread = threading.Thread(target=_fit, args=arguments, daemon=True, name="ray-train")
    try:
        thread.start()
        seen: dict[str, Any] = {}
        while thread.is_alive():
            thread.join(LOOK_AGAIN)
            if stop():
                board.ask_to_stop.remote()
            news = ray.get(board.look.remote())
            if news != seen:
                seen = news
                on_news(news)
        if stop():
            raise Cancelled("stopped while tuning; this step begins anew next time")
        if failure:
            raise failure[0]
        return ray.get(board.take.remote())
    except RayActorError as error:  # the board's: ranks fail at their next note; removing their machines ends them
        raise RankLost(f"the board was lost: {error}") from error
    finally:
        ray.kill(board)
        for left in own_groups() - before:  # a controller that fails while it starts its ranks forgets them
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(left))))
        thread.join(GONE_WITHIN)
        shutil.rmtree(storage, ignore_errors=True)


def _fit(
    loop: Callable[[Any, Any], Any],
    argument: Any,
    board: Any,
    ranks: int,
    bundle: dict[str, float],
    storage: str,
    failure: list[BaseException],
) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    gpu = "GPU" in bundle
    trainer = TorchTrainer(
        _rank,
        train_loop_config={"loop": loop, "argument": argument, "board": board, "gpu": gpu},
        scaling_config=ScalingConfig(num_workers=ranks, use_gpu=gpu, resources_per_worker=bundle),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        run_config=RunConfig(
            name=uuid.uuid4().hex,
            storage_path=storage,
            # Ray Train's own limits are endless by default; starting again is ours to do, in `train`.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )
    try:
        trainer.fit()
    except BaseException as error:  # handed to the thread that waits
        failure.append(_readable(error))
        # The frames behind an error hold the group's controller, and with it the machines that the next attempt needs.
        failure[0].__traceback__ = failure[0].__context__ = failure[0].__cause__ = None


def _rank(config: dict[str, Any]) -> None:
    """One rank: quiet DeepSpeed, then the handed loop."""
    os.environ["DS_ACCELERATOR"] = "cuda" if config["gpu"] else "cpu"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS is deterministic only with a workspace of fixed size
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    config["loop"](config["argument"], config["board"])


def _readable(error: BaseException) -> BaseException:
    """A user's error from within the ranks; `RankLost` when one of them died; else what Ray says."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [getattr(error, "controller_failure", error)]
    causes = [getattr(one, "cause", None) or one for one in failures]
    for cause in causes:
        if isinstance(cause, KarikomiError):
            return cause
    # A dead rank also breaks its peers' connections, so their errors count for nothing then.
    if any(isinstance(one, RayActorError | WorkerCrashedError) or any(w in str(one) for w in LOST) for one in causes):
        return RankLost(str(error)[:500])
    return error
