# Fine-tune Phi-3.5-vision with Microsoft's recipe, for every row of its tables, and compare with the published numbers.
#
#   snakemake -n                                     what would run (config/config.yaml: the published run)
#   snakemake --profile profiles/demo                         the demo on a CPU
#   snakemake --profile slurm                        the published run on a cluster
#   snakemake --profile slurm phi35-nlvr2-full-bf16  one row by name
from snakemake.utils import min_version

min_version("9.27")

if "files" not in config:

    configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/resources.smk"
include: "workflow/rules/targets.smk"
include: "workflow/rules/plan.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/demo.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/speed.smk"
include: "workflow/rules/report.smk"


rule all:
    """Every selected row that this run's hardware can run, and the report."""
    default_target: True
    input:
        rules.report.output,
        lambda wildcards: lost_of(JOBS),


rule data:
    """Downloads and conversions of every dataset and model that the selected rows need."""
    input:
        lambda wildcards: [dataset_file(job.row.dataset) for job in JOBS],
        lambda wildcards: [dataset_file(name) for job in RUN.accuracy if (name := RUN.official(job))],
        lambda wildcards: [model_file(job.row.model) for job in JOBS],


rule accuracy:
    """Every accuracy row: trained, and evaluated before and after."""
    input:
        lambda wildcards: results_of(RUN.accuracy),


rule predictions:
    """Answers for the unlabelled pictures under `predictions` of the run."""
    input:
        [f"{RESULTS}/predictions/{name}/manifest.json" for name in RUN.settings.predictions],


rule speed:
    """Every speed row."""
    input:
        lambda wildcards: results_of(RUN.speed),


rule plan:
    """Predicted memory, time, price and disk of every row."""
    input:
        rules.plan_run.output,


# A row's id is a target that includes all its seeds: `snakemake phi3-docvqa-lora-bf16`. A seed's id is a target too.
# Only ids on the command line become rules, because 10,000 more rules would double time and memory.
for target, members in RUN.targets().items():
    if any(argument.endswith(target) for argument in sys.argv):

        rule:
            name:
                target
            input:
                results_of(members),


include: "workflow/rules/slurm.smk"


# Snakemake keeps only the last onstart.
onstart:
    refuse_full_disk()
