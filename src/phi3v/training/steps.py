"""What happens at each optimizer step beside the update: counts, census, stop signals, losses that are no numbers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from phi3v.manifest import write_json
from phi3v.training.census import Census
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
        nan_patience: int = 3,
        save_minutes: float = 0,
    ) -> None:
        self.trainer, self.folder, self.stop = trainer, folder, stop
        self.census, self.observer, self.nan_patience = census, observer, nan_patience
        self.save_seconds = save_minutes * 60
        self.counts: StepCounts | None = None
        self.stopped_by_signal = False
        self.examples = 0
        """Examples trained on by this start of the job, over all processes."""
        self._bad_steps = 0
        self._bad_ids: list[list[str]] = []
        self._saved_at = time.monotonic()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.set_epoch(state.global_step // self.trainer.plan.steps_per_epoch)
        self.trainer.meter.restart_clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        meter = self.trainer.meter
        self._check_loss(meter)
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
        if self.counts.save_asked:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved_at = time.monotonic()
        self.trainer.meter.restart_clock()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.meter.restart_clock()

    def values(self) -> dict[str, float]:
        """What the step adds to the Trainer's log."""
        assert self.counts is not None
        seconds = max(self.counts.seconds, 1e-9)
        return {
            "seconds": self.counts.seconds,
            "images_per_second": self.counts.images / seconds,
            "tokens_per_second": self.counts.tokens / seconds,
            "loading_share": self.counts.loading_seconds / seconds,
        }

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
            f"step {self.trainer.state.global_step}: the loss was not a finite number in {self._bad_steps} steps in a row;"
            f" the examples of these steps are in {path}. A lower --learning_rate, --bf16 in place of --fp16, or leaving "
            "these examples out are what usually helps."
        )


def note_scale(scale: float, step: int) -> None:
    """Name a float16 loss scale that has collapsed; at 1 and below gradients vanish rather than overflow."""
    if scale < 1:
        say(f"step {step}: the float16 loss scale has collapsed to {scale:g}: gradients overflow whatever it is; use --bf16")
