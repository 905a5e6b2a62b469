"""Kills a process of a server with streams open. Needs a server for each process that is killed."""

import contextlib
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil

from benchmarks.soak.attacks import LONG
from benchmarks.soak.exchange import ANSWERED, BROKEN, CHAT, GONE, PROMPT, VLLMS, Outcome, Target, until
from benchmarks.soak.report import Row
from harness.launch import EM_SERVE, serve

VICTIMS = ("API server", "EngineCore", "Worker")
END_LIMIT_S = 60.0  # within which clients and processes end


def kill(victim: str, folder: Path, *flags: str) -> Row:
    """Start a server, kill one of its processes by SIGKILL amid streams; see how clients and processes end."""
    row = Row(f"kill -9 of the {victim}")
    with serve(*EM_SERVE, *flags, log=folder / f"kill-{victim.replace(' ', '-')}.log", executor="mp") as server:
        target = Target(server.url, server.pid)
        processes = server.processes()
        with ThreadPoolExecutor(8) as pool:
            streams = [pool.submit(_end_of_stream, target, number % 2 == 0) for number in range(8)]
            until(lambda: target.metrics().get("vllm:num_requests_running", 0) > 0, END_LIMIT_S)
            begun = time.monotonic()
            os.kill(_pid(target, victim), signal.SIGKILL)
            for outcome in (stream.result() for stream in streams):
                row.add(outcome)
            status = _exit_status(processes[0])
        row.notes.append(f"exit status {status} after {time.monotonic() - begun:.1f} s")
        until(lambda: not _alive(processes), END_LIMIT_S / 2)
        left = [" ".join(each.cmdline())[:60] for each in _alive(processes)]
        if not status:
            row.problems.append("the server goes on without its process" if status is None else "exit status 0")
        if left:
            row.problems.append(f"processes left: {left}")
    return row


def _pid(target: Target, victim: str) -> int:
    if victim == "API server":
        return target.pid
    children = psutil.Process(target.pid).children(recursive=True)
    pid: int = next(child.pid for child in children if victim in " ".join(child.cmdline()))
    return pid


def _exit_status(process: psutil.Process) -> int | None:
    with contextlib.suppress(psutil.TimeoutExpired):
        status: int | None = process.wait(END_LIMIT_S)
        return status
    return None


def _alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def _end_of_stream(target: Target, vote: bool) -> Outcome:
    """Read a stream until it ends in whatever way; silence is a problem, since the client would wait for ever."""
    strategy = {"strategy": {"type": "self_consistency", "n": 4}} if vote else {}
    body = {"model": "demo", "stream": True} | PROMPT[CHAT] | LONG | {"max_tokens": 900} | strategy
    text = ""
    try:
        with httpx.stream("POST", target.url + CHAT, headers=target.headers, json=body, timeout=END_LIMIT_S) as stream:
            for part in stream.iter_text():
                text += part
    except httpx.ReadTimeout:
        return Outcome(BROKEN, f"a client heard nothing for {END_LIMIT_S:.0f} s")
    except httpx.TransportError:
        return Outcome(GONE)
    return Outcome(VLLMS if '"error"' in text else ANSWERED)
