"""A system call filter (seccomp) for the server and every candidate: no new namespaces, no tracing, no kernel
facilities that escape the limits. A second wall behind the namespaces; other processors than those below go without.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 4, 22, 36, 38
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
NEW_NAMESPACES = 0x7E020080  # CLONE_NEWNS|CGROUP|UTS|IPC|USER|PID|NET and CLONE_NEWTIME
LOAD, JUMP_EQUAL, JUMP_BITS, JUMP_ABOVE, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06

# Audit number of the architecture, number of clone, and what is refused: ptrace, process_vm_readv/writev, unshare,
# setns, mount, umount2, pivot_root, chroot, add_key, request_key, keyctl, bpf, userfaultfd, perf_event_open, shmget,
# shmat, semget, msgget, mq_open, name_to_handle_at, open_by_handle_at
ARCHITECTURES = {
    "x86_64": (
        0xC000003E,
        56,
        (101, 310, 311, 272, 308, 165, 166, 155, 161, 248, 249, 250, 321, 323, 298, 29, 30, 64, 68, 240, 303, 304),
    ),
    "aarch64": (
        0xC00000B7,
        220,
        (117, 270, 271, 97, 268, 40, 39, 41, 51, 217, 218, 219, 280, 282, 241, 194, 196, 190, 186, 180, 264, 265),
    ),
}
# The same number everywhere: io_uring (425-427), open_tree, move_mount, fsopen..fspick (428-433), pidfd_getfd,
# mount_setattr
REFUSED_EVERYWHERE = (425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 442)
KILL_CALL = {"x86_64": 62, "aarch64": 129}
CLONE3 = 435  # its flags cannot be read by a filter: "not implemented" makes the C library use clone


def program(machine: str, everyone: bool = False) -> list[tuple[int, int, int, int]] | None:
    """The filter as (code, jump if true, jump if false, constant), or None for a processor it does not know.

    `everyone`: a signal to all processes, kill(-1), would reach beyond the sandbox, and is refused too.
    """
    if machine not in ARCHITECTURES:
        return None
    audit, clone, refused = ARCHITECTURES[machine]
    refuse = (RETURN, 0, 0, ERRNO | errno.EPERM)
    lines = [(LOAD, 0, 0, 4), (JUMP_EQUAL, 1, 0, audit), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    lines += [(JUMP_ABOVE, 0, 1, 0x40000000), refuse]  # the x32 numbering
    for number in refused + REFUSED_EVERYWHERE:
        lines += [(JUMP_EQUAL, 0, 1, number), refuse]
    lines += [(JUMP_EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, ERRNO | errno.ENOSYS)]
    if everyone:  # the number of the call is loaded again, for what follows
        lines += [(JUMP_EQUAL, 0, 4, KILL_CALL[machine]), (LOAD, 0, 0, 16), (JUMP_EQUAL, 0, 1, 0xFFFFFFFF), refuse]
        lines += [(LOAD, 0, 0, 0)]
    lines += [(JUMP_EQUAL, 0, 3, clone), (LOAD, 0, 0, 16), (JUMP_BITS, 0, 1, NEW_NAMESPACES), refuse]
    return [*lines, (RETURN, 0, 0, ALLOW)]


def install(reaper: bool) -> None:
    """No new privileges, no look into this process from beside it, and the filter. Raises OSError.

    `reaper`: orphaned grandchildren become this process's children, as they do by themselves under process 1, and
    nobody within may signal every process there is: without a pid namespace that is the whole machine.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if reaper:
        _prctl(libc, PR_SET_CHILD_SUBREAPER, 1)
    _prctl(libc, PR_SET_NO_NEW_PRIVS, 1)
    _prctl(libc, PR_SET_DUMPABLE, 0)
    lines = program(platform.machine(), everyone=reaper)
    if lines is None:
        return
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(lines), ctypes.addressof(code)))
    _prctl(libc, PR_SET_SECCOMP, 2, ctypes.addressof(header))


def _prctl(libc: ctypes.CDLL, *numbers: int) -> None:
    arguments = [ctypes.c_ulong(number) for number in (*numbers, 0, 0, 0, 0)[:5]]
    if libc.prctl(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl {numbers[0]} was refused")
