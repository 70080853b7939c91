"""LoRA and QLoRA: adds, loads and merges adapters, and writes the merged model's card.

Only this module and `phi3v.model.lora` use PEFT and bitsandbytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import jinja2
import torch
from torch import nn
from transformers import PreTrainedModel

from phi3v.model.compat import import_bitsandbytes, keep_nf4_unpacked
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.model.processing import Phi3VProcessor
from phi3v.provenance.manifest import Manifest, honour_umask, read_json
from phi3v.settings import FinetuneSettings, Role, fields_with

if TYPE_CHECKING:
    from peft import PeftModel

DECODER_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
# File in an adapter's folder that identifies its base.
BASE_FILE = "base.json"
# Last linear layer of a decoder block, and of a block of the tower.
CHECKPOINT_ENDS = ("mlp.down_proj", "mlp.fc2")
VISION_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def lora_targets(model: Phi3VForCausalLM, freeze_vision: bool) -> list[str]:
    """Full paths of the modules that get an adapter: the recipe's list.

    The decoder's four projections and lm_head, and unless vision is frozen, CLIP's six and the projector's two linear
    layers. The tower's last layer is excluded, because it never runs, so an adapter there would get no gradient.
    """
    n_vision = model.config.vision.num_hidden_layers
    unused = f".encoder.layers.{n_vision - 1}."
    targets = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        last = name.rpartition(".")[2]
        decoder = ".vision_embed_tokens." not in name and (last in DECODER_TARGETS or name == "lm_head")
        tower = ".img_processor." in name and last in VISION_TARGETS and unused not in name
        if decoder or (not freeze_vision and (tower or ".img_projection." in name)):
            targets.append(name)
    return targets


def add_lora(
    model: Phi3VForCausalLM,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    freeze_vision: bool = False,
    use_dora: bool = False,
    seed: int | None = None,
    targets: Sequence[str] | None = None,
    use_rslora: bool = False,
) -> PeftModel:
    """A PEFT model with LoRA (or DoRA) on `targets`, with Gaussian initialisation. All other weights are frozen.

    targets: full module paths. None: `lora_targets`. rank: may exceed a layer's width. alpha: absolute; the scale is
    alpha / rank, or alpha / sqrt(rank) with use_rslora. seed: determines the initial factors, without changing the
    caller's random state. Adapters are float32 on a quantised or half-precision base. Plain LoRA without dropout uses
    the layers of `phi3v.model.lora`, other variants use PEFT's.
    """
    import_bitsandbytes()
    from peft import LoraConfig, get_peft_model

    from phi3v.model import lora

    if rank < 1:
        raise ValueError(f"lora_rank: got {rank}; expected at least 1")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=use_dora,
        init_lora_weights="gaussian",
        use_rslora=use_rslora,
        target_modules=lora_targets(model, freeze_vision) if targets is None else list(targets),
    )
    if use_dora or dropout:
        model.keeps_autocast = True
    else:
        # https://huggingface.co/docs/peft/developer_guides/custom_models: custom layer types.
        config._register_custom_module(lora.layers(bool(getattr(model, "is_loaded_in_4bit", False))))
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    for name, module in adapted.named_modules():
        if isinstance(module, lora.LoraLinear):
            module.ends_checkpoint = name.endswith(CHECKPOINT_ENDS)
    return adapted


def load_quantized(
    folder: str | Path, dtype: torch.dtype = torch.bfloat16, attn: str = "sdpa", device: torch.device | str = "cpu"
) -> Phi3VForCausalLM:
    """The base model in 4 bits: nf4 for every linear layer except lm_head, computing in `dtype`. On CPU and CUDA.

    Raises ImportError if bitsandbytes is missing.
    """
    import_bitsandbytes()
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head"],
    )
    model = Phi3VForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attn,
        quantization_config=quantization,
        device_map={"": device},
    )
    keep_nf4_unpacked(model)
    return model.requires_grad_(False)


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """Writes a PEFT model's factors and configuration, and a digest of its base's weights, but no weights of the base.

    PEFT would add the embedding and the head of the base (hundreds of megabytes), because lm_head has an adapter.
    """
    model.save_pretrained(str(folder), save_embedding_layers=False)
    honour_umask(Path(folder))
    base = Path(model.peft_config["default"].base_model_name_or_path or "")
    if (base / "config.json").is_file():
        mark = {"base": str(base), "weights": weights_mark(base)}
        (Path(folder) / BASE_FILE).write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")


def weights_mark(folder: Path) -> str:
    """A digest that identifies a checkpoint without reading it completely: name, size and samples of each weights file.

    Reads 16 samples of 64 KiB per file, including the header. Training changes the digest, copying a folder does not.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for part in range(16):
                file.seek(part * size // 16)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()[:16]


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder contains a PEFT adapter."""
    return (Path(folder) / "adapter_config.json").is_file()


def base_of(adapter: str | Path) -> Path:
    """The base checkpoint that an adapter folder names. Raises ValueError if it is missing or has other weights."""
    file = Path(adapter) / "adapter_config.json"
    named = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    for candidate in (named, None if named is None else str(Path(adapter) / named)):
        if candidate and Path(candidate).is_dir():
            _check_base(Path(adapter), Path(candidate))
            return Path(candidate)
    raise ValueError(
        f"{file}: field `base_model_name_or_path`: got {named!r}; expected an existing checkpoint folder (absolute, or "
        "relative to the working or the adapter's folder). Restore the base or correct the file"
    )


def processor_folder(folder: str | Path) -> Path:
    """The folder with a model's tokenizer and image processor: its own, or the base's if an adapter has none."""
    if (Path(folder) / "tokenizer.json").is_file() or not is_adapter(folder):
        return Path(folder)
    return base_of(folder)


def _check_base(adapter: Path, base: Path) -> None:
    """Raises ValueError if the weights of `base` differ from those that the adapter was trained on, if recorded."""
    file = adapter / BASE_FILE
    if not file.is_file():
        return
    try:
        expected = str(json.loads(file.read_text(encoding="utf-8"))["weights"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); expected a digest of the adapter's base") from error
    found = weights_mark(base)
    if found != expected:
        raise ValueError(
            f"{adapter}: this adapter belongs to another base: it was trained on weights with digest {expected}, but "
            f"{base} has {found}. Restore the base, or name the right one in {adapter / 'adapter_config.json'}"
        )


def load_for_inference(
    folder: str | Path, dtype: torch.dtype = torch.bfloat16, attn: str = "sdpa", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Loads a checkpoint folder, or an adapter folder merged into its unquantised base, in evaluation mode.

    Adapters of quantised training are evaluated on the unquantised base, as the recipe's scripts do.
    """
    if is_adapter(folder):
        model = _with_adapter(folder, dtype, attn).merge_and_unload()
    else:
        model = Phi3VForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attn)
    return model.to(device).eval()


def _with_adapter(
    folder: str | Path, dtype: torch.dtype, attn: str, quantised_as: torch.dtype | None = None
) -> PeftModel:
    """The base with the adapter, not merged. quantised_as: see `merge`."""
    import_bitsandbytes()
    from peft import PeftModel

    base = Phi3VForCausalLM.from_pretrained(base_of(folder), dtype=dtype, attn_implementation=attn)
    if quantised_as is not None:
        _round_to_nf4(base, base_of(folder), quantised_as)
    try:
        # PEFT's default is the first GPU, in every process. Merging and exporting must not use a GPU.
        return PeftModel.from_pretrained(base, str(folder), torch_device="cpu")
    except RuntimeError as error:  # PyTorch lists the sizes that differ
        raise ValueError(
            f"{folder}: the adapter's weights do not match its base {base_of(folder)}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error


def _round_to_nf4(model: Phi3VForCausalLM, folder: Path, dtype: torch.dtype) -> None:
    """Replaces the weights of `model` by those that 4-bit training in `dtype` computes with: quantised and expanded."""
    from bitsandbytes.functional import dequantize_4bit

    for name, module in load_quantized(folder, dtype).named_modules():
        if type(module).__name__ == "Linear4bit":
            weight = module.get_parameter("weight")
            expanded = dequantize_4bit(weight.data, getattr(weight, "quant_state"))  # noqa: B009 - unknown to torch
            with torch.no_grad():
                model.get_submodule(name).get_parameter("weight").copy_(expanded)


def merge(
    adapter_folder: str | Path,
    out_folder: str | Path,
    dtype: torch.dtype | None = None,
    check: bool = True,
    quantised_as: torch.dtype | None = None,
) -> dict[str, float]:
    """Merges an adapter into its base and writes a checkpoint in the published layout, with its processor files.

    dtype: dtype of the written weights. None keeps the base's. The sum is computed in float32 and rounded once. With
    `check`, compares the adapter and the merged model on a fixed prompt: returns {"max_logit_difference",
    "logit_scale", "top_token_agreement"}, and raises ValueError if they differ by more than rounding. quantised_as:
    compute dtype of QLoRA training, to merge into the expanded 4-bit weights of the training. None merges into the
    unquantised base, as the recipe evaluates it. Raises ValueError if `out` already contains files.
    """
    out = Path(out_folder)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: not empty; choose a new folder for the merged checkpoint")
    base, source = base_of(adapter_folder), processor_folder(adapter_folder)
    if not (source / "tokenizer.json").is_file():
        raise ValueError(
            f"{base}: contains no tokenizer.json, and neither does {adapter_folder}; expected processor files in one "
            "of them"
        )
    target = dtype or Phi3VConfig.from_pretrained(base).dtype or torch.bfloat16
    adapted = _with_adapter(adapter_folder, torch.float32, "sdpa", quantised_as).eval()
    sample = _sample_inputs(adapted.config)
    if check:
        with torch.inference_mode():
            before = adapted(**sample).logits
    merged = adapted.merge_and_unload()
    report: dict[str, float] = {}
    with torch.no_grad():
        for tensor in merged.parameters():  # rounded as in the written file, but still computed with in float32
            tensor.copy_(tensor.to(target))
        if check:
            report = _compare(before, merged(**sample).logits, target)
    merged = merged.to(target)
    merged.config.dtype = target
    merged.save_pretrained(out)
    Phi3VProcessor.from_pretrained(source).save_pretrained(out)
    licence = base / "LICENSE"
    if licence.is_file():
        shutil.copyfile(licence, out / "LICENSE")
    return report


def _sample_inputs(config: Phi3VConfig) -> dict[str, torch.Tensor]:
    """Inputs of a fixed prompt with one picture of one tile, without a tokenizer."""
    generator = torch.Generator().manual_seed(0)
    size, grid = config.tile_size, config.tile_grid
    n_image = 2 * grid * grid + 1 + 2 * grid
    text = torch.randint(3, config.vocab_size // 2, (1, 16), generator=generator)
    text[text == config.image_token_id] = 3
    image = torch.full((1, n_image), config.image_token_id)
    return {
        "input_ids": torch.cat((text[:, :4], image, text[:, 4:]), dim=1),
        "pixel_values": torch.randn(2, 3, size, size, generator=generator),
        "image_sizes": torch.tensor([[size, size]]),
    }


def _compare(before: torch.Tensor, after: torch.Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Differences of logits [1, T, V]. Raises ValueError if they exceed the rounding of the target dtype."""
    difference, scale = float((before - after).abs().max()), float(before.std())
    agreement = float((before.argmax(-1) == after.argmax(-1)).float().mean())
    report = {"max_logit_difference": difference, "logit_scale": scale, "top_token_agreement": agreement}
    # Rounding every weight once changes logits by a few units in the last place, relative to their deviation. A wrong
    # scale or a missing factor changes them by the size of the logits.
    allowed = max(1e-4, 16 * torch.finfo(dtype).eps) * max(scale, 1e-3)
    if difference > allowed:
        raise ValueError(
            f"the merged model differs from the base with adapter: max logit difference {difference:.3g}; expected at "
            f"most {allowed:.3g} (logit deviation {scale:.3g}, {agreement:.1%} of top tokens agree). Nothing was written."
        )
    return report


# Card -----------------------------------------------------------------------------------------------------------------


def model_card(
    name: str, base: str, manifest: Manifest | None, merge_report: dict[str, float] | None, num_crops: int
) -> str:
    """The card (card.md) as Markdown with a YAML header. Without a manifest, it states that the settings are unknown.

    A card may be published, so it contains only the last parts of folder names, and no user or host.
    """
    found = (manifest or {}).get("settings") or {}
    order = dict.fromkeys([*fields_with(FinetuneSettings, *Role), *sorted(found)])
    settings = {key: _cell(key, found[key]) for key in order if found.get(key) is not None}
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True)  # noqa: S701 - Markdown, not HTML
    template = environment.from_string(Path(__file__).with_name("card.md").read_text(encoding="utf-8"))
    return template.render(
        name=name, base=base, manifest=manifest, settings=settings, merge=merge_report, num_crops=num_crops
    )


def _cell(key: str, value: object) -> str:
    """Value of a setting for the table. Only the last part of a folder."""
    if key.endswith(("_dir", "_path")):
        return Path(str(value)).name
    return str(value).replace("|", "\\|").replace("\n", " ")


def write_card(
    folder: str | Path, base: str | Path, manifest: Path | None, merge_report: dict[str, float] | None = None
) -> Path:
    """Writes FOLDER/README.md. Raises ValueError for a manifest that is not a JSON object."""
    content = None if manifest is None else cast(Manifest, read_json(manifest))
    path = Path(folder) / "README.md"
    crops = int(read_json(path.with_name("preprocessor_config.json"))["num_crops"])
    card = model_card(Path(folder).resolve().name, Path(base).name, content, merge_report, crops)
    path.write_text(card, encoding="utf-8")
    return path
