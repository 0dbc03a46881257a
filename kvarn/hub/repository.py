"""Models from the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
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
    try:
        return snapshot_download(name, allow_patterns=HUB_FILES)
    except HFValidationError:
        raise
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        try:
            return snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True)
        except LocalEntryNotFoundError:
            raise SourceError(f"hub model {name!r} could not be fetched and was not fetched before: {error}") from error
