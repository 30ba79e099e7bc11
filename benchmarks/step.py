"""``python -m benchmarks.step``: CPU time of a training step beside a plain PyTorch loop, and beside open_clip's own.

Three loops train the same two towers (open_clip's ViT and text transformer, small) from the same weights on the same batches
of 64, with AdamW, warm-up and cosine, in fp32:

- *ours*: ``mmrep fit`` itself, built by its command line from a config: Lightning's Trainer with every callback and logger
  that a user's run has (throughput, progress, preemption, checkpoints, watchdog...), metrics to ``metrics.csv``, a log step
  in five. Only its batches are given to it, and it does not validate.
- *plain*: forward, loss, backward, optimiser and schedule of the same module in a ``for`` loop that logs nothing.
- *open_clip*: ``open_clip_train.train.train_one_epoch`` on open_clip's ``CLIP`` with its ``ClipLoss`` and parameter groups.

They take their steps in turn in one process, one thread each, one at a time: a loop is held where it asks for its next batch,
until the two others have made their steps. A step is the CPU time from getting a batch to asking for the next one: all that
a loop does, nothing that a loader does. Pictures come prepared: theirs as normalised fp32, as its loader's workers leave
them, ours as uint8, so that our step also converts them. The figure of a side is the mean over the places in the cycle of five
of the median at that place, so that log steps count at their share. Prints the table, writes ``step.json``.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import logging
import os
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from benchmarks.measure import Row, show, write
from benchmarks.step_fit import Fit, Loader
from mmrep.batch import Batch
from mmrep.encoders.image import OpenClipImageEncoder
from mmrep.encoders.text import OpenClipTextEncoder
from mmrep.modules import PairwiseCLIP

RESULT = Path("benchmarks/results/step.json")
EMBED_DIM = 128
MODEL: dict[str, Any] = {
    "embed_dim": EMBED_DIM,
    "vision_cfg": {"image_size": 112, "patch_size": 16, "width": 128, "head_width": 32, "layers": 4},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4},
}
"""As many patches as ViT-B/32 has, and open_clip's vocabulary."""
BATCH, BATCHES, LR, WEIGHT_DECAY, WARMUP = 64, 4, 5e-4, 0.2, 10
LOG_EVERY = 5
"""What ``mmrep fit`` sets; Lightning's own default, 50, costs less."""
SIDES = ("ours", "plain", "open_clip")
LIMITS = {"plain": (1.03, 1.01), "open_clip": (1.0, 0.98)}
"""Gate and aim of ours over theirs."""
Loop = Callable[[Iterator[Any], int], None]
"""Takes prepared batches and their number, and trains on them."""


class Turns:
    """Lets loops take their steps in turn, one at a time, and notes what each step took.

    Args:
        sides: Names of the loops, in the order of their turns.
    """

    def __init__(self, sides: Sequence[str]) -> None:
        self.seconds: dict[str, list[float]] = {side: [] for side in sides}
        self._mine = {side: threading.Semaphore(0) for side in sides}
        self._next = dict(zip(sides, [*sides[1:], sides[0]], strict=True))
        self._ready = threading.Barrier(len(sides))
        self._failure: BaseException | None = None

    def batches(self, side: str, batches: Sequence[Any], count: int) -> Iterator[Any]:
        """``count`` batches, each when it is this side's turn."""
        self._ready.wait()
        if side == next(iter(self._mine)):
            self._mine[side].release()
        for batch in itertools.islice(itertools.cycle(batches), count):
            self._mine[side].acquire()
            if self._failure is not None:
                raise RuntimeError("another loop failed")
            start = time.process_time()
            yield batch
            self.seconds[side].append(time.process_time() - start)
            self._mine[self._next[side]].release()

    def run(self, loops: dict[str, Callable[[], None]]) -> None:
        """Run them, all in threads of their own: the allocator serves a process's first thread in another way.

        Raises:
            BaseException: What a loop raised.
        """
        threads = [threading.Thread(target=self._guarded, args=named, daemon=True) for named in loops.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failure is not None:
            raise self._failure

    def _guarded(self, side: str, loop: Callable[[], None]) -> None:
        torch.set_num_threads(1)
        try:
            loop()
            self._mine[self._next[side]].release()  # Lightning asks for no batch after the last
        except BaseException as error:
            self._failure = self._failure or error
            self._ready.abort()
            for gate in self._mine.values():
                gate.release()


def make_module() -> PairwiseCLIP:
    """The two towers without projection heads, as open_clip has them."""
    torch.manual_seed(0)

    def image(width: int) -> OpenClipImageEncoder:
        return OpenClipImageEncoder(width, MODEL, projection=False)

    def text(width: int) -> OpenClipTextEncoder:
        return OpenClipTextEncoder(width, MODEL, projection=False)

    encoders: dict[str, Any] = {"image": image, "text": text}
    return PairwiseCLIP(encoders, **settings())


def settings() -> dict[str, Any]:
    """Of the module, beside its encoders."""
    return {"embed_dim": EMBED_DIM, "lr": LR, "weight_decay": WEIGHT_DECAY, "warmup_steps": WARMUP}


def make_open_clip(module: PairwiseCLIP) -> nn.Module:
    """open_clip's model of the same config, with the weights of ours."""
    import open_clip

    model: nn.Module = open_clip.CLIP(**MODEL, output_dict=True)
    towers: dict[str, Any] = dict(module.model.by_modality)
    weights = {f"visual.{name}": value for name, value in towers["image"].tower.state_dict().items()}
    weights |= dict(towers["text"].tower.state_dict())
    model.load_state_dict({**weights, "logit_scale": module.model.loss.state_dict()["logit_scale"].clone()})
    return model


def make_batches(module: PairwiseCLIP) -> tuple[list[Batch], list[tuple[Tensor, Tensor]]]:
    """Random pictures and captions: for us, and as open_clip's loader gives them."""
    generator, size = torch.Generator().manual_seed(0), MODEL["vision_cfg"]["image_size"]
    length, vocabulary = MODEL["text_cfg"]["context_length"], MODEL["text_cfg"]["vocab_size"]
    image: Any = module.model.by_modality["image"]
    present = torch.ones(BATCH, dtype=torch.bool)
    ours, theirs = [], []
    for _ in range(BATCHES):
        pixels = torch.randint(0, 256, (BATCH, 3, size, size), generator=generator, dtype=torch.uint8)
        tokens = torch.randint(1, vocabulary - 2, (BATCH, length), generator=generator)
        tokens[:, 0], tokens[:, -1] = vocabulary - 2, vocabulary - 1  # start and end of a text, whose row is the text's
        keys = [str(number) for number in range(BATCH)]
        ours.append(Batch({"image": pixels, "text": tokens}, {"image": present, "text": present}, keys))
        theirs.append((image.standardize(pixels), tokens))
    return ours, theirs


def plain(module: PairwiseCLIP) -> Loop:
    """The same step, written out."""
    from mmrep.modules.optim import make_optimizer, warmup_cosine

    def run(batches: Iterator[Any], count: int) -> None:
        model = module.model.train()
        optimizer = make_optimizer("adamw", module, model.loss.not_decayed(), lr=LR, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(WARMUP, count))
        for batch in batches:
            loss = model.loss(model(batch.inputs), batch.present).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    return run


def open_clip(model: nn.Module, loss: nn.Module) -> Loop:
    """open_clip's training loop, as its command line sets it up, but for lr, betas and eps, which are ours."""
    cosine_lr = importlib.import_module("open_clip_train.scheduler").cosine_lr
    train_one_epoch = importlib.import_module("open_clip_train.train").train_one_epoch

    def run(batches: Iterator[Any], count: int) -> None:
        named = list(model.named_parameters())
        kept = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
        rest = [p for _, p in named if all(p is not other for other in kept)]
        groups = [{"params": kept, "weight_decay": 0.0}, {"params": rest, "weight_decay": WEIGHT_DECAY}]
        optimizer = torch.optim.AdamW(groups, lr=LR)
        data = {
            "train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=Loader(lambda: batches, count, BATCH))
        }
        schedule = cosine_lr(optimizer, LR, WARMUP, count)
        train_one_epoch(model, data, loss, 0, optimizer, None, schedule, None, _open_clip_options())

    return run


def _open_clip_options() -> SimpleNamespace:
    """What ``train_one_epoch`` reads of its command line, one process, fp32."""
    return SimpleNamespace(
        device="cpu",
        precision="fp32",
        distill=False,
        accum_freq=1,
        skip_scheduler=False,
        grad_clip_norm=None,
        horovod=False,
        log_every_n_steps=100,
        batch_size=BATCH,
        world_size=1,
        rank=0,
        local_rank=0,
        log_local=False,
        wandb=False,
    )


@dataclass(frozen=True)
class Run:
    """What a run of all sides gave, per side and step: CPU seconds, losses."""

    seconds: dict[str, list[float]]
    losses: dict[str, list[float]]


def run_sides(steps: int) -> Run:
    """So many steps of each side, in turn."""
    from open_clip.loss import ClipLoss

    losses: dict[str, list[Tensor]] = {side: [] for side in SIDES}
    module = make_module()
    theirs, their_loss = make_open_clip(module), ClipLoss()
    their_loss.register_forward_hook(lambda *call: losses["open_clip"].append(call[-1]["contrastive_loss"].detach()))
    ours, as_floats = make_batches(module)
    turns = Turns(SIDES)
    with tempfile.TemporaryDirectory() as folder:
        fit = Fit(Path(folder), MODEL, BATCH, **settings())
        fit.model.load_state_dict(module.state_dict())
        for side, trained in (("ours", fit.model), ("plain", module)):
            trained.model.loss.register_forward_hook(lambda *call, to=losses[side]: to.append(call[-1].loss.detach()))
        loops: dict[str, Loop] = {
            "ours": fit.train,
            "plain": plain(module),
            "open_clip": open_clip(theirs, their_loss),
        }
        prepared: dict[str, Sequence[Any]] = {"ours": ours, "plain": ours, "open_clip": as_floats}

        def start(side: str) -> Callable[[], None]:
            return lambda: loops[side](turns.batches(side, prepared[side], steps), steps)

        turns.run({side: start(side) for side in SIDES})
    return Run(turns.seconds, {side: [float(loss) for loss in found] for side, found in losses.items()})


def typical(seconds: Sequence[float]) -> float:
    """Mean over the places in the cycle of log steps of the median at that place."""
    return statistics.mean(statistics.median(seconds[place::LOG_EVERY]) for place in range(LOG_EVERY))


def spread(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Quartiles and a 95 % interval of the median of the ratios of neighbouring steps, which shared a spell of the machine."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    reach = round(0.98 * len(ratios) ** 0.5)  # ranks around the middle that hold the median in 19 samples of 20
    centre = len(ratios) // 2
    bounds = ratios[max(0, centre - reach)], ratios[min(len(ratios) - 1, centre + reach)]
    return {"q25": low, "median": middle, "q75": high, "ci95_low": bounds[0], "ci95_high": bounds[1]}


def measure(rounds: int) -> tuple[list[Row], dict[str, dict[str, float]]]:
    """Rows, and how much single steps differ. The first steps warm up, and the last one, which ends the loops, is left out."""
    warm_up = 2 * LOG_EVERY
    found = run_sides(warm_up + rounds + 1)
    seconds = {side: values[warm_up : warm_up + rounds] for side, values in found.seconds.items()}
    rows, noise = [], {}
    for side, name in (("plain", "plain PyTorch loop"), ("open_clip", "open_clip_train")):
        gate, aim = LIMITS[side]
        case = f"Training step, batch {BATCH}"
        rows.append(Row.of(case, "CPU s", typical(seconds["ours"]), typical(seconds[side]), name, gate, aim))
        noise[name] = spread(seconds["ours"], seconds[side])
    return rows, noise


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100, help="measured steps of each side")
    parser.add_argument("--out", type=Path, default=RESULT, help=f"where the JSON goes ({RESULT})")
    options = parser.parse_args(arguments)
    if options.rounds < 2 * LOG_EVERY:
        parser.error(f"--rounds {options.rounds}: at least {2 * LOG_EVERY}, two cycles of log steps")
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    rows, noise = measure(options.rounds)
    show("A training step", rows)
    for name, values in noise.items():
        print(
            f"step by step against {name}: median ratio {values['median']:.3f} (95 %: {values['ci95_low']:.3f} to "
            f"{values['ci95_high']:.3f}), quartiles {values['q25']:.3f} and {values['q75']:.3f}"
        )
    packages = ("torch", "pytorch_lightning", "open_clip_torch", "mmrep")
    write(options.out, rows, *packages, rounds=options.rounds, spread=noise)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
