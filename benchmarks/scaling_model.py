"""How long a model takes on how many GPUs, and what saturates first: `python benchmarks/scaling_model.py`.

A simulation of `cluster/layerwise.py`, step by step, in plain arithmetic: bytes and operations of a step over the rate
of what carries it. Steps wait for each other as in the engine, so the seconds of a block are the sum of its steps, and
the largest step is what saturates. Rates are measured (`benchmarks/scaling.py`) or published ones with a stated share
that is reached. Sparse solver: SparseGPT. Writes the tables into scaling_model.md.
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from pages import put

from cluster.sums import branches, of_worker, spread

PAGE = Path(__file__).parent / "scaling_model.md"
FP32 = 4
GB = 1e9


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model. Widths in numbers; `item` bytes per stored weight."""

    name: str
    blocks: int
    hidden: int
    ffn: int
    key_value: int
    item: int = 2

    @property
    def linears(self) -> list[tuple[int, int, str]]:
        """Rows, columns and the input's name of every prunable matrix."""
        attention = [(self.hidden, "qkv"), (self.key_value, "qkv"), (self.key_value, "qkv"), (self.hidden, "o")]
        feed_forward = [(self.ffn, self.hidden, "up"), (self.ffn, self.hidden, "up"), (self.hidden, self.ffn, "down")]
        return [(rows, self.hidden, name) for rows, name in attention] + feed_forward

    @property
    def widths(self) -> dict[str, int]:
        """Width of every distinct input."""
        return {name: columns for _, columns, name in self.linears}

    @property
    def weights(self) -> int:
        """Weights of one block's linears."""
        return sum(rows * columns for rows, columns, _ in self.linears)

    @property
    def block_bytes(self) -> int:
        """One block on disk; norms do not count."""
        return self.item * self.weights

    @property
    def gram_bytes(self) -> int:
        """One sum of the Grams of one block, folded."""
        return FP32 * sum(width * (width // 2 + 1) for width in self.widths.values())

    @property
    def factor_bytes(self) -> int:
        """The prepared factors of one block."""
        return FP32 * sum(width**2 for width in self.widths.values())


@dataclass(frozen=True)
class Machine:
    """What one worker reaches (operations, bytes or seconds), and what workers on one node share.

    Attributes:
        forward: operations per second of a block's matrix products, in the type that it is run in.
        gram: of XᵀX in fp32.
        factor: of Cholesky in fp32.
        solve: of the products in a solver, fp32.
        column: seconds that a solver needs for one column of one unit, whatever its rows: small calls.
        copy: bytes per second between host and device; infinite where blocks run on the host.
        add: bytes per second at which one task on the host adds up Grams.
        add_here: the same of a worker, where blocks run.
        store: bytes per second that one process writes into the object store.
        link: bytes per second into and out of a node.
        read, write: bytes per second of the checkpoint's storage for one node.
        write_one: bytes per second at which one process packs, digests and writes a block.
        task: seconds of the engine per task or call.
        per_node: workers on a node.
        cores: workers that really run at once on all nodes together; None: every one.
        store_memory: bytes of a node's object store.
    """

    name: str
    forward: float
    gram: float
    factor: float
    solve: float
    column: float
    copy: float
    add: float
    add_here: float
    store: float
    link: float
    read: float
    write_one: float
    task: float
    per_node: int = 1
    cores: int | None = None
    store_memory: float = math.inf


@dataclass(frozen=True)
class Schedule:
    """How the work is cut: all of it from the recipe, but `workers`."""

    windows: int
    length: int
    shards: int
    rows: int
    workers: int

    @property
    def tokens(self) -> int:
        """Tokens of the calibration."""
        return self.windows * self.length

    @property
    def busiest(self) -> int:
        """Shards of the worker that has most of them."""
        return math.ceil(self.shards / self.workers)

    def nodes(self, machine: Machine) -> int:
        """Nodes that the workers fill."""
        return math.ceil(self.workers / machine.per_node)

    def sums(self, nodes: int) -> list[tuple[int, int]]:
        """For every node: how many sums of an input its workers make, and as how many they leave it."""
        found, held, whole = [], spread(self.shards, self.workers), (0, self.shards)
        step = math.ceil(self.workers / nodes)
        for start in range(0, self.workers, step):
            own = [(shards[0], shards[-1] + 1) for shards in held[start : start + step] if shards]
            made = sum(len(of_worker(shards, self.shards)) for shards in held[start : start + step])
            leave = len(branches((own[0][0], own[-1][1]), whole)) if nodes > 1 and own else made
            found.append((made, leave))
        return found

    def units(self, shape: Shape) -> list[tuple[int, int]]:
        """Rows and columns of every solve task of a block."""
        return [
            (min(step, rows - start), columns)
            for rows, columns, _ in shape.linears
            for step in [math.ceil(rows / math.ceil(rows / self.rows))]
            for start in range(0, rows, step)
        ]


@dataclass(frozen=True)
class Traffic:
    """Bytes of one block through the object store.

    Attributes:
        grams, factors, rows: written once, where they are made.
        added: sums that nodes make of their workers'.
        moved: written once more on another node that needs them.
    """

    grams: int
    added: int
    factors: int
    rows: int
    moved: int

    @property
    def all(self) -> int:
        """All that is written into the stores."""
        return self.grams + self.added + self.factors + self.rows + self.moved


def traffic(shape: Shape, schedule: Schedule, nodes: int) -> Traffic:
    """The engine's bytes: sums of every worker; factors and rows on every node, whose windows go on through them.

    Spread evenly, as many of the nodes' sums are on the right node already as chance puts there.
    """
    grams, factors, rows = shape.gram_bytes, shape.factor_bytes, shape.block_bytes
    sums = schedule.sums(nodes)
    return Traffic(
        grams * sum(made for made, _ in sums),
        grams * sum(leave for made, leave in sums if leave < made),
        factors,
        rows,
        round(grams * sum(leave for _, leave in sums) * (1 - 1 / nodes)) + (factors + rows) * (nodes - 1),
    )


def least_traffic(shape: Shape, schedule: Schedule, nodes: int) -> int:
    """One Gram of every worker that has shards and of every node but one; factors and rows once per node."""
    grams = min(schedule.workers, schedule.shards) + nodes - 1
    return grams * shape.gram_bytes + nodes * (shape.factor_bytes + shape.block_bytes)


def block_steps(shape: Shape, machine: Machine, schedule: Schedule) -> dict[str, float]:
    """Seconds of every step of one block; of its writing, what the next block's steps do not hide."""
    workers, nodes = schedule.workers, schedule.nodes(machine)
    slowed = max(1.0, workers / (machine.cores or workers))  # more workers than cores take turns
    at_once = workers / slowed
    share = schedule.busiest / schedule.shards * slowed
    attention = 4 * schedule.length * schedule.tokens * shape.hidden
    widths = list(shape.widths.values())
    elsewhere = 1 - 1 / nodes
    units = schedule.units(shape)

    # Inputs come one after the other, and of each there is one sum and one factor: other workers wait for it.
    sums = schedule.sums(nodes)
    made, leave = max(made for made, _ in sums), sum(leave for _, leave in sums)
    each = math.ceil(sum(made for made, _ in sums) / workers)  # sums that a worker hands on
    on_node = made / machine.add + 1 / machine.store if leave < sum(made for made, _ in sums) else 0.0
    adding = shape.gram_bytes * (on_node + leave / machine.add)
    received = leave * shape.gram_bytes * elsewhere / machine.link
    per_unit = sum(FP32 * columns**2 for _, columns in units) / machine.copy
    solving = [rows * columns**2 / machine.solve + columns * machine.column for rows, columns in units]
    tasks = each * len(widths) * slowed + (len(widths) + len(units)) / at_once + 1
    readers = min(workers, machine.per_node) * slowed  # each its own block; solves and who writes it once together
    steps = {
        "read the checkpoint": (readers + 1 + 1 / workers) * shape.block_bytes / machine.read,
        "forward": (2 * shape.weights * schedule.tokens + attention) * share / machine.forward,
        "Grams": sum(2 * width**2 for width in widths) * schedule.tokens * share / machine.gram,
        "add up Grams of a worker": (schedule.busiest - each) * slowed * shape.gram_bytes / machine.add_here,
        "Grams to the store": each * slowed * shape.gram_bytes * (1 / machine.copy + 1 / machine.store),
        "Grams over the network": received,
        "add up Grams": adding + shape.gram_bytes / machine.copy,
        "prepare (Cholesky)": sum(width**3 / 3 for width in widths) / machine.factor,
        "factors to every node": shape.factor_bytes / machine.store
        + math.ceil(math.log2(nodes)) * shape.factor_bytes / machine.link,
        "factors to the device": per_unit / at_once,
        "solve": max(max(solving), sum(solving) / at_once),  # no faster than the longest unit alone
        "rows to every node": shape.block_bytes
        * (1 / machine.store / at_once + math.ceil(math.log2(nodes)) * elsewhere / machine.link),
        "engine, per task": tasks * machine.task,
    }
    return steps | {"write the block": max(0.0, shape.block_bytes / machine.write_one - sum(steps.values()))}


def store_needed(shape: Shape, machine: Machine, schedule: Schedule) -> int:
    """Bytes that the fullest node's object store holds at once: its Grams, other nodes' of one input, factors, rows."""
    nodes = schedule.nodes(machine)
    sums = schedule.sums(nodes)
    own = max(made + (leave if leave < made else 0) for made, leave in sums) * shape.gram_bytes
    widest = max(shape.widths.values())
    others = sum(leave for _, leave in sums) * FP32 * widest * (widest // 2 + 1) * (1 - 1 / nodes)
    return round(own + others + shape.factor_bytes + shape.block_bytes)


@dataclass(frozen=True)
class Prediction:
    """One case: seconds of a block by step."""

    shape: Shape
    machine: Machine
    schedule: Schedule
    steps: dict[str, float]

    @property
    def block(self) -> float:
        """Seconds per block."""
        return sum(self.steps.values())

    @property
    def model(self) -> float:
        """Seconds of all blocks."""
        return self.block * self.shape.blocks

    @property
    def saturated(self) -> list[tuple[str, float]]:
        """The two largest steps and their shares."""
        ranked = sorted(self.steps.items(), key=lambda one: -one[1])[:2]
        return [(name, seconds / self.block) for name, seconds in ranked]

    @property
    def spills(self) -> bool:
        """Whether a node's object store is too small for a block."""
        return store_needed(self.shape, self.machine, self.schedule) > self.machine.store_memory


def predict(shape: Shape, machine: Machine, schedule: Schedule) -> Prediction:
    """Runs the simulation for one case."""
    return Prediction(shape, machine, schedule, block_steps(shape, machine, schedule))


LLAMA_8B = Shape("8B", 32, 4096, 14336, 1024)
LLAMA_70B = Shape("70B", 80, 8192, 28672, 1024)
LLAMA_405B = Shape("405B", 126, 16384, 53248, 1024)
RECIPE = Schedule(windows=128, length=2048, shards=4, rows=512, workers=1)

# Peaks: NVIDIA's H100 SXM datasheet (dense bf16 989 TFLOP/s, fp32 67 TFLOP/s, PCIe 5 x16 64 GB/s each way, 80 GB).
# The shares of them that are reached, and all that follows, are assumptions: none was measured on such a machine.
H100_NODES = Machine(
    "H100 SXM, 8 per node",
    forward=0.5 * 989e12,  # large products in bf16, batch of one window
    gram=0.7 * 67e12,  # fp32 without TF32
    factor=0.3 * 67e12,  # Cholesky and triangular solves are less regular than products
    solve=0.5 * 67e12,
    column=50e-6,  # some five kernels per column, launched one by one
    copy=0.4 * 64e9,  # pageable host memory
    add=4e9,  # one thread; half of the sums go into fresh memory
    add_here=0.9e12,  # on the GPU: 80 % of 3.35 TB/s, three passes
    store=4e9,  # one process copying into shared memory
    link=3e9,  # Ray moves objects over TCP: a node reaches some 25 Gbit/s, far below its network
    read=5e9,  # several ranged reads from S3, or a node's NVMe
    write_one=0.4e9,  # pack, sha256 and upload in one task
    task=2e-3,
    per_node=8,
    store_memory=600e9,  # 30 % of 2 TB
)


def cases(rows: int) -> list[Prediction]:
    """The models on 1, 8 and 64 GPUs; as many shards as GPUs, and at least four."""
    return [
        predict(shape, H100_NODES, replace(RECIPE, workers=workers, shards=max(4, workers), rows=rows))
        for shape in (LLAMA_8B, LLAMA_70B, LLAMA_405B)
        for workers in (1, 8, 64)
    ]


def table(found: list[Prediction]) -> str:
    """Seconds, efficiency and what saturates first, one line per case."""
    lines = [
        "| model | GPUs | s per block | whole model | efficiency | first | second | object store of a node |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        alone = next(other for other in found if other.shape == one.shape)
        gain = alone.block * alone.schedule.workers / (one.block * one.schedule.workers)
        first, second = (f"{name} {share:.0%}" for name, share in one.saturated)
        needed = store_needed(one.shape, one.machine, one.schedule)
        full = " (spills)" if one.spills else ""
        lines.append(
            f"| {one.shape.name} | {one.schedule.workers} | {one.block:.1f} | {one.model / 3600:.2f} h | {gain:.0%} |"
            f" {first} | {second} | {needed / GB:.0f} GB{full} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints the tables and puts them into the page."""
    texts = [
        f"As the engine is, units of at most 512 rows (the default):\n\n{table(cases(512))}",
        f"Units of 2,048 rows (`solver.rows: 2048`):\n\n{table(cases(2048))}",
    ]
    text = "\n\n".join(texts)
    print(text)
    put(PAGE, text)


if __name__ == "__main__":
    main()
