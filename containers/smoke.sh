#!/bin/sh
# The test of an image, by the workflow's own scripts: smoke.sh workflow|report|train. No network, no GPU, nothing is left behind.
#   workflow: the demo is planned · report: a plan and a page · train: two training steps of a tiny model on real digits
set -eu
image=${1:?expected workflow, report or train}
source=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export PYTHONPATH="$source/src" PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HOME="$folder" XDG_CACHE_HOME="$folder/cache"
case $image in
workflow)
  cd "$source" && cp -r Snakefile config envs profiles scripts src workflow "$folder" && cd "$folder"
  snakemake -n --quiet --profile profiles/demo
  ;;
report)
  cd "$source"
  python scripts/plan.py --config config/config.yaml --output_dir "$folder/plan"
  python scripts/report.py --config config/demo.yaml --results "$folder" --output_dir "$folder/report"
  test -s "$folder/report/index.html"
  ;;
train)
  python "$source/scripts/digits.py" --output_dir results/digits-source >/dev/null
  of="--datasets $source/config/digits/datasets.yaml --dataset digits"
  python "$source/scripts/download.py" $of --output_dir data/source
  python "$source/scripts/convert.py" $of --source_dir data/source --output_dir data --workers 1
  python "$source/scripts/demo_model.py" --data_dirs data --geometry hidden_size=32 --geometry layers=1 --output_dir model
  python "$source/scripts/finetune.py" --model_name_or_path model --data_dir data --output_dir out \
    --use_lora --bf16 --max_steps 2 --batch_size 4 --num_crops 1 --no-tqdm
  test -s out/manifest.json
  ;;
*)
  echo "smoke.sh: got $image; expected workflow, report or train" >&2
  exit 2
  ;;
esac
echo "$image: passed"
