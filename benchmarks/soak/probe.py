"""Asks `/health/live` every 50 ms from a process of its own, as a kubelet would: `python -m benchmarks.soak.probe URL`.

Ends when its standard input does, and then prints how long the slowest answer took.
"""

import contextlib
import http.client
import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from types import TracebackType
from urllib.parse import urlsplit

EVERY_S = 0.05
HANG_S = 1.0  # an answer that takes longer counts as a hang
GIVE_UP_S = 600.0


@dataclass
class Answers:
    """How a server answered its probes."""

    asked: int = 0
    failures: list[str] = field(default_factory=list)  # refused, broken off, or no 200
    hangs: int = 0  # answers that took longer than HANG_S
    slowest_s: float = 0.0


class Probe:
    """Probes a server while its block runs; `answers` is there afterwards."""

    def __init__(self, url: str, path: str = "/health/live") -> None:
        self.address = url + path
        self.answers = Answers()

    def __enter__(self) -> "Probe":
        """Start the process that asks, in a session of its own.

        Linux shares processor time among sessions (sched_autogroup). In the session of the busy clients, the process
        waited up to 6 s for a processor; in its own, 0.01 s.
        """
        command = [sys.executable, "-m", "benchmarks.soak.probe", self.address]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self.process.stdout is not None
        self.process.stdout.readline()  # it has begun
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """End the process, once its last answer has come, and take what it measured."""
        output, _ = self.process.communicate()
        self.answers = Answers(**json.loads(output))


def ask_until(stop: threading.Event, address: str) -> Answers:
    """Ask until `stop` is set, by a new connection each time."""
    url = urlsplit(address)
    answers = Answers()
    while not stop.is_set():
        begun = time.monotonic()
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=GIVE_UP_S)
        try:
            connection.request("GET", url.path)
            if (status := connection.getresponse().status) != 200:
                answers.failures.append(f"status {status}")
        except (OSError, http.client.HTTPException) as error:
            answers.failures.append(repr(error))
        finally:
            connection.close()
        took = time.monotonic() - begun
        answers.asked += 1
        answers.hangs += took > HANG_S
        answers.slowest_s = max(answers.slowest_s, took)
        stop.wait(max(0.0, EVERY_S - took))
    return answers


def main() -> None:
    """Run as a process of `Probe`."""
    stop = threading.Event()

    def wait_for_the_end() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            sys.stdin.read()
        stop.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    print("asking", flush=True)
    print(json.dumps(asdict(ask_until(stop, sys.argv[1]))))


if __name__ == "__main__":
    main()
