"""Device, dtype of the weights, and attention kernel of a job.

Training, speed, evaluation and prediction share these choices and checks, so that no job starts on an unsuitable
device. The settings contain the request. `Observer` records what runs, in the first training forward pass.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from phi3v.model import fused
from phi3v.settings import Compute, FinetuneSettings, SettingsError

TORCH_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Oldest driver branch for a CUDA major version (NVIDIA, CUDA Compatibility, "Minor Version Compatibility", table 1:
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
# Values of CUDA_VISIBLE_DEVICES that hide every GPU; SLURM writes the last one.
NO_DEVICES = ("", "-1", "NoDevFiles")
ANYWAY = "To compute on the CPU anyway, set --expect_device cpu"
# Files of NVIDIA's kernel module, which exist even in a container that cannot use it. Tests replace them.
DEVICE_FILE, DRIVER_FILE = Path("/dev/nvidia0"), Path("/proc/driver/nvidia/version")


# Device ---------------------------------------------------------------------------------------------------------------


def compute_device(settings: Compute) -> torch.device:
    """Sets and returns this process's device: the GPU of its LOCAL_RANK, or the CPU.

    Raises SettingsError if a GPU is expected, or this machine has one, and PyTorch cannot use it, if this machine runs
    more processes than it has GPUs, or if PyTorch or the GPU lacks kernels or the data type.
    """
    if settings.expect_device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        check_no_gpu(settings)
        return torch.device("cpu")
    grow_segments()
    count, rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    processes = max(rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if processes > count:
        raise SettingsError(
            f"torchrun: --nproc_per_node: got {processes} processes on this machine, but PyTorch sees {count} GPU(s) "
            f"({torch.cuda.get_device_name(0)}); expected at most one process per GPU"
        )
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    check_architecture(device)
    if settings.bf16 and not fused.is_ampere(device):
        raise SettingsError(
            f"command line: field `bf16`: got true on {device_title(device)}, which does not support bfloat16; "
            "expected --fp16"
        )
    return device


def grow_segments() -> None:
    """Enables expandable segments of the CUDA allocator, unless the user chose otherwise. Must run before CUDA is used.

    Batches differ in tokens and tiles. With segments of fixed size, freed memory often does not match the next request,
    and the reserved memory grows (PyTorch, CUDA semantics, memory management).
    """
    chosen = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    if not torch.version.hip and not chosen:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def device_name(device: torch.device) -> str:
    """Description of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"CPU ({names[0]})" if names else "CPU"


def device_title(device: torch.device) -> str:
    """Name and compute capability of a CUDA device."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"


def check_no_gpu(settings: Compute) -> None:
    """Raises SettingsError if `settings` expect a GPU or this machine has one. Called if PyTorch sees none."""
    sign = sign_of_gpus()
    if settings.expect_device is None and sign is None:
        return
    why = "command line: field `expect_device`: got cuda" if settings.expect_device else str(sign)
    build = f"PyTorch {torch.__version__}"
    if torch.version.hip:
        raise SettingsError(f"{why}, but {build} for ROCm {torch.version.hip} sees no GPU; {ANYWAY}")
    driver, cuda = driver_version(), torch.version.cuda
    found = f"NVIDIA driver {driver}" if driver else "no NVIDIA driver"
    if cuda is None:
        raise SettingsError(
            f"{why}, but {build} is a CPU build (found {found}); install PyTorch's CUDA build "
            f"(docs/troubleshooting.md). {ANYWAY}"
        )
    oldest = OLDEST_DRIVER.get(int(cuda.split(".")[0]))
    needed = f"which needs driver {oldest} or newer" if oldest else "whose driver is in NVIDIA's CUDA release notes"
    if driver and oldest and int(driver.split(".")[0]) < oldest:
        advice = f"install driver {oldest} or newer, or PyTorch's build for an earlier CUDA (docs/troubleshooting.md)"
    else:
        advice = (
            "check that the job requests a GPU (SLURM: --gres=gpu:1), CUDA_VISIBLE_DEVICES, and in a container --nv"
        )
    raise SettingsError(
        f"{why}, but PyTorch can use no GPU: found {found}; {build} is built for CUDA {cuda}, {needed}; {advice}. "
        f"{ANYWAY}"
    )


def sign_of_gpus() -> str | None:
    """Evidence, independent of PyTorch, that this machine or job has NVIDIA GPUs, or None.

    An empty CUDA_VISIBLE_DEVICES hides the GPUs on purpose, so only SLURM's allotment counts then.
    """
    for name in ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS"):
        if value := os.environ.get(name):
            return f"SLURM gave this job GPUs ({name}={value})"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in NO_DEVICES:
        return None
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES is {visible!r}"
    if names := nvidia_smi("--query-gpu=name", "--format=csv,noheader"):
        return f"this machine has {names.splitlines()[0].strip()}"
    return f"this machine has {DEVICE_FILE}" if DEVICE_FILE.exists() else None


def driver_version() -> str | None:
    """Version of NVIDIA's driver ("570.86.15"), from nvidia-smi or the kernel module. None without a driver."""
    said = nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader") or ""
    if not re.match(r"\d", said):
        said = DRIVER_FILE.read_text(encoding="utf-8") if DRIVER_FILE.is_file() else ""
    version = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", said)
    return version[0] if version else None


def nvidia_smi(*arguments: str) -> str | None:
    """Output of nvidia-smi. None if it is missing, fails or takes a minute."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def check_architecture(device: torch.device) -> None:
    """Raises SettingsError if PyTorch's build has no kernels for a CUDA device.

    A build for sm_XY runs on the devices of generation X whose minor number is Y or more, compute_XY (PTX, compiled by
    the driver) on X.Y and all later ones, a name with an a (sm_90a) on that very architecture alone (NVIDIA, CUDA C++
    Programming Guide, binary and PTX compatibility). Other builds and devices (CPU, ROCm) are not checked.
    """
    if device.type != "cuda" or torch.version.hip:
        return
    built = torch.cuda.get_arch_list()
    capability = torch.cuda.get_device_capability(device)
    if not built or any(_runs(name, capability) for name in built):
        return
    older = capability < min(_number(name) for name in built)
    build = f"PyTorch {torch.__version__}"
    raise SettingsError(
        f"{torch.cuda.get_device_name(device)}: compute capability {capability[0]}.{capability[1]}, and {build} has "
        "kernels "
        f"for {', '.join(built)} only; expected a build of PyTorch that has sm_{capability[0]}{capability[1]}: "
        + (
            "the same version for CUDA 12.6 (docs/troubleshooting.md has the steps)"
            if older
            else "a newer version, or the same one for a later CUDA"
        )
    )


def _number(name: str) -> tuple[int, int]:
    """(major, minor) of "sm_75", "compute_120", "sm_90a"."""
    digits = re.sub(r"\D", "", name)
    return int(digits[:-1]), int(digits[-1])


def _runs(name: str, capability: tuple[int, int]) -> bool:
    major, minor = _number(name)
    if name.endswith("a"):
        return (major, minor) == capability
    if name.startswith("compute_"):
        return (major, minor) <= capability
    return major == capability[0] and minor <= capability[1]


# Attention ------------------------------------------------------------------------------------------------------------


def attention_implementation(settings: Compute, device: torch.device) -> str:
    """The model's `attn_implementation`: eager, or with --flash_attention the fastest kernel of the device.

    The flash-attn package if it can run there, else PyTorch's SDPA: its flash kernel on Ampere and newer in bf16 and
    fp16, its memory-efficient kernel on other CUDA devices and in fp32, a flash kernel of its own on a CPU.
    """
    if not settings.flash_attention:
        return "eager"
    if has_flash_kernels(settings, device) and has_flash_attn():
        return "flash_attention_2"
    return "sdpa"


def has_flash_kernels(settings: Compute, device: torch.device) -> bool:
    """Whether a GPU has flash kernels for the data type: bf16 or fp16, Ampere or newer."""
    return settings.dtype != "fp32" and fused.is_ampere(device)


def has_flash_attn() -> bool:
    """Whether FlashAttention 2 can be imported: not another package of that name, and not built for another PyTorch."""
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        return False
    try:
        from flash_attn import flash_attn_func, flash_attn_varlen_func
    except (ImportError, OSError, RuntimeError, AttributeError):  # raised by a library with another ABI
        return False
    return callable(flash_attn_func) and callable(flash_attn_varlen_func)


def attention_note(settings: Compute, device: torch.device) -> str:
    """A sentence if --use_flash_attention uses a kernel other than flash attention on a GPU, or ""."""
    if not settings.flash_attention or device.type != "cuda" or has_flash_kernels(settings, device):
        return ""
    return (
        f"--use_flash_attention: PyTorch's memory-efficient attention runs instead, in {settings.dtype} on "
        f"{device_title(device)}: flash kernels need bf16 or fp16 and compute capability 8.0"
    )


# Weights --------------------------------------------------------------------------------------------------------------


def uses_zero(settings: FinetuneSettings) -> bool:
    """Whether the job uses DeepSpeed: full fine-tuning, unless --zero_stage 0."""
    return settings.method in ("full", "frozen") and settings.zero_stage > 0


def weight_dtype(settings: FinetuneSettings) -> torch.dtype:
    """Dtype in which the model's weights are loaded.

    ZeRO keeps its own float32 master copy, and frozen weights under adapters never change: both are held in the compute
    type. Full fine-tuning without ZeRO trains float32 weights under autocast.
    """
    if settings.method in ("full", "frozen") and not uses_zero(settings):
        return torch.float32
    return TORCH_DTYPE[settings.dtype]


# What really runs ------------------------------------------------------------------------------------------------------

# Operator names of PyTorch (native_functions.yaml; torch.nn.attention.varlen) and flash-attn, and their titles in
# reports.
KERNELS = {
    "_scaled_dot_product_flash_attention_for_cpu": "sdpa flash (CPU)",
    "_scaled_dot_product_flash_attention": "sdpa flash",
    "_flash_attention_forward": "sdpa flash (varlen)",
    "_varlen_attn": "sdpa flash (varlen)",
    "_scaled_dot_product_efficient_attention": "sdpa memory-efficient",
    "_scaled_dot_product_cudnn_attention": "sdpa cuDNN",
    "_scaled_dot_product_fused_attention_overrideable": "sdpa fused",
    "_flash_attn_forward": "flash-attn",
    "_flash_attn_varlen_forward": "flash-attn (varlen)",
}


class _Operators(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Suspends this mode, which must be the innermost one."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name.split("::")[-1])
        return func(*args, **(kwargs or {}))


def attention_kernel(operators: set[str], implementation: str) -> str:
    """The attention kernel among the operators of a layer. `implementation` separates eager from SDPA's composite.

    An attention operator without a title keeps its own name.
    """
    for name, title in KERNELS.items():
        if name in operators:
            return title
    if unnamed := sorted(name for name in operators if "attention" in name or "attn" in name):
        return unnamed[0]
    if "_softmax" in operators or "_safe_softmax" in operators:
        return "eager" if implementation == "eager" else "sdpa math"
    return "none seen"


class Observer:
    """Observes the first training forward pass of one decoder layer and one vision layer, then removes its hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.activation_dtype: str | None = None
        self.kernels: dict[str, str] = {}
        self._handles: list[RemovableHandle] = []
        implementation = str(getattr(model.config, "_attn_implementation", "sdpa"))
        for part, layer in _first_layers(model).items():
            self._watch(part, layer, implementation)
            if part == "decoder":
                linear = next(m for n, m in layer.named_modules() if n.endswith("qkv_proj"))
                self._handles.append(linear.register_forward_hook(self._see_dtype))

    def _see_dtype(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if module.training:
            names = {dtype: name for name, dtype in TORCH_DTYPE.items()}
            self.activation_dtype = names.get(output.dtype, str(output.dtype))

    def _watch(self, part: str, layer: nn.Module, implementation: str) -> None:
        entered: list[tuple[_Operators, contextlib.ExitStack]] = []

        def enter(module: nn.Module, inputs: Any) -> None:
            if module.training and part not in self.kernels:
                stack = contextlib.ExitStack()
                operators = stack.enter_context(_Operators())
                stack.enter_context(fused.called_within(operators.paused))
                entered.append((operators, stack))

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            if entered:
                operators, stack = entered.pop()
                stack.close()
                self.kernels[part] = attention_kernel(operators.names, implementation)

        self._handles.append(layer.register_forward_pre_hook(enter))
        self._handles.append(layer.register_forward_hook(leave, always_call=True))

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def result(self) -> dict[str, Any]:
        """The fields of observed.json from a forward pass. null if no such layer ran."""
        return {
            "activation_dtype": self.activation_dtype,
            "attention_decoder": self.kernels.get("decoder"),
            "attention_vision": self.kernels.get("vision"),
        }


def _first_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The first layer of each tower, by module path."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        if parts[-2:] == ["layers", "0"]:
            found.setdefault("vision" if "vision_embed_tokens" in parts else "decoder", module)
    return found


def linear4bit(model: nn.Module) -> tuple[int, int]:
    """Number of bitsandbytes 4-bit layers and the bytes of their packed weights."""
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    return len(layers), sum(int(module.get_parameter("weight").nbytes) for module in layers)
