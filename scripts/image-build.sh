#!/bin/sh
# image-build.sh cpu|cuda [FLAG...]: builds em-inf-server:cpu or em-inf-server:cuda with BUILDER, or else with the first of
# docker, podman and buildah that is here. FLAGs go to its `build`: docs/images.md has those of a machine without a registry.
set -eu
cd "$(dirname "$0")/.."
target=$1 && shift

for found in ${BUILDER:-docker podman buildah}; do
    command -v "$found" >/dev/null && break
done
case $found in
docker) ;;
*) set -- --format docker "$@" ;; # the other format has no place for a HEALTHCHECK
esac
"$found" build --target "$target" --tag "em-inf-server:$target" \
    --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)" "$@" .
