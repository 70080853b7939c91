"""Every setting: names, types, defaults, ranges and the rules between fields. Imports no torch."""

from phi3v.settings.commands import (
    EvaluateSettings,
    FinetuneSettings,
    Precision,
    SpeedSettings,
    parse,
    precision_flags,
    training_flags,
)
from phi3v.settings.entries import (
    CONVERTER_VERSION,
    Dataset,
    Geometry,
    Hardware,
    Model,
    Peak,
    Split,
    VisionGeometry,
    dataset_key,
    model_key,
)
from phi3v.settings.reading import SettingsError, explain, read_entries, read_table, read_yaml, validate
from phi3v.settings.rows import AccuracyRow, SpeedRow, Training
from phi3v.settings.run import Demo, Job, NotRun, Pool, ResolvedRun, Run, load_run

__all__ = [
    "CONVERTER_VERSION",
    "AccuracyRow",
    "Dataset",
    "Demo",
    "EvaluateSettings",
    "FinetuneSettings",
    "Geometry",
    "Hardware",
    "Job",
    "Model",
    "NotRun",
    "Peak",
    "Pool",
    "Precision",
    "ResolvedRun",
    "Run",
    "SettingsError",
    "SpeedRow",
    "SpeedSettings",
    "Split",
    "Training",
    "VisionGeometry",
    "dataset_key",
    "explain",
    "load_run",
    "model_key",
    "parse",
    "precision_flags",
    "read_entries",
    "read_table",
    "read_yaml",
    "training_flags",
    "validate",
]
