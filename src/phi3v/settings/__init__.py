"""Every setting: names, types, defaults, ranges and the rules between fields. Imports no torch."""

from phi3v.settings.base import (
    Role,
    SettingsError,
    Strict,
    check_choice,
    explain,
    fields_with,
    number_of,
    read_entries,
    read_yaml,
    validate,
)
from phi3v.settings.command_line import flags, heavy_imports, parse, run_script
from phi3v.settings.commands import (
    Compute,
    EvaluateSettings,
    FinetuneSettings,
    PredictSettings,
    ReportSettings,
    ScoreSettings,
    ServeSettings,
    SpeedSettings,
)
from phi3v.settings.entries import (
    CONVERSION_THREADS,
    CONVERTER_VERSION,
    FORMAT_OPTIONS,
    METRICS,
    Dataset,
    Division,
    Geometry,
    Hardware,
    Model,
    Options,
    OptionValue,
    Peak,
    Split,
    VisionGeometry,
    Workload,
    dataset_key,
    local_source,
    model_key,
    source_file,
)
from phi3v.settings.rows import AccuracyRow, SpeedRow, Training
from phi3v.settings.run import Demo, Job, NotRun, Pool, ResolvedRun, Run, load_run
