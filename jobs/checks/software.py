"""Python, the packages, Ray's token, DeepSpeed, CUDA."""

import os
import platform
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from jobs.checks.finding import Finding, fail, ok, warn

PYTHON = (3, 11)
STEP_WITHIN = 180  # seconds for importing torch and DeepSpeed on a busy machine, and one step
SMALL_GPU = 16 << 30  # bytes


def python() -> list[Finding]:
    """The interpreter."""
    found = platform.python_version()
    if sys.version_info[:2] != PYTHON:
        return [fail("Python", f"{found}; 3.11 is needed", "python3.11 -m venv .venv, and install karikomi there.")]
    return [ok("Python", found)]


def packages() -> list[Finding]:
    """What is installed against what Karikomi's own metadata asks for."""
    try:
        wanted = [Requirement(line) for line in requires("karikomi") or []]
    except PackageNotFoundError:
        return [
            warn("packages", "karikomi runs from its source and is not installed; versions are not compared",
                 "pip install -e . in its directory."),
        ]  # fmt: skip
    return compared(one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""}))


def compared(wanted: Iterable[Requirement]) -> list[Finding]:
    """One finding for each package that is missing or of another version, else one for all."""
    findings, right = [], 0
    for requirement in wanted:
        install = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            findings.append(fail("packages", f"{requirement.name} is not installed", install))
            continue
        if requirement.specifier.contains(found, prereleases=True):
            right += 1
            continue
        # transformers above all: the model adapters know the layout of its classes and configs
        findings.append(
            fail("packages", f"{requirement.name} is {found}; Karikomi is tested with {requirement.specifier}", install)
        )
    return findings or [ok("packages", f"all {right} have the versions that Karikomi is tested with")]


def compiler() -> list[Finding]:
    """None is needed: DeepSpeed's compiled CPU operators are switched off."""
    found = next((name for name in ("g++", "c++", "clang++") if shutil.which(name)), None)
    return [ok("compiler", f"{found or 'none'}; none is needed, nothing is compiled")]


def ray_token(cluster: str | None) -> list[Finding]:
    """How this machine identifies itself to a Ray cluster; the token itself is never shown.

    Args:
        cluster: the cluster that is asked about, if one is.
    """
    name, mode = "Ray token", os.environ.get("RAY_AUTH_MODE", "token").lower()  # importing `cluster` sets it, too
    if mode == "disabled":
        return [
            warn(name, "RAY_AUTH_MODE is disabled: whoever reaches a cluster of yours can run anything on it",
                 "export RAY_AUTH_MODE=token"),
        ]  # fmt: skip
    if mode != "token":
        return [fail(name, f"RAY_AUTH_MODE is {mode!r}: neither token nor disabled", "export RAY_AUTH_MODE=token")]
    if os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return [ok(name, "set in RAY_AUTH_TOKEN")]
    return [token_file(os.environ.get("RAY_AUTH_TOKEN_PATH"), cluster)]


def token_file(named: str | None, cluster: str | None) -> Finding:
    """The token's file: there, not empty, and nobody else's to read."""
    name = "Ray token"
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    fetch = f"Ask whoever runs the cluster for its token, and put it into {path} (chmod 600)."
    try:
        mode, empty = path.stat().st_mode, not path.read_text().strip()
    except OSError as error:
        if named:
            return fail(name, f"RAY_AUTH_TOKEN_PATH: {path} cannot be read: {error.strerror}", fetch)
        if cluster:
            return fail(name, f"none: neither RAY_AUTH_TOKEN nor {path}", fetch)
        return ok(name, "none here, and none needed: the embedded cluster makes its own for each run")
    if empty:
        return fail(name, f"{path} is empty", fetch)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        return warn(name, f"{path} can be read by others on this machine", f"chmod 600 {path}")
    return ok(name, f"in {path}, readable by you only")


def ray() -> list[Finding]:
    """Whether Ray can be imported."""
    try:
        import ray
    except Exception as error:  # a broken installation fails in many ways
        return [fail("Ray", f"cannot be imported: {error}", "pip install --force-reinstall 'ray[data,train]'")]
    return [ok("Ray", ray.__version__)]


def deepspeed() -> list[Finding]:
    """One real optimizer step by DeepSpeed's ZeRO with torch's AdamW, in a process of its own."""
    command = [sys.executable, "-m", "jobs.checks.deepspeed_step"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "DS_ACCELERATOR": "cpu"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=STEP_WITHIN)
    except subprocess.TimeoutExpired:
        return [
            warn("DeepSpeed", f"no optimizer step within {STEP_WITHIN} s", "Look again when the machine is less busy.")
        ]
    return [stepped(done.returncode, done.stdout, done.stderr)]


def stepped(code: int, stdout: str, stderr: str) -> Finding:
    """What the step's process left behind."""
    if code == 0:
        return ok("DeepSpeed", f"{stdout.strip().splitlines()[-1]}; one ZeRO step with torch's AdamW works")
    said = (stderr.strip().splitlines() or [f"ended by {code}"])[-1]
    return fail("DeepSpeed", f"no optimizer step: {said}", "pip install --force-reinstall deepspeed==0.19.8")


def cuda() -> list[Finding]:
    """Devices as torch sees them: driver, memory, bf16."""
    import torch

    card = shutil.which("nvidia-smi") is not None
    if not torch.cuda.is_available():
        if not card:
            return [ok("CUDA", "no GPU here; jobs that run here say `gpus_per_worker: 0`")]
        built = torch.version.cuda
        why = f"torch is built for CUDA {built} and finds no device" if built else "torch is a build without CUDA"
        way = (
            "Update the driver." if built else f"pip install --force-reinstall torch=={version('torch').split('+')[0]}"
        )
        return [warn("CUDA", f"nvidia-smi is here, but {why}", way)]
    driver = driver_version()
    findings = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        bf16 = torch.cuda.get_device_capability(index) >= (8, 0)
        findings.append(device(index, torch.cuda.get_device_name(index), driver, free, total, bf16))
    return findings


def device(index: int, name: str, driver: str, free: int, total: int, bf16: bool) -> Finding:
    """One GPU, in words. Memory in bytes."""
    text = f"{name}, driver {driver}, {free / (1 << 30):.0f} of {total / (1 << 30):.0f} GiB free"
    label = f"CUDA {index}"
    if not bf16:
        return warn(label, f"{text}, no bf16", "Train on a newer GPU (Ampere or later); scoring and pruning work here.")
    if free < total / 2:
        return warn(label, f"{text}: somebody else is using it", "nvidia-smi shows who; latency is not measured well.")
    if total < SMALL_GPU:
        return warn(label, f"{text}, bf16", "It holds small models only; `karikomi plan JOB` says what a job needs.")
    return ok(label, f"{text}, bf16")


def driver_version() -> str:
    """Of the NVIDIA driver, by nvidia-smi; "unknown" without it."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (done.stdout.split() or ["unknown"])[0]
