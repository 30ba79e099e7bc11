"""``mmrep fit|validate|test|predict``: LightningCLI with mmrep's module, data and run folder."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from jsonargparse import Namespace, set_parsing_settings
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback, Checkpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

import mmrep.encoders  # noqa: F401 - its classes are then known by their short names in YAML
from mmrep.cli.launch import is_first, launched
from mmrep.cli.meeting import Meeting
from mmrep.cli.messages import explain
from mmrep.cli.resume import newest_intact
from mmrep.cli.run_folder import FirstStep, RunFolder, check_writable
from mmrep.cli.same_start import SameStart
from mmrep.cli.watching import Watching
from mmrep.data.datamodule import ShardDataModule
from mmrep.errors import CheckpointError, ConfigError, MmrepError
from mmrep.files import replacing
from mmrep.interop.load import read_checkpoint
from mmrep.modules import ContrastiveModule
from mmrep.modules.callbacks.monitored import MonitoredCheckpoint
from mmrep.modules.fault_tolerance.accumulated_gradients import AccumulatedGradients
from mmrep.modules.fault_tolerance.checkpoint_io import DurableCheckpointIO
from mmrep.modules.fault_tolerance.children import WatchedLauncher
from mmrep.modules.fault_tolerance.pending_validation import PendingValidation
from mmrep.modules.fault_tolerance.preemption import PreemptedError, Preemption, StopSignals
from mmrep.modules.fault_tolerance.timed_checkpoint import TimedCheckpoint
from mmrep.modules.fault_tolerance.unfinished import Unfinished
from mmrep.modules.fault_tolerance.watchdog import BatchCount, Watchdog


def run(arguments: list[str]) -> int:
    """Run ``fit``, ``validate``, ``test`` or ``predict``."""
    _quieten()
    set_parsing_settings(config_read_mode_fsspec_enabled=False)  # or --data.path URL is downloaded and read as a config
    signals = StopSignals()
    if arguments[:1] == ["fit"]:
        signals.listen()
    try:
        with Meeting(launched(), signals.asked) as meeting:
            _check_config_files(arguments)
            TrainCLI(arguments, signals, meeting)
    except PreemptedError as stop:
        if is_first():
            print(f"mmrep: {stop}", flush=True)
    except ValueError as error:  # jsonargparse wraps what a constructor raises, once for each level of the config
        raise _own(error) or error from error
    finally:
        signals.restore()
    return 0


class TrainCLI(LightningCLI):
    """The Lightning command line over one run folder.

    Args:
        arguments: Words after ``mmrep``.
        signals: Those that ask this process to stop; by default it listens to none.
        meeting: Where the processes of a launch say that they can start; by default there is one process.
    """

    def __init__(
        self, arguments: list[str], signals: StopSignals | None = None, meeting: Meeting | None = None
    ) -> None:
        self.run_folder: RunFolder | None = None
        self._signals, self._meeting = signals or StopSignals(), meeting or Meeting(None)
        self._default_quarantine = False
        super().__init__(
            ContrastiveModule,
            ShardDataModule,
            subclass_mode_model=True,
            parser_class=TrainParser,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            trainer_defaults={"use_distributed_sampler": False, "log_every_n_steps": 5},
            auto_configure_optimizers=False,
            args=arguments,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str | None, default=None, help="Name of the run; by default the config's.")
        parser.add_argument("--runs", type=str, default="runs", help="Folder of all runs.")
        parser.add_argument("--overwrite", action="store_true", help="Replace the run folder if it exists.")
        parser.add_argument(
            "--resume", type=str | None, default=None, help="'auto' goes on from the run's last checkpoint."
        )
        parser.add_argument(
            "--wandb", action="store_true", help="Log to Weights & Biases too (WANDB_MODE=offline works)."
        )
        parser.add_argument("--tensorboard", action="store_true", help="Log to TensorBoard too.")
        parser.add_argument("--project", type=str, default="mmrep", help="Project at Weights & Biases.")
        parser.add_argument(
            "--dead_after", type=float, default=35.0, help="Seconds without a sign of life of a rank, before all end."
        )
        parser.add_argument(
            "--hang_after", type=float, default=1800.0, help="Seconds that ranks wait for one that does not come."
        )
        parser.add_argument(
            "--checkpoint_minutes", type=float, default=30.0, help="A checkpoint at least so often; 0 for none by time."
        )
        parser.add_lightning_class_args(MonitoredCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.filename": "epoch={epoch}-step={step}"})
        parser.set_defaults({"checkpoint.auto_insert_metric_name": False})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning warns that sys.argv is not what it parses
            super().parse_arguments(parser, args)
        options: Namespace = self.config[self.config.subcommand]
        self._arguments: list[str] = args
        if options.ckpt_path:
            if not Path(options.ckpt_path).is_file():
                raise CheckpointError("no such checkpoint", where=options.ckpt_path)
            read_checkpoint(options.ckpt_path)  # refuses what is not safe and whole, before Lightning reads it

    def before_instantiate_classes(self) -> None:
        options: Namespace = self.config[self.subcommand]
        name = options.name or next((Path(f).stem for f in _config_files(self._arguments)), "run")
        self.run_folder = RunFolder(Path(options.runs), name)
        self._dirpath = options.checkpoint.dirpath
        options.checkpoint.dirpath = self._dirpath or str(self.run_folder.checkpoints)
        folder = Path(options.checkpoint.dirpath)
        if self.subcommand == "fit":
            self.run_folder.check(
                folder, overwrite=options.overwrite, resume=options.resume, checkpoint=options.ckpt_path
            )
            options.name = name
            if options.data.quarantine is None and not options.trainer.fast_dev_run:
                self._default_quarantine = True
                options.data.quarantine = str(self.run_folder.path / "quarantine.csv")
            check_writable(folder)
            found = newest_intact(folder) if options.resume else None
            if found is not None:  # before --ckpt_path, which is where the first start begins, and no later one
                options.ckpt_path = str(found)

    def instantiate_classes(self) -> None:
        """Tell in one line what Lightning refuses, as an option of the trainer, and show where a user's class fails."""
        try:
            super().instantiate_classes()
            return
        except (MisconfigurationException, ValueError) as error:
            told = _told(error)
        raise told  # with no word of what jsonargparse makes of it

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        options: Namespace = self.config[self.subcommand]
        assert self.run_folder is not None
        chosen, launch = options.trainer, launched()
        _check_numbers(options)
        if launch is not None:
            kwargs |= launch.trainer_options(chosen, self.run_folder.path)
        self.watching = Watching(options, str(self.subcommand), self.run_folder)
        kwargs |= self.watching.trainer_options()
        trainer = super().instantiate_trainer(**kwargs)
        by_time = self.subcommand == "fit" and not isinstance(chosen.val_check_interval, int | float | None)
        if by_time and trainer.num_devices * trainer.num_nodes > 1:
            raise ConfigError(
                "each rank would validate by its own clock",
                where="trainer.val_check_interval",
                fix="give a number of steps, with trainer.check_val_every_n_epoch: null to count over the epochs",
            )
        self._first_step = FirstStep(self.run_folder)
        self.watchdog = Watchdog(options.dead_after, options.hang_after)
        keeping = self._against_faults(trainer)
        self.watching.add_to(trainer)
        # The watchdog comes before all that may wait for other ranks when one has failed.
        first: list[Callback] = [SameStart(options.ckpt_path, options.as_dict()), self.watchdog, self._first_step]
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets the list without declaring it
        callbacks[:] = [*first, *callbacks, *keeping, BatchCount(self.watchdog)]
        return trainer

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> pl.Trainer:
        """Without ``trainer.enable_checkpointing`` Lightning takes no callback that writes checkpoints, nor the run's own."""
        if config["enable_checkpointing"] is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
        return super()._instantiate_trainer(config, callbacks)

    def _against_faults(self, trainer: pl.Trainer) -> list[Callback]:
        """What keeps a run's work when a signal, a dead rank or a full disk ends it: see docs/faults.md."""
        options, strategy = self.config[self.subcommand], trainer.strategy
        if isinstance(strategy, DDPStrategy) and strategy._timeout == timedelta(minutes=30):  # nobody set it
            strategy._timeout = timedelta(seconds=options.hang_after)
        if type(strategy.launcher) is _SubprocessScriptLauncher:
            strategy._launcher = WatchedLauncher(strategy.launcher, self.watchdog)
        if self.subcommand != "fit":
            return []
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = DurableCheckpointIO()
        self._signals.take_over(trainer)
        folder, minutes = Path(options.checkpoint.dirpath), options.checkpoint_minutes
        by_time = minutes > 0 and options.trainer.enable_checkpointing is not False and not options.trainer.fast_dev_run
        timed = [TimedCheckpoint(folder, timedelta(minutes=minutes))] if by_time else []
        keeping = [PendingValidation(), AccumulatedGradients(), *timed, Preemption(self._signals, folder)]
        assert self.run_folder is not None
        return keeping if options.trainer.fast_dev_run else [Unfinished(self.run_folder.path / "model"), *keeping]

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            self._run_and_keep(subcommand)
        except Exception as error:
            lost = self.watchdog.error(error)
            if lost is not None:
                raise lost from error
            if not self._first_step.made and _by_lightning(error):
                raise _refusal(error) from error
            raise
        finally:
            self.watchdog.close()

    def _run_and_keep(self, subcommand: str) -> None:
        """What ends before its first step, by an error or a signal, replaces no earlier run. See also `after_fit`."""
        assert self.run_folder is not None
        try:
            super()._run_subcommand(subcommand)
        finally:
            self.run_folder.put_back()

    def after_instantiate_classes(self) -> None:
        """Find out that a run cannot start before it writes anything. What only Lightning finds out removes no earlier run
        either: see `FirstStep`."""
        options: Namespace = self.config[self.subcommand]
        if options.ckpt_path:
            self.model.check_checkpoint(read_checkpoint(options.ckpt_path, mapped=True), options.ckpt_path)
        self.datamodule.check(self.model.model.by_modality, str(self.subcommand))
        self._meeting.all_ready(options.hang_after)
        if self.subcommand == "fit" and self.run_folder is not None and not options.trainer.fast_dev_run:
            self.run_folder.make_way(Path(options.checkpoint.dirpath), overwrite=options.overwrite)
        # What belongs to this start and not to the run stays out of config.yaml: started again under another name, it must
        # neither replace this run nor write into its folder.
        options.overwrite, options.resume, options.ckpt_path = False, None, None
        options.checkpoint.dirpath = self._dirpath
        if self._default_quarantine:
            options.data.quarantine = None

    def after_fit(self) -> None:
        """Leave the trained model in the run folder: the best checkpoint's weights where one metric is watched.

        Raises:
            CheckpointError: If the last checkpoint, or the model, could not be written.
        """
        assert self.run_folder is not None
        if self.trainer.fast_dev_run or not self.trainer.is_global_zero:  # type: ignore[attr-defined]  # set by a connector
            return
        if self.run_folder.put_back():
            return
        folder, metrics = self.run_folder.path / "model", self.run_folder.path / "metrics.csv"
        if folder.exists():  # the first step would have set it aside
            print(f"nothing was left to train; model in {folder}")
            return
        checkpoints = self.trainer.strategy.checkpoint_io
        if isinstance(checkpoints, DurableCheckpointIO):
            checkpoints.check()
        best = self._best_checkpoint()
        if best:
            self.model.load_state_dict(read_checkpoint(best)["state_dict"])
        with replacing(folder) as part:
            self.model.model.save_pretrained(part)
        self.watching.print_report()
        written = f", metrics in {metrics}" if metrics.exists() else ""
        print(f"model in {folder}{' (best checkpoint)' if best else ''}{written}")

    def _best_checkpoint(self) -> str:
        """By --checkpoint.monitor, or else by that of a callback of the user's own; empty where nothing is watched."""
        own = self._get(self.config_init, "checkpoint")
        for callback in sorted(self.trainer.checkpoint_callbacks, key=lambda callback: callback is not own):
            best = getattr(callback, "best_model_path", "") if getattr(callback, "monitor", None) else ""
            if Path(best).is_file():  # a full disk may have kept it from being written
                return str(best)
        return ""

    def before_predict(self) -> None:
        from mmrep.cli.predictions import PredictionWriter

        assert self.run_folder is not None
        self.trainer.callbacks.append(PredictionWriter(self.run_folder.path / "predictions"))  # type: ignore[attr-defined]  # as above


class TrainParser(LightningArgumentParser):
    """Answers a wrong key or class in a few lines, with the nearest right one, instead of a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise ConfigError(explain(message, self)) from ex


def _own(error: BaseException) -> MmrepError | None:
    """Our error behind one that was raised from it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, MmrepError):
        cause = cause.__cause__
    return cause


def _told(error: BaseException) -> BaseException:
    """What to raise for an error of a constructor: our own, what Lightning or jsonargparse refuses as one line, or else that of
    the user's code, with its traceback. jsonargparse wraps each, once for each level of the config."""
    cause: BaseException | None = error
    while cause is not None and _raised_in(cause).startswith("jsonargparse."):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return _own(error) or _refusal(error)
    return _own(error) or (_refusal(cause) if _by_lightning(cause) else cause)


def _refusal(error: BaseException) -> ConfigError:
    text = " ".join(str(error).split()) or type(error).__name__
    return ConfigError(text if len(text) < 400 else text[:400] + " ...")


def _by_lightning(error: BaseException) -> bool:
    """Whether Lightning itself refuses something, and not code that it calls, whose traceback is needed."""
    lightning = _raised_in(error).startswith(("pytorch_lightning.", "lightning_fabric."))
    return lightning and isinstance(error, (MisconfigurationException, ValueError))


def _raised_in(error: BaseException) -> str:
    """Name of the module."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))


def _check_numbers(options: Namespace) -> None:
    """Numbers that Lightning and torch take, and fail by in the middle of a run's start.

    Raises:
        ConfigError: If one is too small.
    """
    leasts = {"data.num_workers": 0, "trainer.accumulate_grad_batches": 1, "trainer.val_check_interval": 1}
    for name, least in leasts.items():
        value = options[name]
        if isinstance(value, int) and value < least:
            raise ConfigError(f"{value} is too small", where=name, fix=f"give {least} or more")


def _config_files(arguments: list[str]) -> Iterable[str]:
    """The values of all --config options."""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if word in ("--config", "-c"):
            yield following
        elif word.startswith("--config="):
            yield word.removeprefix("--config=")


def _check_config_files(arguments: list[str]) -> None:
    missing = [file for file in _config_files(arguments) if not Path(file).is_file()]
    if missing:
        raise ConfigError("no such config file", where=missing[0], fix="the ones that come with mmrep are in configs/")


def _quieten() -> None:
    """Silence what says nothing about the user's run."""
    for category in ("jsonargparse", "pytorch_lightning", "lightning_fabric", "torch"):
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=f"{category}.*")
    for message in (
        ".*does not have many workers.*",
        ".*litlogger.*",
        ".*Experiment logs directory.*",
        ".*barrier.*device.*",
        ".*LeafSpec.*",
        ".*It is recommended to use .self.log.*sync_dist.*",  # these are computed from all ranks' rows already
        ".*custom batch sampler `PlanSampler` for prediction.*",
        ".*`IterableDataset` has `__len__` defined.*",  # a stream's workers share its batches
        ".*Total length of `list` across ranks is zero.*",  # a stream that is not validated
    ):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    for name in ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
