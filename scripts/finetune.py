"""Fine-tune a Phi-3(.5)-vision checkpoint on a data folder.

The recipe's full fine-tuning on the full DocVQA training set, on one machine with 8 GPUs:

    torchrun --standalone --nproc_per_node=8 scripts/finetune.py --model_name_or_path results/models/KEY \\
        --output_dir results/mine/train/docvqa --full_train --bf16 --use_flash_attention --batch_size 64

LoRA on one GPU or a CPU, without torchrun:

    python scripts/finetune.py --model_name_or_path MODEL --data_dir DATA --output_dir OUT --use_lora --bf16

The same command resumes from the newest checkpoint in OUT/checkpoints. Exit codes: 0: done; 75: saved and stopped after
a signal; 73: another job uses OUT; 2: wrong setting; 1: any other error.
"""

from phi3v.settings import FinetuneSettings, heavy_imports, parse, run_script
from phi3v.training.compat import leave_out_unused


def main() -> int:
    """Parses the command line and trains."""
    settings = parse(FinetuneSettings, __doc__)
    leave_out_unused(settings)
    with heavy_imports():
        from phi3v.training.finetune import run

    return run(settings)


if __name__ == "__main__":
    run_script(main)
