"""Each patch of phi3v.training.compat is still needed: a test that fails here says which one can go."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from phi3v.settings import EvaluateSettings, FinetuneSettings, validate
from phi3v.training.compat import compute_float16_on_cpu

# What a LoRA job runs of these libraries.
IMPORTS = """
import sys
import torch
import peft
import transformers.modeling_utils
from accelerate.utils import extract_model_from_parallel
extract_model_from_parallel(torch.nn.Linear(1, 1))
print(*sorted(name for name in ("bitsandbytes", "deepspeed", "scipy") if sys.modules.get(name)))
"""
LEAVE_OUT = """
from phi3v.settings import FinetuneSettings, validate
from phi3v.training.compat import leave_out_unused
leave_out_unused(validate(FinetuneSettings, {"model_name_or_path": "m", "output_dir": "o", "use_lora": True}, "test"))
"""
DEEPSPEED = """
import deepspeed, torch
from deepspeed.accelerator import get_accelerator
accelerator = get_accelerator()
builder = accelerator.create_op_builder("ShareMemCommBuilder")
print(builder.NAME in deepspeed.ops.__compatible_ops__)
print(bool(accelerator.is_fp16_supported()) == torch.ops.mkldnn._is_mkldnn_fp16_supported())
"""


def printed(code: str) -> list[str]:
    """Words of the last lines that Python code prints in a process of its own."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.fixture(scope="module")
def libraries() -> list[str]:
    return printed(IMPORTS + DEEPSPEED)


def test_libraries_import_what_a_lora_job_does_not_use(libraries):
    assert libraries[:3] == ["bitsandbytes", "deepspeed", "scipy"]
    assert printed(LEAVE_OUT + IMPORTS) == []


def test_accelerate_takes_float16_for_float32_on_a_cpu():
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="fp16")
        assert not accelerator.native_amp and accelerator.scaler is None
        compute_float16_on_cpu(accelerator)
        layer = torch.nn.Linear(2, 2)
        seen: list[torch.dtype] = []
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        accelerator.prepare(layer)(torch.ones(1, 2))
        with accelerator.autocast():
            seen.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        assert seen[-1] == torch.float16
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_deepspeed_would_build_an_all_reduce_and_asks_onednn_for_float16(libraries):
    assert libraries[-2:] == ["True", "True"]


@pytest.mark.parametrize(
    ("values", "left_out"),
    [
        ({"use_lora": True}, {"bitsandbytes", "deepspeed", "scipy"}),
        ({"use_lora": True, "report_to": ["tensorboard"]}, {"bitsandbytes", "deepspeed"}),
        ({"use_qlora": True}, {"deepspeed"}),
        ({"zero_stage": 2}, {"bitsandbytes", "scipy"}),
        ({"optimizer": "adamw_8bit"}, {"deepspeed"}),
    ],
)
def test_only_unused_libraries_are_left_out(monkeypatch, values, left_out):
    from phi3v.training.compat import leave_out_unused

    modules = dict.fromkeys(())
    monkeypatch.setattr(sys, "modules", modules)
    leave_out_unused(validate(FinetuneSettings, {"model_name_or_path": "m", "output_dir": "o"} | values, "test"))
    assert set(modules) == left_out


def test_evaluation_imports_no_library_of_training(monkeypatch):
    from phi3v.training.compat import leave_out_unused

    modules = dict.fromkeys(())
    monkeypatch.setattr(sys, "modules", modules)
    values = {"model_name_or_path": "m", "data_dir": "d", "output_dir": "o"}
    leave_out_unused(validate(EvaluateSettings, values, "test"))
    assert set(modules) == {"bitsandbytes", "deepspeed"}
