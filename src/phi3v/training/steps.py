"""What happens at each optimizer step beside the update: counts, census, stop signals, losses that are no numbers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from phi3v.planning.utilisation import Utilisation
from phi3v.provenance.manifest import write_json
from phi3v.settings import FinetuneSettings
from phi3v.training.census import Census
from phi3v.training.lock import FolderLock, LockedError
from phi3v.training.meter import StepCounts
from phi3v.training.observe import Observer
from phi3v.training.signals import StopRequest
from phi3v.training.watching import say


class NotANumberError(RuntimeError):
    """The loss was NaN or infinite for several steps in a row."""


class StepCallback(TrainerCallback):
    """Drives epoch order, meter, census and stop requests; one for each process."""

    def __init__(
        self,
        trainer: Any,
        folder: Path,
        stop: StopRequest,
        census: Census | None = None,
        observer: Observer | None = None,
        lock: FolderLock | None = None,
        utilisation: Utilisation | None = None,
        settings: FinetuneSettings | None = None,
    ) -> None:
        self.trainer, self.folder, self.stop = trainer, folder, stop
        self.census, self.observer, self.lock = census, observer, lock
        self.utilisation = utilisation
        self.nan_patience = settings.nan_patience if settings else 3
        self.save_steps = settings.save_steps if settings else 0
        self.save_seconds = settings.save_minutes * 60 if settings else 0.0
        self.eval_patience = settings.early_stopping_patience if settings else 0
        self.counts: StepCounts | None = None
        self.stopped_by_signal = False
        self.examples = 0
        """Examples trained on by this start of the job, over all processes."""
        self._collapse_told = False
        self._bad_steps = 0
        self._bad_ids: list[list[str]] = []
        self._saved_at = time.monotonic()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.set_epoch(state.global_step // self.trainer.plan.steps_per_epoch)
        self.trainer.meter.restart_clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        meter = self.trainer.meter
        if self.lock is not None and self.lock.lost:
            raise LockedError(f"{self.folder}: another job took this folder over; nothing more is written from here")
        self._check_loss(meter)
        if args.fp16:
            self._check_scale(state.global_step)
        minutes_are_up = bool(self.save_seconds) and time.monotonic() - self._saved_at >= self.save_seconds
        self.counts = meter.finish_step(self.stop.asked, minutes_are_up)
        self.examples += self.counts.examples
        if self.census is not None:
            self.census.finish(args.device, pictures_seen=self.counts.images > 0)
            if state.is_world_process_zero:
                write_json(self.folder / "census.json", self.census.result())
            self.census = None
        if self.observer is not None:
            self.observer.remove()
        if self.counts.stop_asked and state.global_step < state.max_steps:
            self.stopped_by_signal = True
            control.should_save = control.should_training_stop = True
        if self.counts.save_asked or (self.save_steps and state.global_step % self.save_steps == 0):
            # The last step is followed by the export; a checkpoint of it would be removed at once.
            control.should_save = control.should_save or state.global_step < state.max_steps

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved_at = time.monotonic()
        self.trainer.meter.restart_clock()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.meter.restart_clock()
        losses = [line["eval_loss"] for line in state.log_history if "eval_loss" in line]
        if self.eval_patience and stale_for(losses) >= self.eval_patience:
            say(f"step {state.global_step}: no lower validation loss for {self.eval_patience} times: stopping early")
            control.should_training_stop = True

    def values(self) -> dict[str, float | None]:
        """What the step adds to the Trainer's log."""
        assert self.counts is not None
        seconds = max(self.counts.seconds, 1e-9)
        return {
            "seconds": self.counts.seconds,
            "images_per_second": self.counts.images / seconds,
            "tokens_per_second": self.counts.tokens / seconds,
            "loading_share": self.counts.loading_seconds / seconds,
            "padding_share": 1 - self.counts.tokens / max(self.counts.slots, 1),
            **(self.utilisation.of(self.counts.work, seconds) if self.utilisation else {}),
        }

    def _check_scale(self, step: int) -> None:
        """Name a float16 loss scale that has collapsed: below 1, gradients overflow whatever it is."""
        engine = self.trainer.model_wrapped
        scaler = self.trainer.accelerator.scaler
        scale = scaler.get_scale() if scaler is not None else getattr(engine.optimizer, "cur_scale", None)
        if scale is not None and scale < 1 and not self._collapse_told:
            self._collapse_told = True
            say(
                f"step {step}: the float16 loss scale has collapsed to {scale:g}, gradients overflow at any: use --bf16"
            )

    def _check_loss(self, meter: Any) -> None:
        """Raises NotANumberError after `nan_patience` bad steps in a row on this process."""
        total = torch.stack(meter.losses).sum() if meter.losses else torch.zeros(())
        if bool(torch.isfinite(total)):
            self._bad_steps, self._bad_ids = 0, []
            return
        self._bad_steps += 1
        self._bad_ids.append(list(meter.ids))
        if self._bad_steps < self.nan_patience:
            return
        path = self.folder / f"bad_examples.rank{self.trainer.args.process_index}.json"
        write_json(path, {"step": self.trainer.state.global_step, "ids": self._bad_ids})
        raise NotANumberError(
            f"step {self.trainer.state.global_step}: the loss was not a finite number in {self._bad_steps} steps in "
            f"a row; the examples of these steps are in {path}. What usually helps: a lower --learning_rate, --bf16 in "
            "place of --fp16, or leaving these examples out."
        )


def stale_for(losses: list[float]) -> int:
    """How many of the last validations brought no new lowest loss."""
    best = min(range(len(losses)), key=losses.__getitem__)
    return len(losses) - 1 - best
