"""The code sandbox: runs strangers' programs against hidden tests, apart from the system and from the grader.

    with Sandbox.open() as sandbox:
        sandbox.run([Program(source="def f(x): return x + 1", entry="f", tests=(((1,), 2),))])

What keeps a program from being called right when it is not: the expected values never enter the sandbox. A candidate
is told the arguments alone and its answers are compared outside, so leaving early, patching `__eq__`, reading the
caller's frame or writing to the reply pipe can at best give a wrong value in another way.

What keeps it from the system, layer by layer (`inside/` is what runs within):
  bwrap       bubblewrap: own mount, pid, network, ipc and host name spaces, read-only system, no home
  namespaces  the same by system calls from Python, where bubblewrap is not installed
  unsafe      limits, filter and clean-up only; never chosen by itself
In every layer a candidate has its own process, session, limits, scratch folder and system call filter; what it leaves
behind is killed and removed before the next one. Left out: control groups, virtual machines.
"""

from shoestring.tasks.sandbox.pool import Sandbox
from shoestring.tasks.sandbox.program import Limits, Outcome, Program, SandboxError

__all__ = ["Limits", "Outcome", "Program", "Sandbox", "SandboxError"]
