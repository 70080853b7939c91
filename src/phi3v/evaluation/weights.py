"""The folder of the weights that a command line names: a checkpoint or adapter as it is, a hub id through phi3v.data.sources.

A hub id is fetched once into results/models, where the workflow's downloads are, with the lock and pins of every source: what
is fetched later is the same commit, byte for byte. Nothing else here reaches the network.
"""

from __future__ import annotations

import re
from pathlib import Path

from phi3v.data.conversations import DataError
from phi3v.data.sources import LOCK, fetch, locked_files
from phi3v.settings import Model, SettingsError, model_key, read_entries

MODELS = "config/models.yaml"
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def is_hub_id(name: str) -> bool:
    """Whether a name that is no folder is OWNER/NAME or OWNER/NAME@REVISION."""
    return not Path(name).is_dir() and _HUB_ID.fullmatch(name) is not None


def hub_folder(name: str, root: Path = Path()) -> tuple[Path, Model]:
    """Where a hub id's weights belong, and what is fetched: an entry of config/models.yaml that has its URL, else one made of the id."""
    match = _HUB_ID.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r}: expected OWNER/NAME or OWNER/NAME@REVISION")
    url, revision = f"hf://{match['repo']}", match["revision"]
    known: dict[str, Model] = {}
    if (root / MODELS).is_file():
        known = read_entries([MODELS], Model, root)
    for entry, model in known.items():
        if model.url == url and revision in (None, model.revision):
            return root / "results" / "models" / model_key(entry, model), model
    model = Model(title=name, url=url, revision=revision)
    return root / "results" / "models" / model_key(match["repo"].replace("/", "--"), model), model


def folder_of(name: str, root: Path = Path(), may_fetch: bool = True) -> Path:
    """The folder of a checkpoint, an adapter or a hub id.

    may_fetch: fetch a hub id that is not there (of several processes only one must). Raises FileNotFoundError for a name that is neither
    a folder nor a hub id, SourceError (a DataError) for weights that cannot be fetched or are not what they were.
    """
    if Path(name).is_dir():
        return Path(name)
    if not is_hub_id(name):
        raise FileNotFoundError(
            f"--model_name_or_path {name}: no such folder; expected a checkpoint, an adapter or a hub id OWNER/NAME"
        )
    try:
        folder, model = hub_folder(name, root)
    except SettingsError as error:
        raise DataError(f"--model_name_or_path {name}: {error}") from None
    if may_fetch and not (folder / LOCK).is_file():
        fetch([(model.url, model.revision)], folder, kind="model", flat=True)
    locked_files(folder, model.url, model.revision)
    return folder
