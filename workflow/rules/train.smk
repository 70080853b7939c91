rule finetune:
    """Train one row. Checkpoints live in the row's folder and are not outputs: a failed job keeps them and goes on."""
    input:
        model=on_job(lambda job: model_file(job.row.model)),
        data=on_job(lambda job: dataset_file(job.row.dataset)),
    output:
        f"{RESULTS}/train/{{row}}/manifest.json",
    log:
        f"{RESULTS}/logs/train/{{row}}.log",
    benchmark:
        f"{RESULTS}/logs/train/{{row}}.tsv"
    conda:
        TRAIN_ENV
    container:
        TRAIN_IMAGE
    threads: on_plan("train", "cpus")
    resources:
        mem_mb=on_plan("train", "mem_mb"),
        runtime=on_plan("train", "runtime"),
        accelerators=on_job(lambda job: job.processes_per_node),
        # An empty `mpi` leaves launching to the command below, on one node or many.
        mpi="",
        nodes=on_job(lambda job: job.nodes),
        tasks=on_job(lambda job: job.nodes),
        gres=on_plan("train", "gres"),
        tasks_per_gpu=0,
        slurm_partition=on_job(lambda job: job.pool.slurm_partition),
    params:
        scripts=SCRIPTS,
        launch=on_job(launch_training),
        flags=on_job(lambda job: settings.training_flags(job.row, job.num_crops)),
        run=on_job(training_run_flags),
        model=on_job(lambda job: model_folder(job.row.model)),
        data=on_job(lambda job: data_folder(job.row.dataset)),
        folder=f"{RESULTS}/train/{{row}}",
        omp=on_job(threads_each),
    message:
        "train {wildcards.row}"
    shell:
        "OMP_NUM_THREADS={params.omp} {params.launch} {params.scripts}/finetune.py {params.flags} {params.run}"
        " --model_name_or_path {params.model} --data_dir {params.data} --output_dir {params.folder} 2>&1 | tee {log}"
