"""Phi-3-vision and Phi-3.5-vision: transformers' CLIP vision layers and Phi-3 decoder layers under the official names.

Shapes: B = batch rows, T = tokens of a row, D = decoder width, n = tiles of all pictures, S = tile side in pixels,
g = tile side in image tokens, C = vision width, I = image tokens of the batch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

from phi3v.model.attention import LongRope, Phi3VAttention, make_room
from phi3v.model.configuration import Phi3VConfig, token_ids
from phi3v.model.fused import GatedMLP, RMSNorm
from phi3v.model.layout import BatchLayout, lay_out
from phi3v.model.vision import ImageEmbedding
from phi3v.provenance.manifest import honour_umask

EMBEDDING = "model.embed_tokens.weight"
# The published modules also have the text embedding under a second name. Files contain one of the two.
EMBEDDING_ALIAS = "model.vision_embed_tokens.wte.weight"
GROUPS = ("clip", "projector", "separators", "embedding", "decoder", "head", "adapters")
"""Groups of parameters, see `parameter_group`."""
# Part of a parameter's name to its group. The first match counts.
_GROUP_OF = {
    ".lora_": "adapters",
    ".modules_to_save.": "adapters",
    ".img_processor.": "clip",
    ".img_projection.": "projector",
    ".glb_GN": "separators",
    ".sub_GN": "separators",
    ".vision_embed_tokens.wte.": "embedding",
    ".embed_tokens.": "embedding",
    ".layers.": "decoder",
    ".model.norm.": "decoder",
    ".lm_head.": "head",
}


class Phi3VPreTrainedModel(PreTrainedModel):
    """Loading, saving and initial weights of the two classes below."""

    config_class = Phi3VConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Phi3DecoderLayer", "CLIPEncoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"vision_embed_tokens\.wte\.weight$"]

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__(config)
        # The tower consists of layers instead of a PreTrainedModel, so transformers does not pass on the
        # implementation.
        if config.vision._attn_implementation is None:
            config.vision._attn_implementation = config._attn_implementation

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ImageEmbedding):
            for separator in (module.glb_GN, module.sub_GN):
                init.normal_(separator, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, CLIPVisionEmbeddings):
            init.normal_(module.class_embedding, mean=0.0, std=self.config.initializer_range)
            init.copy_(module.position_ids, torch.arange(module.num_positions).expand((1, -1)))


class Phi3VModel(Phi3VPreTrainedModel):
    """Embeddings, vision part and decoder, without the head."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_dropout = nn.Dropout(config.embd_pdrop)
        self.vision_embed_tokens = ImageEmbedding(config)
        self.layers = nn.ModuleList()
        for index in range(config.num_hidden_layers):
            layer = Phi3DecoderLayer(config, index)
            layer.self_attn = Phi3VAttention(config, index)
            layer.mlp = GatedMLP(layer.mlp)
            layer.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            layer.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.layers.append(layer)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rope = LongRope(config)
        self.gradient_checkpointing = False
        self.post_init()

    def embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None, layout: BatchLayout) -> torch.Tensor:
        """Text embeddings with image features at the layout's image positions, [B, T, D]; features in reading order."""
        embeds = self.embed_tokens(input_ids)
        if pixel_values is None:
            if self.vision_embed_tokens.must_run_without_images(self.training and torch.is_grad_enabled()):
                # Multiply by zero before the sum: the sum of the features can overflow float16, and infinity times zero
                # is NaN.
                embeds = embeds + (0.0 * self.vision_embed_tokens()).sum().to(embeds.dtype)
            return embeds
        assert layout.image_positions is not None
        features = self.vision_embed_tokens(pixel_values, layout.image_sizes, layout.feature_rows)  # [I, D]
        flat = embeds.view(-1, embeds.shape[-1]).index_copy(0, layout.image_positions, features.to(embeds.dtype))
        return flat.view_as(embeds)

    def forward(
        self,
        inputs: torch.Tensor,
        layout: BatchLayout,
        pixel_values: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """inputs: input_ids [B, T] or inputs_embeds [B, T, D]. The others: see `Phi3VForCausalLM.forward`.

        hidden_states (on request): the inputs of every layer, then the normed output.
        """
        embeds = self.embed(inputs, pixel_values, layout) if inputs.dim() == 2 else inputs  # [B, T, D]
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
            make_room(past_key_values)
        (batch, queries), past = embeds.shape[:2], cached_tokens(past_key_values)
        position_ids = layout.position_ids
        if position_ids is None:
            position_ids = torch.arange(past, past + queries, device=embeds.device)[None]
        is_long = self.rope.is_long(layout.plan, batch, queries, past, embeds.device)
        rotary = self.rope(position_ids, is_long, embeds.dtype)
        hidden = self.embed_dropout(embeds)
        states = []
        for layer in self.layers:
            if output_hidden_states:
                states.append(hidden)
            hidden = layer(
                hidden, attention_mask=layout.plan, past_key_values=past_key_values, position_embeddings=rotary
            )  # [B, T, D]
        hidden = self.norm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states, hidden) if output_hidden_states else None,
        )


class Phi3VForCausalLM(Phi3VPreTrainedModel, GenerationMixin):
    """The whole model. Reads and writes checkpoints in the published layout."""

    keeps_autocast = False
    """Whether autocast stays on with half-precision weights, for layers with mixed dtypes (DoRA, dropout in
    adapters)."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__(config)
        self.model = Phi3VModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self._stop_at_every_end_token()

    # Loading and saving ---------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: object, **kwargs: Any) -> Any:
        """Loads a checkpoint in the published layout (only safetensors), with either name of the text embedding."""
        kwargs["use_safetensors"] = True
        kwargs["key_mapping"] = {**(kwargs.get("key_mapping") or {}), EMBEDDING_ALIAS: EMBEDDING}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Loading creates new parameters, which all require gradients.
        model.model.vision_embed_tokens.img_processor.vision_model.freeze_unused()
        model._stop_at_every_end_token()
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: object) -> None:
        """Writes a checkpoint in the published layout, with the text embedding under the decoder's name."""
        # True, the default, would restore the name under which the embedding was loaded.
        super().save_pretrained(save_directory, **{"save_original_format": False, **kwargs})
        honour_umask(Path(save_directory))

    def _stop_at_every_end_token(self) -> None:
        """Makes `generate` stop at each of the config's end tokens. The published files name only one of three."""
        if self.generation_config is None:
            return
        given = token_ids(self.generation_config.eos_token_id)
        self.generation_config.eos_token_id = sorted({*given, *self.config.end_token_ids})
        if self.generation_config.pad_token_id is None:
            self.generation_config.pad_token_id = self.config.pad_token_id

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, object] | None = None, **options: object
    ) -> None:
        """Enables activation checkpointing, always non-reentrant. Raises ValueError if the reentrant variant is
        requested.

        The reentrant variant drops the gradients of layers whose input requires none, so a decoder with frozen
        embeddings never trains.
        """
        arguments = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if arguments["use_reentrant"]:
            raise ValueError(
                "activation checkpointing: use_reentrant: got true; expected false, because true drops gradients"
            )
        super().activation_checkpointing_enable(arguments, **options)

    # Forward --------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        loss_weights: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        return_dict: bool | None = None,
        layout: BatchLayout | None = None,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        """Loss and logits.

        input_ids [B, T] with `config.image_token_id` at image positions; attention_mask [B, T]; pixel_values [n, 3, S,
        S] float, or uint8 local tiles (normalised here, global views added); image_sizes [n_images, 2]. A packed batch
        has no attention_mask, and position_ids [B, T] that restart at 0 with every example. labels [B, T], -100 = none;
        loss_weights [B, T], aligned with labels. layout: precomputed layout of the batch (`lay_out`). Then only
        input_ids and pixel_values are read in addition, and the forward pass never synchronises with the device.

        loss: without weights the mean cross entropy over all label tokens; with weights the sum of weight times cross
        entropy, not divided any further. Both in float32.
        logits: with labels None (the head runs at label positions alone, which are not kept), unless `logits_to_keep`
        is given; without labels all positions, or the last `logits_to_keep` (0 = all).
        """
        inputs = _inputs(input_ids, inputs_embeds)
        if use_cache is None and (labels is not None or layout is not None):
            use_cache = False
        if layout is None:
            past = cached_tokens(past_key_values)
            if pixel_values is None:
                image_sizes = None
            elif image_sizes is None:
                raise ValueError(
                    "pixel_values without image_sizes; expected [n_images, 2] (height, width of each canvas)."
                )
            layout = lay_out(
                self.config, inputs, attention_mask, position_ids, image_sizes, labels, loss_weights, past
            ).to(inputs.device)
        with self._own_dtype():
            outputs = self.model(inputs, layout, pixel_values, past_key_values, use_cache, output_hidden_states)
            hidden = outputs.last_hidden_state  # [B, T, D]
            loss = None if layout.label_positions is None else self._loss(hidden, layout)
            logits = None
            if loss is None or logits_to_keep is not None:
                keep = logits_to_keep or 0
                logits = self.lm_head(hidden[:, -keep:] if isinstance(keep, int) else hidden[:, keep])
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )
        return result if return_dict is not False else result.to_tuple()

    def _own_dtype(self) -> contextlib.AbstractContextManager[object]:
        """Turns autocast off for half-precision weights, where it would only widen norms and the residual stream to
        float32."""
        weight = self.model.embed_tokens.weight
        if self.keeps_autocast or weight.dtype not in (torch.float16, torch.bfloat16):
            return contextlib.nullcontext()
        return torch.autocast(weight.device.type, enabled=False)

    def _loss(self, hidden: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        """Cross entropy of the layout's labels. The head runs only at their positions in hidden [B, T, D]."""
        positions, labels, weights = layout.label_positions, layout.label_ids, layout.label_weights
        assert positions is not None and labels is not None
        if not len(positions):
            # Through the head too, whose weights DDP waits for; zeros first, since float16 may not hold the sum.
            return self.lm_head(0.0 * hidden[:1, :1]).sum().float()
        logits = self.lm_head(hidden.flatten(0, 1)[positions]).float()
        if weights is None:
            return F.cross_entropy(logits, labels)
        return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()

    # Generation -----------------------------------------------------------------------------------------------

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: object,
    ) -> dict[str, object]:
        """Inputs of one step. A step in which a row becomes too long for the short factors recomputes the whole
        prompt."""
        if attention_mask is not None and attention_mask.dim() == 2 and is_first_iteration:
            last = attention_mask[:, -1].bool()
            if not bool(last.all()):
                row = int((~last).nonzero()[0, 0])
                raise ValueError(
                    f"attention_mask, row {row}: its last column is padding; expected left-padded prompts "
                    "(processor(..., padding_side='left'))."
                )
        if cached_tokens(past_key_values) and self._outgrows_short_factors(input_ids, attention_mask):
            past_key_values, next_sequence_length, is_first_iteration = None, None, True
        make_room(past_key_values)
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def _outgrows_short_factors(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
        """Whether a row switches from the short to the long factors in this step."""
        limit = self.config.original_max_position_embeddings
        if self.config.rope_scaling is None or input_ids.shape[1] <= limit:
            return False
        if self.config.longrope_scope == "sequence" and attention_mask is not None and attention_mask.dim() == 2:
            return bool((attention_mask.sum(-1) == limit + 1).any())
        return input_ids.shape[1] == limit + 1


def _inputs(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """The given one of the two. Raises ValueError if none or both are given, or if ids are not integers."""
    if inputs_embeds is not None and input_ids is None:
        return inputs_embeds
    if inputs_embeds is not None or input_ids is None:
        raise ValueError("input_ids, inputs_embeds: got none or both; expected exactly one of the two")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids: got dtype {input_ids.dtype}; expected integers")
    return input_ids


def cached_tokens(cache: Cache | None) -> int:
    """Number of tokens in a cache."""
    return 0 if cache is None else int(cache.get_seq_length())


def parameter_group(name: str) -> str:
    """The group of a parameter, one of `GROUPS`, from its name (with or without PEFT's and DDP's prefixes).

    clip, projector and separators are the vision part; embedding is the text embedding; decoder includes the final
    norm; adapters are LoRA and DoRA weights in any layer. Raises ValueError for a name that matches none.
    """
    for part, group in _GROUP_OF.items():
        if part in f".{name}":
            return group
    raise ValueError(f"parameter {name!r}: belongs to none of the groups {', '.join(GROUPS)}")


def freeze(model: nn.Module, groups: Collection[str]) -> list[str]:
    """Freezes groups of weights. Returns the names of the frozen parameters.

    Call it before adding adapters, which it does not freeze. Raises ValueError for an unknown group.
    """
    if unknown := set(groups) - set(GROUPS):
        raise ValueError(f"freeze: {', '.join(sorted(unknown))}; expected groups among {', '.join(GROUPS)}.")
    frozen = [name for name, _ in model.named_parameters() if parameter_group(name) in groups]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return frozen


def size_of(parameter: nn.Parameter) -> int:
    """Number of elements of a weight. With ZeRO 3 the tensor is empty, and the size is an attribute."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
