rule evaluate_base:
    """Evaluate a model before training, once for all rows that start from it on the same inputs."""
    input:
        model=on_job(lambda job: model_file(job.row.model)),
        data=on_job(lambda job: dataset_file(job.row.dataset)),
    output:
        f"{RESULTS}/evaluate/base/{{baseline}}/manifest.json",
    log:
        f"{RESULTS}/logs/evaluate/base/{{baseline}}.log",
    benchmark:
        f"{RESULTS}/logs/evaluate/base/{{baseline}}.tsv"
    conda:
        TRAIN_ENV
    container:
        TRAIN_IMAGE
    threads: cpus("evaluate")
    resources:
        **machines("evaluate"),
    params:
        omp=on_job(threads_each),
        command=command("evaluate", jobs.evaluate, what="base"),
    message:
        "evaluate {wildcards.baseline} before training"
    shell:
        "OMP_NUM_THREADS={params.omp} {params.command} 2>&1 | tee {log}"


rule evaluate:
    """Evaluate a trained row, and with the pictures swapped among the examples as a control."""
    input:
        trained=f"{RESULTS}/train/{{row}}/manifest.json",
        before=on_job(
            lambda job: f"{RESULTS}/evaluate/base/{job.baseline}/manifest.json"
        ),
        data=on_job(lambda job: dataset_file(job.row.dataset)),
    output:
        f"{RESULTS}/evaluate/{{row}}/manifest.json",
    log:
        f"{RESULTS}/logs/evaluate/{{row}}.log",
    benchmark:
        f"{RESULTS}/logs/evaluate/{{row}}.tsv"
    conda:
        TRAIN_ENV
    container:
        TRAIN_IMAGE
    threads: cpus("evaluate")
    resources:
        **machines("evaluate"),
    params:
        omp=on_job(threads_each),
        command=command("evaluate", jobs.evaluate, what="trained"),
    message:
        "evaluate {wildcards.row}"
    shell:
        "OMP_NUM_THREADS={params.omp} {params.command} 2>&1 | tee {log}"


rule evaluate_official:
    """Evaluate a trained row on the authors' own split: the second protocol, where its files are there."""
    input:
        trained=f"{RESULTS}/train/{{row}}/manifest.json",
        data=on_job(lambda job: dataset_file(RUN.official(job))),
        train=on_job(lambda job: dataset_file(job.row.dataset)),
    output:
        f"{RESULTS}/evaluate/official/{{row}}/manifest.json",
    log:
        f"{RESULTS}/logs/evaluate/official/{{row}}.log",
    benchmark:
        f"{RESULTS}/logs/evaluate/official/{{row}}.tsv"
    conda:
        TRAIN_ENV
    container:
        TRAIN_IMAGE
    threads: cpus("official")
    resources:
        **machines("official"),
    params:
        omp=on_job(threads_each),
        command=command("evaluate", jobs.evaluate, what="official"),
    message:
        "evaluate {wildcards.row} on the official split"
    shell:
        "OMP_NUM_THREADS={params.omp} {params.command} 2>&1 | tee {log}"
