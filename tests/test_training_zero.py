"""What differs between a CUDA device and a CPU: the optimizer and DeepSpeed's configuration."""

from __future__ import annotations

import pytest
import torch

from phi3v.settings import FinetuneSettings, SettingsError, validate
from phi3v.training.job import check_automatic
from phi3v.training.optimizers import zero_config


def settings(**values: object) -> FinetuneSettings:
    return validate(FinetuneSettings, {"model_name_or_path": "m", "output_dir": "o"} | values, "test")


@pytest.mark.parametrize(
    ("stage", "cuda", "dtype"), [(1, True, None), (2, True, "fp32"), (3, True, "fp32"), (2, False, None)]
)
def test_shards_of_gradients_are_summed_in_float32_on_cuda(stage, cuda, dtype):
    config = zero_config(settings(bf16=True, zero_stage=stage), 8, cuda)
    assert config.get("data_types", {}).get("grad_accum_dtype") == dtype
    assert config["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize(("machines", "cuda", "whole_buckets"), [(1, True, True), (4, True, False), (4, False, True)])
def test_between_machines_each_share_of_a_bucket_goes_to_its_owner_alone(monkeypatch, machines, cuda, whole_buckets):
    monkeypatch.setenv("GROUP_WORLD_SIZE", str(machines))
    config = zero_config(settings(bf16=True), 8, cuda)
    zero = config["zero_optimization"]
    assert zero["use_multi_rank_bucket_allreduce"] == whole_buckets
    assert zero["reduce_scatter"] == (not cuda or machines > 1)


@pytest.mark.parametrize("automatic", [{"batch_size_per_gpu": "auto"}, {"gradient_checkpointing": "auto"}])
def test_auto_is_refused_if_its_memory_plan_is_not_the_jobs(automatic):
    gpu = torch.device("cuda", 0)
    for stage in (0, 1):
        with pytest.raises(SettingsError, match=f"`zero_stage`: got {stage} with auto on 8 GPUs"):
            check_automatic(settings(bf16=True, zero_stage=stage, **automatic), 8, gpu)
    check_automatic(settings(bf16=True, zero_stage=0, **automatic), 1, gpu)
    check_automatic(settings(bf16=True, zero_stage=2, **automatic), 8, gpu)
    check_automatic(settings(bf16=True, use_lora=True, **automatic), 8, gpu)


@pytest.mark.parametrize(("stage", "scatters"), [(2, False), (3, True)])
def test_only_zero_2_reduces_its_buckets_in_place(stage, scatters):
    assert (
        zero_config(settings(bf16=True, zero_stage=stage), 8, True)["zero_optimization"]["reduce_scatter"] == scatters
    )
