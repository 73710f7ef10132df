"""One optimizer step as tuning does it, in a process of its own: `python -m jobs.checks.deepspeed_step`."""

import os
import sys
import tempfile
from pathlib import Path


def main() -> str:
    """Makes the step on one CPU rank; gives DeepSpeed's version.

    Raises:
        RuntimeError: the weights did not move.
    """
    os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}  # what a launcher would set
    import deepspeed
    import torch
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False  # as in tuning: nothing is compiled
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "rank").as_uri()
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
        model = torch.nn.Linear(8, 8)
        before = model.weight.detach().clone()
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
            config={
                "train_batch_size": 1,
                "zero_optimization": {"stage": 2},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
            },
            dist_init_required=False,
        )
        engine.backward(engine(torch.ones(1, 8)).square().sum())
        engine.step()
        if torch.equal(before, engine.module.weight):
            raise RuntimeError("the step changed no weight")
        torch.distributed.destroy_process_group()
    return str(deepspeed.__version__)


if __name__ == "__main__":
    found = main()
    sys.stdout.write(f"\n{found}\n")
