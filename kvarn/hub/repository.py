"""Models from the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils.tqdm import disable_progress_bars

from kvarn.hub.errors import SourceError
from kvarn.hub.progress import Progress

HUB_FILES = [
    "*.json",
    "model*.safetensors",
    "tokenizer.model",
    "*.tiktoken",
    "*.txt",
    "*.jsonl",
    "*.jinja",
]
"""What of a hub repository is fetched: weights and tokenizer, no code."""


def snapshot(name: str, progress: Progress) -> Path:
    """Folder of a repository's newest snapshot; without a network, of the one fetched before. Raises SourceError."""
    if not progress.visible:
        disable_progress_bars()
    try:
        folder = Path(_fetched(name))
    except HFValidationError as error:
        raise SourceError(f"model {name!r} is not a hub name: {error}") from error
    if not any(folder.glob("*.safetensors")):
        raise SourceError(f"hub model {name!r} has no *.safetensors")
    return folder


def _fetched(name: str) -> str:
    if HF_HUB_CACHE.startswith("~"):  # without a home folder it would be one of that name, wherever we are
        why = "there is no home folder to keep it in; HF_HUB_CACHE=FOLDER names a folder"
        raise SourceError(f"hub model {name!r} cannot be fetched: {why}")
    try:
        return snapshot_download(name, allow_patterns=HUB_FILES)
    except HFValidationError:
        raise
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        try:
            return snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True)
        except (LocalEntryNotFoundError, OSError):
            why = str(error)
            if error.errno is not None and error.filename is not None:  # of this machine's disk, not of the network
                why = f"{HF_HUB_CACHE} cannot be used: {error.strerror}; HF_HUB_CACHE=FOLDER names another folder"
            raise SourceError(f"hub model {name!r} could not be fetched and was not fetched before: {why}") from error
