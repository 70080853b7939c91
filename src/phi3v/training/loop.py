"""The training loop: forward, backward, clip, step, log, evaluate, save, stop, in that order.

accelerate runs the same code under DDP, DeepSpeed and mixed precision. A step is an optimizer step over the examples
of a global batch. Each process runs its micro-steps and reduces gradients only in the last one. The loss of a step is
the mean over its examples of each example's mean over its label tokens.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from phi3v.model.runtime import uses_zero
from phi3v.planning.flops import Work
from phi3v.planning.hardware import Utilisation
from phi3v.settings import FinetuneSettings
from phi3v.training.batches import BatchCounts, MicroBatch, PlannedSplit
from phi3v.training.census import LossGuard
from phi3v.training.checkpoints import TRAINING, CheckpointError
from phi3v.training.launch import StopRequest, over_processes, say
from phi3v.training.logging import Log
from phi3v.training.writer import CheckpointWriter


@dataclass
class TrainingState:
    """Progress of a job, stored in every checkpoint."""

    step: int = 0
    """Completed optimizer steps."""
    validation_losses: dict[int, float] = field(default_factory=dict)
    """Validation losses by step."""

    @property
    def best_step(self) -> int:
        """The step with the lowest validation loss, or 0."""
        finite = {step: loss for step, loss in self.validation_losses.items() if np.isfinite(loss)}
        return min(finite, key=finite.__getitem__, default=0)

    @property
    def stale_validations(self) -> int:
        """Number of validations since the lowest loss."""
        return sum(step > self.best_step for step in self.validation_losses)


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, summed over all processes."""

    step: int
    epoch: float
    loss: float
    grad_norm: float | None
    """Gradient norm before clipping."""
    learning_rate: float
    images: int
    slots: int
    """Tokens including padding."""
    work: Work
    """Examples, tokens without padding, and the other amounts that determine the FLOP."""
    seconds: float
    """Wall time of this process since the previous step, without evaluation and saving."""
    loading_seconds: float
    """Part of it that this process waited for data."""
    stop_asked: bool = False
    """Whether any process received a request to save and stop."""
    save_asked: bool = False
    """Whether --save_minutes have passed."""
    parts_written: int = 0
    """Number of processes whose part of a checkpoint is complete."""

    def line(self, utilisation: Utilisation | None = None) -> dict[str, Any]:
        """The values of a metrics.jsonl line."""
        seconds = max(self.seconds, 1e-9)
        return {
            "step": self.step,
            "epoch": self.epoch,
            "loss": self.loss,
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
            "seconds": self.seconds,
            "images_per_second": self.images / seconds,
            "tokens_per_second": self.work.tokens / seconds,
            "loading_share": self.loading_seconds / seconds,
            "padding_share": 1 - self.work.tokens / max(self.slots, 1),
            **(utilisation.of(self.work, seconds) if utilisation else {}),
        }


@dataclass
class Loop:
    """Trains a model that accelerate has prepared. Call `run` once, after `resume` if there is a checkpoint.

    `job.build` creates a loop.
    """

    settings: FinetuneSettings
    """Effective settings. `auto` is already replaced by a number."""
    accelerator: Accelerator
    module: nn.Module
    """The model, with or without adapters."""
    model: Any
    """The module as prepared by accelerate: in DDP's or DeepSpeed's wrapper, or the module itself."""
    optimizer: Any
    scheduler: Any
    training: PlannedSplit
    validation: PlannedSplit | None
    writer: CheckpointWriter
    guard: LossGuard
    total_steps: int
    warmup_steps: int
    """Effective warm-up. The default is shortened for a job with fewer steps."""
    state: TrainingState = field(default_factory=TrainingState)
    stop: StopRequest = field(default_factory=StopRequest)
    hooks: list[Callable[[StepRecord], None]] = field(default_factory=list)
    """Functions to call after every optimizer step in every process, before logging."""
    logs: list[Log] = field(default_factory=list)
    longest: tuple[int, int] = (0, 0)
    """(tokens, index in the training split) of the longest example in the last training micro-batch."""
    utilisation: Utilisation | None = None
    stopped_by_signal: bool = False
    examples: int = 0
    """Examples trained on since this start of the job, over all processes."""

    def __post_init__(self) -> None:
        self.device, self.processes = self.accelerator.device, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.is_sharded = uses_zero(self.settings)
        """Whether DeepSpeed trains. It then reduces, clips, steps and saves in its own way behind accelerate's
        interface."""
        self.trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self._random: dict[str, torch.Tensor] | None = None
        self._ended = False
        self._loading_seconds = 0.0
        self._clock = time.perf_counter()
        self._saved_at = time.monotonic()

    # The loop --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Trains from `state` to the last step, or until a signal or early stopping. A collective call."""
        self._loader = self.training.loader(self.accelerator.process_index, persistent=True)
        try:
            for log in self.logs:
                log.begin(self.state.step, self.total_steps)
            self.model.train()
            self._ended = self.state.step >= self.total_steps or self.stops_early
            while not self._ended:
                self._run_epoch()
            self.writer.finish()
            if self.settings.keep_best and not self.stopped_by_signal:
                self._load_best()
        except BaseException as error:
            # The loader's processes ignore SIGTERM, so an exiting interpreter would wait for them. They end with the
            # last reference to the loader, and the frames of an exception hold one.
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            del self._loader
            self._batches: Iterator[MicroBatch] = iter(())
            for log in self.logs:
                log.close()

    def _run_epoch(self) -> None:
        epoch, first_step = divmod(self.state.step, self.training.plan.steps_per_epoch)
        self.training.set_epoch(self._loader, epoch, first_step)
        self._batches = iter(self._loader)
        if self._random is not None:
            set_random_states(self._random, self.device)
            self._random = None
        self._clock = time.perf_counter()
        for _ in range(first_step, self.training.plan.steps_per_epoch):
            self._run_step()
            if self._ended:
                return

    def _run_step(self) -> None:
        record = self.update()
        step, last = record.step, record.step == self.total_steps
        self.examples += int(record.work.examples)
        for hook in tuple(self.hooks):  # a hook may remove itself
            hook(record)
        for log in self.logs:
            log.write(record.line(self.utilisation))
        self._ended = last
        is_best = False
        if self.validation is not None and (last or step % self.settings.eval_steps == 0):
            is_best = self.evaluate()
        if record.parts_written == self.processes:
            self.writer.seal()
        if record.stop_asked and not last:
            self.stopped_by_signal = self._ended = True
        every = self.settings.save_steps
        asked = record.stop_asked or record.save_asked or bool(every and step % every == 0)
        # After the last step comes the export, so a checkpoint would be deleted at once.
        if (asked and not last) or (is_best and self.settings.keep_best):
            self.save()

    def update(self) -> StepRecord:
        """One optimizer step on the next global batch: forward, backward, clip, step."""
        losses: list[torch.Tensor] = []
        counts: list[BatchCounts] = []
        ended = False
        while not ended:
            batch = self._next_batch()
            self.longest = batch.counts.longest
            losses.append(self.micro_step(batch))
            counts.append(batch.counts)
            ended = batch.ends_step
        grad_norm = self.accelerator.clip_grad_norm_(self.trained, self.settings.max_grad_norm)
        self.optimizer.step()
        learning_rate = self.scheduler.get_last_lr()[0]
        if not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.state.step += 1
        return self._record(losses, counts, grad_norm, learning_rate)

    def micro_step(self, batch: MicroBatch) -> torch.Tensor:
        """Forward and backward. Returns the detached `loss_of`. Gradients are reduced in the last micro-step."""
        last = self.accelerator.sync_gradients = batch.ends_step
        # Under DeepSpeed, accelerate would divide by the number of micro-steps. `loss_of` already divides.
        undivided = {"scale_wrt_gas": False} if self.is_sharded else {}
        with nullcontext() if last or self.is_sharded else self.accelerator.no_sync(self.model):
            loss = self.loss_of(batch)
            self.accelerator.backward(loss, **undivided)
        return loss.detach()

    def loss_of(self, batch: MicroBatch) -> torch.Tensor:
        """A micro-batch's share of the step's loss, times the number of processes, because gradients are averaged over
        them."""
        outputs = self.model(**batch.inputs.on(self.device))
        return outputs["loss"] * (self.processes / batch.examples_in_step)

    def evaluate(self) -> bool:
        """Logs the loss on the validation split. Returns whether it is the lowest so far. A collective call."""
        assert self.validation is not None
        start, step = time.perf_counter(), self.state.step
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.model.eval()
        with torch.no_grad():
            for batch in self.validation.loader(self.accelerator.process_index):
                total += self.loss_of(batch).double()
        self.model.train()
        loss = over_processes([float(total)], "SUM", self.device)[0] / self.processes
        self.state.validation_losses[step] = loss
        line = {"step": step, "epoch": self.training.plan.epochs_at(step), "eval_loss": loss}
        for log in self.logs:
            log.write(line | {"eval_seconds": time.perf_counter() - start})
        if self.stops_early:
            patience = self.settings.early_stopping_patience
            say(f"step {step}: stopping early, because the last {patience} validations had no lower loss")
            self._ended = True
        self._clock = time.perf_counter()
        return self.state.best_step == step

    @property
    def stops_early(self) -> bool:
        """Whether early stopping applies. The state is in checkpoints, so a resumed job stops at the same step."""
        patience = self.settings.early_stopping_patience
        return bool(patience) and self.state.stale_validations >= patience

    # Values of a step ------------------------------------------------------------------------------------------------

    def _next_batch(self) -> MicroBatch:
        """The next micro-batch. On CUDA, waiting only counts if the device is idle by then."""
        start = time.perf_counter()
        batch = next(self._batches)
        if self.device.type != "cuda" or torch.cuda.current_stream(self.device).query():
            self._loading_seconds += time.perf_counter() - start
        return batch

    def _record(
        self,
        losses: list[torch.Tensor],
        counts: list[BatchCounts],
        grad_norm: torch.Tensor | float | None,
        learning_rate: float,
    ) -> StepRecord:
        """The values of the step over all processes. Collective, so that all processes stop or save after the same
        step."""
        loss = sum(losses[1:], losses[0])
        if isinstance(grad_norm, torch.Tensor):
            own_loss, norm = torch.stack([loss, grad_norm]).tolist()  # one synchronisation with the device
        else:
            own_loss, norm = float(loss), grad_norm
        self.guard.check(self.state.step, own_loss, [name for batch in counts for name in batch.ids])
        minutes = self.settings.save_minutes
        save_asked = bool(minutes) and time.monotonic() - self._saved_at >= 60 * minutes
        flags = (self.stop.asked, save_asked, self.writer.part_written)
        own = [(batch.images, batch.slots, *astuple(batch.work)) for batch in counts]
        mean, stop, save, written, images, slots, *work = over_processes(
            [own_loss, *flags, *map(sum, zip(*own, strict=True))], "SUM", self.device
        )
        now = time.perf_counter()
        record = StepRecord(
            step=self.state.step,
            epoch=self.training.plan.epochs_at(self.state.step),
            loss=float(np.float32(mean / self.processes)),
            grad_norm=norm,
            learning_rate=learning_rate,
            images=int(images),
            slots=int(slots),
            work=Work(*work),
            seconds=now - self._clock,
            loading_seconds=self._loading_seconds,
            stop_asked=stop > 0,
            save_asked=save > 0,
            parts_written=int(written),
        )
        self._clock, self._loading_seconds = now, 0.0
        return record

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Starts writing a checkpoint of this step (`CheckpointWriter`). A collective call."""
        folder = self.writer.begin(self.state.step)
        if self.is_sharded:
            with self.writer.explained():
                self.model.save_checkpoint(str(folder))
        parts: dict[str, object] = {f"random_{self.accelerator.process_index}.pt": random_states(self.device)}
        if self.is_main:
            parts[TRAINING] = self._training_state()
        self.writer.write(parts, self.state.best_step if self.settings.keep_best else 0)
        self._saved_at, self._clock = time.monotonic(), time.perf_counter()

    def _training_state(self) -> dict[str, object]:
        values: dict[str, object] = {"state": asdict(self.state), "scheduler": self.scheduler.state_dict()}
        if self.is_sharded:
            return values
        scaler = self.accelerator.scaler
        return values | {
            "weights": {name: weight for name, weight in self.module.named_parameters() if weight.requires_grad},
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def resume(self, checkpoint: Path) -> None:
        """Restores the state of a checkpoint. With ZeRO, a collective call."""
        values = self._load_weights(checkpoint)
        self.state = TrainingState(**values["state"])
        self.scheduler.load_state_dict(values["scheduler"])
        if not self.is_sharded:
            self.optimizer.load_state_dict(values["optimizer"])
            if values["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(values["scaler"])
        own = checkpoint / f"random_{self.accelerator.process_index}.pt"
        if own.is_file():  # without ZeRO the number of processes may change
            self._random = torch.load(own, weights_only=True)

    def _load_weights(self, checkpoint: Path) -> dict[str, Any]:
        """Restores the weights, and with ZeRO the optimizer states. Returns the values in training.pt."""
        # Not memory-mapped, because the optimizer would keep parts of the file, which may be deleted later.
        values: dict[str, Any] = torch.load(checkpoint / TRAINING, map_location="cpu", weights_only=True)
        if self.is_sharded:
            if self.model.load_checkpoint(str(checkpoint))[0] is None:
                raise CheckpointError(
                    f"{checkpoint}: DeepSpeed finds no file `latest` in process {self.accelerator.process_index}; "
                    "expected a "
                    "folder that every process can read; put --output_dir on a shared file system"
                )
            return values
        parameters = dict(self.module.named_parameters())
        with torch.no_grad():
            for name, weight in values.pop("weights").items():  # freed before the optimizer copies its states
                parameters[name].copy_(weight)
        return values

    def _load_best(self) -> None:
        best = self.writer.folder / f"checkpoint-{self.state.best_step}"
        if best.is_dir():
            self._load_weights(best)
        elif self.state.best_step:
            say(
                f"{best}: the checkpoint with the lowest validation loss is missing; exporting the last weights instead"
            )


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """States of PyTorch's random generators. Training uses no others."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def set_random_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restores the random generators to the result of `random_states`."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
