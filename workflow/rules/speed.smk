rule speed_row:
    """Time one row."""
    input:
        on_job(sources_of),
    output:
        f"{RESULTS}/speed/{{row}}/manifest.json",
        f"{RESULTS}/speed/{{row}}/speed.json",
    log:
        f"{RESULTS}/logs/speed/{{row}}.log",
    conda:
        TRAIN_ENV
    threads: threads_of("speed")
    resources:
        **resources_of("speed"),
    params:
        **command("speed", lambda job, wildcards: jobs.speed(RUN, job)),
    message:
        "time {wildcards.row}"
    shell:
        "{params.command} 2>&1 | tee {log}"
