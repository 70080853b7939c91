from phi3v.data.fetch import local_contents


# Snakemake does not record parameters that take `input`: the list of settings files differs between runs that share an
# entry, and must not repeat its work.
localrules:
    download_data,
    download_model,


rule download_data:
    """Fetch a dataset's files to where every run shares them; sizes and digests go into a lock file."""

    # A user's own files are compared by content, so their times do not matter.
    input:
        lambda wildcards: [
            ancient(path) if own else path for path, own in RUN.dataset_of(wildcards.key).source_files.items()
        ],
    output:
        "results/data/{key}/source/sources.lock.json",
    log:
        "results/data/{key}/logs/download.log",
    benchmark:
        "results/data/{key}/logs/download.tsv"
    conda:
        DATA_ENV
    container:
        TRAIN_IMAGE
    resources:
        **on_cpus(mem_mb=2000, runtime=240),
    params:
        scripts=SCRIPTS,
        dataset=lambda wildcards: RUN.datasets_by_key[wildcards.key],
        # An edited file of the user's repeats the download and what follows.
        contents=lambda wildcards: [
            local_contents(url, Path("results/data/.digests.json")) for url in RUN.dataset_of(wildcards.key).users_urls
        ],
        files=lambda wildcards, input: RUN.settings.files.datasets,
    message:
        "download {params.dataset}"
    shell:
        "python {params.scripts}/download.py --datasets {params.files:q} --dataset {params.dataset}"
        " --output_dir results/data/{wildcards.key}/source 2>&1 | tee {log}"


rule download_model:
    """Fetch a model's weights to where every run shares them."""
    input:
        lambda wildcards: settings.source_file(RUN.models[RUN.models_by_key[wildcards.key]].url),
    output:
        "results/models/{key}/sources.lock.json",
    log:
        "results/models/logs/{key}.log",
    benchmark:
        "results/models/logs/{key}.tsv"
    conda:
        DATA_ENV
    container:
        TRAIN_IMAGE
    resources:
        **on_cpus(mem_mb=2000, runtime=240),
    params:
        scripts=SCRIPTS,
        model=lambda wildcards: RUN.models_by_key[wildcards.key],
        files=lambda wildcards, input: RUN.settings.files.models,
    message:
        "download {params.model}"
    shell:
        "python {params.scripts}/download.py --models {params.files:q} --model {params.model}"
        " --output_dir results/models/{wildcards.key} 2>&1 | tee {log}"


rule convert:
    """Convert a dataset to images/ and the conversations jsonl of each split."""
    input:
        rules.download_data.output,
    output:
        "results/data/{key}/dataset.json",
    log:
        "results/data/{key}/logs/convert.log",
    benchmark:
        "results/data/{key}/logs/convert.tsv"
    conda:
        DATA_ENV
    container:
        TRAIN_IMAGE
    threads: settings.CONVERSION_THREADS
    resources:
        **on_cpus(mem_mb=4000, runtime=240, threads=settings.CONVERSION_THREADS),
    params:
        scripts=SCRIPTS,
        dataset=lambda wildcards: RUN.datasets_by_key[wildcards.key],
        entry=lambda wildcards: RUN.dataset_of(wildcards.key).conversion_entry,
        files=lambda wildcards, input: RUN.settings.files.datasets,
    message:
        "convert {params.dataset} to the conversations jsonl"
    shell:
        "python {params.scripts}/convert.py --datasets {params.files:q} --dataset {params.dataset}"
        " --source_dir results/data/{wildcards.key}/source --output_dir results/data/{wildcards.key} --workers {threads} 2>&1 | tee {log}"
