"""Evaluate a checkpoint or an adapter on a split.

    python scripts/evaluate.py --model_name_or_path CHECKPOINT --data_dir DATA --output_dir RESULT --bf16
    torchrun --nproc_per_node=4 scripts/evaluate.py --model_name_or_path ADAPTER --data_dir DATA --output_dir RESULT \\
        --bf16 --use_flash_attention --passes after control --batch_size_per_gpu 16

Writes predictions.jsonl, metrics.json and timing.json to RESULT/PASS/, and RESULT/manifest.json last. The same command
resumes a stopped run. On a CPU, with the demo's data:

    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 scripts/evaluate.py --fp32 --model_name_or_path results/demo/train/ROW/final \\
        --data_dir results/data/KEY --output_dir evaluated
"""

from phi3v.settings import EvaluateSettings, heavy_imports, parse, run_script
from phi3v.training.compat import leave_out_unused


def main() -> None:
    """Parses the command line and evaluates."""
    settings = parse(EvaluateSettings, __doc__)
    leave_out_unused(settings)
    # Imported after the command line is checked, because loading PyTorch takes seconds.
    with heavy_imports():
        from phi3v.evaluation.run import evaluate

    evaluate(settings)


if __name__ == "__main__":
    run_script(main)
