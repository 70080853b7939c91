"""Files of a target, and the check that the disk can hold them."""

from phi3v.planning.resources import check_free_space


def manifests_of(jobs):
    """The last file of each step of the rows."""
    return list(dict.fromkeys(path for job in jobs for path in RUN.manifests(job)))


def results_of(jobs):
    """The manifests of rows, and files that finished rows have lost."""
    return manifests_of(jobs) + lost_of(jobs)


def lost_of(jobs):
    """Missing weights, answers and scores of finished rows. Listing those of all rows would double time and memory."""
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


def shown(file, caption, category):
    """A file of the run's results as `snakemake --report` shows it."""
    return report(f"{RESULTS}/{file}", caption=f"../report/{caption}.rst", category=category, labels={"what": caption})


def refuse_full_disk():
    """Stop if the disk cannot hold what is left to write. For files as targets and for the plan, the jobs check it."""
    named = set(sys.argv)
    rows = {job.row.row for name, members in RUN.targets().items() if name in named for job in members}
    if not rows and ("plan" in named or any(name.startswith("results/") for name in named)):
        return
    try:
        check_free_space(RUN, rows or {job.row.row for job in JOBS}, downloads_only="data" in named)
    except settings.SettingsError as error:
        raise WorkflowError(f"not enough disk space, nothing was started\n{error}")
