# Snakemake does not record parameters that take `input`: the list of settings files differs between runs that share an
# entry, and must not repeat its work.
localrules:
    download_data,
    download_model,


rule download_data:
    """Fetch a dataset's files to where every run shares them; sizes and digests go into a lock file."""
    input:
        sources_of,
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
    threads: 1
    resources:
        mem_mb=2000,
        runtime=240,
    params:
        scripts=SCRIPTS,
        dataset=lambda wildcards: DATASET_KEYS[wildcards.key],
        contents=contents_of,
        files=lambda wildcards, input: RUN.settings.files.datasets,
    message:
        "download {params.dataset}"
    shell:
        "python {params.scripts}/download.py --datasets {params.files:q} --dataset {params.dataset}"
        " --output_dir results/data/{wildcards.key}/source 2>&1 | tee {log}"


rule download_model:
    """Fetch a model's weights to where every run shares them."""
    input:
        lambda wildcards: local_source(RUN.models[MODEL_KEYS[wildcards.key]].url),
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
    threads: 1
    resources:
        mem_mb=2000,
        runtime=240,
    params:
        scripts=SCRIPTS,
        model=lambda wildcards: MODEL_KEYS[wildcards.key],
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
        mem_mb=4000,
        runtime=240,
    params:
        scripts=SCRIPTS,
        dataset=lambda wildcards: DATASET_KEYS[wildcards.key],
        entry=lambda wildcards: RUN.datasets[
            DATASET_KEYS[wildcards.key]
        ].conversion_entry,
        files=lambda wildcards, input: RUN.settings.files.datasets,
    message:
        "convert {params.dataset} to the conversations jsonl"
    shell:
        "python {params.scripts}/convert.py --datasets {params.files:q} --dataset {params.dataset}"
        " --source_dir results/data/{wildcards.key}/source --output_dir results/data/{wildcards.key} --workers {threads} 2>&1 | tee {log}"
