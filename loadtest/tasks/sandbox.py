"""Runs untrusted code in namespaces of its own, if the kernel allows, and with limits. Linux.

A program for `python -I`, of the standard library alone: `run` starts it. Its processes are the launcher, which enters
the namespaces; an init, the first process there, with which all others die; and a runner, which runs the code.
"""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import types
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

SOLUTION, TESTS = "solution.py", "tests.py"  # the files that are run
TOKEN_BYTES = 32
MAX_REASON_BYTES = 800  # of what the code failed with
CPU_TIME, SIGNAL = 64, 128  # exit status of the launcher: processor time is used up; a signal, added to it
NOBODY = 65534
ROOT_BYTES = 64 << 20  # of all files that the code can write together: they are in memory
VISIBLE = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")

# Constants of Linux: <sched.h>, <sys/mount.h>, <linux/mount.h>, <sys/prctl.h>, <linux/capability.h>
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 442, -100, 0x8000, 1, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 36, 38
CAPABILITY_VERSION_3 = 0x20080522


@dataclass(frozen=True)
class Limits:
    """Limits of each process of the code; `processes` in namespaces, else so many more than there are."""

    cpu_s: int
    memory_bytes: int
    file_bytes: int
    processes: int = 256


def run(folder: str, channel: int, limits: Limits, timeout_s: float, namespaces: bool) -> str | None:
    """Run `solution.py` and then `tests.py` of a folder until they end or their time is up.

    Args:
        folder: absolute. In namespaces the code works on a copy of it.
        channel: a descriptor with 32 bytes to read, a token. It comes back after the tests; or else the code's error.
        limits: of each process.
        timeout_s: after it all processes are killed.
        namespaces: whether to enter namespaces; without them the code sees what its user sees.

    Returns:
        Why the code was killed, or not started; None if it ended. The code cannot choose it but by killing itself.
    """
    arguments = {"folder": folder, "channel": channel, "limits": asdict(limits), "namespaces": namespaces}
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    python = Path(sys.executable).parent.resolve() / Path(sys.executable).name  # a folder of links has no place there
    launcher = subprocess.Popen(
        [python, "-I", __file__, json.dumps(arguments)],
        cwd=folder,
        env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"} | one_thread,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[channel],
        start_new_session=True,
    )
    killed = None
    try:
        launcher.wait(timeout_s)
    except subprocess.TimeoutExpired:
        killed = f"took more than {timeout_s:g} s"
        launcher.terminate()  # it kills what is left, and ends
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(timeout_s)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(launcher.pid, signal.SIGKILL)
    return killed or _reason_killed(launcher.wait(), limits)


def _reason_killed(status: int, limits: Limits) -> str | None:
    """Return what a launcher's exit status says about the code."""
    if status == CPU_TIME:
        return f"took more than {limits.cpu_s} s of processor time"
    if status > SIGNAL or status < 0:
        number = status - SIGNAL if status > 0 else -status
        return f"killed by signal {number} ({signal.strsignal(number)})"
    return f"was not started: status {status}" if status else None


# ---- The launcher


def main() -> int:
    """Run the code, and end when it and all its processes have ended; returns the exit status."""
    arguments = json.loads(sys.argv[1])
    folder, channel, limits = arguments["folder"], arguments["channel"], Limits(**arguments["limits"])
    os.set_inheritable(channel, False)
    if arguments["namespaces"]:
        _enter_namespaces()
        init = os.fork()
        if init == 0:
            _init(folder, channel, limits)
        signal.signal(signal.SIGTERM, lambda *_: os.kill(init, signal.SIGKILL))
        os.close(channel)
        status = os.waitstatus_to_exitcode(os.waitpid(init, 0)[1])
        return status if status >= 0 else SIGNAL - status
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # what loses its parent becomes the launcher's child
    runner = os.fork()
    if runner == 0:
        _run_code(channel, limits)
    signal.signal(signal.SIGTERM, lambda *_: _kill_children())
    os.close(channel)
    status = 0
    with suppress(ChildProcessError):  # the signal's function has waited for it
        status = _exit_status(os.wait4(runner, 0), limits)
    _kill_children()
    return status


def _exit_status(ended: tuple[int, int, resource.struct_rusage], limits: Limits) -> int:
    """Return the launcher's exit status for the end of the code's process, as `os.wait4` tells it."""
    _, status, usage = ended
    number = -os.waitstatus_to_exitcode(status)
    if number <= 0:
        return 0
    if number == signal.SIGKILL and round(usage.ru_utime + usage.ru_stime) >= limits.cpu_s:
        return CPU_TIME
    return SIGNAL + number


def _kill_children() -> None:
    """Kill the children, and those that become children by it, until there are none."""
    while True:
        for status in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it has ended meanwhile
                _, state_and_parent = status.read_text().rsplit(")", 1)
                if int(state_and_parent.split()[1]) == os.getpid():
                    os.kill(int(status.parent.name), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return


# ---- Namespaces


def _enter_namespaces() -> None:
    """Leave the namespaces of the caller, as root of new ones; root's rights there are over these alone."""
    launcher, is_root = os.getpid(), os.geteuid() == 0
    users, groups = os.geteuid(), os.getegid()
    ready, entered = os.pipe()
    helper = os.fork()
    if helper == 0:  # only a process outside may map users
        os.close(entered)
        os.read(ready, 1)
        status = 1
        with suppress(OSError):
            if not is_root:
                Path(f"/proc/{launcher}/setgroups").write_text("deny")
            nobody = f"{NOBODY} {NOBODY} 1\n" if is_root else ""
            Path(f"/proc/{launcher}/uid_map").write_text(f"0 {users} 1\n{nobody}")
            Path(f"/proc/{launcher}/gid_map").write_text(f"0 {groups} 1\n{nobody}")
            status = 0
        os._exit(status)
    os.close(ready)
    kinds = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    _checked(_libc.unshare(kinds), "unshare")
    os.close(entered)
    if os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1]):
        raise PermissionError("users cannot be mapped")


def _init(folder: str, channel: int, limits: Limits) -> None:
    """Be the first process of the namespaces: it cannot be killed from inside, and all others end with it."""
    status = 1
    try:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        _build_root(folder)
        with suppress(OSError):  # or the code could be root of namespaces that it makes
            Path("/proc/sys/user/max_user_namespaces").write_text("0")
        child = os.fork()
        if child == 0:
            _drop_rights()
            _run_code(channel, limits)
        os.close(channel)
        while (ended := os.wait4(-1, 0))[0] != child:  # it also waits for processes that lost their parent
            pass
        status = _exit_status(ended, limits)
    finally:
        os._exit(status)


def _build_root(folder: str) -> None:
    """Make a root folder in memory, of what Python needs to run, read-only, and a copy of `folder`; and move there."""
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    files = {name: Path(folder, name).read_bytes() for name in (SOLUTION, TESTS)}
    root = Path(folder, "root")
    root.mkdir()
    _mount("tmpfs", str(root), "tmpfs", MS_NOSUID | MS_NODEV, f"size={ROOT_BYTES},nr_inodes=10000,mode=755")
    for path in dict.fromkeys((*VISIBLE, *DEVICES, *map(os.path.realpath, (sys.prefix, sys.base_prefix)))):
        _show(path, root)
    for name in ("proc", "dev/shm", "tmp", folder.lstrip("/")):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("dev/shm", "tmp", folder.lstrip("/")):
        (root / name).chmod(0o777)
    for name, content in files.items():
        copy = root / folder.lstrip("/") / name
        copy.write_bytes(content)
        copy.chmod(0o666)
    _mount("proc", str(root / "proc"), "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.chdir(root)
    _checked(_libc.pivot_root(b".", b"."), "pivot_root")
    _checked(_libc.umount2(b".", MNT_DETACH), "umount")
    os.chdir(folder)


def _show(path: str, root: Path) -> None:
    """Show a file or folder at the same place under `root`, read-only; links stay links."""
    target = Path(f"{root}{path}")
    if not os.path.exists(path) or target.exists() or target.is_symlink():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.islink(path):
        target.symlink_to(os.readlink(path))
        return
    if os.path.isdir(path):
        target.mkdir()
    else:
        target.touch()
    _mount(path, str(target), None, MS_BIND | MS_REC)
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID)
    place = os.fsencode(target)
    size = ctypes.sizeof(attributes)
    _checked(_libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, place, AT_RECURSIVE, attributes, size), "mount_setattr")


def _drop_rights() -> None:
    """Give up all rights of root, for this process and what it starts."""
    for capability in range(64):
        _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails beyond the kernel's last one
    if NOBODY in {int(line.split()[0]) for line in Path("/proc/self/uid_map").read_text().splitlines()}:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    _checked(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_SET_DUMPABLE, 1)  # or it could not read what /proc has of itself


_libc = ctypes.CDLL(None, use_errno=True)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    names = (os.fsencode(source), os.fsencode(target), kind and kind.encode(), ctypes.c_ulong(flags))
    _checked(_libc.mount(*names, options.encode()), f"mount {target}")


def _prctl(option: int, value: int) -> None:
    _checked(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def _checked(result: int, what: str) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


# ---- The runner


def _run_code(channel: int, limits: Limits) -> None:
    """Set limits, run the code and its tests, and only then send back the token. Does not return."""
    runner = os.getpid()
    try:
        token = os.read(channel, TOKEN_BYTES)  # before the code runs: it cannot read it from the descriptor
        _set_limits(limits)
        sys.argv = [SOLUTION]
        module = sys.modules["solution"] = types.ModuleType("solution")  # not __main__: skip what only scripts run
        for code in [compile(Path(name).read_bytes(), name, "exec") for name in (SOLUTION, TESTS)]:
            exec(code, vars(module))
        os.write(channel, token)
    except BaseException as error:
        if os.getpid() == runner:  # a process that the code made must not send it before the token
            os.write(channel, _reason(error).encode(errors="replace")[:MAX_REASON_BYTES])
    finally:
        os._exit(0)  # do not wait for threads that the code started


def _reason(error: BaseException) -> str:
    """Return the kind of an error with the last line of the code or its tests that it went through, and its message."""
    file, line, message = None, None, str(error)
    if isinstance(error, SyntaxError):
        file, line, message = error.filename, error.lineno, error.msg
    step = error.__traceback__
    while step:
        if step.tb_frame.f_code.co_filename in (SOLUTION, TESTS):
            file, line = step.tb_frame.f_code.co_filename, step.tb_lineno
        step = step.tb_next
    place = f" in {file}: line {line}" if file else ""
    return f"{type(error).__name__}{place}{(', ' if place else ': ') + message if message else ''}"


def _set_limits(limits: Limits) -> None:
    """Set limits that only root could lift again; root itself has no limit on processes."""
    existing = len(list(Path("/proc").glob("[0-9]*/task/*")))  # the limit counts all processes of the user
    wanted = {
        resource.RLIMIT_CPU: limits.cpu_s,
        resource.RLIMIT_AS: limits.memory_bytes,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: limits.processes + existing,
    }
    for kind, limit in wanted.items():
        hard_limit = resource.getrlimit(kind)[1]
        limit = limit if hard_limit == resource.RLIM_INFINITY else min(limit, hard_limit)
        resource.setrlimit(kind, (limit, limit))


if __name__ == "__main__":
    sys.exit(main())
