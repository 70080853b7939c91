rule evaluate_base:
    """Evaluate a model before training, once for all rows that start from it on the same inputs."""
    input:
        model=lambda wildcards: model_file(BASELINES[wildcards.baseline].row.model),
        data=lambda wildcards: dataset_file(BASELINES[wildcards.baseline].row.dataset),
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
    threads: lambda wildcards: planned(BASELINES[wildcards.baseline].row.row, "evaluate").cpus
    resources:
        mem_mb=on_baseline(lambda job: planned(job.row.row, "evaluate").mem_mb),
        runtime=on_baseline(lambda job: planned(job.row.row, "evaluate").runtime),
        accelerators=on_baseline(lambda job: job.processes_per_node),
        mpi="",
        nodes=on_baseline(lambda job: job.nodes),
        tasks=on_baseline(lambda job: job.nodes),
        gres=on_baseline(lambda job: planned(job.row.row, "evaluate").gres),
        tasks_per_gpu=0,
        slurm_partition=on_baseline(lambda job: job.pool.slurm_partition),
    params:
        scripts=SCRIPTS,
        launch=on_baseline(launch),
        flags=on_baseline(evaluation_flags),
        model=on_baseline(lambda job: model_folder(job.row.model)),
        data=on_baseline(lambda job: data_folder(job.row.dataset)),
        folder=f"{RESULTS}/evaluate/base/{{baseline}}",
        omp=on_baseline(threads_each),
    message:
        "evaluate {wildcards.baseline} before training"
    shell:
        "OMP_NUM_THREADS={params.omp} {params.launch} {params.scripts}/evaluate.py --passes before {params.flags}"
        " --model_name_or_path {params.model} --data_dir {params.data} --output_dir {params.folder} 2>&1 | tee {log}"


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
    threads: on_plan("evaluate", "cpus")
    resources:
        mem_mb=on_plan("evaluate", "mem_mb"),
        runtime=on_plan("evaluate", "runtime"),
        accelerators=on_job(lambda job: job.processes_per_node),
        mpi="",
        nodes=on_job(lambda job: job.nodes),
        tasks=on_job(lambda job: job.nodes),
        gres=on_plan("evaluate", "gres"),
        tasks_per_gpu=0,
        slurm_partition=on_job(lambda job: job.pool.slurm_partition),
    params:
        scripts=SCRIPTS,
        launch=on_job(launch),
        passes="after control" if RUN.settings.evaluation.control else "after",
        flags=on_job(lambda job: ["--row", job.row.row, *evaluation_flags(job)]),
        model=f"{RESULTS}/train/{{row}}/final",
        data=on_job(lambda job: data_folder(job.row.dataset)),
        folder=f"{RESULTS}/evaluate/{{row}}",
        omp=on_job(threads_each),
    message:
        "evaluate {wildcards.row}"
    shell:
        "OMP_NUM_THREADS={params.omp} {params.launch} {params.scripts}/evaluate.py --passes {params.passes} {params.flags}"
        " --model_name_or_path {params.model} --data_dir {params.data} --output_dir {params.folder} 2>&1 | tee {log}"


rule evaluate_official:
    """Evaluate a trained row on the authors' own split: the second protocol, where its files are there."""
    input:
        trained=f"{RESULTS}/train/{{row}}/manifest.json",
        data=on_job(lambda job: dataset_file(official_dataset(job))),
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
    threads: on_plan("official", "cpus")
    resources:
        mem_mb=on_plan("official", "mem_mb"),
        runtime=on_plan("official", "runtime"),
        accelerators=on_job(lambda job: job.processes_per_node),
        mpi="",
        nodes=on_job(lambda job: job.nodes),
        tasks=on_job(lambda job: job.nodes),
        gres=on_plan("official", "gres"),
        tasks_per_gpu=0,
        slurm_partition=on_job(lambda job: job.pool.slurm_partition),
    params:
        scripts=SCRIPTS,
        launch=on_job(launch),
        flags=on_job(
            lambda job: [
                "--row",
                job.row.row,
                *evaluation_flags(job, official_dataset(job)),
            ]
        ),
        model=f"{RESULTS}/train/{{row}}/final",
        data=on_job(lambda job: data_folder(official_dataset(job))),
        train=on_job(lambda job: data_folder(job.row.dataset)),
        folder=f"{RESULTS}/evaluate/official/{{row}}",
        omp=on_job(threads_each),
    message:
        "evaluate {wildcards.row} on the official split"
    shell:
        "OMP_NUM_THREADS={params.omp} {params.launch} {params.scripts}/evaluate.py --passes after {params.flags}"
        " --model_name_or_path {params.model} --data_dir {params.data} --train_dir {params.train}"
        " --output_dir {params.folder} 2>&1 | tee {log}"
