#!/usr/bin/env bash
# Puts Debian's prometheus and promtool into .venv/bin, for the tests that scrape a server; needs no root. Where there is
# no apt-get, have both on the PATH: without them those tests are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$PWD/.venv/bin
if [ -x "$bin/promtool" ] || ! command -v apt-get >/dev/null; then exit; fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
apt-get -qq download prometheus 2>/dev/null || { apt-get -qq update && apt-get -qq download prometheus; }
dpkg-deb --extract prometheus_*.deb .
mv usr/bin/prometheus usr/bin/promtool "$bin"
