#!/bin/sh
# A definition's %test: two training steps of a tiny model on real digits, by the workflow's own scripts. No network, no GPU.
set -eu
source=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
python "$source/scripts/digits.py" --output_dir results/digits-source >/dev/null
of="--datasets $source/config/digits/datasets.yaml --dataset digits"
python "$source/scripts/download.py" $of --output_dir data/source
python "$source/scripts/convert.py" $of --source_dir data/source --output_dir data --workers 1
python "$source/scripts/demo_model.py" --data_dirs data --geometry hidden_size=32 --geometry layers=1 --output_dir model
python "$source/scripts/finetune.py" --model_name_or_path model --data_dir data --output_dir out \
  --use_lora --bf16 --max_steps 2 --batch_size 4 --num_crops 1 --no-tqdm
test -s out/manifest.json
echo "smoke: two training steps done"
