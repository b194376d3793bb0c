"""How a worker is started on each layer: the command, and why a layer cannot be used here.

The interpreter inside is the one that runs us, without its site-packages: its binary and library folder are bound at
their own paths, which works wherever it is installed, a home folder included, and shows nothing else of that home.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shoestring.tasks.sandbox.inside.settings import Settings
from shoestring.tasks.sandbox.program import Limits

Layer = Literal["bwrap", "namespaces", "unsafe"]
SAFE_LAYERS: tuple[Layer, ...] = ("bwrap", "namespaces")
SERVER = "from inside.server import main; main()"
LAUNCH = "from inside.launch import main; main()"
HERE = Path(__file__).resolve().parent
BOX, SCRATCH = "/box", "/scratch"
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
FIRST_UID, UIDS = 61184, 4336  # the range systemd keeps for users that exist only while a service runs
CAP_SETGID, CAP_SETUID, CAP_SYS_ADMIN = 6, 7, 21


@dataclass(slots=True)
class Start:
    """A command ready to be started, as which user (None: ours), and the folder to remove when it has ended."""

    command: list[str]
    env: dict[str, str]
    folder: str | None = None
    user: int | None = None


def missing(layer: Layer) -> str | None:
    """Why `layer` cannot even be tried here, or None."""
    if sys.platform != "linux":
        return "needs Linux"
    if layer == "bwrap" and shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    if layer == "namespaces" and os.uname().machine not in ("x86_64", "aarch64"):
        return f"not written for {os.uname().machine}"
    return None


def start(layer: Layer, limits: Limits) -> Start:
    """The command of one worker.

    The limit on processes does not bind root, so each worker of root's becomes a user of its own: within the sandbox
    where root may mount without a user namespace, before it where root may not.
    """
    if layer == "unsafe":
        folder = tempfile.mkdtemp(prefix="shoestring-unsafe-")
        settings = _settings(limits, folder, isolated=False, uid=None)
        return Start(_python(SERVER, settings), _environment(str(HERE), folder), folder)
    rights = _rights()
    uid = FIRST_UID + secrets.randbelow(UIDS) if rights != "none" else None
    server = _python(SERVER, _settings(limits, SCRATCH, isolated=True, uid=uid if rights == "mount" else None))
    env = _environment(BOX, SCRATCH)
    started = (_bwrap if layer == "bwrap" else _namespaces)(server, env, limits, privileged=rights == "mount")
    if rights == "become":
        started.user = uid
        if started.folder is not None:
            os.chown(started.folder, uid or -1, -1)
    return started


def _bwrap(server: list[str], env: dict[str, str], limits: Limits, privileged: bool) -> Start:
    spaces = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if privileged:
        identity = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        identity = ["--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
    shown = [*_binds(), *DEVICES, f"{BOX}/inside"]
    mounts = [word for path in _parents(shown) for word in ("--perms", "0755", "--dir", path)]
    mounts += [word for path in _binds() for word in ("--ro-bind", path, path)]
    mounts += ["--ro-bind", str(HERE / "inside"), f"{BOX}/inside"]
    mounts += [word for path in DEVICES for word in ("--dev-bind", path, path)]
    mounts += [word for path, target in _links() for word in ("--symlink", target, path)]
    mounts += ["--perms", "0777", "--size", str(limits.scratch), "--tmpfs", SCRATCH, "--remount-ro", "/"]
    variables = [word for item in env.items() for word in ("--setenv", *item)]
    bwrap = ["bwrap", *spaces, *identity, "--as-pid-1", "--hostname", "sandbox", "--clearenv", *variables, *mounts]
    return Start([*_first_to_die(), *bwrap, "--chdir", SCRATCH, "--", *server], dict(os.environ))


def _namespaces(server: list[str], env: dict[str, str], limits: Limits, privileged: bool) -> Start:
    folder = tempfile.mkdtemp(prefix="shoestring-root-")
    plan = {
        "root": folder,
        "user": not privileged,
        "binds": _binds(),
        "mounted": [(str(HERE / "inside"), f"{BOX}/inside")],
        "devices": DEVICES,
        "links": _links(),
        "scratch": SCRATCH,
        "size": limits.scratch,
        "command": server,
        "env": env,
    }
    return Start([*_first_to_die(), *_python(LAUNCH, plan)], _environment(str(HERE), "/"), folder)


def _settings(limits: Limits, scratch: str, isolated: bool, uid: int | None) -> dict[str, object]:
    own = dataclasses.asdict(limits)
    shared = {name: own[name] for name in Settings._fields if name in own}
    return {**shared, "scratch": scratch, "isolated": isolated, "uid": uid}


def _first_to_die() -> list[str]:
    """When memory runs out the kernel is to take a candidate, not the training run beside it."""
    return ["/bin/sh", "-c", 'echo 1000 > /proc/self/oom_score_adj; exec "$@"', "sandbox"]


def _python(code: str, argument: object) -> list[str]:
    return [_interpreter(), "-s", "-S", "-B", "-c", code, json.dumps(argument)]


def _interpreter() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _environment(code: str, scratch: str) -> dict[str, str]:
    # A fixed hash seed: the same candidate gives the same verdict every time.
    return {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": code,
        "PYTHONHASHSEED": "0",
        "LC_ALL": "C.UTF-8",
        "TMPDIR": scratch,
        "HOME": scratch,
    }


def _binds() -> list[str]:
    """What of the system is shown inside, read-only; a folder within another one is left out."""
    wanted = ["/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache", "/nix/store"]
    paths = {path for path in wanted if os.path.exists(path) and not os.path.islink(path)}
    for path in (_interpreter(), os.path.join(sys.base_prefix, "lib"), os.path.join(sys.base_prefix, "lib64")):
        if os.path.exists(path) and not any(Path(path).is_relative_to(shown) for shown in paths):
            paths.add(path)
    return sorted(paths)


def _parents(paths: list[str]) -> list[str]:
    """Every folder above `paths`, outermost first: bubblewrap would make them for root alone."""
    return sorted({str(folder) for path in paths for folder in Path(path).parents} - {"/"})


def _links() -> list[tuple[str, str]]:
    return [(path, os.readlink(path)) for path in ("/lib", "/lib32", "/lib64", "/bin") if os.path.islink(path)]


def _rights() -> Literal["none", "become", "mount"]:
    """What being root is worth here: nothing (or not root), becoming another user, or mounting as well.

    Root of a user namespace that maps no other ids, or may not drop groups, is an ordinary user in disguise.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    ids = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    mapped = any(first <= FIRST_UID and first + count >= FIRST_UID + UIDS for first, _, count in ids)
    groups = Path("/proc/self/setgroups").read_text().strip() == "allow"
    held = int(status["CapEff"], 16)
    if os.geteuid() != 0 or not mapped or not groups or not (held >> CAP_SETUID & held >> CAP_SETGID & 1):
        return "none"
    return "mount" if held >> CAP_SYS_ADMIN & 1 else "become"
