#!/bin/sh
# test.sh essential|all [FLAG...]: runs pytest with FLAGs in two processes at a time. The one in the foreground has the
# engine's tests, so that Ctrl-C lets it stop its servers; the other has the rest, and what it prints comes at the end.
# Fails if either does, or if FLAGs select no test.
set -u
cd "$(dirname "$0")/.."
case $1 in
essential) engine="engine and essential" others="not engine and not slow" fetch=: ;;
all) engine="engine" others="not engine" fetch=scripts/test-triton.sh ;;
*) echo "test.sh: essential or all, not '$1'" >&2 && exit 2 ;;
esac
shift

output=$(mktemp)
{ $fetch; exec .venv/bin/python -m pytest -m "$others" "$@"; } >"$output" 2>&1 &
other_tests=$!
trap 'kill $other_tests 2>/dev/null; rm -f "$output"' EXIT
trap 'exit 130' INT TERM
.venv/bin/python -m pytest -m "$engine" "$@"
engine_status=$?
wait $other_tests
others_status=$?
echo && echo "Tests that start no engine:" && cat "$output"

no_tests=5 # pytest's status if nothing was selected
[ $others_status = $no_tests ] && exit $engine_status
[ $engine_status = $no_tests ] && exit $others_status
[ $others_status = 0 ] && [ $engine_status = 0 ]
