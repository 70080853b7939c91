rule finetune:
    """Train one row. Checkpoints are no outputs, which Snakemake would remove after a failure: the next job resumes from them."""
    input:
        on_job(sources_of),
    output:
        f"{RESULTS}/train/{{row}}/manifest.json",
        directory(f"{RESULTS}/train/{{row}}/final"),
    log:
        f"{RESULTS}/logs/train/{{row}}.log",
    benchmark:
        f"{RESULTS}/logs/train/{{row}}.tsv"
    conda:
        TRAIN_ENV
    container:
        TRAIN_IMAGE
    threads: threads_of("train")
    resources:
        **resources_of("train"),
    params:
        start=start_of,
        command=command("finetune", jobs.finetune),
    message:
        "train {wildcards.row}"
    shell:
        "{params.start} {params.command} 2>&1 | tee {log}"
