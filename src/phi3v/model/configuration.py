"""The configuration of Phi-3-vision and Phi-3.5-vision, read from and written to the publisher's config.json.

The decoder's fields are at the top level, the vision tower's in the optional key `vision_config` (CLIPVisionConfig
fields; absent = ViT-L/14 at 336 pixels, the published geometry).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from transformers import CLIPVisionConfig, PreTrainedConfig

OFFICIAL_VOCAB_SIZE = 32064
OFFICIAL_IMAGE_TOKEN_ID = 32044
# </s>, <|endoftext|> and <|end|>: a fine-tuned model may close its answer with any of them, and one that is
# missing from the list shows as endless generation.
OFFICIAL_END_TOKEN_IDS = (2, 32000, 32007)

# openai/clip-vit-large-patch14-336, vision part.
OFFICIAL_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
}
# The publisher's config.json names its own Python files here. This package never runs them; other programs need the
# key to find the files when a user puts them beside the weights (docs/how-to/serve.md).
OFFICIAL_AUTO_MAP = {
    "AutoConfig": "configuration_phi3_v.Phi3VConfig",
    "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
}
OFFICIAL_EMBD_LAYER = {
    "embedding_cls": "image",
    "hd_transform_order": "sub_glb",
    "projection_cls": "mlp",
    "use_hd_transform": True,
    "with_learnable_separator": True,
}
_NOT_PUBLISHED = (
    "dtype", "id2label", "label2id", "problem_type", "return_dict", "output_hidden_states", "output_attentions",
    "chunk_size_feed_forward", "is_encoder_decoder", "_attn_implementation",
)  # fmt: skip
_VISION_KEYS = (*OFFICIAL_VISION, "num_channels", "initializer_range", "initializer_factor")


class Phi3VConfig(PreTrainedConfig):
    """Configuration of `Phi3VForCausalLM`; the defaults are Phi-3.5-vision's but for `rope_scaling`.

    `rope_scaling` keeps the published form: exactly `type` ("su"), `short_factor`, `long_factor`, each list
    head_dim / 2 numbers long. None means plain RoPE.

    `longrope_scope` selects the length that decides between the short and the long factors: "sequence" (default) is
    each example's own length, "batch" is the padded length of the whole batch, which is what the published code does.

    Raises ValueError if a field has a value that this implementation does not support.
    """

    model_type = "phi3_v"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    sub_configs_defaults: ClassVar[dict] = {"vision_config": CLIPVisionConfig}

    vocab_size: int = OFFICIAL_VOCAB_SIZE
    hidden_size: int = 3072
    intermediate_size: int = 8192
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    resid_pdrop: float | int = 0.0
    embd_pdrop: float | int = 0.0
    max_position_embeddings: int = 131072
    original_max_position_embeddings: int = 4096
    rope_theta: float | int = 10000.0
    rope_scaling: dict | None = None
    sliding_window: int | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 32000
    embd_layer: dict | None = None
    img_processor: dict | None = None
    vision_config: CLIPVisionConfig | dict | None = None
    longrope_scope: Literal["sequence", "batch"] = "sequence"
    image_token_id: int = OFFICIAL_IMAGE_TOKEN_ID
    end_token_ids: list[int] | tuple[int, ...] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # The published config.json requests flash attention, but here the caller's `attn_implementation` decides.
        kwargs.pop("_attn_implementation", None)
        self.auto_map = kwargs.pop("auto_map", None) or dict(OFFICIAL_AUTO_MAP)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if not isinstance(self.vision_config, CLIPVisionConfig):
            given = self.vision_config or {}
            self.vision_config = CLIPVisionConfig(**{**OFFICIAL_VISION, **given})
        self.embd_layer = self.embd_layer or dict(OFFICIAL_EMBD_LAYER)
        self.img_processor = self.img_processor or {
            "image_dim_out": self.vision.hidden_size,
            "model_name": "openai/clip-vit-large-patch14-336",
            "name": "clip_vision_model",
            "num_img_tokens": self.tokens_per_tile,
        }
        if self.end_token_ids is None:
            self.end_token_ids = (
                list(OFFICIAL_END_TOKEN_IDS)
                if self.vocab_size == OFFICIAL_VOCAB_SIZE
                else sorted({*token_ids(self.eos_token_id), *token_ids(self.pad_token_id)})
            )
        super().__post_init__(**kwargs)
        self._check()

    # Geometry of one tile -------------------------------------------------------------------------------------

    @property
    def vision(self) -> CLIPVisionConfig:
        """The tower's configuration."""
        assert isinstance(self.vision_config, CLIPVisionConfig)
        return self.vision_config

    @property
    def head_dim(self) -> int:
        """Width of one decoder head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def tile_size(self) -> int:
        """Side of a square tile in pixels (336 in the published models)."""
        return self.vision.image_size

    @property
    def tile_grid(self) -> int:
        """Side of a tile after the 2x2 merge, in image tokens (12 in the published models)."""
        return self.vision.image_size // self.vision.patch_size // 2

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens of one tile (144 in the published models)."""
        return self.tile_grid**2

    def _check(self) -> None:
        vision, embd_layer = self.vision, self.embd_layer or {}
        if vision.image_size % (2 * vision.patch_size):
            raise ValueError(
                f"config vision_config: image_size {vision.image_size} is not a multiple of twice patch_size "
                f"{vision.patch_size}, because patches are merged two by two"
            )
        if vision.num_hidden_layers < 2:
            raise ValueError(
                f"config vision_config.num_hidden_layers: {vision.num_hidden_layers}; expected at least 2, because the "
                "image features are the output of the last but one layer"
            )
        for key, value in OFFICIAL_EMBD_LAYER.items():
            if embd_layer.get(key, value) != value:
                raise ValueError(
                    f"config embd_layer.{key}: {embd_layer[key]!r}; expected {value!r}, the only supported value"
                )
        if self.tie_word_embeddings:
            raise ValueError(
                "config tie_word_embeddings: got true; expected false, because Phi-3-vision has a separate lm_head"
            )
        if self.sliding_window is not None and self.sliding_window < self.max_position_embeddings:
            raise ValueError(
                f"config sliding_window: {self.sliding_window} is shorter than max_position_embeddings "
                f"{self.max_position_embeddings}; expected at least that, because this model does not support an "
                "effective window"
            )
        if self.rope_scaling is None:
            return
        if set(self.rope_scaling) != {"type", "short_factor", "long_factor"}:
            raise ValueError(
                f"config rope_scaling: keys {sorted(self.rope_scaling)}; "
                "expected exactly type, short_factor, long_factor."
            )
        if self.rope_scaling["type"] not in ("su", "yarn", "longrope"):
            raise ValueError(f"config rope_scaling.type: {self.rope_scaling['type']!r}; expected 'su'.")
        for key in ("short_factor", "long_factor"):
            factors = self.rope_scaling[key]
            if (
                not isinstance(factors, list)
                or len(factors) != self.head_dim // 2
                or not all(isinstance(f, int | float) for f in factors)
            ):
                shown = len(factors) if isinstance(factors, list) else factors
                raise ValueError(
                    f"config rope_scaling.{key}: {shown!r}; expected a list of {self.head_dim // 2} numbers "
                    "(half the head width)."
                )

    # Serialisation --------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, object]:
        """The publisher's config.json as a dictionary. Contains our own keys only if they differ from the defaults."""
        output = super().to_dict()
        for key in _NOT_PUBLISHED:
            output.pop(key, None)
        if self.dtype is not None:
            output["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        output["model_type"] = self.model_type
        vision = {key: getattr(self.vision, key) for key in _VISION_KEYS}
        official = CLIPVisionConfig(**OFFICIAL_VISION)
        if all(vision[key] == getattr(official, key) for key in _VISION_KEYS):
            output.pop("vision_config", None)
        else:
            output["vision_config"] = vision
        if self.longrope_scope == "sequence":
            output.pop("longrope_scope", None)
        if self.image_token_id == OFFICIAL_IMAGE_TOKEN_ID:
            output.pop("image_token_id", None)
        if list(self.end_token_ids or ()) == list(OFFICIAL_END_TOKEN_IDS):
            output.pop("end_token_ids", None)
        return output

    def to_diff_dict(self) -> dict[str, object]:
        """The saved form, with every key, because other readers have other defaults."""
        output = self.to_dict()
        output.pop("_name_or_path", None)
        return output


def token_ids(value: int | list[int] | None) -> list[int]:
    """Token ids as a list, from any of the three forms in a config."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
