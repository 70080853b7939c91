"""Write a run's results and the published numbers as one page and as files.

    python scripts/report.py --config config/demo.yaml
    python scripts/report.py --config config/config.yaml --results results/published --output_dir results/published/report

Writes index.html (one file, works offline), accuracy.tsv, speed.tsv, report.json and tables.md. Uses all available
results; each unfinished row gives its reason. Needs no GPU and no PyTorch.
"""

from phi3v.reporting.page import build_report
from phi3v.settings import ReportSettings, parse, run_script


def main() -> None:
    """Parses the command line, writes the report, and prints the number of finished rows."""
    tables = build_report(parse(ReportSettings, __doc__))
    done = sum(line.state.status == "done" for line in tables.accuracy)
    timed = sum(line.state.status == "done" for line in tables.speed)
    print(f"report: {done} of {len(tables.accuracy)} accuracy rows, {timed} of {len(tables.speed)} speed rows done")


if __name__ == "__main__":
    run_script(main)
