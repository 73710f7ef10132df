"""What a gradient pass costs beside the forward pass it rests on: `python benchmarks/importance.py MODEL TEXT`.

MODEL and TEXT as for benchmarks/quality.py, and the same calibration windows. One process with one thread goes all
steps as a worker does, boundaries in memory. Seconds are of CPU, which other work on the machine disturbs least.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from quality import CALIBRATION, LENGTH, windows_of

from cluster.backwards import Walk
from cluster.storage import open_store
from workflows.data.windows import to_parquet
from workflows.gradient_files import put_gradients
from workflows.importance import GradientPass
from workflows.models.source import load_tokenizer, resolve_source
from workflows.models.state import ModelState

SHARDS = 4


def held_mib(what: str) -> float:
    """What this process holds now (VmRSS), or has held at most so far (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{what}:")[1].split()[0]) / 1024


def main() -> None:
    """Prints one line of JSON per kind of step, and keeps Γ where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=CALIBRATION)
    parser.add_argument("--memory", type=float, default=4.0, help="GiB of boundaries kept in memory")
    parser.add_argument("--keep", type=Path, help="directory into which gammas.safetensors is written")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        source = resolve_source(asked.model, Path(temporary))
        windows = windows_of(asked.text.read_text(), load_tokenizer(source), 0, asked.windows)
        model = ModelState(
            source=source.uri, source_digest=source.digest, config=source.config, store=f"{temporary}/store"
        )
        stored = open_store(model.store).put("windows", to_parquet({"calibration": windows}))
        work = GradientPass(
            model, stored.key, SHARDS, "float32", "cpu", threads=1, memory=int(asked.memory * (1 << 30))
        )
        work.setup()
        walk, blocks, baseline = Walk(work, range(SHARDS)), work.block_count, held_mib("VmRSS")
        seconds, totals = defaultdict(float), []
        for step in range(2 * blocks + 1):
            kind = "forward" if step < blocks else "head" if step == blocks else "backward"
            before = time.process_time()
            parts = walk.step(step)
            seconds[kind] += time.process_time() - before
            totals += [work.total(parts)] if parts else []
        found = work.result(totals[0], totals[:0:-1])
    for kind, spent in seconds.items():
        print(json.dumps({"step": kind, "cpu_seconds": round(spent, 1), "share": round(spent / seconds["forward"], 2)}))
    print(json.dumps({"peak_mib": round(held_mib("VmHWM")), "held_before_mib": round(baseline)}))
    print(json.dumps({"windows": asked.windows, "loss_per_token": found.loss / (asked.windows * (LENGTH - 1))}))
    if asked.keep:
        put_gradients(open_store(str(asked.keep)), "gammas.safetensors", found)


if __name__ == "__main__":
    main()
