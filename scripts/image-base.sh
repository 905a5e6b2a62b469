#!/bin/sh
# image-base.sh NAME: makes the image NAME, a stand-in for PYTHON_IMAGE where no registry can be reached: Debian 12 and its
# Python 3.11, by debootstrap. BUILDER as in image-build.sh. Needs root.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
debootstrap --variant=minbase --include=ca-certificates,python3-venv bookworm "$folder/debian" >/dev/null
rm -rf "$folder"/debian/var/cache/apt/archives/*.deb "$folder"/debian/var/lib/apt/lists/*
tar -C "$folder/debian" -cf "$folder/base.tar" .
printf 'FROM scratch\nADD base.tar /\n' >"$folder/Dockerfile"
rm -rf "$folder/debian"
"${BUILDER:-docker}" build --tag "$1" "$folder"
