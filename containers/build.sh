#!/bin/sh
# Build images from the Dockerfile, and convert them for Apptainer where it is installed:
#
#     containers/build.sh                                        # make containers: workflow, report and train
#     containers/build.sh train --build-arg lock=train-cpu       # one image; options go to the engine's build
#
# ENGINE is buildah or podman. For each image: NAME.tar (OCI archive), NAME.sif, NAME.sif.sha256 (manifests quote it) and
# NAME.cdx.json (bill of materials). The same commit, base and lock give layers of equal digests.
set -eu

stop() { echo "$1" >&2; exit 2; }

cd "$(dirname "$0")/.."
names=
while [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; do
  grep -q "^FROM .* AS $1\$" containers/Dockerfile || stop "$1: no such image; expected workflow, report or train"
  names="$names $1"
  shift
done
engine=${ENGINE:-$(command -v buildah || command -v podman)} || stop "neither buildah nor podman is installed; install one of them"
epoch=315532800
base=$(sed -n 's/^base=//p' containers/base.txt)
for name in ${names:-workflow report train}; do
  archive=containers/$name.tar image=containers/$name.sif
  $engine build --layers --format oci --timestamp $epoch --file containers/Dockerfile --target "$name" --tag "localhost/phi3v-$name" \
    --build-arg "base=$base" --build-arg "commit=$(git rev-parse HEAD)" --build-arg "SOURCE_DATE_EPOCH=$epoch" "$@" .
  rm -f "$archive"
  $engine push --quiet "localhost/phi3v-$name" "oci-archive:$archive:phi3v-$name"
  lock=$($engine inspect --type image "localhost/phi3v-$name" | sed -n 's/.*"phi3v.lock": "\(.*\)".*/\1/p' | head -n 1)
  python scripts/sbom.py "$lock" "containers/$name.cdx.json"
  if command -v apptainer >/dev/null; then
    apptainer build --force "$image" "oci-archive:$archive"
    sha256sum "$image" > "$image.sha256"
  else
    echo "no Apptainer here; where it is: apptainer build --force $image oci-archive:$archive"
  fi
done
