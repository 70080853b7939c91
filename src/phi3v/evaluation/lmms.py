"""Checkpoints and adapters in lmms-eval, the harness of public benchmarks, which finds this module by its entry point.

    tests/clients/install.sh .clients lmms-eval && source .clients/lmms-eval/bin/activate
    python -m lmms_eval --model phi3v_checkpoint --model_args pretrained=results/NAME/train/ROW/final,dtype=bf16 \
        --tasks docvqa_val,pope --batch_size 8 --output_path logs

Compared with this package's evaluation in one process only. lmms-eval gives each process of `accelerate launch` its share of
the questions; a run of several processes has not been tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from phi3v.data.conversations import Turn, prompt_text
from phi3v.evaluation.generate import Predictor
from phi3v.model.runtime import compute_device
from phi3v.settings import Compute, validate

MANIFEST = ModelManifest("phi3v_checkpoint", simple_class_path="phi3v.evaluation.lmms.Phi3VCheckpoint")


class Phi3VCheckpoint(lmms):  # type: ignore[misc]
    """Greedy answers of a checkpoint or adapter folder, batched by length, equal to those of this package's
    evaluation."""

    def __init__(
        self, pretrained: str, dtype: str = "bf16", num_crops: int | None = None, batch_size: int = 1, **_: object
    ) -> None:
        """pretrained: folder. dtype: bf16, fp16 or fp32. num_crops: largest number of tiles. None: the checkpoint's.

        Raises SettingsError for another dtype.
        """
        super().__init__()
        compute = validate(Compute, {dtype: True}, "model_args")
        self.predictor = Predictor.load(Path(pretrained), compute, compute_device(compute), 1, num_crops)
        self.batch_size = int(batch_size)
        # lmms-eval counts the questions of all processes in tensors there.
        self.device = self.predictor.model.device

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers in the order of the requests, cut at the first of a task's stop strings."""
        order = sorted(
            range(len(requests)), key=lambda index: (str(requests[index].args[1]), len(requests[index].args[0]))
        )
        answers = [""] * len(requests)
        progress = tqdm(total=len(requests), desc="answers", disable=self.rank != 0)
        while order:
            options = requests[order[0]].args[1]
            chunk = [index for index in order[: self.batch_size] if requests[index].args[1] == options]
            order = order[len(chunk) :]
            predictor = replace(self.predictor, max_new_tokens=int(options.get("max_new_tokens", 1024)))
            prompts, pictures = zip(*(self._question(requests[index]) for index in chunk), strict=True)
            for index, answer in zip(chunk, predictor.answer(predictor.prepare(prompts, pictures)), strict=True):
                answers[index] = _stopped(answer.prediction, options.get("until"))
            progress.update(len(chunk))
        return answers

    def _question(self, request: Instance) -> tuple[str, list[Image.Image]]:
        """Prompt and pictures. `<image>` marks the place of a picture. Without it, pictures come before the text."""
        text, _, doc_to_visual, doc_id, task, split = request.args
        pictures = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        if wrong := next(
            (type(picture).__name__ for picture in pictures if not isinstance(picture, Image.Image)), None
        ):
            raise ValueError(
                f"task {task}, document {doc_id}: got a {wrong}; expected only pictures; choose a task without video "
                "and sound"
            )
        marks = text.count("<image>")
        for number in range(marks):
            text = text.replace("<image>", f"<|image_{number + 1}|>", 1)
        own = () if marks else ("picture",) * len(pictures)
        return prompt_text(Turn(own, text, "")), [picture.convert("RGB") for picture in pictures]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not supported. Choose the generating variant of a task."""
        raise NotImplementedError(
            "phi3v_checkpoint only supports tasks of output_type generate_until; choose the generating variant"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not supported."""
        raise NotImplementedError("phi3v_checkpoint only supports tasks with one round")


def _stopped(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first stop string."""
    for stop in [until] if isinstance(until, str) else until or []:
        text = text.partition(stop)[0] if stop else text
    return text
