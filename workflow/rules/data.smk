from phi3v.data.fetch import local_contents


localrules:
    download_data,
    download_model,


def users_sources(key):
    """URLs of a dataset's local files that no rule makes (those lie under results/)."""
    urls = {split.url for split in RUN.datasets[DATASET_KEYS[key]].splits.values()}
    return sorted(
        url
        for url in urls
        if not (settings.local_source(url) or "results/").startswith("results/")
    )


def sources_of(wildcards):
    """Local sources. A user's own are compared by content (contents_of), so their times do not matter."""
    own = users_sources(wildcards.key)
    urls = {
        split.url for split in RUN.datasets[DATASET_KEYS[wildcards.key]].splits.values()
    }
    return [
        ancient(path) if url in own else path
        for url in sorted(urls)
        for path in local_source(url)
    ]


def contents_of(wildcards):
    """Digest of a user's files, so that an edited one repeats the download and what follows."""
    return [
        local_contents(url, Path("results/data/.digests.json"))
        for url in users_sources(wildcards.key)
    ]


def entry_of(wildcards):
    """What a dataset's conversion depends on; not the files of settings, which differ between runs that share it."""
    entry = RUN.datasets[DATASET_KEYS[wildcards.key]]
    return entry.model_dump_json(exclude={"title", "licence", "workload", "official"})


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
    message:
        "download {params.dataset}"
    shell:
        "python {params.scripts}/download.py --datasets {RUN.settings.files.datasets:q} --dataset {params.dataset}"
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
    message:
        "download {params.model}"
    shell:
        "python {params.scripts}/download.py --models {RUN.settings.files.models:q} --model {params.model}"
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
    threads: lambda wildcards: RUN.datasets[DATASET_KEYS[wildcards.key]].conversion_threads
    resources:
        mem_mb=4000,
        runtime=240,
    params:
        scripts=SCRIPTS,
        dataset=lambda wildcards: DATASET_KEYS[wildcards.key],
        entry=entry_of,
    message:
        "convert {params.dataset} to the conversations jsonl"
    shell:
        "python {params.scripts}/convert.py --datasets {RUN.settings.files.datasets:q} --dataset {params.dataset}"
        " --source_dir results/data/{wildcards.key}/source --output_dir results/data/{wildcards.key} --workers {threads} 2>&1 | tee {log}"
