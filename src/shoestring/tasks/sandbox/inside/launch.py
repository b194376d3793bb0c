"""The namespaces layer: what bubblewrap does, by system calls, for machines that do not have it.

Python 3.11 has no os.unshare, so these are calls into the C library. In order: new namespaces (a user namespace too,
unless this is root with the right to do without), a root of its own on tmpfs with the system bound read-only, then
process 1 of the pid namespace, which becomes the server. Needs Linux 5.12 (mount_setattr).
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys

CLONE = {"user": 0x10000000, "mount": 0x20000, "pid": 0x20000000, "net": 0x40000000, "ipc": 0x8000000, "uts": 0x4000000}
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH, AT_FDCWD, AT_RECURSIVE = 2, -100, 0x8000
RDONLY, NOSUID, NODEV = 1, 2, 4  # of mount_setattr
SYS_MOUNT_SETATTR = 442
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
NOBODY = 65534

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """argv: a JSON plan; `layers` makes it: root is an empty folder, user whether to make a user namespace."""
    plan = json.loads(sys.argv[1])
    spaces = [name for name in CLONE if name != "user" or plan["user"]]
    uid, gid = os.getuid(), os.getgid()
    _call("unshare", ctypes.c_int(sum(CLONE[name] for name in spaces)))
    if plan["user"]:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{NOBODY} {uid} 1")
        _write("/proc/self/gid_map", f"{NOBODY} {gid} 1")
    _call("sethostname", b"sandbox", ctypes.c_size_t(7))
    _build(plan)
    pid = os.fork()
    if pid == 0:
        os.chdir(plan["scratch"])
        os.execve(plan["command"][0], plan["command"], plan["env"])
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 255)


def _build(plan: dict) -> None:
    """Mount the new root, then swap it in and let go of the old one."""
    root = plan["root"]
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=0755")
    for path in plan["binds"]:
        _bind(path, root + path)
        _restrict(root + path, RDONLY | NOSUID | NODEV, AT_RECURSIVE)
    for source, target in plan["mounted"]:
        _bind(source, root + target)
        _restrict(root + target, RDONLY | NOSUID | NODEV, AT_RECURSIVE)
    for path in plan["devices"]:
        _bind(path, root + path)
    for path, target in plan["links"]:
        os.symlink(target, root + path)
    os.makedirs(root + plan["scratch"])
    options = f"size={plan['size']},nr_inodes=4096,mode=0777"
    _mount("tmpfs", root + plan["scratch"], "tmpfs", MS_NOSUID | MS_NODEV, options)
    _restrict(root, RDONLY | NOSUID | NODEV, 0)
    os.chdir(root)
    _syscall(PIVOT_ROOT[os.uname().machine], b".", b".")
    _call("umount2", b".", ctypes.c_int(MNT_DETACH))
    os.chdir("/")


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(source, target, None, MS_BIND | MS_REC)


def _restrict(path: str, flags: int, at: int) -> None:
    attributes = ctypes.create_string_buffer(struct.pack("=QQQQ", flags, 0, 0, 0), 32)
    _syscall(SYS_MOUNT_SETATTR, ctypes.c_int(AT_FDCWD), path.encode(), ctypes.c_uint(at), attributes, ctypes.c_long(32))


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    names = [None if text is None else text.encode() for text in (source, target, kind)]
    _call("mount", *names, ctypes.c_ulong(flags), None if options is None else options.encode(), what=target)


def _syscall(number: int, *arguments: object) -> None:
    _call("syscall", ctypes.c_long(number), *arguments, what=str(number))


def _call(name: str, *arguments: object, what: str = "") -> None:
    if getattr(libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        sys.exit(f"{name} {what}: {os.strerror(number)}")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
