"""Many publishers of one version, in real processes on a real S3 server: one winner in every round."""

import json
import os
import subprocess
import sys
from pathlib import Path

RACE = Path(__file__).parents[2] / "benchmarks" / "publish_race.py"


def test_sixteen_publishers_have_one_winner_in_each_of_five_rounds(s3):
    command = [sys.executable, str(RACE), "--publishers", "16", "--rounds", "5", "--processes", "2"]
    environment = os.environ | {"PYTHONPATH": str(RACE.parents[1])}
    done = subprocess.run(
        [*command, "--store", s3.make_prefix()],
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["rounds"], found["rounds_with_exactly_one_winner"], found["losers_told"]) == (5, 5, 75)
