import json


localrules:
    run_settings,
    plan_run,


rule run_settings:
    """The run's effective configuration, beside its results: what the report and a later reader start from."""
    output:
        f"{RESULTS}/config.json",
    log:
        f"{RESULTS}/logs/settings.log",
    benchmark:
        f"{RESULTS}/logs/settings.tsv"
    conda:
        REPORT_ENV
    container:
        REPORT_IMAGE
    threads: 1
    resources:
        mem_mb=100,
        runtime=5,
    params:
        config=json.dumps(dict(config), sort_keys=True),
    message:
        "write the run's settings"
    shell:
        "printf '%s\\n' {params.config:q} > {output} 2> {log}"


rule plan_run:
    """What every row costs before it runs: memory, time, price, disk; needs no GPU and no torch."""
    input:
        config=rules.run_settings.output,
    output:
        json=f"{RESULTS}/plan/plan.json",
        page=report(
            f"{RESULTS}/plan/plan.html",
            caption="../report/plan.rst",
            category="Plan",
            labels={"what": "plan"},
        ),
    log:
        f"{RESULTS}/logs/plan.log",
    benchmark:
        f"{RESULTS}/logs/plan.tsv"
    conda:
        REPORT_ENV
    container:
        REPORT_IMAGE
    threads: 1
    resources:
        mem_mb=500,
        runtime=5,
    params:
        scripts=SCRIPTS,
        tables=tables_digest(),
        folder=lambda wildcards, output: Path(output.json).parent,
    message:
        "plan every row"
    shell:
        "python {params.scripts}/plan.py --config {input.config} --output_dir {params.folder} 2>&1 | tee {log}"


# Hours of downloads and training should not end at a full disk; a plan or a report alone needs no room.
onstart:
    waiting = list(workflow.dag.needrun_jobs())
    trains = {job.wildcards.row for job in waiting if job.rule.name == "finetune"}
    fetches = any(
        job.rule.name in ("download_data", "download_model", "convert")
        for job in waiting
    )
    if trains or fetches:
        rows = trains or {job.row.row for job in JOBS}
        try:
            planning.check_room(RUN, rows, downloads_only=not trains)
        except settings.SettingsError as error:
            raise WorkflowError(f"not enough disk, nothing was started\n{error}")
