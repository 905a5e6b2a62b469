#!/usr/bin/env bash
# test-tools.sh: unpack Debian's prometheus, promtool and haproxy into .venv/bin, for the tests that need them. Needs no root.
# Without apt-get it does nothing: put the three programs on the PATH yourself, or their tests are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$PWD/.venv/bin lib=$PWD/.venv/lib/haproxy
if [ -x "$bin/haproxy" ] || ! command -v apt-get >/dev/null; then exit; fi
packages=(prometheus haproxy liblua5.3-0 libopentracing-c-wrapper0 libopentracing1)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
apt-get -qq download "${packages[@]}" 2>/dev/null || { apt-get -qq update && apt-get -qq download "${packages[@]}"; }
for package in *.deb; do dpkg-deb --extract "$package" .; done
mkdir -p "$lib"
mv usr/bin/prometheus usr/bin/promtool "$bin"
mv usr/sbin/haproxy usr/lib/*/*.so.* "$lib"
printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s/haproxy "$@"\n' "$lib" "$lib" >"$bin/haproxy"
chmod +x "$bin/haproxy"
