"""Where a model is: a path of this machine, or a repository of the Hugging Face Hub."""

import logging
import os
import re
from pathlib import Path

logger = logging.getLogger(__name__)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""``owner/name``."""
FILES = ("*.safetensors", "*.json")
"""What is fetched of a repository: weights and configurations, nothing that runs and nothing pickled."""


def local_path(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The path that a user means: ``source`` itself if it is there, else a snapshot of that Hub repository.

    A snapshot that is in the cache of ``huggingface_hub`` is not fetched again, and with ``HF_HUB_OFFLINE=1`` nothing
    is fetched at all.

    Args:
        source: a path, or an id ``owner/name`` of the Hub. What is on this machine goes first.
        revision: branch, tag or commit of a Hub repository. Give a commit to get the same weights every time.

    Raises:
        FileNotFoundError: no such path and no such repository, or it cannot be reached.
        ValueError: a revision of something that is on this machine.
        ModuleNotFoundError: ``huggingface_hub`` is missing.
    """
    path = Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise ValueError(f"revision is {revision!r}, but {str(source)!r} is on this machine; leave it away")
        return path
    if not isinstance(source, str) or not HUB_ID.fullmatch(source):
        raise FileNotFoundError(
            f"nothing at {str(source)!r}; accepted: a run or checkpoint folder, a .safetensors or .pt file, or an id "
            "of the Hub such as 'owner/name'"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModuleNotFoundError("an id of the Hub needs huggingface_hub: pip install 'dcdit[train]'") from None
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=list(FILES)))
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"no path {source!r}, and not to be had from the Hub: {first}") from None
    logger.info("%s of the Hub is in %s", source, folder)
    return folder
