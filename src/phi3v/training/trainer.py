"""The Hugging Face Trainer with the recipe's loss, our own batches, whole checkpoints, and float16 that is float16."""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerControl, TrainingArguments

from phi3v.training import checkpoints
from phi3v.training.batches import TRAINER_KEYS, model_inputs
from phi3v.training.batching import BatchPlan, PlannedBatches
from phi3v.training.checkpoints import CheckpointError
from phi3v.training.loading import StepBatches, batch_loader
from phi3v.training.meter import Meter

Own = TypeVar("Own")


class OneDeviceArguments(TrainingArguments):
    """The Trainer's arguments for a process that computes on one GPU, however many the machine has."""

    @property
    def n_gpu(self) -> int:
        """At most 1: with more the Trainer would cut each batch over all GPUs if it is alone (nn.DataParallel)."""
        return min(1, int(super().n_gpu))


class RecipeTrainer(Trainer):
    """Trains on a `BatchPlan`; loss = mean over the examples of a step of each example's mean over its label tokens."""

    control: TrainerControl

    def __init__(
        self, *, plan: BatchPlan, meter: Meter, eval_plan: BatchPlan | None = None, eval_collator: Any = None,
        keep_checkpoints: int = 2, **arguments: Any,
    ) -> None:  # fmt: skip
        self.plan, self.meter, self.eval_plan, self.eval_collator = plan, meter, eval_plan, eval_collator
        self.keep_checkpoints = keep_checkpoints
        self.step_values: Callable[[], dict[str, float | None]] | None = None
        """What a step adds to the log."""
        self.fingerprint: dict[str, Any] = {}
        """Settings, data and base weights that a checkpoint belongs to; known to the first process."""
        self.sampler: PlannedBatches | None = None
        self._writing: Path | None = None
        super().__init__(**arguments)
        # compute_loss divides by the examples of the whole step, so nothing is left to divide.
        self.loss_is_scaled_for_ga = True

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer; on a CPU accelerate takes float16 for float32 without a word, so it is switched on here."""
        super().create_accelerator_and_postprocess()
        if self.args.fp16 and self.args.device.type == "cpu" and not self.is_deepspeed_enabled:
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler("cpu")

    def get_train_dataloader(self) -> DataLoader:
        """The planned micro-batches of this process."""
        self.sampler = PlannedBatches(self.plan, self.args.process_index)
        return self._loader(self.train_dataset, self.sampler, self.data_collator, persistent=True)

    def _loader(self, dataset: Any, sampler: PlannedBatches, collator: Any, persistent: bool = False) -> DataLoader:
        return batch_loader(
            dataset, sampler, collator, self.args.dataloader_num_workers, self.args.device.type == "cuda", persistent
        )

    def train(self, *arguments: Any, **more: Any) -> Any:
        """As the Trainer; the loader's processes end with it, also after an error, whose frames hold the loader.

        They ignore SIGTERM, so an interpreter that exits while they are there would wait for them for ever.
        """
        try:
            return super().train(*arguments, **more)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            self.callback_handler.train_dataloader = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order and turns."""
        assert self.sampler is not None
        self.sampler.set_epoch(epoch)
        self.train_dataset.set_epoch(epoch)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[StepBatches, None]:  # type: ignore[override]  # the Trainer needs its length and one pass over it
        """The micro-batches of a step; the number of examples they are divided by comes with each of them."""
        return StepBatches(epoch_iterator, num_batches, self.meter), None

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # In one copy, and without the Trainer's cast of every floating tensor to DeepSpeed's compute type: 1/3 as a
        # loss weight is off by 0.1 % in bfloat16.
        return {**model_inputs(inputs, self.args.device), **{key: inputs[key] for key in TRAINER_KEYS}}

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

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The same loss on the validation split; a collective call."""
        assert self.eval_plan is not None
        start = time.perf_counter()
        loader = self._loader(
            self.eval_dataset, PlannedBatches(self.eval_plan, self.args.process_index), self.eval_collator
        )
        model = self.model_wrapped
        model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        with torch.no_grad():
            for inputs in loader:
                total += self.compute_loss(model, self._prepare_inputs(inputs)).double()
        model.train()
        if dist.is_initialized():
            dist.all_reduce(total)
        loss = float(total) / self.accelerator.num_processes
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_seconds": time.perf_counter() - start}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer, with throughput and data loading beside the loss, for every tracker."""
        if "loss" in logs and self.step_values is not None:
            # Trackers take numbers only: a peak that is not known stays away.
            logs = {**logs, **{name: value for name, value in self.step_values().items() if value is not None}}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The Trainer's estimate walks over all parameters at every micro-step and knows no pictures: switched off."""
        return 0

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # With save_strategy "best" the Trainer forgets a save that was asked for in the same step.
        return bool(super()._determine_best_metric(metrics, trial)) or self.control.should_save

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing or self.args.output_dir)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """The Trainer's checkpoint, written aside and named only when it is whole; a collective call."""
        folder, step = Path(self.args.output_dir), self.state.global_step
        writing, name = folder / checkpoints.WRITING, f"checkpoint-{step}"
        if self.args.process_index == 0:
            shutil.rmtree(writing, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._writing = writing
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.state.best_global_step:
                self.state.best_model_checkpoint = str(folder / f"checkpoint-{self.state.best_global_step}")
                if self.args.process_index == 0:
                    self.state.save_to_json(str(writing / name / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
            listings = self._everyones(checkpoints.names_of(writing / name))
            share = checkpoints.share_of(listings, self.args.process_index, self.args.world_size)
            digests = self._everyones(checkpoints.digest_and_sync(writing / name, share))
            files = {file: facts for part in digests for file, facts in part.items()}
            if self.args.process_index == 0:
                checkpoints.seal(writing / name, folder / name, files, step, self.args.world_size, self.fingerprint)
                best = self.state.best_model_checkpoint
                checkpoints.rotate(folder, self.keep_checkpoints, Path(best) if best else None)
        except Exception as error:
            free = shutil.disk_usage(folder).free / 1e9
            raise CheckpointError(
                f"step {step}: {folder / name} could not be written ({error}); {free:.2f} GB are free there. "
                "Checkpoints written before are untouched: the same command goes on from the newest"
            ) from error
        finally:
            self._writing = None
        self.accelerator.wait_for_everyone()

    def _everyones(self, own: Own) -> list[Own]:
        """What each process holds, by rank; a collective call."""
        if self.args.world_size == 1:
            return [own]
        found: list[Any] = [None] * self.args.world_size
        dist.all_gather_object(found, own)
        return found

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The weights of a checkpoint; DeepSpeed's own files hold them already, so they are not written twice."""
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not hasattr(self.model, "peft_config"):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            # lm_head is a target, but its own weights stay the base checkpoint's.
            self.model.save_pretrained(output_dir, save_embedding_layers=False)
