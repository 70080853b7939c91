"""A model card from a training run's manifest: what was trained on what, how, and how to load it (card.md)."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import jinja2

from phi3v.provenance.manifest import Manifest, read_json
from phi3v.settings import FinetuneSettings, Role, fields_with

TEMPLATE = Path(__file__).with_name("card.md")


def model_card(name: str, base: str, manifest: Manifest | None, merge_report: dict[str, float] | None) -> str:
    """The card as Markdown with its YAML head; without a manifest it states that the training is not recorded.

    Folders are named by their last part, and user and host stay out: a card is published.
    """
    found = (manifest or {}).get("settings") or {}
    order = dict.fromkeys([*fields_with(FinetuneSettings, *Role), *sorted(found)])
    settings = {key: _cell(key, found[key]) for key in order if found.get(key) is not None}
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True)  # noqa: S701 - Markdown, not HTML
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(name=name, base=base, manifest=manifest, settings=settings, merge=merge_report)


def _cell(key: str, value: object) -> str:
    """A setting's value for the table; of folders only the last part."""
    if key.endswith(("_dir", "_path")):
        return Path(str(value)).name
    return str(value).replace("|", "\\|").replace("\n", " ")


def write_card(
    folder: str | Path, base: str | Path, manifest: Path | None, merge_report: dict[str, float] | None = None
) -> Path:
    """Write FOLDER/README.md; raises ValueError for a manifest that is no JSON object."""
    content = None if manifest is None else cast(Manifest, read_json(manifest))
    path = Path(folder) / "README.md"
    path.write_text(model_card(Path(folder).resolve().name, Path(base).name, content, merge_report), encoding="utf-8")
    return path
