#!/bin/sh
# pinned.sh LOCK NAME...: print the lines of LOCK that pin the packages NAME, with their hashes. Fails if one is not pinned.
set -eu
lock=$1 && shift
for name in "$@"; do
    awk -v name="$name" '/^[a-z0-9]/ { on = index($0, name "==") == 1; found = found || on }
        on
        END { exit !found }' "$lock" || { echo "pinned: $lock has no $name" >&2; exit 1; }
done
