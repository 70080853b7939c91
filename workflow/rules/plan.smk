import json

from phi3v.provenance.manifest import write_json


localrules:
    run_settings,
    plan_run,


rule run_settings:
    """Keep the run's effective configuration beside its results."""
    output:
        f"{RESULTS}/config.json",
    log:
        f"{RESULTS}/logs/settings.log",
    # The terminal's lines read it.
    priority: 2
    params:
        config=json.dumps(dict(config), sort_keys=True),
    message:
        "write the run's settings"
    run:
        write_json(Path(output[0]), json.loads(params.config))


rule plan_run:
    """Predict memory, time, price and disk of every row, without a GPU or torch."""
    input:
        config=rules.run_settings.output,
    output:
        json=f"{RESULTS}/plan/plan.json",
        page=shown("plan/plan.html", "plan", "Plan"),
    log:
        f"{RESULTS}/logs/plan.log",
    conda:
        REPORT_ENV
    container:
        REPORT_IMAGE
    resources:
        **on_cpus(mem_mb=500, runtime=5, results=RESULTS),
    params:
        tables=lambda wildcards: RUN.digest,
        folder=lambda wildcards, output: Path(output.json).parent,
    message:
        "plan every row"
    shell:
        run_script("plan", "--config {input.config} --output_dir {params.folder}")
