"""The run's tables beside the published numbers, as one page and as files.

    python scripts/report.py --config config/demo.yaml
    python scripts/report.py --config config/config.yaml --results results/published --output_dir results/published/report

Writes index.html (one file, works offline), accuracy.tsv, speed.tsv, report.json and tables.md. It reads whatever is there: rows that
are not done say why. No GPU, no PyTorch.
"""

import sys

from phi3v.reporting.page import build_report
from phi3v.settings import ReportSettings, SettingsError, parse

if __name__ == "__main__":
    settings = parse(ReportSettings, __doc__ or "")
    try:
        tables = build_report(settings)
    except SettingsError as error:
        sys.exit(f"error: {error}")
    done = sum(line.state.status == "done" for line in tables.accuracy)
    timed = sum(line.state.status == "done" for line in tables.speed)
    print(f"report: {done} of {len(tables.accuracy)} accuracy rows, {timed} of {len(tables.speed)} speed rows done")
