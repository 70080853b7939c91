"""A loaded model, and its greedy answers to batches of prompts, left-padded. Every end token stops a row.

B = prompts of a batch, T = their padded length, V = vocabulary.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from phi3v.data.conversations import DataError
from phi3v.data.fetch import LOCK, fetch, locked_files
from phi3v.evaluation.questions import Answer
from phi3v.model.adapters import load_for_inference, processor_folder
from phi3v.model.compat import widen_float16_products
from phi3v.model.processing import Phi3VProcessor
from phi3v.model.runtime import TORCH_DTYPE, attention_implementation
from phi3v.provenance.manifest import read_json
from phi3v.settings import Compute, FinetuneSettings, Model, SettingsError, model_key, read_entries, validate
from phi3v.training.checkpoints import TRAINING

END_TOKENS = ("<|end|>", "<|endoftext|>", "</s>")
"""Ids of tokens that end an answer: 32007, 32000 and 2 of the published tokenizer. All must stop generation."""
MODELS = "config/models.yaml"
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def is_hub_id(name: str) -> bool:
    """Whether a name is OWNER/NAME or OWNER/NAME@REVISION, and no path, that is, there is no folder OWNER."""
    return not Path(name).parent.is_dir() and _HUB_ID.fullmatch(name) is not None


def hub_folder(name: str, root: Path = Path()) -> tuple[Path, Model]:
    """Folder of a hub id's weights, and its entry: from config/models.yaml if one has this URL, else created from the
    id."""
    match = _HUB_ID.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r}: expected OWNER/NAME or OWNER/NAME@REVISION")
    url, revision = f"hf://{match['repo']}", match["revision"]
    entries = read_entries([MODELS], Model, root) if (root / MODELS).is_file() else {}
    for entry, model in entries.items():
        if model.url == url and revision in (None, model.revision):
            return root / "results" / "models" / model_key(entry, model), model
    model = Model(title=name, url=url, revision=revision)
    return root / "results" / "models" / model_key(match["repo"].replace("/", "--"), model), model


def weights_folder(name: str, root: Path = Path(), may_fetch: bool = True) -> Path:
    """The folder of a checkpoint, an adapter or a hub id. Only this function of the room uses the network.

    A hub id is downloaded once to results/models, with the lock and pins of every source, so a later download gives the
    same bytes. may_fetch: whether to download a missing hub id (only one process may). Raises FileNotFoundError for a
    name that is neither a model's folder nor a hub id, SourceError (a DataError) for weights that cannot be downloaded
    or differ from their lock.
    """
    if Path(name).is_dir():
        if not any((Path(name) / file).is_file() for file in ("config.json", "adapter_config.json", TRAINING)):
            raise FileNotFoundError(
                f"--model_name_or_path {name}: contains neither config.json nor adapter_config.json; expected a "
                "checkpoint "
                "or an adapter, such as final/ of a training job"
            )
        return Path(name)
    if not is_hub_id(name):
        raise FileNotFoundError(
            f"--model_name_or_path {name}: no such folder; expected a checkpoint, an adapter, or a hub id OWNER/NAME "
            "(which must not be a folder here)"
        )
    try:
        folder, model = hub_folder(name, root)
    except SettingsError as error:
        raise DataError(f"--model_name_or_path {name}: {error}") from None
    if may_fetch and not (folder / LOCK).is_file():
        print(f"{name}: no such folder; downloading it from the hub", file=sys.stderr)
        fetch([(model.url, model.revision)], folder, kind="model", flat=True)
    locked_files(folder, model.url, model.revision)
    return folder


@dataclass(frozen=True)
class Choice:
    """First tokens of the two answers of a yes/no task."""

    positive: tuple[int, ...]
    negative: tuple[int, ...]

    def share(self, logits: torch.Tensor) -> list[float]:
        """P(positive) / (P(positive) + P(negative)) of each row. logits: [B, V]."""
        positive = torch.logsumexp(logits[:, list(self.positive)].double(), dim=1)
        negative = torch.logsumexp(logits[:, list(self.negative)].double(), dim=1)
        return torch.sigmoid(positive - negative).tolist()


def choice_of(tokenizer: PreTrainedTokenizerBase, positive: str = "yes", negative: str = "no") -> Choice | None:
    """First tokens of the two words in lower, upper and title case, with and without word boundary. None if they
    overlap."""
    # After a line break, a word has no word boundary before it.
    before = tokenizer("\n", add_special_tokens=False)["input_ids"]

    def first(word: str) -> set[int]:
        ids = set()
        for form in (word.lower(), word.capitalize(), word.upper()):
            ids.add(tokenizer(form, add_special_tokens=False)["input_ids"][0])
            ids.add(tokenizer("\n" + form, add_special_tokens=False)["input_ids"][len(before) :][0])
        return ids - {tokenizer.unk_token_id}

    yes, no = first(positive), first(negative)
    # If the boundary is a token of its own, it starts both words and does not distinguish them.
    yes, no = yes - no, no - yes
    return Choice(tuple(sorted(yes)), tuple(sorted(no))) if yes and no else None


def end_token_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig) -> list[int]:
    """Ids that stop an answer: the tokenizer's END_TOKENS, and those of the checkpoint's generation_config."""
    ids = {tokenizer.convert_tokens_to_ids(token) for token in END_TOKENS} - {None, tokenizer.unk_token_id}
    saved = generation_config.eos_token_id
    ids.update([saved] if isinstance(saved, int) else saved or ())
    return sorted(ids)


class _Watch:
    """A logits processor without effect. first: [B, V] logits of the first step. best: largest log-probability per
    step, [B]."""

    def __init__(self) -> None:
        self.first: torch.Tensor | None = None
        self.best: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits = scores.float()
        if self.first is None:
            self.first = logits
        self.best.append(logits.amax(-1) - logits.logsumexp(-1))  # greedy decoding takes this token
        return scores


def _of_training_job(folder: Path, settings: Compute, device: torch.device) -> tuple[PreTrainedModel, Phi3VProcessor]:
    """The model of TRAIN/checkpoints/checkpoint-N, with adapters merged into the unquantised base, and its
    processor."""
    from phi3v.training.job import load_model

    file = folder.resolve().parents[1] / "settings.json"
    weights = torch.load(folder / TRAINING, map_location="cpu", weights_only=True, mmap=True).get("weights")
    if weights is None or not file.is_file():
        found = "its weights are in ZeRO's shards" if weights is None else f"{file} is missing"
        raise DataError(f"{folder}: {found}; export it with scripts/export_zero.py, and use that folder")
    values = read_json(file)
    values |= {"use_lora": values["use_lora"] or values["use_qlora"], "use_qlora": False, "memory_limit_gb": None}
    values |= {"gradient_checkpointing": False, "recompute_every": 1}
    values |= settings.model_dump(include=set(Compute.model_fields))
    job = validate(FinetuneSettings, values, str(file))
    model = load_model(job, device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
    if job.use_lora:
        model = model.merge_and_unload()
    processor = Phi3VProcessor.from_pretrained(job.model_name_or_path, num_crops=job.num_crops)
    return model.to(device=device, dtype=TORCH_DTYPE[settings.dtype]).eval(), processor


@dataclass(frozen=True)
class Predictor:
    """A model in evaluation mode and its processor: from prompts and pictures to answers."""

    model: PreTrainedModel
    processor: Phi3VProcessor
    num_crops: int
    """Largest number of tiles per picture."""
    max_new_tokens: int
    """Most tokens in an answer."""
    choice: Choice | None = None
    """Set for a yes/no task. Answers then have a `choice`."""

    @classmethod
    def load(
        cls, folder: Path, settings: Compute, device: torch.device, max_new_tokens: int, num_crops: int | None = None
    ) -> Predictor:
        """Loads a checkpoint folder, an adapter folder with its base, or checkpoints/checkpoint-N of a training job.

        num_crops: None uses the checkpoint's. Raises DataError for a checkpoint-N that cannot be loaded directly.
        """
        disable_progress_bar()
        widen_float16_products(device, TORCH_DTYPE[settings.dtype])
        attention = attention_implementation(settings, device)
        if (folder / TRAINING).is_file():
            model, processor = _of_training_job(folder, settings, device)
        else:
            model = load_for_inference(folder, TORCH_DTYPE[settings.dtype], attention, device)
            processor = Phi3VProcessor.from_pretrained(processor_folder(folder))
        return cls(model, processor, num_crops or processor.image_processor.num_crops, max_new_tokens)

    @property
    def end_tokens(self) -> list[int]:
        """Ids that stop an answer."""
        return end_token_ids(self.processor.tokenizer, self.model.generation_config)

    def prepare(self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> dict[str, torch.Tensor]:
        """Left-padded model inputs on the CPU: input_ids and attention_mask [B, T], pixel_values, image_sizes."""
        return dict(
            self.processor(
                list(prompts),
                images=[list(own) for own in images] if any(images) else None,
                padding=True,
                padding_side="left",
                num_crops=self.num_crops,
                return_tensors="pt",
            )
        )

    @torch.inference_mode()
    def answer(self, inputs: dict[str, torch.Tensor]) -> list[Answer]:
        """Greedy answers to prepared inputs, with at most max_new_tokens each."""
        moved = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        if "pixel_values" in moved and moved["pixel_values"].is_floating_point():
            moved["pixel_values"] = moved["pixel_values"].to(self.model.dtype)
        watch, tokenizer, ends = _Watch(), self.processor.tokenizer, self.end_tokens
        sequences = self.model.generate(
            **moved,
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
            # The model would fail on a generated token that refers to a missing picture.
            suppress_tokens=[self.model.config.image_token_id],
            logits_processor=[watch],
        )  # [B, T + new]
        new = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        best = torch.stack(watch.best, dim=1).double().cpu()  # [B, new]
        shares: list[float] | list[None] = [None] * len(new)
        if self.choice and watch.first is not None:
            shares = [round(share, 6) for share in self.choice.share(watch.first)]
        answers = []
        for row, own, share in zip(new, best, shares, strict=True):
            stop = next((i for i, token in enumerate(row) if token in ends), len(row))
            text = tokenizer.decode(row[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            tokens = min(stop + 1, len(row))
            probability = round(math.exp(own[:tokens].mean()), 6)
            answers.append(Answer(text, tokens, probability, stop == len(row) == self.max_new_tokens, share))
        return answers
