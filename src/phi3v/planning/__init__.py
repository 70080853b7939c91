"""What a row costs before it runs: FLOP, memory, time, money, and which hardware can do it. Imports no torch.

For training (MFU, HFU, fitting micro-batches):

    from phi3v.planning import example_work, geometry_from_config, hardware_of_device, training_flops, utilisation

    geometry = geometry_from_config(model.config.to_dict())            # or the models entry's geometry
    work = sum over the step of example_work(geometry, tokens, tiles, labels)
    flops = training_flops(geometry, work, "lora", rank=32, flash=True, recompute=1.0)
    key = hardware_of_device(torch.cuda.get_device_name(), entries)     # None: unknown, then show no MFU
    peak = entries[key].peak_tflops.bf16
    mfu = utilisation(flops.model, seconds, peak, devices=world_size)
    hfu = utilisation(flops.hardware, seconds, peak, devices=world_size)

`work` is that of all devices together in `seconds`. The method is the tables' (full, frozen, lora, qlora).
"""

from phi3v.planning.choice import Choice, best_micro_batch, largest_micro_batch
from phi3v.planning.flops import (
    FORMULA,
    Flops,
    TrainingFlops,
    Work,
    example_work,
    forward_flops,
    training_flops,
    utilisation,
)
from phi3v.planning.geometry import (
    geometry_from_config,
    model_geometry,
    parameters,
    quantised_parameters,
    trainable_parameters,
)
from phi3v.planning.hardware import find_hardware, hardware_of_device
from phi3v.planning.memory import Memory, fits, memory
from phi3v.planning.misfit import runnable
from phi3v.planning.plan import Resources, check_room, plan_run, resources
from phi3v.planning.roofline import StepTime, images_per_second, step_time
from phi3v.planning.setup import Constants, Setup
from phi3v.planning.traffic import Traffic, traffic_of

__all__ = [
    "FORMULA",
    "Choice",
    "Constants",
    "Flops",
    "Memory",
    "Resources",
    "Setup",
    "StepTime",
    "Traffic",
    "TrainingFlops",
    "Work",
    "best_micro_batch",
    "check_room",
    "example_work",
    "find_hardware",
    "fits",
    "forward_flops",
    "geometry_from_config",
    "hardware_of_device",
    "images_per_second",
    "largest_micro_batch",
    "memory",
    "model_geometry",
    "parameters",
    "plan_run",
    "quantised_parameters",
    "resources",
    "runnable",
    "step_time",
    "traffic_of",
    "trainable_parameters",
    "training_flops",
    "utilisation",
]
