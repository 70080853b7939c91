# Checkpoints are no outputs, because Snakemake removes the outputs of a failed job, and the next job resumes from them.
rule finetune:
    input:
        on_job(sources_of),
    output:
        f"{RESULTS}/train/{{row}}/manifest.json",
        directory(f"{RESULTS}/train/{{row}}/final"),
    log:
        f"{RESULTS}/logs/train/{{row}}.log",
    conda:
        TRAIN_ENV
    threads: threads_of("train")
    resources:
        **resources_of("train"),
    params:
        **command("finetune", lambda job, wildcards: jobs.finetune(RUN, job)),
    message:
        "train {wildcards.row}"
    shell:
        "{params.command} 2>&1 | tee {log}"
