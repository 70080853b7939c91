rule speed_row:
    """Time one row: warm-up excluded, repeats with their spread.

    No `benchmark:` here: in its first 15 seconds Snakemake walks the pages of every process twice a second, which made the
    first window up to a tenth slower. speed.json has time and memory.
    """
    input:
        model=on_job(lambda job: model_file(job.row.model)),
        data=on_job(lambda job: dataset_file(job.row.dataset)),
    output:
        f"{RESULTS}/speed/{{row}}/manifest.json",
    log:
        f"{RESULTS}/logs/speed/{{row}}.log",
    conda:
        TRAIN_ENV
    container:
        TRAIN_IMAGE
    threads: on_plan("speed", "cpus")
    resources:
        mem_mb=on_plan("speed", "mem_mb"),
        runtime=on_plan("speed", "runtime"),
        accelerators=on_job(lambda job: job.processes_per_node),
        mpi="",
        nodes=on_job(lambda job: job.nodes),
        tasks=on_job(lambda job: job.nodes),
        gres=on_plan("speed", "gres"),
        tasks_per_gpu=0,
        slurm_partition=on_job(lambda job: job.pool.slurm_partition),
    params:
        scripts=SCRIPTS,
        launch=on_job(launch),
        flags=on_job(lambda job: settings.training_flags(job.row, job.num_crops)),
        run=on_job(speed_flags),
        model=on_job(lambda job: model_folder(job.row.model)),
        data=on_job(lambda job: data_folder(job.row.dataset)),
        folder=f"{RESULTS}/speed/{{row}}",
        omp=on_job(threads_each),
    message:
        "time {wildcards.row}"
    shell:
        "OMP_NUM_THREADS={params.omp} {params.launch} {params.scripts}/speed.py {params.flags} {params.run}"
        " --model_name_or_path {params.model} --data_dir {params.data} --output_dir {params.folder} 2>&1 | tee {log}"
