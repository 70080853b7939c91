"""The Hugging Face Trainer with the recipe's loss, our own batches, and float16 that is float16 on a CPU too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from phi3v.training.batches import TRAINER_KEYS
from phi3v.training.batching import BatchPlan, PlannedBatches
from phi3v.training.meter import Meter


class RecipeTrainer(Trainer):
    """Trains on a `BatchPlan`; loss = mean over the examples of a step of each example's mean over its label tokens."""

    def __init__(self, *, plan: BatchPlan, meter: Meter, **arguments: Any) -> None:
        self.plan, self.meter = plan, meter
        self.step_values: Callable[[], dict[str, float]] | None = None
        super().__init__(**arguments)
        # compute_loss divides by the examples of the whole step, so nothing is left to divide.
        self.loss_is_scaled_for_ga = True
        self.sampler: PlannedBatches | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer; on a CPU accelerate takes float16 for float32 without a word, so it is switched on here."""
        super().create_accelerator_and_postprocess()
        if self.args.fp16 and self.args.device.type == "cpu" and not self.is_deepspeed_enabled:
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler("cpu")

    def get_train_dataloader(self) -> DataLoader:
        """The planned micro-batches of this process."""
        self.sampler = PlannedBatches(self.plan, self.args.process_index)
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.device.type == "cuda",
            multiprocessing_context="fork" if self.args.dataloader_num_workers else None,
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order and turns; called by `EpochCallback`."""
        assert self.sampler is not None
        self.sampler.set_epoch(epoch)
        self.train_dataset.set_epoch(epoch)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The micro-batches of a step; the number of examples they are divided by comes with each of them."""
        with self.meter.loading():
            samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return samples, None

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        return None

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # With DeepSpeed the Trainer casts every floating tensor to the compute type; 1/3 in bfloat16 is off by 0.1 %.
        weights = inputs["loss_weights"].to(self.args.device)
        prepared = super()._prepare_inputs({key: value for key, value in inputs.items() if key != "loss_weights"})
        return {**prepared, "loss_weights": weights}

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss, times W because gradients are averaged over processes."""
        counts = {key: inputs[key] for key in TRAINER_KEYS}
        outputs = model(**{key: value for key, value in inputs.items() if key not in TRAINER_KEYS})
        loss = outputs["loss"] * (self.accelerator.num_processes / counts["examples_in_step"])
        if model.training:
            self.meter.saw(counts, loss.detach())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer, with throughput and data loading beside the loss, for every tracker."""
        if "loss" in logs and self.step_values is not None:
            logs = {**logs, **self.step_values()}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The Trainer's estimate walks over all parameters at every micro-step and knows no pictures: switched off."""
        return 0
