"""What a target needs, and whether the disk can hold it."""

from phi3v.planning.resources import check_free_space


def manifests_of(jobs):
    """What rows end with."""
    return list(dict.fromkeys(path for job in jobs for path in RUN.manifests(job)))


def results_of(jobs):
    """What rows end with, and what is lost of it."""
    return manifests_of(jobs) + lost_of(jobs)


def lost_of(jobs):
    """Weights, answers and scores that finished rows lack, to make them again.

    To list those of all rows would double time and memory of a run of 10,000 rows.
    """
    found = []
    for job in jobs:
        row = {"row": job.row.row, "baseline": job.baseline}
        made = [rules.finetune, rules.evaluate_base, rules.evaluate]
        if isinstance(job.row, settings.SpeedRow):
            made = [rules.speed_row]
        elif RUN.official(job):
            made.append(rules.evaluate_official)
        for each in made:
            manifest, *others = [Path(path.format_map(row)) for path in each.output]
            if manifest.exists():
                found += [str(path) for path in others if not path.exists()]
    return list(dict.fromkeys(found))


def refuse_full_disk():
    """Hours of downloads and training should not end at a full disk; what is left to write counts.

    Targets that are files, and the plan, are left to the jobs, which look at the disk themselves.
    """
    named = set(sys.argv)
    rows = {job.row.row for name, members in RUN.targets().items() if name in named for job in members}
    if not rows and ("plan" in named or any(name.startswith("results/") for name in named)):
        return
    try:
        check_free_space(RUN, rows or {job.row.row for job in JOBS}, downloads_only="data" in named)
    except settings.SettingsError as error:
        raise WorkflowError(f"not enough disk, nothing was started\n{error}")
