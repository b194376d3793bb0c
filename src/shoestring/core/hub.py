"""The folder of a checkpoint: one that is here, or one downloaded from the Hugging Face hub by its id (owner/name).

The only place that fetches models. The network is touched for an id alone, never for the name of something that could
be here: where the first part of a name is a folder of this machine, a missing second part is a mistake, not an id.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from shoestring.core.errors import UserError

CHECKPOINT = ("*.json", "*.safetensors", "*.jinja")  # never pickled weights, never code
CONFIG = ("config.json",)
_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def is_id(name: str) -> bool:
    """Whether a name can only mean a model on the hub."""
    return bool(_ID.fullmatch(name)) and not Path(name).exists() and not Path(name).parent.exists()


def checkpoint_folder(path_or_id: str | Path, *, files: Sequence[str] = CHECKPOINT, download: bool = True) -> Path:
    """The folder itself, or where the hub's files of that id lie here once those that match `files` are downloaded.

    download False takes only what was downloaded earlier. Raises UserError, in a sentence, when it cannot be had.
    """
    name = str(path_or_id)
    if Path(name).is_dir():
        return Path(name)
    if not is_id(name):
        raise UserError(f"{name} is not the folder of a checkpoint, nor a model id like owner/name.")
    try:
        from huggingface_hub import snapshot_download  # an extra; and slow to import
        from huggingface_hub.errors import RepositoryNotFoundError
    except ImportError:
        raise UserError(f"{name} is no folder here; to download it, pip install 'shoestring[hf]'.") from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(files), local_files_only=not download))
    except RepositoryNotFoundError as error:
        raise UserError(f"the hub has no model {name}, or it is private and needs `hf auth login`.") from error
    except Exception as error:
        reason = type(error).__name__
        raise UserError(
            f"{name} is no folder here, and downloading it failed ({reason}); check the network, or give the folder "
            "of a copy."
        ) from error
