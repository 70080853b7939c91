"""Score the predictions of an evaluation by other metrics, or by your own function. Needs no model and no GPU.

    python scripts/score.py --input_dir results/NAME/evaluate/ROW --output_dir scored --metrics my_metrics.py:score accuracy
    python scripts/score.py --input_dir scored --metrics cer --compare results/NAME/evaluate/base/KEY/before

Writes predictions.jsonl and metrics.json to OUTPUT/PASS/. my_metrics.py defines `def score(predictions: list[dict]) ->
list[float]`, which returns a number from 0 to 1 for each line of predictions.jsonl.
"""

from phi3v.evaluation.scoring import rescore
from phi3v.settings import ScoreSettings, parse, run_script


def main() -> None:
    """Parses the command line, scores, and prints a line per pass."""
    for name, found in rescore(parse(ScoreSettings, __doc__)).items():
        low, high = found["interval"]
        print(f"{name}: {found['metric']} {found['score']:.2f} [{low:.1f}, {high:.1f}], n = {found['n']}")


if __name__ == "__main__":
    run_script(main)
