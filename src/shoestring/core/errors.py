"""The one error type for users' mistakes, and the sentence that helps them mend it.

`UserError` is raised before any expensive work; the command line prints its message alone
(no traceback) and exits with code 2. Everything else that escapes a stage is a failure: exit code 1,
and the run directory stays resumable.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the user's. The message is one sentence: what is wrong, where, how to mend it."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """' Did you mean "x"?' for the closest of `choices`, or a short list of them, or ''."""
    known = sorted(set(choices))
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f' Did you mean "{close[0]}"?'
    return f" Known: {', '.join(known)}." if 0 < len(known) <= 20 else ""


def without_password(address: object) -> str:
    """An address (of a database, of a server) as it may be shown and logged: its password taken out."""
    hidden = re.sub(r"(//[^:/@]*):[^/]*@", r"\1@", str(address))
    return re.sub(r"(?i)([?&](?:password|passwd|pwd)=)[^&#]*", r"\1…", hidden)
