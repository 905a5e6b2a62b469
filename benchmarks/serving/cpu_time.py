"""Processor time of servers, and of everything else on the machine while a benchmark measures."""

import time

import psutil

from harness.launch import Server


def busy_cores(server: Server, seconds: float) -> float:
    """Return how many cores the server's processes keep busy, on average over the next `seconds`."""
    before, start = _processor_time(server), time.perf_counter()
    time.sleep(seconds)
    return (_processor_time(server) - before) / (time.perf_counter() - start)


class OtherProcesses:
    """All processes of the machine but this one and the servers: they take cores that the measurement then lacks."""

    def __init__(self, *servers: Server) -> None:
        self.servers = servers
        self.start = time.perf_counter()
        self.before = self._processor_time()

    def busy_cores(self) -> float:
        """Return how many cores they kept busy, on average since this object was made."""
        used: float = self._processor_time() - self.before
        return used / (time.perf_counter() - self.start)

    def _processor_time(self) -> float:
        machine = psutil.cpu_times()
        this = psutil.Process().cpu_times()
        all_but_this: float = machine.user + machine.nice + machine.system - this.user - this.system
        return all_but_this - sum(_processor_time(server) for server in self.servers)


def _processor_time(server: Server) -> float:
    times = [process.cpu_times() for process in server.processes()]
    seconds: float = sum(each.user + each.system for each in times)
    return seconds
