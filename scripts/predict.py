"""Ask a checkpoint or an adapter about your own pictures.

One question; the answer goes to standard output. Several pictures are numbered in the order given:

    python scripts/predict.py --model_name_or_path microsoft/Phi-3.5-vision-instruct --image invoice.png \\
        --question "What is the total? Answer briefly." --bf16 --use_flash_attention

A table of pictures and questions, or every picture of a folder; torchrun answers on several GPUs:

    python scripts/predict.py --model_name_or_path results/NAME/train/ROW/final --bf16 --table new.csv --output_dir answers
    torchrun --nproc_per_node=4 scripts/predict.py --model_name_or_path ADAPTER --bf16 --folder scans \\
        --question "What is the total?" --output_dir answers

OUTPUT_DIR gets answers.jsonl, answers.csv and manifest.json. The same command resumes a run that was stopped.
"""

from phi3v.settings import PredictSettings, parse, run_script


def main() -> None:
    """Parse, ask, print the answer or where the answers are."""
    settings = parse(PredictSettings, __doc__)
    # After the command line is checked: loading PyTorch takes seconds.
    from phi3v.evaluation.predict import predict, predict_all

    if settings.table or settings.folder:
        print(predict_all(settings), end="")
    else:
        print(predict(settings))


if __name__ == "__main__":
    run_script(main)
