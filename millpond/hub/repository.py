"""Models from the hub."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils.tqdm import disable_progress_bars

from millpond.hub.errors import SourceError
from millpond.hub.progress import Progress
from millpond.hub.weights import files_of_index, weight_files

WEIGHTS = "model*.safetensors"
HUB_FILES = [
    "*.json",
    WEIGHTS,
    "tokenizer.model",
    "*.tiktoken",
    "*.txt",
    "*.jsonl",
    "*.jinja",
]
"""What of a hub repository is fetched: weights and tokenizer, no code; and what its index names besides."""


def snapshot(name: str, progress: Progress) -> Path:
    """Folder of a repository's newest snapshot; without a network, of the one fetched before. Raises SourceError."""
    if not progress.visible:
        disable_progress_bars()
    try:
        folder = Path(_fetched(name, HUB_FILES))
    except HFValidationError as error:
        raise SourceError(f"model {name!r} is not a hub name: {error}") from error
    try:
        if any(not fnmatch(file, WEIGHTS) for file in files_of_index(folder)):
            folder = Path(_fetched(name, [*HUB_FILES, *files_of_index(folder)]))
        weight_files(folder)
    except SourceError as error:
        raise SourceError(f"hub model {name!r}: {error}") from error
    return folder


def _fetched(name: str, patterns: list[str]) -> str:
    if HF_HUB_CACHE.startswith("~"):  # without a home folder it would be one of that name, wherever we are
        why = "there is no home folder to keep it in; HF_HUB_CACHE=FOLDER names a folder"
        raise SourceError(f"hub model {name!r} cannot be fetched: {why}")
    try:
        return snapshot_download(name, allow_patterns=patterns)
    except HFValidationError:
        raise
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        try:
            return snapshot_download(name, allow_patterns=patterns, local_files_only=True)
        except (LocalEntryNotFoundError, OSError):
            why = str(error)
            if error.errno is not None and error.filename is not None:  # of this machine's disk, not of the network
                why = f"{HF_HUB_CACHE} cannot be used: {error.strerror}; HF_HUB_CACHE=FOLDER names another folder"
            raise SourceError(f"hub model {name!r} could not be fetched and was not fetched before: {why}") from error
