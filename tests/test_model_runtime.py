"""Where a job computes and with which kernels: what a machine shows, and what is refused before anything is loaded."""

import json
import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")


from phi3v.benchmark import speed  # noqa: E402
from phi3v.evaluation import predict as prediction  # noqa: E402
from phi3v.evaluation.run import join  # noqa: E402
from phi3v.model import runtime  # noqa: E402
from phi3v.model.runtime import check_architecture, compute_device  # noqa: E402
from phi3v.settings import (  # noqa: E402
    Compute,
    EvaluateSettings,
    FinetuneSettings,
    PredictSettings,
    SettingsError,
    SpeedSettings,
)
from phi3v.training.job import build  # noqa: E402
from phi3v.training.launch import deterministic_kernels, explain_failure  # noqa: E402

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
CUDA_12_6 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.fixture(autouse=True)
def environment_stays(monkeypatch):
    """What a job sets for its own process is taken back."""
    for name in ("PYTORCH_ALLOC_CONF", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


@pytest.fixture
def machine(monkeypatch):
    """A function that gives this process a CUDA device and a build of PyTorch."""

    def make(name, capability, built, count=1):
        answers = {
            "is_available": True, "device_count": count, "current_device": 0, "set_device": None, "get_device_name": name,
            "get_device_capability": capability, "get_arch_list": built,
        }  # fmt: skip
        for function, answer in answers.items():
            monkeypatch.setattr(torch.cuda, function, lambda *_, answer=answer: answer)

    return make


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((7, 0), CUDA_13, False),
        ((7, 0), CUDA_12_6, True),
        ((7, 5), CUDA_13, True),
        ((8, 9), CUDA_13, True),  # a later minor of the same generation: sm_80, sm_86
        ((12, 0), CUDA_13, True),
        ((12, 0), CUDA_12_6, False),
        ((12, 0), [*CUDA_12_6, "compute_90"], True),  # PTX of a lower version
        ((7, 0), ["sm_80", "compute_75"], False),
        ((8, 0), ["sm_86"], False),
        ((10, 0), ["sm_90a"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100f"], True),  # f: the family
        ((7, 0), [], True),  # nothing known
    ],
)
def test_which_architectures_run(machine, capability, built, runs):
    machine("some GPU", capability, built)
    if runs:
        check_architecture(torch.device("cuda", 0))
    else:
        with pytest.raises(SettingsError, match="some GPU: compute capability"):
            check_architecture(torch.device("cuda", 0))
    check_architecture(torch.device("cpu"))


def test_the_error_names_device_build_and_what_to_install(machine):
    machine("Tesla V100-SXM2-32GB", (7, 0), CUDA_13)
    with pytest.raises(SettingsError) as caught:
        check_architecture(torch.device("cuda", 0))
    said = str(caught.value)
    assert said.startswith("Tesla V100-SXM2-32GB: compute capability 7.0, and PyTorch ")
    assert (
        "has kernels for sm_75, sm_80, sm_86, sm_90, sm_100, sm_120 only; expected a build of PyTorch that has sm_70"
        in said
    )
    assert "the same version for CUDA 12.6 (docs/troubleshooting.md has the steps)" in said
    machine("NVIDIA GeForce RTX 5090", (12, 0), CUDA_12_6)
    with pytest.raises(SettingsError, match="has sm_120: a newer version, or the same one for a later CUDA"):
        check_architecture(torch.device("cuda", 0))


def test_training_evaluation_and_prediction_refuse_before_they_load_anything(machine, tmp_path):
    """No data and no model are there: whoever looked for them first would complain of that."""
    machine("Tesla V100-SXM2-32GB", (7, 0), CUDA_13)
    refused = "Tesla V100-SXM2-32GB: compute capability 7.0"
    folders = {"model_name_or_path": "missing", "output_dir": str(tmp_path), "data_dir": "missing"}
    with pytest.raises(SettingsError, match=refused):
        build(FinetuneSettings(**folders), tmp_path)
    with pytest.raises(SettingsError, match=refused):
        join(EvaluateSettings(**folders))
    with pytest.raises(SettingsError, match=refused):
        prediction.predict(PredictSettings(model_name_or_path="missing", question="What?"))


# No CUDA --------------------------------------------------------------------------------------------------------------

SMI = """#!/bin/sh
[ "$1" = --query-gpu=driver_version ] && echo {driver} || echo "NVIDIA A100-SXM4-80GB"
"""
GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS")


@pytest.fixture
def without_cuda(monkeypatch, tmp_path):
    """A function that makes this a machine on which PyTorch sees no GPU; `driver`: of the nvidia-smi there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in GPU_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(runtime, "DEVICE_FILE", tmp_path / "nvidia0")
    monkeypatch.setattr(runtime, "DRIVER_FILE", tmp_path / "version")

    def make(build=None, driver="", hip=None, **environment):
        monkeypatch.setattr(torch.version, "cuda", build)
        monkeypatch.setattr(torch.version, "hip", hip)
        if driver:
            (tmp_path / "nvidia-smi").write_text(SMI.format(driver=driver))
            (tmp_path / "nvidia-smi").chmod(0o755)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return tmp_path

    return make


def refusal(**settings) -> str:
    with pytest.raises(SettingsError) as caught:
        compute_device(Compute(**settings))
    return str(caught.value)


def test_a_machine_without_gpus_computes_on_its_cpu(without_cuda):
    without_cuda(build="13.0")
    assert compute_device(Compute()) == torch.device("cpu")
    for hidden in ("", "-1", "NoDevFiles"):
        without_cuda(build="13.0", driver="580.65.06", CUDA_VISIBLE_DEVICES=hidden)
        assert compute_device(Compute()) == torch.device("cpu")


@pytest.mark.parametrize(
    ("environment", "sign"),
    [
        ({"SLURM_JOB_GPUS": "0,1"}, "SLURM_JOB_GPUS=0,1"),
        ({"SLURM_JOB_GPUS": "0", "CUDA_VISIBLE_DEVICES": ""}, "SLURM_JOB_GPUS=0"),
        ({"SLURM_STEP_GPUS": "3"}, "SLURM_STEP_GPUS=3"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES is '0'"),
        ({"driver": "570.86.15"}, "this machine has NVIDIA A100-SXM4-80GB"),
    ],
)
def test_gpus_that_pytorch_does_not_see_are_no_reason_to_take_the_cpu(without_cuda, environment, sign):
    without_cuda(build="13.0", **environment)
    assert sign in refusal()
    assert "--expect_device cpu" in refusal()
    assert compute_device(Compute(expect_device="cpu")) == torch.device("cpu")


def test_a_device_file_alone_shows_a_gpu(without_cuda):
    folder = without_cuda()
    (folder / "nvidia0").touch()
    assert f"this machine has {folder / 'nvidia0'}" in refusal()


@pytest.mark.parametrize(
    ("build", "driver", "parts"),
    [
        ("13.0", "570.86.15", ["NVIDIA driver 570.86.15", "CUDA 13.0, which needs driver 580", "install driver 580"]),
        ("12.6", "515.43.04", ["NVIDIA driver 515.43.04", "CUDA 12.6, which needs driver 525"]),
        ("12.6", "535.54.03", ["NVIDIA driver 535.54.03", "check that the job requests a GPU"]),
        ("13.0", "", ["found no NVIDIA driver", "check that the job requests a GPU"]),
        (None, "580.65.06", ["is a CPU build", "NVIDIA driver 580.65.06"]),
        (None, "", ["is a CPU build", "no NVIDIA driver"]),
    ],
)
def test_the_refusal_names_driver_build_and_the_driver_that_is_needed(without_cuda, build, driver, parts):
    without_cuda(build=build, driver=driver)
    said = refusal(expect_device="cuda")
    assert said.startswith("command line: field `expect_device`: got cuda")
    assert all(part in said for part in parts), said


def test_the_driver_is_read_from_the_kernel_where_nvidia_smi_is_missing(without_cuda):
    folder = without_cuda(build="13.0")
    (folder / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build  (dvs-builder)\n"
        "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"
    )
    assert "NVIDIA driver 550.54.15" in refusal(expect_device="cuda")


def test_a_rocm_build_is_not_asked_for_nvidias_driver(without_cuda):
    without_cuda(hip="6.4.43482")
    assert "for ROCm 6.4.43482 sees no GPU" in refusal(expect_device="cuda")


def test_every_job_refuses_to_take_the_cpu_before_it_loads_anything(without_cuda, tmp_path):
    without_cuda(build="13.0", driver="570.86.15", SLURM_JOB_GPUS="0")
    training = {"model_name_or_path": "missing", "output_dir": str(tmp_path), "data_dir": str(tmp_path)}
    jobs = [
        lambda: build(FinetuneSettings(**training), tmp_path),
        lambda: speed.measure(SpeedSettings(**training, stand_in=True)),
        lambda: join(EvaluateSettings(**training)),
        lambda: prediction.predict(PredictSettings(model_name_or_path="missing", question="What?")),
    ]
    for job in jobs:
        with pytest.raises(SettingsError, match="which needs driver 580"):
            job()


# One process per GPU --------------------------------------------------------------------------------------------------


def test_a_process_takes_the_gpu_of_its_local_rank(machine, monkeypatch):
    machine("NVIDIA A100-SXM4-80GB", (8, 0), CUDA_13, count=2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert compute_device(Compute(expect_device="cuda")) == torch.device("cuda", 1)
    assert compute_device(Compute(expect_device="cpu")) == torch.device("cpu")


def test_cuda_segments_grow_unless_the_user_chose(machine, monkeypatch):
    machine("NVIDIA A100-SXM4-80GB", (8, 0), CUDA_13)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    touched = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: touched.append(os.environ["PYTORCH_ALLOC_CONF"]))
    compute_device(Compute())
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:128")
    compute_device(Compute())
    assert touched == ["expandable_segments:True", "max_split_size_mb:128"]


@pytest.mark.parametrize(("rank", "processes"), [("0", "3"), ("2", "3"), ("2", None)])
def test_more_processes_than_gpus_are_refused_before_a_gpu_is_touched(machine, monkeypatch, rank, processes):
    machine("NVIDIA A100-SXM4-80GB", (8, 0), CUDA_13, count=2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail("a GPU was touched"))
    monkeypatch.setenv("LOCAL_RANK", rank)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert "got 3 processes on this machine, but PyTorch sees 2 GPU(s) (NVIDIA A100-SXM4-80GB)" in refusal()


# Data type and attention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "capability"), [("Tesla V100-SXM2-32GB", (7, 0)), ("Tesla T4", (7, 5))])
def test_bfloat16_is_refused_before_ampere(machine, name, capability):
    machine(name, capability, CUDA_12_6)
    assert f"field `bf16`: got true on {name} (compute capability" in refusal(bf16=True)
    assert compute_device(Compute(fp16=True)).type == "cuda"


def package(folder, code: str, distribution: str = "flash-attn", version: str = "2.8.3"):
    """An installed distribution that brings a package `flash_attn`."""
    (folder / "flash_attn").mkdir(parents=True)
    (folder / "flash_attn" / "__init__.py").write_text(code)
    (folder / "flash_attn" / "cute").mkdir()
    (folder / "flash_attn" / "cute" / "__init__.py").touch()
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (info / "top_level.txt").write_text("flash_attn\n")
    (info / "RECORD").write_text(f"flash_attn/__init__.py,,\n{info.name}/METADATA,,\n")


PACKAGES = {
    "FlashAttention 2": ("def flash_attn_func(): ...\ndef flash_attn_varlen_func(): ...\n", {}),
    "built for another PyTorch": ("raise ImportError('undefined symbol: _ZN3c105ErrorC2E')\n", {}),
    "a library that cannot be loaded": ("raise OSError('libcudart.so.12: cannot open shared object file')\n", {}),
    "without its functions": ("", {}),
    "FlashAttention 4": ("", {"distribution": "flash-attn-4", "version": "4.0.0"}),
    "too old": ("def flash_attn_func(): ...\ndef flash_attn_varlen_func(): ...\n", {"version": "2.0.1"}),
}
# Capability and package of each machine; "none": a folder `flash_attn` that is no distribution.
MACHINES = [("8.0", kind) for kind in PACKAGES]
MACHINES += [("7.0", "FlashAttention 2"), ("7.5", "FlashAttention 2"), ("9.0", "none")]
CHOICE = """
import gc, json, os, sys
gc.disable()  # nothing goes before the end
import torch
for folder, capability in json.loads(sys.argv[1]):
    if os.fork():  # transformers looks for packages once in a process
        os.wait()
        continue
    sys.path.insert(0, folder)
    capability = tuple(map(int, capability.split(".")))
    answers = {"is_available": True, "get_device_capability": capability, "get_device_name": "GPU", "device_count": 1}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    torch.version.cuda = "13.0"
    from phi3v.model.runtime import attention_implementation
    from phi3v.settings import Compute
    settings = [Compute(use_flash_attention=True, **{dtype: True}) for dtype in ("bf16", "fp16", "fp32")]
    device = torch.device("cuda", 0)
    chosen = [attention_implementation(one, device) for one in [*settings, Compute()]]
    print(*chosen, attention_implementation(settings[0], torch.device("cpu")), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def choices(tmp_path_factory) -> dict[tuple[str, str], list[str]]:
    """Attention for bf16, fp16 and fp32 on each GPU, without the flag there, and with it on a CPU, in new processes."""
    folders = []
    for _, kind in MACHINES:
        folders.append(tmp_path_factory.mktemp("packages"))
        if kind == "none":
            (folders[-1] / "flash_attn" / "cute").mkdir(parents=True)
        else:
            code, named = PACKAGES[kind]
            package(folders[-1], code, **named)
    asked = json.dumps([(str(folder), machine[0]) for folder, machine in zip(folders, MACHINES, strict=True)])
    done = subprocess.run([sys.executable, "-c", CHOICE, asked], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert len(lines) == len(MACHINES), done.stderr
    return {machine: line.split() for machine, line in zip(MACHINES, lines, strict=True)}


@pytest.mark.parametrize("machine", MACHINES, ids=" ".join)
def test_only_a_flash_attention_2_that_imports_is_chosen_and_not_before_ampere(choices, machine):
    flash = "flash_attention_2" if machine == ("8.0", "FlashAttention 2") else "sdpa"
    assert choices[machine] == [flash, flash, "sdpa", "eager", "sdpa"]


@pytest.mark.parametrize(
    ("capability", "dtype", "said"),
    [
        ((7, 0), "fp16", True),
        ((7, 5), "fp16", True),
        ((8, 0), "fp32", True),
        ((8, 0), "fp16", False),
        ((9, 0), "bf16", False),
    ],
)
def test_another_kernel_than_asked_for_is_said(machine, capability, dtype, said):
    machine("some GPU", capability, CUDA_12_6)
    device = torch.device("cuda", 0)
    note = runtime.attention_note(Compute(use_flash_attention=True, **{dtype: True}), device)
    assert ("memory-efficient" in note) == said
    assert runtime.attention_note(Compute(**{dtype: True}), device) == ""


def test_deterministic_attention_on_cuda_refuses_what_it_cannot_repeat(monkeypatch, tmp_path):
    """A warning alone would leave atomics in PyTorch's attention kernels."""
    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC", raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        deterministic_kernels(torch.device("cpu"))
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        deterministic_kernels(torch.device("cuda", 0))
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "1"
        values, at = torch.zeros(4), torch.tensor([1])
        with (
            pytest.raises(
                SettingsError, match=r"field `deterministic`: got true: put_ .*on this device; expected --no"
            ),
            explain_failure(tmp_path),
        ):
            values.put_(at, torch.ones(1))
    finally:
        torch.use_deterministic_algorithms(False)
