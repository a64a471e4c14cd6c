"""A system that is not POSIX, for the project's own code alone: what Python reads when it starts.

With this folder on PYTHONPATH, modules of the project (and no others) find no `fcntl` and the like,
modules `os`, `signal` and `ctypes` that lack what Windows lacks, and in place of what Windows has,
replacements that work on Linux: locks of msvcrt by flock, kernel32 by /proc, and sockets that are
shared by a message. Paths stay those of Linux. A child process reads this file too.
"""

from __future__ import annotations

import array
import builtins
import errno
import os
import secrets
import socket
import threading
from pathlib import Path
from types import ModuleType

ROOT = str(Path(__file__).resolve().parents[2]) + os.sep
NO_MODULE = {"fcntl", "resource", "termios", "pwd", "grp", "tty", "pty", "readline", "syslog"}
LACKING = {
    "os": """
        O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK WNOHANG chown fchmod fchown fork forkpty
        get_blocking getegid geteuid getgid getloadavg getpgid getuid killpg mkfifo nice
        pidfd_open posix_fadvise posix_fallocate pread preadv pwrite pwritev readv
        register_at_fork sched_getaffinity sched_setaffinity set_blocking setpgid setsid statvfs
        sysconf uname wait3 wait4 waitid writev
    """,
    "signal": """
        SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2
        SIGXCPU SIGXFSZ alarm pidfd_send_signal pthread_kill pthread_sigmask setitimer siginterrupt
    """,
    "socket": "AF_UNIX recv_fds send_fds",
    "mmap": "MADV_HUGEPAGE",
    "ctypes": "",
}


# -- what takes the place of it --------------------------------------------------------------------


class Msvcrt(ModuleType):
    """One lock a file: the project locks one byte of it, far behind the end."""

    LK_NBLCK, LK_UNLCK = 2, 0

    def locking(self, descriptor: int, how: int, count: int) -> None:
        import fcntl

        place = os.lseek(descriptor, 0, os.SEEK_CUR)
        assert (place, count) == (2**30, 1) and os.fstat(descriptor).st_size < 2**30
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if how else fcntl.LOCK_UN)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None


class Kernel32:
    """What system/windows.py asks of it, by /proc. A handle is the number of a process."""

    class Function:
        def __init__(self, does):
            self.does = does

        def __call__(self, *arguments):
            assert len(self.argtypes) == len(arguments) if hasattr(self, "argtypes") else True
            return self.does(*arguments)

    def __init__(self) -> None:
        for name in dir(type(self)):
            if name[0].isupper() and name != "Function":
                setattr(self, name, self.Function(getattr(self, name)))

    def GetCurrentProcess(self):
        return os.getpid()

    def OpenProcess(self, access, inherit, process):
        return process if Path(f"/proc/{process}").exists() else 0

    def CloseHandle(self, handle):
        return 1

    def _stat(self, handle):
        return Path(f"/proc/{handle}/stat").read_text().rpartition(")")[2].split()

    def GetExitCodeProcess(self, handle, code):
        code._obj.value = 0 if self._stat(handle)[0] in "ZX" else 259
        return 1

    def GetProcessTimes(self, handle, created, *_):
        created._obj.value = int(self._stat(handle)[19])
        return 1

    def K32GetProcessMemoryInfo(self, handle, found, size):
        status = Path(f"/proc/{handle}/status").read_text()
        lines = dict(line.split(":", 1) for line in status.splitlines())
        found._obj.peak = int(lines["VmHWM"].split()[0]) * 1024
        found._obj.resident = int(lines["VmRSS"].split()[0]) * 1024
        return 1

    def GlobalMemoryStatusEx(self, found):
        assert found._obj.length == 64
        found._obj.physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return 1


def share(shared: socket.socket, process: int) -> bytes:
    """As `socket.share`: who calls `fromshare` with it gets a copy of the socket."""
    name = f"\0phisight-{secrets.token_hex(16)}"
    server = socket.socket(socket.AF_UNIX)
    server.bind(name)
    server.listen(1)
    copy = shared.dup()

    def hand_over() -> None:
        with server, copy, server.accept()[0] as taker:
            taker.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, given)])

    given = array.array("i", [copy.fileno()])
    threading.Thread(target=hand_over, daemon=True).start()
    return name.encode()


def fromshare(described: bytes) -> socket.socket:
    with socket.socket(socket.AF_UNIX) as taker:
        taker.connect(described.decode())
        return socket.socket(fileno=socket.recv_fds(taker, 1, 1)[1][0])


# -- what the project finds ------------------------------------------------------------------------

_views: dict[str, ModuleType] = {}


def view_of(name: str, module: ModuleType) -> ModuleType:
    """A module as the project finds it."""
    if name not in _views:
        lacking = LACKING[name].split()
        view = ModuleType(name)
        view.__dict__.update({k: v for k, v in vars(module).items() if k not in lacking})
        if name == "os":
            view.name = "nt"
        elif name == "socket":
            view.fromshare = fromshare
        elif name == "signal":  # as sending it is asked of the system that there is
            view.CTRL_BREAK_EVENT = module.SIGTERM
        elif name == "ctypes":
            view.WinDLL = lambda *_, **__: Kernel32()
            view.get_last_error = lambda: 87  # ERROR_INVALID_PARAMETER
        _views[name] = view
    return _views[name]


def is_of_the_project(names: dict | None) -> bool:
    if not names:
        return False
    file = names.get("__file__") or ""
    ours = file != __file__ and file.startswith(ROOT) and not file[len(ROOT) :].startswith(".venv")
    return ours or (not file and names.get("__name__") == "__main__")


def import_there(name, globals=None, locals=None, fromlist=(), level=0):
    if level or not is_of_the_project(globals):
        return really_import(name, globals, locals, fromlist, level)
    root = name.partition(".")[0]
    if root in NO_MODULE:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    if root == "msvcrt":
        return Msvcrt("msvcrt")
    found = really_import(name, globals, locals, fromlist, level)
    return view_of(root, found) if root in LACKING and (name == root or not fromlist) else found


really_import = builtins.__import__
builtins.__import__ = import_there
socket.socket.share = share
