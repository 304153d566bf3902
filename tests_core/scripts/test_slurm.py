"""The sbatch file, run by bash with stand-ins for SLURM's commands and for torchrun."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.helpers import ROOT, wait_until

SBATCH = ROOT / "slurm" / "train.sbatch"


@pytest.fixture
def job(tmp_path: Path) -> dict:
    """A folder with stand-ins: srun runs its arguments, scontrol and torchrun write theirs down."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    stand_ins = {
        "srun": 'exec "$@"',
        "scontrol": 'echo "$@" >> scontrol.txt',
        ".venv/bin/torchrun": 'echo "$@" >> torchrun.txt\ntrap "exit $ON_TERM" TERM\n'
        'touch started\nfor i in $(seq "$TENTHS"); do sleep 0.1; done\nexit "$CODE"',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    environment |= {"SLURM_GPUS_ON_NODE": "2", "TENTHS": "1", "CODE": "0", "ON_TERM": "1"}
    return {"args": ["bash", SBATCH, "EPOCHS=200"], "cwd": tmp_path, "env": environment}


@pytest.mark.parametrize(
    ("code", "requeued", "expected"), [("0", False, 0), ("1", False, 1), ("75", True, 0)]
)
def test_a_job_is_requeued_if_its_run_was_preempted_but_not_if_it_failed(job, code, requeued, expected):
    job["env"]["CODE"] = code
    assert subprocess.run(**job, check=False).returncode == expected
    assert (job["cwd"] / "scontrol.txt").exists() == requeued
    arguments = (job["cwd"] / "torchrun.txt").read_text()
    assert "--nproc-per-node 2" in arguments
    assert arguments.endswith("train.py --variant full --resume auto EPOCHS=200\n")


@pytest.mark.parametrize(("code", "requeued"), [("1", True), ("143", True), ("75", True), ("0", False)])
def test_before_the_time_limit_it_ends_the_training_and_is_requeued_unless_finished(job, code, requeued):
    job["env"] |= {"TENTHS": "600", "ON_TERM": code}
    process = subprocess.Popen(**job)
    wait_until((job["cwd"] / "started").exists)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == 0
    asked = job["cwd"] / "scontrol.txt"
    assert (asked.read_text() == "requeue 42\n") if requeued else not asked.exists()


def test_it_asks_slurm_for_a_signal_before_the_limit_and_for_requeueing():
    lines = SBATCH.read_text().splitlines()
    options = {line.partition("#SBATCH ")[2].split()[0] for line in lines if line.startswith("#SBATCH ")}
    assert {"--requeue", "--signal=B:USR1@300", "--open-mode=append"} <= options
