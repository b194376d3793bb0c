"""The command line: verbs in the order of the road, exit codes 0 done, 1 failed, 2 your mistake.

Heavy imports stand inside the verbs: `shoestring --help` loads no torch. What a verb reports goes to standard
output (`--json`: one document), everything else to standard error.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Annotated

import typer

from shoestring import __version__, cli_chat, cli_export, cli_parts, cli_plan, cli_report, cli_road, cli_runs, cli_serve
from shoestring.core.errors import UserError

DONE, FAILED, MISTAKE = 0, 1, 2
# a place that the user named and that cannot be read or written: said in a sentence, whichever verb stumbled over it
PLACES = frozenset(
    (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP,
     errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT)
)  # fmt: skip

app = typer.Typer(
    name="shoestring",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"shoestring {__version__}")
        raise typer.Exit()


@app.callback(help="Train a DeepSeek-V3-style model, make it reason, distil it into a student, and see the bill.")
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for _verbs in (cli_road, cli_plan, cli_chat, cli_serve, cli_report, cli_export, cli_runs, cli_parts):
    _verbs.register(app)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    if isinstance(sys.stdout, io.TextIOWrapper):  # where it is not UTF-8, a letter it lacks is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = app(sys.argv[1:] if argv is None else argv, prog_name="shoestring", standalone_mode=False)
        sys.stdout.flush()  # a report that does not fit on its disk is no success
    except UserError as error:
        return _tell(error, str(error), MISTAKE)
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError as error:
        return _pipe_closed(error)
    except Exception as error:
        return _usage_or_failure(error)
    return _interrupted() if code == 130 else code if isinstance(code, int) else DONE


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _interrupted() -> int:
    print("Interrupted. The same command goes on from a stage's last checkpoint.", file=sys.stderr)
    return FAILED


def _pipe_closed(error: BrokenPipeError) -> int:
    """Who read our output has left (`| head`): nobody is there to be told, and nothing more is written at the exit."""
    if getattr(error, "__notes__", None):
        return _tell(error, f"Failed: {error}", FAILED)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAILED


def _usage_or_failure(error: Exception) -> int:
    sentence = getattr(error, "format_message", None)  # a usage error of the command-line parser
    if sentence is not None:
        if sentence():  # empty: nothing was asked, and the help has been shown
            print(f"{sentence()} (`shoestring --help` and `shoestring VERB --help` show how.)", file=sys.stderr)
        return MISTAKE
    if getattr(error, "__notes__", None):
        return _tell(error, f"Failed: {type(error).__name__}: {error}", FAILED)
    if isinstance(error, OSError) and error.errno in PLACES:
        place = f"{error.filename}: " if error.filename else ""
        return _tell(error, f"{place}{error.strerror}; give another place, or mend this one.", MISTAKE)
    traceback.print_exc()  # not from within a stage: a fault of the program
    return FAILED


def _tell(error: BaseException, sentence: str, code: int) -> int:
    """The sentence, and where the run directory is when there is one."""
    print(sentence, file=sys.stderr)
    for note in getattr(error, "__notes__", ()):
        print(note, file=sys.stderr)
    if code == FAILED:
        print("Its logs/ hold the traceback; the same command goes on from the last checkpoint.", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
