"""Measure the training speed of one row: images and tokens per second, step time, MFU and HFU, peak memory.

    torchrun --standalone --nproc_per_node=8 scripts/speed.py --model_name_or_path results/models/KEY \\
        --output_dir results/mine/speed/full-flash --full_train --bf16 --use_flash_attention --batch_size 64 \\
        --expect_hardware a100-80gb --expect_processes 8

Two CPU processes in place of the published machines; the result is labelled:

    torchrun --standalone --nproc_per_node=2 scripts/speed.py --model_name_or_path MODEL --data_dir DATA \\
        --output_dir OUT --bf16 --batch_size 64 --expect_processes 8 --stand_in

--profile adds OUT/profile: a trace for https://ui.perfetto.dev and a table of the 20 longest operators.
Exit codes: 0: done; 2: wrong setting, or other devices than expected; 1: any other error.
"""

from phi3v.settings import SpeedSettings, heavy_imports, parse, run_script
from phi3v.training.compat import leave_out_unused


def main() -> int:
    """Parses the command line and measures."""
    settings = parse(SpeedSettings, __doc__)
    leave_out_unused(settings)
    with heavy_imports():
        from phi3v.benchmark.speed import measure

    return measure(settings)


if __name__ == "__main__":
    run_script(main)
