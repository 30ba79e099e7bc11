"""What torchrun and srun say to a process, and contradictions between that and the config."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import yaml
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

from mmrep.cli.launch import Launch, is_first, launched
from mmrep.cli.run_folder import RunFolder
from mmrep.errors import ConfigError
from tests.multi_node.hosts import Host
from tests.multi_node.launching import as_srun, as_torchrun

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
HOSTS = (Host("10.77.0.1", "eth0", None), Host("10.77.0.2", "eth0", None))


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets variables; what a launcher may have set is gone before."""
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)

    def set_variables(values: dict[str, str]) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_variables


def trainer(**options: Any) -> Namespace:
    return Namespace(**{"devices": "auto", "num_nodes": 1, "plugins": None, "default_root_dir": None, **options})


def test_what_torchrun_started_is_told_to_lightning(environment: Any) -> None:
    environment(as_torchrun(HOSTS, node=1, local=2, per_node=4, max_restarts=3))
    assert launched() == Launch("torchrun", rank=6, nodes=2, per_node=4, repeated=True)
    assert launched().trainer_options(trainer(), Path("r")) == {"num_nodes": 2, "devices": 4}
    assert launched().trainer_options(trainer(devices=4, num_nodes=2), Path("r")) == {"num_nodes": 2}
    for devices in ("4", [0, 1, 2, 3], "0,1,2,3"):
        assert launched().trainer_options(trainer(devices=devices), Path("r")) == {"num_nodes": 2}
    for devices in (-1, "-1"):
        assert launched().trainer_options(trainer(devices=devices), Path("r")) == {"num_nodes": 2, "devices": 4}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_config_starts_under_torchrun_and_srun(path: Path, environment: Any) -> None:
    asked = trainer(**yaml.safe_load(path.read_text())["trainer"])
    for variables in (as_srun(HOSTS, 1, 0, per_node=8), as_torchrun(HOSTS, 1, 0, per_node=8)):
        environment(variables)
        options = launched().trainer_options(asked, Path("r"))
        assert options["num_nodes"] == 2 and options["devices"] == 8


def test_what_srun_started_is_told_and_lightning_does_not_requeue(environment: Any) -> None:
    environment(as_srun(HOSTS, node=1, local=0, per_node=4))
    assert launched() == Launch("srun", rank=4, nodes=2, per_node=4, repeated=False)
    options = launched().trainer_options(trainer(), Path("runs/a"))
    (plugin,) = options.pop("plugins")
    assert isinstance(plugin, SLURMEnvironment) and not plugin.auto_requeue
    assert options == {"num_nodes": 2, "devices": 4, "default_root_dir": "runs/a"}
    assert "plugins" not in launched().trainer_options(trainer(plugins=[plugin]), Path("runs/a"))
    environment({"SLURM_JOB_NAME": "interactive"})  # a shell in a job starts processes as on any machine
    assert launched() is None


def test_torchrun_inside_a_job_of_slurm_is_torchrun(environment: Any) -> None:
    environment({**as_srun(HOSTS, 1, 0), **as_torchrun(HOSTS, 0, 0)})
    assert launched() == Launch("torchrun", rank=0, nodes=2, per_node=1, repeated=False)


def test_without_a_launcher_a_config_is_one_process_on_a_cpu(environment: Any) -> None:
    assert launched() is None
    assert pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).world_size == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": "8"}, "trainer.devices=8, but torchrun started 2 nodes"),
        ({"devices": [0, 1]}, r"trainer.devices=\[0, 1\], but torchrun started 2 nodes"),
        ({"devices": 8}, "trainer.devices=8, but torchrun started 2 nodes with 4 processes each; leave it out"),
        ({"num_nodes": 3}, "trainer.num_nodes=3, but torchrun started 2 nodes"),
    ],
)
def test_contradictions_are_named(options: dict[str, Any], message: str, environment: Any) -> None:
    environment(as_torchrun(HOSTS, 0, 0, per_node=4))
    with pytest.raises(ConfigError, match=message):
        launched().trainer_options(trainer(**options), Path("r"))


def test_unequal_nodes_are_refused(environment: Any) -> None:
    environment({**as_torchrun(HOSTS, 0, 0, per_node=4), "WORLD_SIZE": "7"})
    with pytest.raises(ConfigError, match="torchrun started 7 processes on 2 nodes, unequally many"):
        launched()
    environment({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "6"})
    with pytest.raises(ConfigError, match="unequally many"):
        launched()


def test_a_job_of_tasks_without_nodes_is_refused(environment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(as_srun(HOSTS, 0, 0))
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(ConfigError, match="give --ntasks-per-node"):
        launched()


@pytest.mark.parametrize("launcher", [as_torchrun, as_srun])
def test_one_process_of_all_nodes_owns_the_run_folder(launcher: Any, environment: Any, tmp_path: Path) -> None:
    """The first process of the second node is not the first one: it would remove what the first has written."""
    earlier = tmp_path / "a" / "checkpoints" / "last.ckpt"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    folder = RunFolder(tmp_path, "a")
    environment(launcher(HOSTS, node=1, local=0, per_node=2))
    assert not is_first()
    folder.check(folder.checkpoints, overwrite=False, resume=None)
    folder.make_way(folder.checkpoints, overwrite=True)
    assert earlier.exists()
    environment(launcher(HOSTS, node=0, local=0, per_node=2))
    assert is_first()
    with pytest.raises(ConfigError, match="the run folder exists"):
        folder.check(folder.checkpoints, overwrite=False, resume=None)
    for end in (folder.put_back, folder.forget):
        folder.make_way(folder.checkpoints, overwrite=True)
        assert not earlier.exists() and (tmp_path / "a.replaced.part").exists()
        earlier.parent.mkdir(parents=True)
        end()
        assert earlier.exists() == (end == folder.put_back) and not (tmp_path / "a.replaced.part").exists()


def test_by_hand_the_first_process_is_that_of_the_first_node(environment: Any) -> None:
    environment({"NODE_RANK": "1", "LOCAL_RANK": "0"})
    assert launched() is None and not is_first()
    environment({"NODE_RANK": "0"})
    assert is_first()


@pytest.mark.parametrize(("launcher", "again"), [(as_torchrun, {"max_restarts": 1}), (as_srun, {"restarts": 1})])
def test_a_run_that_is_started_again_does_not_remove_itself(
    launcher: Any, again: dict[str, int], environment: Any, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path, "a")
    environment(launcher(HOSTS, 0, 0))
    folder.check(folder.checkpoints, overwrite=True, resume=None)
    environment(launcher(HOSTS, 0, 0, **again))
    folder.check(folder.checkpoints, overwrite=False, resume="auto")
    with pytest.raises(ConfigError, match="--overwrite would remove what it had done"):
        folder.check(folder.checkpoints, overwrite=True, resume=None)


def test_restarts_with_a_store_that_outlives_them_are_refused(environment: Any) -> None:
    environment({**as_torchrun(HOSTS, 0, 0, max_restarts=1), "TORCHELASTIC_USE_AGENT_STORE": "True"})
    with pytest.raises(ConfigError, match="export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        launched()
    environment({"TORCHELASTIC_MAX_RESTARTS": "0"})
    assert launched() is not None
