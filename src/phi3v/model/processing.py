"""Converts prompts and pictures to model inputs, with the published tokenisation, in batches.

A prompt's text is split at its image tags `<|image_1|>` ..., and every piece is tokenised separately, so there is a
beginning-of-sequence token before the text and after every picture. `image_token_id` marks the place of a picture,
repeated as often as the picture has tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

from phi3v.model.image_processing import Phi3VImageProcessor

IMAGE_TOKEN = "<|image|>"  # noqa: S105
Pictures: TypeAlias = Image.Image | Sequence[Image.Image | Sequence[Image.Image] | None] | None
"""A picture, a prompt's pictures, or one list of them for each prompt."""
_TAG = re.compile(r"<\|image_(\d+)\|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{- '<|assistant|>\n' -}}"
    "{% endif %}"
)
# Keys of tokenizer_config.json that describe the file itself, not the tokenizer.
_NOT_TOKENIZER_ARGUMENTS = {
    "added_tokens_decoder",
    "auto_map",
    "tokenizer_class",
    "processor_class",
    "sp_model_kwargs",
    "use_default_system_prompt",
    "legacy",
    "add_bos_token",
    "add_eos_token",
    "additional_special_tokens",
    "tokenizer_file",
}
# Files that are written back unchanged, because tokenizer.json differs between versions of the tokenizers library.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a checkpoint folder from its tokenizer.json.

    Does not use AutoTokenizer, because transformers 5 rebuilds Llama tokenizers from their vocabulary and drops the
    published normaliser. Raises FileNotFoundError that names the missing file.
    """
    folder = Path(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder}: contains no {name}; expected a checkpoint folder in the published layout"
            )
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    arguments = {key: value for key, value in config.items() if key not in _NOT_TOKENIZER_ARGUMENTS}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **arguments)
    tokenizer.published_files = {
        name: (folder / name).read_bytes() for name in _TOKENIZER_FILES if (folder / name).is_file()
    }
    return tokenizer


def json_file(content: dict[str, object]) -> bytes:
    """The bytes of a configuration file."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


class Phi3VProcessor(ProcessorMixin):
    """An image processor and a tokenizer. Call it with prompts and pictures to get model inputs."""

    def __init__(
        self, image_processor: Phi3VImageProcessor, tokenizer: PreTrainedTokenizerFast, **kwargs: object
    ) -> None:
        # ProcessorMixin's constructor is not called, because it checks class names against transformers' list of
        # models.
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.chat_template = kwargs.get("chat_template") or tokenizer.chat_template or CHAT_TEMPLATE
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(f"tokenizer: has no token {IMAGE_TOKEN}; expected the published special tokens")

    # Loading and saving -----------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: object) -> Phi3VProcessor:
        """Loads a checkpoint folder. `num_crops=...` overrides the saved number."""
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; expected a downloaded checkpoint folder")
        overrides = {key: kwargs[key] for key in ("num_crops",) if kwargs.get(key) is not None}
        image_processor = Phi3VImageProcessor.from_pretrained(folder, **overrides)
        return cls(image_processor, load_tokenizer(folder))

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: object) -> list[str]:
        """Writes the tokenizer's files unchanged, and the processor's. Returns their paths."""
        if push_to_hub:
            raise ValueError(
                "push_to_hub: not supported here; to upload a whole folder, use scripts/merge.py --push_to_hub"
            )
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            **self.tokenizer.published_files,
            "preprocessor_config.json": json_file(self.image_processor.to_dict()),
            "processor_config.json": json_file(self.to_dict()),
        }
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return [str(folder / name) for name in files]

    def to_dict(self) -> dict[str, object]:
        """The publisher's processor_config.json."""
        return {"auto_map": {"AutoProcessor": "processing_phi3_v.Phi3VProcessor"}, "processor_class": "Phi3VProcessor"}

    # Text ---------------------------------------------------------------------------------------------------------

    def apply_chat_template(
        self, conversation: list, add_generation_prompt: bool = False, **kwargs: object
    ) -> str | list:
        """Applies the published chat template: `<|role|>\\ncontent<|end|>\\n` per message. A list of conversations
        gives a list.

        Raises ValueError if a message's content is not a string. (Instead of list content, write image tags into the
        text.)
        """
        batched = bool(conversation) and isinstance(conversation[0], list)
        for index, messages in enumerate(conversation if batched else [conversation]):
            if not messages:
                raise ValueError(f"conversation {index}: got no messages; expected at least one")
            for turn, message in enumerate(messages):
                if not isinstance(message.get("content"), str):
                    raise ValueError(
                        f"conversation {index}, message {turn}, content: got {type(message.get('content')).__name__}; "
                        "expected a string with <|image_1|> ... in place of pictures"
                    )
        kwargs.setdefault("tokenize", False)
        return self.tokenizer.apply_chat_template(
            conversation, chat_template=self.chat_template, add_generation_prompt=add_generation_prompt, **kwargs
        )

    @property
    def model_input_names(self) -> list[str]:
        """Keys of a processed batch."""
        return ["input_ids", "attention_mask", "pixel_values", "image_sizes"]

    # The call -----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Pictures = None,
        padding: bool | str = True,
        padding_side: str | None = None,
        max_length: int | None = None,
        truncation: bool = False,
        num_crops: int | None = None,
        as_uint8: bool = False,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Model inputs of one prompt or a batch of B prompts.

        images: None; a picture; a flat list for a single prompt; or a list of B lists (None or [] = no picture).
        `<|image_k|>` is the k-th picture of its own prompt; tags may stand in any order, each exactly once.
        A tag without a picture raises ValueError.
        padding: True (longest), "max_length" or False; padding_side: the tokenizer's, right, unless given.

        Returns input_ids and attention_mask [B, T]; with pictures pixel_values [tiles of all pictures, 3, S, S] and
        image_sizes [n_pictures, 2], in the order in which the tags are read. `as_uint8`: see Phi3VImageProcessor.

        Raises ValueError that names the prompt's index, the value and what was expected.
        """
        prompts, nested = _batch(text, images)
        if truncation and any(nested):
            raise ValueError(
                "truncation: got true with pictures; expected false, because truncated pictures are invalid"
            )
        rows: list[list[int]] = []
        pictures: list[Image.Image] = []
        names: list[str] = []
        for index, (prompt, own) in enumerate(zip(prompts, nested, strict=True)):
            ids, order = self._tokenise(index, prompt, own, num_crops)
            rows.append(ids[:max_length] if truncation and max_length else ids)
            pictures.extend(own[number - 1] for number in order)
            names.extend(f"prompt {index}, <|image_{number}|>" for number in order)
        data: dict[str, object]
        if return_tensors is None:
            data = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        else:
            data = self._pad(rows, padding, padding_side or self.tokenizer.padding_side, max_length)
        if pictures:
            tiles, sizes = self.image_processor.tile_all(pictures, names, num_crops, as_uint8)
            data["pixel_values"], data["image_sizes"] = tiles, sizes
        return BatchFeature(data)

    def text_ids(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text as the tokenizer returns them, in a third of its time.

        A call of the tokenizer wakes threads for its batch, and converts masks, types and offsets that nobody reads.
        """
        backend = self.tokenizer.backend_tokenizer
        # An earlier call of the tokenizer with padding or truncation would still apply.
        if backend.padding is not None:
            backend.no_padding()
        if backend.truncation is not None:
            backend.no_truncation()
        return backend.encode(text, add_special_tokens=add_special_tokens).ids

    def _tokenise(self, index: int, prompt: str, images: list, num_crops: int | None) -> tuple[list[int], list[int]]:
        """Ids of one prompt, and its pictures' numbers in reading order."""
        pieces = _TAG.split(prompt)
        numbers = [int(number) for number in pieces[1::2]]
        _check_tags(index, numbers, len(images))
        ids: list[int] = []
        for piece, number in zip(pieces[::2], [*numbers, None], strict=True):
            ids.extend(self.text_ids(piece))
            if number is None:
                continue
            image = images[number - 1]
            if not isinstance(image, Image.Image):
                kind = type(image).__name__
                raise ValueError(f"prompt {index}, <|image_{number}|>: got {kind}; expected a PIL image")
            count = self.image_processor.tokens_of_picture(*image.size, num_crops)
            ids.extend([self.image_token_id] * count)
        return ids, numbers

    def _pad(self, rows: list[list[int]], padding: bool | str, side: str, max_length: int | None) -> dict[str, object]:
        """Rows of ids as [B, T] tensors with their mask."""
        if side not in ("left", "right"):
            raise ValueError(f"padding_side: got {side!r}; expected 'left' or 'right'")
        length = max(len(row) for row in rows)
        if padding == "max_length":
            if max_length is None:
                raise ValueError("padding: got 'max_length' without max_length; set max_length to a number of tokens")
            length = max(length, max_length)
        elif padding not in (True, False, "longest", "do_not_pad", None):
            raise ValueError(f"padding: got {padding!r}; expected True, False, 'longest' or 'max_length'")
        elif padding in (False, "do_not_pad", None) and any(len(row) != length for row in rows):
            lengths = [len(row) for row in rows]
            raise ValueError(
                f"padding: off, but the prompts have {lengths} tokens; expected equal lengths, or turn padding on"
            )
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
            ids[index, place] = torch.tensor(row, dtype=torch.int64)
            mask[index, place] = 1
        return {"input_ids": ids, "attention_mask": mask}


def _batch(text: str | Sequence[str] | None, images: Pictures) -> tuple[list[str], list[list]]:
    """Prompts and one list of pictures for each of them."""
    if isinstance(text, str):
        if images is None:
            return [text], [[]]
        if isinstance(images, Image.Image):
            return [text], [[images]]
        own = list(images)
        if len(own) == 1 and isinstance(own[0], list | tuple):
            own = list(own[0])
        return [text], [own]
    if not isinstance(text, list | tuple) or not text:
        raise ValueError(f"text: got {type(text).__name__}; expected a string or a non-empty list of strings")
    for index, prompt in enumerate(text):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {index}: got {type(prompt).__name__}; expected a string")
    prompts = list(text)
    if images is None:
        return prompts, [[] for _ in prompts]
    if isinstance(images, Image.Image):
        images = [images]
    if len(images) != len(prompts):
        raise ValueError(
            f"images: got {len(images)} entries for {len(prompts)} prompts; expected one list of pictures per prompt"
        )
    return prompts, [[] if x is None else [x] if isinstance(x, Image.Image) else list(x) for x in images]


def _check_tags(index: int, numbers: list[int], n_images: int) -> None:
    """Raises ValueError unless the tags contain each of 1..n_images exactly once."""
    if sorted(numbers) == list(range(1, n_images + 1)):
        return
    found = ", ".join(f"<|image_{number}|>" for number in numbers) or "no image tag"
    expected = ", ".join(f"<|image_{number}|>" for number in range(1, n_images + 1)) or "no tag"
    raise ValueError(
        f"prompt {index}: got {found} and {n_images} image(s); expected {expected}, each once, in any order"
    )
