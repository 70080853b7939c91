"""Greedy answers to a batch of prompts: left padded, every end token stops a row, the first token's logits kept on request.

B = prompts of a batch, T = their padded length, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

END_TOKENS = ("<|end|>", "<|endoftext|>", "</s>")
"""Marks that end an answer: 32007, 32000 and 2 of the published tokenizer. Each must stop, or answers run to the limit."""


@dataclass(frozen=True)
class Answer:
    """One prompt's answer."""

    text: str
    tokens: int
    """Generated tokens, the one that ended it included."""
    choice: float | None = None
    """P(positive) / (P(positive) + P(negative)) of the first token."""


@dataclass(frozen=True)
class Choice:
    """First tokens of the two answers of a yes/no task."""

    positive: tuple[int, ...]
    negative: tuple[int, ...]


def end_token_ids(tokenizer: Any, generation_config: Any = None) -> list[int]:
    """Ids that stop an answer: END_TOKENS that the tokenizer has, and those of the checkpoint's generation_config."""
    known = {tokenizer.convert_tokens_to_ids(token) for token in END_TOKENS} - {None, tokenizer.unk_token_id}
    saved = getattr(generation_config, "eos_token_id", None)
    known.update([saved] if isinstance(saved, int) else saved or ())
    return sorted(known)


def choice_of(tokenizer: Any, positive: str = "yes", negative: str = "no") -> Choice | None:
    """First tokens of the two words, in any case, with and without a word boundary; None where one token starts both."""

    def first(word: str) -> set[int]:
        ids = set()
        for form in (word.lower(), word.capitalize(), word.upper()):
            ids.add(tokenizer(form, add_special_tokens=False)["input_ids"][0])
            # After a line break the same word has no word boundary in front of it.
            before = tokenizer("\n", add_special_tokens=False)["input_ids"]
            ids.add(tokenizer("\n" + form, add_special_tokens=False)["input_ids"][len(before) :][0])
        return ids - {tokenizer.unk_token_id}

    yes, no = first(positive), first(negative)
    # A boundary that is a token of its own starts both words and says nothing.
    yes, no = yes - no, no - yes
    return Choice(tuple(sorted(yes)), tuple(sorted(no))) if yes and no else None


class _FirstLogits:
    """A logits processor that keeps the first step's logits and changes nothing."""

    def __init__(self) -> None:
        self.logits: torch.Tensor | None = None  # [B, V]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.logits is None:
            self.logits = scores.float()
        return scores


@torch.inference_mode()
def generate(
    model: Any,
    processor: Any,
    prompts: Sequence[str],
    images: Sequence[Sequence[Any]],
    *,
    num_crops: int,
    max_new_tokens: int,
    end_tokens: Sequence[int],
    choice: Choice | None = None,
) -> list[Answer]:
    """Greedy answers of B prompts with their pictures (PIL), at most max_new_tokens each."""
    inputs = prepare(processor, prompts, images, num_crops)
    return answer(
        model, processor.tokenizer, inputs, max_new_tokens=max_new_tokens, end_tokens=end_tokens, choice=choice
    )


def prepare(
    processor: Any, prompts: Sequence[str], images: Sequence[Sequence[Any]], num_crops: int
) -> dict[str, torch.Tensor]:
    """Left-padded model inputs on the CPU: input_ids and attention_mask [B, T], pixel_values, image_sizes."""
    return dict(
        processor(
            list(prompts), images=[list(own) for own in images] if any(images) else None, padding=True, padding_side="left",
            num_crops=num_crops, return_tensors="pt",
        )
    )  # fmt: skip


@torch.inference_mode()
def answer(
    model: Any,
    tokenizer: Any,
    inputs: dict[str, torch.Tensor],
    *,
    max_new_tokens: int,
    end_tokens: Sequence[int],
    choice: Choice | None = None,
) -> list[Answer]:
    """Greedy answers to prepared inputs."""
    device = model.device
    moved = {name: tensor.to(device) for name, tensor in inputs.items()}
    if "pixel_values" in moved and moved["pixel_values"].is_floating_point():
        moved["pixel_values"] = moved["pixel_values"].to(model.dtype)
    first = _FirstLogits()
    # As an answer it would mean a picture that is not there, and stop the model with an error.
    placeholder = getattr(model.config, "image_token_id", None)
    sequences = model.generate(
        **moved,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(end_tokens),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        suppress_tokens=None if placeholder is None else [placeholder],
        logits_processor=[first] if choice else None,
    )  # [B, T + new]
    new = sequences[:, inputs["input_ids"].shape[1] :].tolist()
    shares = _shares(first.logits, choice) if choice else [None] * len(new)
    ends = set(end_tokens)
    answers = []
    for row, share in zip(new, shares, strict=True):
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        text = tokenizer.decode(row[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        answers.append(Answer(text, min(stop + 1, len(row)), share))
    return answers


def _shares(logits: torch.Tensor | None, choice: Choice) -> list[float]:
    assert logits is not None
    yes = torch.logsumexp(logits[:, list(choice.positive)].double(), dim=1)
    no = torch.logsumexp(logits[:, list(choice.negative)].double(), dim=1)
    return torch.sigmoid(yes - no).tolist()
