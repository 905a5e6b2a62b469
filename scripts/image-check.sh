#!/bin/sh
# image-check.sh IMAGE [FLAG...]: serve the demo model from IMAGE as in production (no network, no capabilities, a read-only
# root) and check startup, one completion, the rights of the process, HEALTHCHECK and shutdown. BUILDER is docker or podman;
# FLAGS are passed to its `run`.
set -eu
image=$1 && shift
engine=${BUILDER:-docker}

container=$("$engine" run --detach --network none --read-only --cap-drop ALL --security-opt no-new-privileges \
    --shm-size 1g --tmpfs /tmp:noexec,nosuid,nodev --volume /home/em "$@" "$image" --shutdown-timeout 20)
trap '"$engine" rm --force --volumes "$container" >/dev/null' EXIT

die() { "$engine" logs "$container" 2>&1 | tail -50 >&2; echo "image-check: $*" >&2; exit 1; }
state() { "$engine" inspect --format "{{.State.$1}}" "$container"; }
inside() { "$engine" exec "$container" python3 -c "$1"; }
seconds() { echo $(($(date +%s) - start)); }

start=$(date +%s)
until inside 'from urllib.request import *; urlopen("http://127.0.0.1:8000/health")' 2>/dev/null; do
    [ "$(state Running)" = true ] || die "the server stopped"
    sleep 1
done
echo "/health answers after $(seconds) s"

inside 'import json
from urllib.request import *

body = {"model": "demo", "messages": [{"role": "user", "content": "12+7*3-4"}], "temperature": 1, "seed": 1,
        "em_inf": {"threshold": 0.3, "stats": "summary"}}
response = json.load(urlopen(Request("http://127.0.0.1:8000/v1/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})))
print(response["choices"][0]["message"]["content"].split()[-1], response["em_inf"])
assert response["em_inf"][0]["tokens"] and not response["em_inf"][0]["missing"]' || die "no completion, or stats are missing"

inside 'import os
status = dict(line.split(":", 1) for line in open("/proc/1/status"))
print("process 1:", open("/proc/1/cmdline").read().replace("\0", " "), "user", *status["Uid"].split()[:1],
      "capabilities", status["CapEff"].strip())
assert os.getuid() == 10001 and int(status["CapEff"], 16) == 0
try: open("/opt/x", "w")
except OSError as error: print("root:", error.strerror)
else: raise SystemExit("the root is writable")' || die "the process has more rights than it needs"

case $engine in
podman) podman healthcheck run "$container" || die "HEALTHCHECK fails" ;;
*) until [ "$(state Health.Status)" = healthy ]; do sleep 1; done ;;
esac
echo "HEALTHCHECK: healthy"

start=$(date +%s)
"$engine" stop --time 60 "$container" >/dev/null # SIGTERM; SIGKILL after 60 s
[ "$(state ExitCode)" = 0 ] || die "exit code $(state ExitCode)"
echo "SIGTERM: exited after $(seconds) s, exit code 0"
