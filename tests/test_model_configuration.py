"""The configuration reads and writes the publisher's config.json."""

import copy
import json

import pytest
from golden.helpers import load_json, official_files
from transformers import AutoConfig
from transformers.cache_utils import DynamicCache

from phi3v.model import Phi3VConfig
from phi3v.model.attention import GrowingLayer, make_room


def rope(length: int = 48, **changes) -> dict:
    return {"type": "su", "short_factor": [1.0] * length, "long_factor": [2.0] * length, **changes}


def test_official_config_is_written_back_as_it_was_read(tmp_path):
    folder = official_files()
    config = Phi3VConfig.from_pretrained(folder)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    official = json.loads((folder / "config.json").read_text())
    for key in ("_attn_implementation", "_name_or_path", "transformers_version"):  # of the machine that wrote the file
        official.pop(key), written.pop(key, None)
    assert written == official


def test_golden_config_round_trip(tmp_path):
    spec = load_json("state_dict_tiny.json")["tiny_gqa"]
    config = Phi3VConfig.from_dict({**spec["text"], "vision_config": dict(spec["clip"])})
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is Phi3VConfig
    assert again.to_diff_dict() == config.to_diff_dict()
    assert again.vision_config.num_hidden_layers == spec["clip"]["num_hidden_layers"]
    assert again.vision_config.hidden_act == "quick_gelu"
    assert copy.deepcopy(again).to_dict() == again.to_dict()


def test_attention_of_the_file_does_not_decide():
    config = Phi3VConfig.from_dict({"rope_scaling": rope(), "_attn_implementation": "flash_attention_2"})
    assert config._attn_implementation is None


def test_phi3_vision_128k_config_loads():
    """The older model: other factors, no pad_token_id, no *_pdrop, its own sliding window."""
    config = Phi3VConfig.from_dict(
        {
            "architectures": ["Phi3VForCausalLM"],
            "hidden_size": 3072,
            "model_type": "phi3_v",
            "rope_scaling": rope(long_factor=[1.03 + i for i in range(48)]),
            "sliding_window": 131072,
            "torch_dtype": "bfloat16",
            "vocab_size": 32064,
            "embd_layer": {"embedding_cls": "image", "hd_transform_order": "sub_glb", "use_hd_transform": True},
        }
    )
    assert config.pad_token_id == 32000
    assert config.tokens_per_tile == 144
    assert config.end_token_ids == [2, 32000, 32007]
    assert config.to_dict()["torch_dtype"] == "bfloat16"
    # Its window is as long as its positions: no layer of the cache needs to forget anything.
    cache = DynamicCache(config=config)
    make_room(cache)
    assert {type(layer) for layer in cache.layers} == {GrowingLayer}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": rope(47)}, "expected a list of 48 numbers"),
        ({"rope_scaling": rope(type="linear")}, "expected 'su'"),
        ({"rope_scaling": rope(factor=2.0)}, "expected exactly type, short_factor, long_factor"),
        ({"sliding_window": 2048}, "shorter than max_position_embeddings"),
        ({"tie_word_embeddings": True}, "separate lm_head"),
        ({"embd_layer": {"hd_transform_order": "glb_sub"}}, "embd_layer.hd_transform_order"),
        ({"vision_config": {"image_size": 30, "patch_size": 7}}, "multiple of twice patch_size"),
        ({"vision_config": {"num_hidden_layers": 1}}, "num_hidden_layers: 1; expected at least 2"),
    ],
)
def test_what_is_not_computed_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Phi3VConfig.from_dict(changes)
