"""Merge a LoRA or QLoRA adapter into a checkpoint in the published layout, and write a model card.

    python scripts/merge.py --adapter results/NAME/train/ROW/final --out merged/my-model
    python scripts/merge.py --adapter ADAPTER --out OUT --dtype float32 --manifest results/NAME/train/ROW/manifest.json

Before writing, the merged model is compared with the base and its adapter. The sum is computed in float32, so a
full-size model takes about 18 GiB of memory. Nothing is uploaded without --push_to_hub.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Merges, writes the card, and uploads if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, type=Path, help="folder with adapter_config.json")
    parser.add_argument("--out", required=True, type=Path, help="new folder for the merged checkpoint")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="dtype of the weights (default: the base's)"
    )
    parser.add_argument(
        "--quantised_as",
        choices=("bfloat16", "float16", "float32"),
        help="dtype of QLoRA training, to merge into its 4-bit weights (default: merge into the unquantised base)",
    )
    parser.add_argument("--manifest", type=Path, help="manifest.json of the training (default: in or above --adapter)")
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="upload the folder as a private repository")
    chosen = parser.parse_args(arguments)
    if chosen.manifest is not None and not chosen.manifest.is_file():
        parser.error(f"--manifest {chosen.manifest}: no such file; expected a manifest.json")
    if not (chosen.adapter / "adapter_config.json").is_file():
        parser.error(f"--adapter {chosen.adapter}: contains no adapter_config.json; expected a PEFT adapter folder")

    import torch

    from phi3v.model.adapters import base_of, merge, write_card
    from phi3v.provenance.manifest import parent_file

    try:
        dtype, quantised_as = (getattr(torch, name) if name else None for name in (chosen.dtype, chosen.quantised_as))
        report = merge(chosen.adapter, chosen.out, dtype, quantised_as=quantised_as)
        write_card(
            chosen.out,
            base_of(chosen.adapter),
            chosen.manifest or parent_file(chosen.adapter, ["manifest.json"]),
            report,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"out": str(chosen.out), **report}, indent=1))
    if chosen.push_to_hub:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(chosen.push_to_hub, private=True, exist_ok=True)
        api.upload_folder(repo_id=chosen.push_to_hub, folder_path=str(chosen.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
