"""Answer questions about your own pictures with a checkpoint or an adapter.

One question, answered on standard output. Several pictures are numbered in the given order:

    python scripts/predict.py --model_name_or_path microsoft/Phi-3.5-vision-instruct --image invoice.png \\
        --question "What is the total? Answer briefly." --bf16 --use_flash_attention

A table of pictures and questions, or every picture in a folder, on one GPU or with torchrun on several:

    python scripts/predict.py --model_name_or_path results/NAME/train/ROW/final --bf16 --table new.csv --output_dir answers
    torchrun --nproc_per_node=4 scripts/predict.py --model_name_or_path ADAPTER --bf16 --folder scans \\
        --question "What is the total?" --output_dir answers

Writes answers.jsonl, answers.csv and manifest.json to OUTPUT_DIR. The same command resumes a stopped run.
"""

from phi3v.settings import PredictSettings, heavy_imports, parse, run_script
from phi3v.training.compat import leave_out_unused


def main() -> None:
    """Parses the command line, and prints the answer or the path of the answers."""
    settings = parse(PredictSettings, __doc__)
    leave_out_unused(settings)
    # Imported after the command line is checked, because loading PyTorch takes seconds.
    with heavy_imports():
        from phi3v.evaluation.predict import predict, predict_all

    if settings.table or settings.folder:
        print(predict_all(settings), end="")
    else:
        print(predict(settings))


if __name__ == "__main__":
    run_script(main)
