"""Where the demo's sources come from: files in the hub's formats, and a tiny base model. The rest is not special."""

DEMO = RUN.demo


rule digits:
    """Real handwritten digits as an example of a user's files: pictures, and a table per split."""
    output:
        directory("results/digits-source"),
    log:
        "results/logs/digits.log",
    conda:
        DATA_ENV
    resources:
        **on_cpus(mem_mb=1000, runtime=10),
    message:
        "write the handwritten digits as files"
    shell:
        run_script("digits", "--output_dir {output}")


if DEMO:

    rule demo_sources:
        """Synthetic source files in the hub's formats."""
        output:
            expand(
                f"{DEMO.folder}/{{file}}",
                file=[
                    "the_cauldron/docvqa/train-00000-of-00001.parquet",
                    "the_cauldron/hateful_memes/train-00000-of-00001.parquet",
                    "the_cauldron/nlvr2/train-00000-of-00001.parquet",
                    "docvqa_1200_examples/data/train-00000-of-00001.parquet",
                    "docvqa_1200_examples/data/test-00000-of-00001.parquet",
                    "ucf101-subset/UCF101_subset.tar.gz",
                    "mixture/train-00000-of-00001.parquet",
                    "mixture/val-00000-of-00001.parquet",
                ],
            ),
        log:
            f"{DEMO.folder}/logs/sources.log",
        conda:
            DATA_ENV
        resources:
            **on_cpus(mem_mb=2000, runtime=10),
        params:
            folder=lambda wildcards: DEMO.folder,
            seed=DEMO.seed,
            sizes=" ".join(f"--size {name}={size}" for name, size in DEMO.sizes.items()),
        message:
            "make the demo's source files"
        shell:
            run_script("demo_sources", "--output_dir {params.folder} --seed {params.seed} {params.sizes}")

    rule demo_model:
        """A random tiny model, and a tokenizer that knows the words of the training splits."""
        input:
            [dataset_file(name) for name in DEMO.texts],
        output:
            directory(f"{DEMO.folder}/random"),
        log:
            f"{DEMO.folder}/logs/random.log",
        conda:
            TRAIN_ENV
        resources:
            **on_cpus(mem_mb=2000, runtime=10),
        params:
            data=[RUN.data_folder(name) for name in DEMO.texts],
            seed=DEMO.seed,
            geometry=" ".join(f"--geometry {name}={size}" for name, size in DEMO.geometry.items()),
        message:
            "make a random tiny Phi-3.5-vision"
        shell:
            run_script(
                "demo_model",
                "--data_dirs {params.data} --seed {params.seed} {params.geometry} --output_dir {output}",
            )

    rule demo_base:
        """Train the random model briefly on a mixture, so that rows do not start from random weights."""
        input:
            model=rules.demo_model.output[0],
            data=dataset_file(DEMO.mixture),
        output:
            directory(f"{DEMO.folder}/base/final"),
            f"{DEMO.folder}/base/manifest.json",
        log:
            f"{DEMO.folder}/logs/base.log",
        conda:
            TRAIN_ENV
        threads: DEMO.base.processes
        resources:
            **on_cpus(mem_mb=6000, runtime=30, threads=DEMO.base.processes),
            accelerators=DEMO.base.processes,
            # As for the rows: the command starts its own step.
            mpi="",
            nodes=1,
            tasks=1,
        params:
            scripts=SCRIPTS,
            # torchrun would import PyTorch a second time.
            start=(
                "python"
                if DEMO.base.processes == 1
                else f"torchrun --standalone --nproc_per_node={DEMO.base.processes}"
            ),
            flags=settings.flags(jobs.demo_base(RUN)),
        message:
            "train the tiny base model"
        shell:
            "OMP_NUM_THREADS=1 {params.start} {params.scripts}/finetune.py {params.flags} 2>&1 | tee {log}"
