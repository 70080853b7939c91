from phi3v.data.fetch import local_contents


localrules:
    download_data,
    download_model,


# Snakemake records no parameter that takes `input`. The settings files are such a parameter, because runs that share an
# entry may list other files, and must not repeat its work.
rule download_model:
    """Fetch a model's weights into a folder that all runs share; sizes and digests go into a lock file."""
    input:
        lambda wildcards: settings.source_file(RUN.models[RUN.models_by_key[wildcards.key]].url),
    output:
        "results/models/{key}/sources.lock.json",
    log:
        "results/models/logs/{key}.log",
    conda:
        DATA_ENV
    resources:
        **on_cpus(mem_mb=2000, runtime=240),
    params:
        name=lambda wildcards: RUN.models_by_key[wildcards.key],
        options=lambda wildcards, input: ["--models", *RUN.settings.files.models, "--model"],
    message:
        "download {params.name}"
    shell:
        run_script("download", "{params.options:q} {params.name} --output_dir $(dirname {output})")


use rule download_model as download_data with:
    # A user's own files are compared by content, so their times do not matter.
    input:
        lambda wildcards: [
            ancient(path) if own else path for path, own in RUN.dataset_of(wildcards.key).source_files.items()
        ],
    output:
        "results/data/{key}/source/sources.lock.json",
    log:
        "results/data/{key}/logs/download.log",
    params:
        name=lambda wildcards: RUN.datasets_by_key[wildcards.key],
        # An edited file of the user's repeats the download and what follows.
        contents=lambda wildcards: [
            local_contents(url, Path("results/data/.digests.json")) for url in RUN.dataset_of(wildcards.key).users_urls
        ],
        options=lambda wildcards, input: ["--datasets", *RUN.settings.files.datasets, "--dataset"],


rule convert:
    """Convert a dataset to images/ and the conversations jsonl of each split."""
    input:
        rules.download_data.output,
    output:
        "results/data/{key}/dataset.json",
    log:
        "results/data/{key}/logs/convert.log",
    conda:
        DATA_ENV
    threads: settings.CONVERSION_THREADS
    resources:
        **on_cpus(mem_mb=4000, runtime=240, threads=settings.CONVERSION_THREADS),
    params:
        dataset=lambda wildcards: RUN.datasets_by_key[wildcards.key],
        entry=lambda wildcards: RUN.dataset_of(wildcards.key).conversion_entry,
        files=lambda wildcards, input: RUN.settings.files.datasets,
    message:
        "convert {params.dataset} to the conversations jsonl"
    shell:
        run_script(
            "convert",
            "--datasets {params.files:q} --dataset {params.dataset} --source_dir results/data/{wildcards.key}/source"
            " --output_dir results/data/{wildcards.key} --workers {threads}",
        )
