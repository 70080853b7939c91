#!/bin/sh
# Pack what a cluster without internet needs into one new folder: source, wheels of each environment, images, data, weights.
#
#     scripts/bundle.sh phi3v-offline                              # make offline-bundle
#     scripts/bundle.sh phi3v-offline workflow report train-cpu    # wheels of these locks, envs/NAME.txt
#
# Run it on a machine with internet, after `snakemake -c2 data` (downloads and conversions) and, for --sdm apptainer,
# `make containers`. The folder's README explains how to unpack; SHA256SUMS checks the copy.
set -eu

stop() { echo "$1" >&2; exit 2; }

output=${1:?expected a new folder to pack into}
shift
case $output in /*) ;; *) output=$PWD/$output ;; esac
[ $# -gt 0 ] || set -- workflow data report train-cuda
cd "$(dirname "$0")/.."
for name; do test -f "envs/$name.txt" || stop "envs/$name.txt: no such lock; expected names of envs/NAME.txt"; done
test ! -e "$output" || stop "$output: exists already; expected a new folder"
mkdir -p "$output/wheels"

git archive --format=tar -o "$output/source.tar" HEAD
# `pip wheel` builds packages that are published as source alone, so nothing is built on the cluster.
for name; do python -m pip wheel --quiet --wheel-dir "$output/wheels" -r "envs/$name.txt"; done
# Each of these files is the last one that is written to its folder. tar keeps times, which Snakemake compares.
results=$(ls results/data/*/dataset.json results/models/*/sources.lock.json 2>/dev/null | xargs -r -n 1 dirname)
images=$(find containers -name '*.sif*' | sort)
test -n "$images" || images=$(find containers -name '*.tar' | sort)
test -z "$results" || tar -cf "$output/results.tar" $results
test -z "$images" || tar -cf "$output/images.tar" $images

# SHA256SUMS checks the wheels: the hashes of one lock would make pip refuse the others, and the wheels built here.
for name; do cat "envs/$name.txt"; done | sed -e '/^ *#/d' -e '/^ *--hash/d' -e 's/ *\\$//' | sort -u > "$output/requirements.txt"
cat > "$output/README" <<END
phi3v without internet. On the cluster, in this folder:

    sha256sum --check SHA256SUMS
    mkdir phi3v && tar -xf source.tar -C phi3v && cd phi3v
    for name in results images; do test ! -f ../\$name.tar || tar -xf ../\$name.tar; done
    for tar in containers/*.tar; do test ! -f \$tar || apptainer build \${tar%.tar}.sif oci-archive:\$tar; done
    python3 -m venv .venv
    .venv/bin/pip install --no-index --find-links ../wheels -r ../requirements.txt
    . .venv/bin/activate && export HF_HUB_OFFLINE=1 PIP_NO_INDEX=1 PIP_FIND_LINKS=\$PWD/../wheels
    snakemake --profile slurm -n

Packed: wheels of $*;$(printf ' %s' $results $images).
The wheels are for $(python --version) on $(uname -sm).
END
cd "$output"
find . -type f ! -name SHA256SUMS | sort | xargs sha256sum > SHA256SUMS
echo "$output: $(du -sh . | cut -f 1)"
