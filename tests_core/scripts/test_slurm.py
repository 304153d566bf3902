"""The sbatch file, run by bash with stand-ins for SLURM's commands and for torchrun."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


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
    return {
        "args": ["bash", ROOT / "slurm" / "train.sbatch", "EPOCHS=200"],
        "cwd": tmp_path,
        "env": environment,
    }


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


@pytest.mark.parametrize("code", ["1", "143", "75"])
def test_before_the_time_limit_it_ends_the_training_and_is_requeued(job, code):
    job["env"] |= {"TENTHS": "600", "ON_TERM": code}
    process = subprocess.Popen(**job)
    while not (job["cwd"] / "started").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == 0
    assert (job["cwd"] / "scontrol.txt").read_text() == "requeue 42\n"


def test_a_run_that_finishes_after_the_signal_is_not_requeued(job):
    job["env"] |= {"TENTHS": "600", "ON_TERM": "0"}
    process = subprocess.Popen(**job)
    while not (job["cwd"] / "started").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == 0
    assert not (job["cwd"] / "scontrol.txt").exists()


def test_it_asks_slurm_for_a_signal_before_the_limit_and_for_requeueing():
    lines = (ROOT / "slurm" / "train.sbatch").read_text().splitlines()
    options = [line.partition("#SBATCH ")[2].split()[0] for line in lines if line.startswith("#SBATCH ")]
    assert {"--requeue", "--signal=B:USR1@300", "--open-mode=append"} <= set(options)
