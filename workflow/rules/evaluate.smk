# If the control does not apply to a dataset, its metrics.json contains the reason and there are no predictions.
CONTROL = f"{RESULTS}/evaluate/{{row}}/control/metrics.json" if RUN.settings.evaluation.control else []


use rule finetune as evaluate_base with:
    # Before training, once for all rows that start from the same model and inputs.
    input:
        on_job(sources_of),
    output:
        f"{RESULTS}/evaluate/base/{{baseline}}/manifest.json",
        f"{RESULTS}/evaluate/base/{{baseline}}/before/predictions.jsonl",
        f"{RESULTS}/evaluate/base/{{baseline}}/before/metrics.json",
    log:
        f"{RESULTS}/logs/evaluate/base/{{baseline}}.log",
    # Evaluations, also the rules derived from this one, start before further trainings.
    priority: 1
    threads: threads_of("evaluate")
    resources:
        **resources_of("evaluate"),
    params:
        **command("evaluate", lambda job, wildcards: jobs.evaluate(RUN, job, "base")),
    message:
        "evaluate {wildcards.baseline} before training"


use rule evaluate_base as evaluate with:
    input:
        rules.finetune.output,
        data=on_job(lambda job: dataset_file(job.row.dataset)),
    output:
        f"{RESULTS}/evaluate/{{row}}/manifest.json",
        f"{RESULTS}/evaluate/{{row}}/after/predictions.jsonl",
        f"{RESULTS}/evaluate/{{row}}/after/metrics.json",
        CONTROL,
    log:
        f"{RESULTS}/logs/evaluate/{{row}}.log",
    params:
        **command("evaluate", lambda job, wildcards: jobs.evaluate(RUN, job, "trained")),
    message:
        "evaluate {wildcards.row}"


use rule evaluate_base as evaluate_official with:
    input:
        rules.finetune.output,
        data=on_job(lambda job: dataset_file(RUN.official(job))),
        train=on_job(lambda job: dataset_file(job.row.dataset)),
    output:
        f"{RESULTS}/evaluate/official/{{row}}/manifest.json",
        f"{RESULTS}/evaluate/official/{{row}}/after/predictions.jsonl",
        f"{RESULTS}/evaluate/official/{{row}}/after/metrics.json",
    log:
        f"{RESULTS}/logs/evaluate/official/{{row}}.log",
    resources:
        **resources_of("official"),
    params:
        **command("evaluate", lambda job, wildcards: jobs.evaluate(RUN, job, "official")),
    message:
        "evaluate {wildcards.row} on the official split"


rule score:
    """Score predictions with the user's own functions, outside the job that occupies the GPUs."""
    input:
        f"{RESULTS}/evaluate/{{evaluated}}/manifest.json",
        functions=lambda wildcards: RUN.datasets[RUN.evaluated(wildcards.evaluated)].own_metrics,
    output:
        f"{RESULTS}/score/{{evaluated}}/manifest.json",
    log:
        f"{RESULTS}/logs/score/{{evaluated}}.log",
    conda:
        DATA_ENV
    resources:
        **on_cpus(mem_mb=4000, runtime=60, results=RESULTS),
    params:
        flags=lambda wildcards: shlex.join(
            settings.flags(jobs.score(RUN, RUN.evaluated(wildcards.evaluated), wildcards.evaluated))
        ),
    message:
        "score {wildcards.evaluated}"
    shell:
        run_script("score", "{params.flags}")


use rule evaluate_base as predict with:
    input:
        lambda wildcards: RUN.settings.predictions[wildcards.prediction].files,
        on_job(lambda job: [f"{RESULTS}/train/{job.row.row}/{name}" for name in ("manifest.json", "final")]),
    output:
        f"{RESULTS}/predictions/{{prediction}}/manifest.json",
        f"{RESULTS}/predictions/{{prediction}}/answers.jsonl",
        f"{RESULTS}/predictions/{{prediction}}/answers.csv",
    log:
        f"{RESULTS}/logs/predictions/{{prediction}}.log",
    params:
        **command("predict", lambda job, wildcards: jobs.predict(RUN, job, wildcards.prediction)),
    message:
        "answer {wildcards.prediction}"
