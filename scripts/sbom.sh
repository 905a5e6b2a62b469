#!/bin/sh
# sbom.sh FILE: write what image-packages.sh installs into the cpu image as an SBOM (CycloneDX, JSON), with the hashes of the
# locks. What the base image has, and what vLLM's image has below the cuda target, is theirs to list. CYCLONEDX is the program cyclonedx-py, if it is not in .venv.
set -eu
cd "$(dirname "$0")/.."
mkdir -p "$(dirname "$1")"
cat requirements/cpu.lock requirements/torch-cpu.txt |
    "${CYCLONEDX:-.venv/bin/cyclonedx-py}" requirements --output-reproducible --pyproject pyproject.toml --output-file "$1" -
