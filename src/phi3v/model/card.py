"""A model card from a training run's manifest: what was trained on what, how, and how to load it."""

from __future__ import annotations

import json
from pathlib import Path

from phi3v.provenance.manifest import Manifest
from phi3v.settings import FinetuneSettings, Role, fields_with

CARD = """---
license: mit
base_model: {base}
library_name: transformers
pipeline_tag: image-text-to-text
tags: [phi3_v, vision, fine-tuned]
---

# {name}

Fine-tuned from `{base}` with phi3v; weights in the base's own checkpoint layout.

## Training

{training}
{merge}## Use

```python
from phi3v.model import Phi3VForCausalLM, Phi3VProcessor

model = Phi3VForCausalLM.from_pretrained("{name}").eval()
processor = Phi3VProcessor.from_pretrained("{name}")
```

Programs that run the publisher's remote code need the publisher's Python files beside these weights.
"""
MERGE = """## Merge

The adapter was folded into the base's weights. On a fixed prompt with one picture the merged model \
differs from base plus adapter by at most {max_logit_difference:.2g} in a logit \
(deviation of the logits: {logit_scale:.2g}); {top_token_agreement:.1%} of the most probable tokens are the same.

"""


def model_card(name: str, base: str, manifest: Manifest | None, merge_report: dict[str, float] | None) -> str:
    """The card as Markdown with its YAML head; without a manifest it states that the training is not recorded.

    Folders are named by their last part, and user and host stay out: a card is published.
    """
    if manifest is None:
        training = "No manifest was found beside the trained weights: how they came about is not recorded.\n"
    else:
        training = _training(manifest)
    merge = MERGE.format_map(merge_report) if merge_report else ""
    return CARD.format(name=name, base=base, training=training, merge=merge)


def _training(manifest: Manifest) -> str:
    settings = manifest.get("settings") or {}
    first = [key for key in fields_with(FinetuneSettings, *Role) if key in settings]
    ordered = first + sorted(set(settings) - set(first))
    changed = " with uncommitted changes" if manifest.get("dirty") else ""
    versions = ", ".join(f"{package} {version}" for package, version in (manifest.get("versions") or {}).items())
    lines = ["| setting | value |", "|---|---|"]
    lines += [f"| {key} | {_cell(key, settings[key])} |" for key in ordered if settings[key] is not None]
    lines += [
        "",
        f"Code: commit {manifest.get('commit') or 'unknown'}{changed}. Device: {manifest.get('device', 'unknown')}. "
        f"Wall time: {manifest.get('seconds', 0):.0f} s. Finished: {manifest.get('finished', 'unknown')}.",
        "",
        f"Versions: {versions or 'unknown'}.",
        "",
    ]
    for key, value in (manifest.get("inputs") or {}).items():
        digest = value.get("sha256") or value.get("value")
        lines.append(f"- input {key}: `{Path(str(value.get('path', ''))).name}` {digest}")
    return "\n".join([*lines, ""])


def _cell(key: str, value: object) -> str:
    """A setting's value for the table; of folders only the last part."""
    if key.endswith(("_dir", "_path")) or key == "model_name_or_path":
        return Path(str(value)).name
    return str(value).replace("|", "\\|").replace("\n", " ")


def write_card(
    folder: str | Path, base: str | Path, manifest: Path | None, merge_report: dict[str, float] | None = None
) -> Path:
    """Write FOLDER/README.md; raises ValueError for a manifest that is no JSON object."""
    content = None
    if manifest is not None:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{manifest}: {type(content).__name__}; expected a JSON object.")
    path = Path(folder) / "README.md"
    path.write_text(model_card(Path(folder).resolve().name, Path(base).name, content, merge_report), encoding="utf-8")
    return path
