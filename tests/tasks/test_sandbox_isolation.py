"""Attacks on what the layers that isolate promise: nothing of the system is seen, reached, written or harmed."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from shoestring.tasks.sandbox import Sandbox

from .conftest import call, endless

READ = """
import os
def f(*paths):
    seen = []
    for path in paths:
        try:
            os.listdir(path) if os.path.isdir(path) else open(path).read(1)
            seen.append(path)
        except OSError:
            pass
    return seen
"""
WRITE = """
import os
def f(*paths):
    done = []
    for path in paths:
        try:
            os.close(os.open(os.path.join(path, "x"), os.O_CREAT | os.O_WRONLY))
            done.append(path)
        except OSError:
            pass
    return done
"""
CONNECT = """
import errno, socket
def f(port, path):
    failures = []
    internet, local = socket.AF_INET, socket.AF_UNIX
    for family, address in [(internet, ("127.0.0.1", port)), (local, path), (internet, ("8.8.8.8", 53))]:
        with socket.socket(family) as s:
            s.settimeout(0.3)
            try:
                s.connect(address)
            except OSError as error:
                failures.append(type(error).__name__)
    try:
        socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)
    except OSError:
        failures.append("raw")
    return len(failures)
"""
KILL = """
import os, signal
def f():
    for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGSEGV):
        for pid in {os.getppid(), 1}:
            try:
                os.kill(pid, number)
            except PermissionError:
                pass
    return "sent"
"""
KILL_ALL = """
import os, signal
def f():
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:  # there is nobody but the server and itself
        return os.getppid()
"""
GAIN = """
import ctypes, os
def f():
    libc = ctypes.CDLL(None, use_errno=True)
    own = 0x10000000 | 0x20000
    tries = {
        "new namespaces": libc.unshare(own),
        "clone into namespaces": libc.syscall(56 if os.uname().machine == "x86_64" else 220, own | 17, 0, 0, 0, 0),
        "mount": libc.mount(b"tmpfs", b"/scratch", b"tmpfs", 0, None),
        "remount": libc.mount(None, b"/", None, 32, None),
        "chroot": libc.chroot(b"/usr"),
        "setuid": libc.setuid(0),
        "setgid": libc.setgid(0),
        "trace the server": libc.ptrace(16, 1, 0, 0),
        "trace": libc.ptrace(0, 0, 0, 0),
        "shared memory": libc.shmget(0, 4096, 0o1600),
        "hostname": libc.sethostname(b"mine", 4),
    }
    return sorted(name for name, result in tries.items() if result >= 0)
"""
SEE = "import os\ndef f(name): return [os.environ.get(name), os.getuid() != 0, os.uname().nodename, os.getcwd()]"


def test_reads_nothing_outside(isolated: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s")
    paths = ["/etc/passwd", "/etc/shadow", "/etc", "/home", "/root", "/proc", "/proc/1/mem", "/sys", "/tmp", "/var"]
    paths += ["/dev/mem", "/dev/shm", "/run", "../../etc/passwd", str(Path.home()), str(secret), str(Path(__file__))]
    hidden = {"/etc", "/root", str(Path.home())}  # folders on the way to the interpreter: there, but almost empty
    assert set(call(isolated, READ, *paths).values[0]) <= hidden


def test_sees_of_the_way_to_the_interpreter_only_the_way(isolated: Sandbox) -> None:
    names = call(
        isolated, "import os\ndef f(path): return os.listdir(path) if os.path.exists(path) else []", "/root"
    ).values
    assert len(names[0]) <= 1
    listed = call(isolated, "import os\ndef f(): return os.listdir('/etc') if os.path.exists('/etc') else []").values
    assert set(listed[0]) <= {"ld.so.cache"}


def test_writes_nothing_but_scratch(isolated: Sandbox) -> None:
    paths = [
        "/",
        "/usr",
        "/usr/lib",
        "/etc",
        "/box",
        "/box/inside",
        "/dev",
        "/bin",
        os.path.dirname(os.__file__),
        "/scratch",
    ]
    assert call(isolated, WRITE, *paths).values == (["/scratch"],)


def test_reaches_no_network(isolated: Sandbox, tmp_path: Path) -> None:
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        abstract = f"\0shoestring-test-{os.getpid()}"
        unix.bind(abstract)
        unix.listen()
        assert call(isolated, CONNECT, tcp.getsockname()[1], abstract, expected=4).ok


def test_cannot_kill_the_server(isolated: Sandbox) -> None:
    before = _server(isolated)
    assert call(isolated, KILL).values == ("sent",)
    assert call(isolated, KILL_ALL).values == (1,)
    assert _server(isolated) == before, "the same worker goes on"


def test_gains_no_privilege(isolated: Sandbox) -> None:
    assert call(isolated, GAIN).values == ([],)


def test_sees_neither_environment_nor_name(isolated: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_GRADER", "s")
    isolated.close()  # the next worker starts with that environment around it
    assert call(isolated, SEE, "SECRET_OF_THE_GRADER").values == ([None, True, "sandbox", "/scratch"],)


def test_symbolic_links_lead_nowhere(isolated: Sandbox, tmp_path: Path) -> None:
    target = tmp_path / "kept"
    target.write_text("whole")
    source = f"""
import os
def f():
    os.symlink({str(target)!r}, "file")
    os.symlink({str(tmp_path)!r}, "folder")
    os.symlink("/", "root")
    return [os.path.exists("file"), os.path.exists("folder/kept")]
"""
    assert call(isolated, source).values == ([False, False],)
    assert target.read_text() == "whole"


def test_holds_a_fork_bomb(isolated: Sandbox) -> None:
    bomb = "import os\ndef f():\n    while True:\n        try: os.fork()\n        except OSError: pass"
    assert endless(isolated, bomb).error == "timeout"


def test_limits_the_number_of_processes(isolated: Sandbox) -> None:
    source = """
import os, time
def f():
    children = 0
    try:
        while children < 50:
            if os.fork() == 0:
                time.sleep(9)
            children += 1
    except OSError:
        pass
    return children
"""
    count = call(isolated, source).values[0]
    assert isinstance(count, int) and count < isolated.limits.processes


def _server(sandbox: Sandbox) -> int:
    process = sandbox._workers[0]._process
    assert process is not None
    return process.pid
