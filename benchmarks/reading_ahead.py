"""What reading a model's next block ahead saves: `python benchmarks/reading_ahead.py [--blocks 3] [--windows 2]`.

Random blocks in the shape of an 8B model lie in a directory and on a real S3 server on this machine. One process takes
them in order and passes windows of 256 tokens through each, as a shard worker does: it reads each block when it needs
it, or the next one while the one at hand is at work; in turns, three times each.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from big_checkpoint import LLAMA_3_8B, write_checkpoint
from pages import put

from cluster.local_s3 import LocalS3
from cluster.storage import open_store
from workflows.models.checkpoint import Checkpoint
from workflows.models.decoder import Decoder
from workflows.models.state import ModelState

PAGE = ROOT / "benchmarks" / "reading_ahead.md"
LENGTH, REPEATS = 256, 3
WORDS = 1024  # the embedding is not what is measured


@torch.no_grad()
def walk(state: ModelState, windows: int, ahead: bool) -> tuple[float, float]:
    """Seconds of all but the first block: in all, and those in which the windows wait for a block."""
    decoder = Decoder(Checkpoint(state), torch.float32, LENGTH)
    draw = torch.Generator().manual_seed(0)
    hidden = decoder.embed(torch.randint(0, WORDS, (windows, LENGTH), generator=draw))
    waits = []
    for index in range(state.block_count):
        asked = time.monotonic()
        block = decoder.block(index)
        if ahead:
            decoder.read_ahead(index + 1)
        waits.append((asked, time.monotonic()))
        hidden = [decoder.run(index, block, one) for one in hidden]
        del block
    later = waits[1:]
    return time.monotonic() - later[0][0], sum(there - asked for asked, there in later)


def main() -> None:
    """Makes the model, walks both ways on both stores, writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--windows", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    config = LLAMA_3_8B | {"num_hidden_layers": asked.blocks, "vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": 1}
    lines = [
        "| source | s per block, read when needed | of it waiting | read ahead | of it waiting |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as temporary, LocalS3(Path(temporary) / "s3", "models") as server:
        os.environ.update(server.environment())
        directory, size = Path(temporary) / "model", 0
        write_checkpoint(directory, config)
        remote = open_store(f"s3://{server.bucket}/model")
        for file in sorted(directory.iterdir()):
            remote.put(file.name, file)
            size += file.stat().st_size
        for name, source in {"directory, in the page cache": str(directory), "S3 on this machine": remote.uri}.items():
            state = ModelState(source=source, source_digest="0" * 64, config=config, store=temporary)
            walk(state, 1, ahead=False)
            ways = {True: [], False: []}
            for _ in range(REPEATS):
                for ahead, found in ways.items():
                    found.append(walk(state, asked.windows, ahead))
            cells = [
                f"{statistics.median(own) / (asked.blocks - 1):.2f}"
                for ahead in (False, True)
                for own in zip(*ways[ahead], strict=True)
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    machine = f"{os.cpu_count()} CPU cores, {platform.machine()}; load before {os.getloadavg()[0]:.1f}"
    told = (
        f"Machine: {machine}. {date.today()}; torch {torch.__version__}. Medians of {REPEATS}, without the first block."
    )
    size_told = f"float32; blocks of {size / asked.blocks / 1e6:.0f} MB of bfloat16"
    work = f"One thread; {asked.windows} windows of {LENGTH} tokens, {size_told}."
    put(PAGE, "\n".join([*lines, "", told, work]))


if __name__ == "__main__":
    main()
