rule speed_row:
    """Time one row: warm-up excluded, repeats with their spread.

    No `benchmark:` here: in its first 15 seconds Snakemake walks the pages of every process twice a second, which made the
    first window up to a tenth slower. speed.json has time and memory.
    """
    input:
        on_job(sources_of),
    output:
        f"{RESULTS}/speed/{{row}}/manifest.json",
        f"{RESULTS}/speed/{{row}}/speed.json",
    log:
        f"{RESULTS}/logs/speed/{{row}}.log",
    conda:
        TRAIN_ENV
    container:
        TRAIN_IMAGE
    threads: threads_of("speed")
    resources:
        **resources_of("speed"),
    params:
        start=start_of,
        command=command("speed", jobs.speed),
    message:
        "time {wildcards.row}"
    shell:
        "{params.start} {params.command} 2>&1 | tee {log}"
