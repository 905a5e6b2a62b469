#!/bin/sh
# image-build.sh cpu|cuda [FLAG...]: build em-inf-server:cpu or em-inf-server:cuda, labelled with the version and the commit.
# BUILDER chooses the program; the default is the first of docker, podman and buildah that is installed. FLAGS are passed to
# its `build`; docs/images.md lists those for a machine without an image registry. With RELEASE=1 it refuses a base image
# without a digest: a tag can be moved.
set -eu
cd "$(dirname "$0")/.."
target=$1 && shift

if [ "${RELEASE:-}" = 1 ]; then
    case $target in cpu) base=PYTHON_IMAGE ;; *) base=VLLM_IMAGE ;; esac
    default=$(sed -n "s/^ARG $base=/$base=/p" Dockerfile)
    printf '%s\n' "$default" "$@" | grep "^$base=" | tail -n 1 | grep -Eq '@sha256:[0-9a-f]{64}$' || {
        echo "image-build: a release needs --build-arg $base=NAME@sha256:DIGEST" >&2
        exit 2
    }
fi
for found in ${BUILDER:-docker podman buildah}; do
    command -v "$found" >/dev/null && break
done
case $found in
docker) ;;
*) set -- --format docker "$@" ;; # the OCI format, their default, has no HEALTHCHECK
esac
"$found" build --target "$target" --tag "em-inf-server:$target" \
    --build-arg "VERSION=$(sed -n 's/^version = "\([^"]*\)".*/\1/p' pyproject.toml)" \
    --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)" "$@" .
