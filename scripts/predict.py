"""Ask a checkpoint or an adapter about your own pictures.

    python scripts/predict.py --model_name_or_path microsoft/Phi-3.5-vision-instruct --image invoice.png \\
        --question "What is the total? Answer briefly." --bf16 --use_flash_attention
    python scripts/predict.py --fp32 --model_name_or_path results/demo/train/ROW/final --image left.png right.png \\
        --question "Are the two shapes the same?"

Several pictures are numbered in the order given. The answer goes to standard output.
"""

from phi3v.settings import PredictSettings, parse, run_script


def main() -> None:
    """Parse, ask, print the answer."""
    settings = parse(PredictSettings, __doc__)
    # After the command line is checked: loading PyTorch takes seconds.
    from phi3v.evaluation.predict import predict

    print(predict(settings))


if __name__ == "__main__":
    run_script(main)
