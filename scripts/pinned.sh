#!/bin/sh
# pinned.sh LOCK NAME...: prints the lines of LOCK that pin those packages, with their hashes.
set -eu
lock=$1 && shift
for name in "$@"; do
    awk -v name="$name" '/^[a-z0-9]/ { on = index($0, name "==") == 1; found = found || on }
        on
        END { exit !found }' "$lock" || { echo "pinned: $lock has no $name" >&2; exit 1; }
done
