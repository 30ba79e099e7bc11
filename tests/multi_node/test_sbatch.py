"""The template for SLURM, with a script in the place of srun and of scontrol."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

TEMPLATE = Path(__file__).parents[2] / "configs" / "slurm" / "fit.sbatch"
FINISHES = "mkdir -p runs/mine/model && touch runs/mine/model/config.json"
STOPS = "mkdir -p runs/mine/checkpoints && touch runs/mine/checkpoints/stopped.ckpt"


def submit(folder: Path, srun: str, *words: str) -> tuple[int, list[str], list[str]]:
    """Run the script as SLURM does; gives its exit code, what it called srun with, and scontrol."""
    (folder / "bin").mkdir()
    for name, body in (("srun", srun), ("scontrol", "true")):
        script = folder / "bin" / name
        script.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {folder}/{name}.txt\n{body}\n')
        script.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_CPUS_PER_TASK": "8",
    }
    result = subprocess.run(["bash", TEMPLATE, *words], cwd=folder, env=environment, capture_output=True, text=True)
    called = [
        (folder / f"{name}.txt").read_text().splitlines() if (folder / f"{name}.txt").exists() else []
        for name in ("srun", "scontrol")
    ]
    return result.returncode, called[0], called[1]


def test_a_finished_run_is_not_started_again(tmp_path: Path) -> None:
    code, srun, scontrol = submit(tmp_path, FINISHES, "my.yaml", "mine", "--data.path", "a b")
    command = ["--kill-on-bad-exit=1", "python", "-m", "mmrep", "fit", "--config", "my.yaml"]
    assert srun == [*command, "--runs", "runs", "--name", "mine", "--resume", "auto", "--data.path", "a b"]
    assert code == 0 and scontrol == []
    assert not list((tmp_path / "runs").glob(".started*"))


def test_a_run_that_was_told_to_stop_is_put_into_the_queue_again(tmp_path: Path) -> None:
    code, _, scontrol = submit(tmp_path, STOPS, "my.yaml", "mine")
    assert code == 0 and scontrol == ["requeue", "4711"]


@pytest.mark.parametrize("srun", ["true", FINISHES])
def test_a_run_that_ended_in_another_way_is_not_started_again(srun: str, tmp_path: Path) -> None:
    """``--trainer.fast_dev_run true``, say, writes no model and would begin anew without end."""
    earlier = tmp_path / "runs" / "mine" / "checkpoints" / "stopped.ckpt"
    earlier.parent.mkdir(parents=True)
    earlier.touch()  # of the start before
    os.utime(earlier, (0, 0))
    code, _, scontrol = submit(tmp_path, srun, "my.yaml", "mine")
    assert code == 0 and scontrol == []


@pytest.mark.parametrize("words", [["--name", "other"], ["--name=other"], ["--runs", "elsewhere"]])
def test_what_would_hide_the_run_from_the_script_is_refused(words: list[str], tmp_path: Path) -> None:
    code, srun, scontrol = submit(tmp_path, STOPS, "my.yaml", "mine", *words)
    assert code == 2 and srun == [] and scontrol == []


@pytest.mark.parametrize("srun", ["exit 3", f"{STOPS}; exit 3"])
def test_a_run_that_failed_is_not_started_again(srun: str, tmp_path: Path) -> None:
    code, _, scontrol = submit(tmp_path, srun, "my.yaml", "mine")
    assert code == 3 and scontrol == []


def test_it_asks_for_a_config_and_a_name(tmp_path: Path) -> None:
    code, srun, _ = submit(tmp_path, "true", "my.yaml")
    assert code != 0 and srun == []


def test_its_options_are_those_that_lightning_can_run_with() -> None:
    lines = [
        line.removeprefix("#SBATCH --") for line in TEMPLATE.read_text().splitlines() if line.startswith("#SBATCH")
    ]
    options = dict(line.split("=", 1) if "=" in line else (line, "") for line in lines)
    assert options["job-name"] not in ("bash", "interactive")  # Lightning then takes it for a shell
    assert "ntasks" not in options and options["ntasks-per-node"] == options["gpus-per-node"]
    assert "requeue" in options and options["signal"].startswith("USR1@") and options["open-mode"] == "append"
