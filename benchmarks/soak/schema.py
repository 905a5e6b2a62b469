"""schemathesis on the routes of `/openapi.json`, as a program of its own; needs the package schemathesis."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.soak.attacks import Size, attack
from benchmarks.soak.exchange import ANSWERED, CHAT, COMPLETIONS, OURS, REFUSED, RESPONSES, Case, Outcome, Target
from benchmarks.soak.report import Row

ROUTES = (CHAT, COMPLETIONS, RESPONSES, "/v1/em_inf")
SEED = 7
CRASHED = 2  # schemathesis ends with 0, with 1 if it found something, and otherwise if it could not work


def program() -> str:
    """Return schemathesis's path.

    Raises:
        RuntimeError: if it is not installed.
    """
    beside = Path(sys.executable).parent / "schemathesis"
    found = str(beside) if beside.exists() else shutil.which("schemathesis")
    if not found:
        raise RuntimeError("schemathesis is not installed: pip install schemathesis, or --without schema")
    return found


def schemathesis(target: Target, size: Size, folder: Path) -> Row:
    """Let schemathesis make requests of the schema until its time is over; judge every 5xx that it met."""
    har, log = folder / "schemathesis.har", folder / "schemathesis.log"
    har.unlink(missing_ok=True)
    command = [program(), "run", f"{target.url}/openapi.json", "--seed", str(SEED), "--no-color", "--no-shrink"]
    command += ["--checks", "not_a_server_error", "--continue-on-failure", "--max-time", str(int(size.limit_s))]
    command += ["--phases", "coverage,fuzzing", "--report", "har", "--report-har-path", str(har)]
    command += ["--generation-database", "none", "--request-timeout", "120"]
    command += [word for route in ROUTES for word in ("--include-path", route)]
    command += [word for name, value in target.headers.items() for word in ("--header", f"{name}: {value}")]
    with attack(target, "schemathesis") as row, log.open("wb") as output:
        limit_s = 3 * size.limit_s + 300
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=limit_s, check=False)
        entries = json.loads(har.read_text())["log"]["entries"] if har.exists() else []
        for entry in entries:
            row.add(judged(target, entry))
    row.notes.append(f"schemathesis ended with {done.returncode}")
    if done.returncode >= CRASHED or not entries:
        row.problems.append(f"schemathesis did not work: {log.read_text(errors='replace')[-600:]}")
    return row


def judged(target: Target, entry: dict[str, dict[str, object]]) -> Outcome:
    """Count one request of the report. A 5xx is sent again, to see whose it is."""
    status = int(str(entry["response"]["status"]))
    if 0 < status < 500:
        return Outcome(ANSWERED if status < 400 else REFUSED)
    posted = entry["request"].get("postData")
    text = str(posted["text"]) if isinstance(posted, dict) and "text" in posted else ""
    path = str(entry["request"]["url"]).removeprefix(target.url).partition("?")[0]
    try:
        body = json.loads(text)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        return Outcome(OURS, f"{path} {text[:300]}: {status}")
    return target.send(Case(path, body))
