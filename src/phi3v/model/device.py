"""Whether this build of PyTorch has kernels for a GPU, asked before anything is loaded onto it."""

from __future__ import annotations

import re

import torch

from phi3v.settings import SettingsError


def check_architecture(device: torch.device) -> None:
    """Raises SettingsError where PyTorch was built for none of the architectures that run on a CUDA device.

    A build for sm_XY runs on the devices of generation X whose minor number is Y or more, compute_XY (PTX, compiled by
    the driver) on X.Y and all later ones, a name with an a (sm_90a) on that very architecture alone (NVIDIA, CUDA C++
    Programming Guide, binary and PTX compatibility). Other builds and devices (CPU,
    ROCm) are not looked at.
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
        f"{torch.cuda.get_device_name(device)}: compute capability {capability[0]}.{capability[1]}, and {build} has kernels "
        f"for {', '.join(built)} only; expected a build of PyTorch that has sm_{capability[0]}{capability[1]}: "
        + (
            "the same version for an earlier CUDA (for V100 and older 12.6, docs/planner.md)"
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
