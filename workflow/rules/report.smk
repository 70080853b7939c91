import shutil
import subprocess


rule data_statistics:
    """Count tokens, tiles and answer lengths of a dataset's examples for the report."""
    input:
        data="results/data/{key}/dataset.json",
        # With the model of the first row on the dataset.
        model=lambda wildcards: next(
            model_file(job.row.model) for job in JOBS if job.row.dataset == RUN.datasets_by_key[wildcards.key]
        ),
    output:
        "results/data/{key}/statistics.json",
    log:
        "results/data/{key}/logs/statistics.log",
    conda:
        TRAIN_ENV
    resources:
        **on_cpus(mem_mb=4000, runtime=60),
    params:
        folder=lambda wildcards, input: Path(input.data).parent,
        model=lambda wildcards, input: Path(input.model).parent,
    message:
        "count the tokens of {wildcards.key}"
    shell:
        run_script("validate", "{params.folder} --level shape --model {params.model}")


rule report:
    """Compare all results with the published numbers."""
    input:
        config=rules.run_settings.output[0],
        plan=rules.plan_run.output.json,
        rows=lambda wildcards: manifests_of(JOBS),
        data=lambda wildcards: [
            f"{RUN.data_folder(name)}/statistics.json" for name in dict.fromkeys(job.row.dataset for job in JOBS)
        ],
    output:
        page=shown("report/index.html", "page", "Report"),
        accuracy=shown("report/accuracy.tsv", "accuracy", "Tables"),
        speed=shown("report/speed.tsv", "speed", "Tables"),
        markdown=shown("report/tables.md", "tables", "Tables"),
    log:
        f"{RESULTS}/logs/report.log",
    conda:
        REPORT_ENV
    container:
        REPORT_IMAGE
    resources:
        **on_cpus(mem_mb=3000, runtime=30, results=RESULTS),
    params:
        tables=lambda wildcards: RUN.digest,
        results=lambda wildcards, input: Path(input.config).parent,
        folder=lambda wildcards, output: Path(output.page).parent,
    message:
        "write the report"
    shell:
        run_script("report", "--config {input.config} --results {params.results} --output_dir {params.folder}")


# A partial report in the report's folder would be newer than all results, so the next run would have nothing to do.
PARTIAL_REPORT = f"{RESULTS}/report-partial"
NEXT_STEPS = (
    f"Answers of a row: {RESULTS}/evaluate/ROW/after/predictions.jsonl",
    f"Ask a trained model: make chat MODEL={RESULTS}/train/ROW/final",
    "Your own pictures: docs/tutorials/own-pictures.md; a cluster: docs/tutorials/slurm.md",
)


onsuccess:
    if Path(rules.report.output.page).is_file():
        shutil.rmtree(PARTIAL_REPORT, ignore_errors=True)
        logger.info(f"Report: {rules.report.output.page}")
        for line in NEXT_STEPS:
            logger.info(line)


onerror:
    # Before the run's settings are written there is nothing to report.
    if Path(f"{RESULTS}/config.json").is_file():
        logger.info(
            f"Some jobs failed. Finished results stay in {RESULTS}. Writing a report of them, with the reason for each "
            "missing row:"
        )
        try:
            shell(
                f"python {SCRIPTS}/report.py --config {RESULTS}/config.json --results {RESULTS}"
                f" --output_dir {PARTIAL_REPORT} --partial"
            )
            logger.info(f"Partial report: {PARTIAL_REPORT}/index.html")
        except subprocess.CalledProcessError:
            logger.info("The partial report could not be written; the message above gives the reason.")
