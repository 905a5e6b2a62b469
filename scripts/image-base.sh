#!/bin/sh
# image-base.sh NAME: build the image NAME, a replacement for PYTHON_IMAGE on machines that reach no image registry: Debian 12
# and its Python 3.11, made by debootstrap. BUILDER is a program with docker's `build` command. Needs root.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
debootstrap --variant=minbase --include=ca-certificates,python3-venv bookworm "$folder/debian" >/dev/null
rm -rf "$folder"/debian/var/cache/apt/archives/*.deb "$folder"/debian/var/lib/apt/lists/*
tar -C "$folder/debian" -cf "$folder/base.tar" .
printf 'FROM scratch\nADD base.tar /\n' >"$folder/Dockerfile"
rm -rf "$folder/debian"
"${BUILDER:-docker}" build --tag "$1" "$folder"
