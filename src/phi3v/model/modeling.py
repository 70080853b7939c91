"""Phi-3-vision and Phi-3.5-vision: transformers' CLIP vision layers and Phi-3 decoder layers under the official names.

Shapes: B = batch rows, T = tokens of a row, D = decoder width, n = tiles of all pictures, S = tile side in pixels,
g = tile side in image tokens, C = vision width, I = image tokens of the batch.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3MLP, Phi3RMSNorm

from phi3v.model import fused
from phi3v.model.attention import LongRope, Phi3VAttention, make_room, plan_attention
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.layout import BatchLayout, label_rows, picture_rows
from phi3v.model.vision import ImageEmbedding

EMBEDDING = "model.embed_tokens.weight"
# The published modules hold the text embedding under a second name as well; files keep one of the two.
EMBEDDING_ALIAS = "model.vision_embed_tokens.wte.weight"


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
        # The tower is made of layers, not of a PreTrainedModel, so nobody else hands it the resolved implementation.
        if config.vision_config._attn_implementation is None:
            config.vision_config._attn_implementation = config._attn_implementation

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ImageEmbedding):
            for separator in (module.glb_GN, module.sub_GN):
                init.normal_(separator, mean=0.0, std=self.config.initializer_range)
        elif hasattr(module, "class_embedding"):
            init.normal_(module.class_embedding, mean=0.0, std=self.config.initializer_range)
            init.copy_(module.position_ids, torch.arange(module.num_positions).expand((1, -1)))


class RMSNorm(Phi3RMSNorm):
    """transformers' norm, in one kernel for each direction if training on CUDA."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., D] to the same shape and type."""
        if self.training and fused.available(hidden_states):
            return fused.rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return super().forward(hidden_states)


class GatedMLP(nn.Module):
    """The linear layers of transformers' Phi-3 feed-forward block with their gate in one kernel, if training on CUDA."""

    def __init__(self, mlp: Phi3MLP) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.activation_fn = mlp.gate_up_proj, mlp.down_proj, mlp.activation_fn
        self.is_silu = mlp.config.hidden_act == "silu"

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, T, D] to the same shape."""
        gate_up = self.gate_up_proj(hidden_states)
        if self.is_silu and self.training and fused.available(gate_up):
            return self.down_proj(fused.swiglu(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


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

    def get_input_embeddings(self) -> nn.Embedding:
        """The text embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the text embedding."""
        self.embed_tokens = value

    def embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None, layout: BatchLayout) -> torch.Tensor:
        """Text embeddings with image features at the layout's image positions, [B, T, D]; features in reading order."""
        embeds = self.embed_tokens(input_ids)
        if pixel_values is None:
            if self.vision_embed_tokens.must_run_without_images(self.training and torch.is_grad_enabled()):
                # Zeros before the sum: float16 cannot hold the features' own sum, and infinity times zero is NaN.
                embeds = embeds + (0.0 * self.vision_embed_tokens()).sum().to(embeds.dtype)
            return embeds
        assert layout.image_positions is not None
        features = self.vision_embed_tokens(pixel_values, layout.image_sizes, layout.feature_rows)  # [I, D]
        flat = embeds.view(-1, embeds.shape[-1]).index_copy(0, layout.image_positions, features.to(embeds.dtype))
        return flat.view_as(embeds)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        layout: BatchLayout | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """See `Phi3VForCausalLM.forward`. hidden_states (on request): inputs of every layer, then the normed output."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids and inputs_embeds: expected exactly one of the two.")
        if inputs_embeds is None:
            pictures = layout or self._pictures(input_ids, pixel_values, image_sizes)
            inputs_embeds = self.embed(input_ids, pixel_values, pictures)  # [B, T, D]
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
            make_room(past_key_values)
        batch, queries, _ = inputs_embeds.shape
        past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        if layout is not None:
            plan, position_ids = layout.plan, layout.position_ids
        else:
            plan = plan_attention(attention_mask, position_ids, batch, queries, past)
        if position_ids is None:
            position_ids = torch.arange(past, past + queries, device=inputs_embeds.device)[None]
        is_long = self.rope.is_long(plan, attention_mask, batch, queries, past, inputs_embeds.device)
        rotary = self.rope(position_ids, is_long, inputs_embeds.dtype)
        hidden = self.embed_dropout(inputs_embeds)
        states = []
        for layer in self.layers:
            if output_hidden_states:
                states.append(hidden)
            hidden = layer(
                hidden, attention_mask=plan, past_key_values=past_key_values, position_embeddings=rotary
            )  # [B, T, D]
        hidden = self.norm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states, hidden) if output_hidden_states else None,
        )

    def _pictures(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None, image_sizes: torch.Tensor | None
    ) -> BatchLayout:
        """A layout of the pictures alone; waits for the device of input_ids."""
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids: dtype {input_ids.dtype}; expected integers.")
        if pixel_values is not None and image_sizes is None:
            raise ValueError("pixel_values without image_sizes; expected [n_images, 2] (height, width of each canvas).")
        image_sizes = None if pixel_values is None or image_sizes is None else image_sizes.cpu()
        positions, rows = picture_rows(self.config, input_ids.cpu(), image_sizes)
        device = input_ids.device
        return BatchLayout(
            image_sizes=image_sizes,
            image_positions=None if positions is None else positions.to(device),
            feature_rows=None if rows is None else rows.to(device),
        )


class Phi3VForCausalLM(Phi3VPreTrainedModel, GenerationMixin):
    """The whole model; reads and writes checkpoints in the published layout."""

    keeps_autocast = False
    """Whether autocast stays on over half-precision weights: for layers that mix types (DoRA, dropout in adapters)."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__(config)
        self.model = Phi3VModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self._stop_at_every_end_token()

    # Loading and saving ---------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint in the published layout, safetensors only, under either name of the text embedding."""
        kwargs["use_safetensors"] = True
        folder = Path(pretrained_model_name_or_path)
        renamed = folder.is_dir() and EMBEDDING not in checkpoint_names(folder)
        if renamed:
            kwargs["key_mapping"] = {**(kwargs.get("key_mapping") or {}), EMBEDDING_ALIAS: EMBEDDING}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if renamed:
            # Saving would turn the renaming round; files are written under the decoder's name.
            model._weight_conversions = None
        # Loading makes new parameters, which all ask for gradients.
        model.model.vision_embed_tokens.img_processor.vision_model.freeze_unused()
        model._stop_at_every_end_token()
        return loaded

    def _stop_at_every_end_token(self) -> None:
        """Let `generate` stop at each of the config's end tokens; published files name one of three."""
        if self.generation_config is None:
            return
        given = self.generation_config.eos_token_id
        given = given if isinstance(given, list) else [] if given is None else [given]
        self.generation_config.eos_token_id = sorted({*given, *self.config.end_token_ids})
        if self.generation_config.pad_token_id is None:
            self.generation_config.pad_token_id = self.config.pad_token_id

    # Module interface -----------------------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Embedding:
        """The text embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the text embedding."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the head."""
        self.lm_head = value

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Activation checkpointing, always non-reentrant.

        The reentrant kind drops the gradients of layers whose input needs none, which silently untrains a decoder under
        frozen embeddings. Raises ValueError where it is asked for.
        """
        arguments = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if arguments["use_reentrant"]:
            raise ValueError("activation checkpointing, use_reentrant: true; expected false (it drops gradients).")
        self._activation_checkpointing_enable(arguments, every_n_layers, offload)

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
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Loss and logits.

        input_ids [B, T] with `config.image_token_id` at image positions; attention_mask [B, T]; pixel_values
        [n, 3, S, S] float, or uint8 local tiles (normalised here, global views added); image_sizes [n_images, 2].
        A packed batch has no attention_mask, and position_ids [B, T] that start at 0 with every example.
        labels [B, T], -100 = none; loss_weights [B, T], aligned with labels.
        layout: what training knows of a batch beforehand (`lay_out`); then only input_ids and pixel_values are read
        beside it, and the forward pass never waits for the device.

        loss: without weights the mean cross entropy over all label tokens; with weights the sum of weight times cross
        entropy, not divided any further. Both in float32.
        logits: with labels None (the head runs at label positions alone, which are not kept), unless `logits_to_keep`
        is given; without labels all positions, or the last `logits_to_keep` (0 = all).
        """
        with self._own_dtype():
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                pixel_values=pixel_values,
                image_sizes=image_sizes,
                use_cache=False if use_cache is None and (labels is not None or layout is not None) else use_cache,
                output_hidden_states=output_hidden_states,
                layout=layout,
            )
            hidden = outputs.last_hidden_state  # [B, T, D]
            loss = logits = None
            if labels is not None:
                packed = position_ids.expand_as(labels) if position_ids is not None and attention_mask is None else None
                host = [None if x is None else x.cpu() for x in (labels, loss_weights, packed)]
                found = label_rows(hidden[..., 0].detach(), *host)
                loss = self._loss(hidden, *(None if x is None else x.to(hidden.device) for x in found))
            elif layout is not None and layout.label_positions is not None:
                loss = self._loss(hidden, layout.label_positions, layout.label_ids, layout.label_weights)
            if loss is None or logits_to_keep is not None:
                keep = logits_to_keep or 0
                kept = hidden[:, -keep:] if isinstance(keep, int) else hidden[:, keep]
                logits = self.lm_head(kept)
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )
        return result if return_dict is not False else result.to_tuple()

    def _own_dtype(self) -> contextlib.AbstractContextManager[object]:
        """No autocast over half-precision weights: it would only widen norms and the residual stream to float32."""
        weight = self.model.embed_tokens.weight
        if self.keeps_autocast or weight.dtype not in (torch.float16, torch.bfloat16):
            return contextlib.nullcontext()
        return torch.autocast(weight.device.type, enabled=False)

    def _loss(
        self, hidden: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """Cross entropy of `targets` [L] with the head at `positions` [L] of the flattened hidden [B, T, D] alone."""
        if not len(positions):
            # Through the head too, whose weights DDP waits for; zeros first, since float16 may not hold the sum.
            return self.lm_head(0.0 * hidden[:1, :1]).sum().float()
        logits = self.lm_head(hidden.flatten(0, 1)[positions]).float()
        if weights is None:
            return F.cross_entropy(logits, targets)
        return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()

    # Generation -----------------------------------------------------------------------------------------------

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """One step's inputs. The step in which a row outgrows the short factors computes everything anew."""
        if attention_mask is not None and attention_mask.dim() == 2 and is_first_iteration:
            last = attention_mask[:, -1].bool()
            if not bool(last.all()):
                row = int((~last).nonzero()[0, 0])
                raise ValueError(
                    f"attention_mask, row {row}: its last column is padding; expected left-padded prompts "
                    "(processor(..., padding_side='left'))."
                )
        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        if cached and self._outgrows_short_factors(input_ids, attention_mask):
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
        """Whether a row passes from the short to the long factors with this step."""
        limit = self.config.original_max_position_embeddings
        if self.config.rope_scaling is None or input_ids.shape[1] <= limit:
            return False
        per_row = self.config.longrope_scope == "sequence" and attention_mask is not None and attention_mask.dim() == 2
        if not per_row:
            return input_ids.shape[1] == limit + 1
        return bool((attention_mask.sum(-1) == limit + 1).any())


def checkpoint_names(folder: Path) -> set[str]:
    """Names of the tensors in a checkpoint folder's safetensors files; an empty set where there are none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    single = folder / "model.safetensors"
    if not single.is_file():
        return set()
    from safetensors import safe_open

    with safe_open(single, framework="pt") as file:
        return set(file.keys())
