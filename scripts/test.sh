#!/bin/sh
# test.sh essential|all [FLAG...]: runs pytest with FLAGs in two processes at a time. One has the engine's tests, which wait
# much, the other all else; what the first prints comes at the end. Fails if either does, or if FLAGs select no test.
set -u
cd "$(dirname "$0")/.."
case $1 in
essential) engine="engine and essential" others="not engine and not slow" ;;
all) engine="engine" others="not engine" ;;
*) echo "test.sh: essential or all, not '$1'" >&2 && exit 2 ;;
esac
shift

output=$(mktemp)
.venv/bin/python -m pytest -m "$engine" "$@" >"$output" 2>&1 &
engine_tests=$!
trap 'kill $engine_tests 2>/dev/null; rm -f "$output"' EXIT
trap 'exit 130' INT TERM
.venv/bin/python -m pytest -m "$others" "$@"
others_status=$?
wait $engine_tests
engine_status=$?
echo && echo "Tests that start an engine:" && cat "$output"

no_tests=5 # pytest's status if nothing was selected
[ $others_status = $no_tests ] && exit $engine_status
[ $engine_status = $no_tests ] && exit $others_status
[ $others_status = 0 ] && [ $engine_status = 0 ]
