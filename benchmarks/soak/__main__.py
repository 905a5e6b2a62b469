"""`make soak`: attacks a real em-serve on the demo model for about 15 minutes; writes a table into build/soak.

Ends with 1 if there was a server error of ours, a broken stream, a hang of /health/live, a leak or a wrong answer.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.soak.attacks import Size, all_places, disconnects, fuzz_alone, fuzz_combined, many, slow_readers
from benchmarks.soak.exchange import Target
from benchmarks.soak.kills import VICTIMS, kill
from benchmarks.soak.report import Row, write
from benchmarks.soak.schema import program, schemathesis
from harness.launch import EM_SERVE, serve

# A small cache, so that the requests of a warm-up touch all of it: memory touched later would look like a leak.
FLAGS = ("--max-logprobs", "100", "--num-gpu-blocks-override", "1024")
GROWTH_MIB = 32.0
PARTS = ("fuzz", "schema", "disconnects", "slow", "many", "kills")


def attacks(target: Target, share: float, folder: Path) -> dict[str, list[Callable[[], Row]]]:
    """Return the attacks on a running server by the names of PARTS; `share` of their full size."""

    def size(requests: int, limit_s: float) -> Size:
        return Size(max(8, int(requests * share)), max(10.0, limit_s * share))

    total = size(10_000, 240)
    return {
        "fuzz": [
            partial(fuzz_alone, target, size(3_000, 120)),
            partial(fuzz_combined, target, size(4_000, 180)),
        ],
        "schema": [partial(schemathesis, target, size(0, 120), folder)],
        "disconnects": [partial(disconnects, target, size(360, 120)), partial(all_places, target, Size(8))],
        "slow": [partial(slow_readers, target, size(200, 60))],
        "many": [partial(many, target, total, GROWTH_MIB, total.requests // 5)],
    }


def rows(parts: list[str], share: float, folder: Path) -> Iterator[Row]:
    """Run the chosen parts."""
    if set(parts) - {"kills"}:
        with serve(*EM_SERVE, *FLAGS, log=folder / "server.log", executor="mp") as server:
            chosen = attacks(Target(server.url, server.pid), share, folder)
            for name in chosen:
                if name in parts:
                    yield from (run() for run in chosen[name])
    if "kills" in parts:
        yield from (kill(victim, folder, *FLAGS) for victim in VICTIMS)


def main() -> None:
    """Run the soak and write its table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="run this part; may be repeated; default: all")
    parser.add_argument("--without", choices=PARTS, action="append", default=[], help="leave this part out")
    parser.add_argument("--share", type=float, default=1.0, help="share of the full number of requests and time")
    parser.add_argument("--out", type=Path, default=Path("build/soak"))
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # by an exception: the server is stopped too
    parts = [part for part in arguments.only or PARTS if part not in arguments.without]
    arguments.out.mkdir(parents=True, exist_ok=True)
    if "schema" in parts:
        try:
            program()
        except RuntimeError as error:
            sys.exit(f"soak: {error}")
    done: list[Row] = []
    for row in rows(parts, arguments.share, arguments.out):
        done.append(row)
        print(" | ".join(row.cells()), *(f"  ! {problem}" for problem in row.all_problems()), sep="\n", flush=True)
        write(done, "Soak", arguments.out)
    print(write(done, "Soak", arguments.out))
    sys.exit(any(row.all_problems() for row in done))


if __name__ == "__main__":
    main()
