"""How much the training loop costs: step time of fine-tuning over bare forward, backward and update.

    python scripts/bench_training.py --model_name_or_path MODEL --data_dir DATA --output_dir bench --fp32 \\
        --zero_stage 0 --batch_size 8 --batch_size_per_gpu 8 --repeats 5

Both sides run the same model, batches, loss and optimizer in one process, in turn, and the medians of the windows are
compared. The first line of the result is JSON.
"""

from __future__ import annotations

import json
import sys

from phi3v.settings import SpeedSettings, parse
from phi3v.training.startup import leave_out_unused


def main() -> int:
    """Parse, measure, print."""
    settings = parse(SpeedSettings, __doc__ or "")
    leave_out_unused(settings)
    from phi3v.training.overhead import loop_overhead

    print(json.dumps(loop_overhead(settings)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
