"""Verdicts: whether a measured figure agrees with the published one.

Accuracy, in points of 0-100, with a margin M of 2 points (`statistics.MARGIN`):

    d = ours - published            h = q * sqrt(s_ours**2 + s_published**2 + b)

    agrees        -M <= d - h  and  d + h <= M      (the whole 95 % interval of the difference lies within the margin)
    above          M <  d - h
    below          d + h < -M
    inconclusive   otherwise

s is the sampling error of each side: the standard deviation of the scores over sqrt(n), or that of a proportion. The
published scores of single examples are unknown, so the two sides count as independent. b is the variance between seeds,
counted once for the single published seed and once for our k seeds: v * (1 + 1/k). q is 1.96, or with several seeds
Student's t with Welch and Satterthwaite's degrees of freedom. 500 examples at 86 % give +-3 points, too few for
"agrees". Computed by `evaluation.statistics.against_published`.

There is no verdict if the two figures do not measure the same. `not_comparable` lists the reasons, the most important
first.

Speed: the ratio of our images/s to the published images/s. For a row of ours that accompanies a published one, the
ratio to that row's images/s, measured here. Stand-ins, doubted figures and runs marked as not comparable get no
verdict.
"""

from __future__ import annotations

from dataclasses import dataclass

from phi3v.evaluation import statistics
from phi3v.reporting.results import Pass, Speed
from phi3v.settings import AccuracyRow, FinetuneSettings, Hardware, Job, ResolvedRun, Role, SpeedRow, fields_with


@dataclass(frozen=True)
class Verdict:
    """Verdict on a row's published figure."""

    text: str = ""
    """agrees, above, below, inconclusive, "1.05 x published", not comparable, or the status of the row."""
    reason: str = ""
    against: statistics.AgainstPublished | None = None
    """The comparison behind a verdict on accuracy."""


def accuracy_verdict(run: ResolvedRun, job: Job, row: AccuracyRow, after: Pass, seed_scores: list[float]) -> Verdict:
    """The verdict on a finished accuracy row. seed_scores: score of each seed, or empty for a row with one seed."""
    if row.published is None:
        return Verdict("", "no published figure")
    reason = not_comparable(run, job, row, after.n)
    if reason:
        return Verdict("not comparable", reason)
    against = statistics.against_published(
        after.score, after.n, row.published, row.published_examples or after.n, after.scores, seed_scores
    )
    low, high = against.interval
    seeds = f", mean of {len(seed_scores)} seeds" if len(seed_scores) > 1 else ""
    reason = f"difference {against.difference:+.1f} [{low:+.1f}, {high:+.1f}], margin {statistics.MARGIN:g}{seeds}"
    return Verdict(against.verdict, reason, against)


def not_comparable(run: ResolvedRun, job: Job, row: AccuracyRow, n: int) -> str:
    """Why an accuracy row cannot be compared with its published figure, or ""."""
    if not run.settings.comparable:
        return run.settings.notice or "this run is marked as not comparable"
    if job.pool.stand_in or run.hardware[job.pool.device].kind == "cpu":
        return f"other hardware: {run.hardware[job.pool.device].title}"
    if row.legacy_freezing:
        return "legacy freezing also freezes the text embedding"
    if row.published_doubted:
        return "the published figure very likely comes from a run that trained fewer weights (see the note)"
    # The loss depends neither on the grouping of examples into micro-batches nor on runtime fields.
    changed = job.departures.keys() - {"finetune", *fields_with(AccuracyRow, Role.EQUIVALENT)}
    changed |= row.finetune.keys() & {*fields_with(FinetuneSettings, Role.RECIPE, Role.NUMERICS)}
    if changed:
        return f"departs from the recipe: {', '.join(sorted(changed))}"
    if row.published_examples is not None and n != row.published_examples:
        return f"{n} examples, but the published figure has {row.published_examples}"
    return ""


def speed_verdict(run: ResolvedRun, job: Job, row: SpeedRow, speed: Speed, beside: float | None) -> Verdict:
    """The verdict on a finished speed row. beside: measured images/s of the published row that this row accompanies."""
    rate = speed.images_per_second
    if speed.stand_in or job.pool.stand_in:
        return Verdict("not comparable", stand_in_text(job, row, speed, run.hardware))
    if not run.settings.comparable:
        return Verdict("not comparable", run.settings.notice)
    if row.published_doubted:
        return Verdict(
            "not comparable", "the published figure very likely comes from a run that did less work (see the note)"
        )
    if row.accompanies:
        text = f"{rate / beside:.2f} x recipe's" if beside else "no published figure"
        return Verdict(text, f"images/s divided by those of {row.accompanies}, measured here")
    if row.published_images_per_second:
        ratio = rate / row.published_images_per_second
        return Verdict(f"{ratio:.2f} x published", "images/s divided by the published images/s")
    return Verdict()


def stand_in_text(job: Job, row: SpeedRow, speed: Speed, hardware: dict[str, Hardware]) -> str:
    """Description of the devices used in place of the published machines."""
    own = hardware[job.pool.device]
    count = speed.world_size or job.processes
    name = own.title if own.kind != "cpu" else "CPU process" if count == 1 else "CPU processes"
    return f"{count} {name} instead of {row.nodes * row.gpus_per_node} {hardware_name(row.hardware)}"


def hardware_name(entry: str) -> str:
    """`a100-80gb` as A100, for texts."""
    return entry.split("-")[0].upper()
