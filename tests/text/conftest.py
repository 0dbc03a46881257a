"""Model folders with small real tokenizers, made once per run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_tokenizers import CHATML, TURNS, byte_fallback_backend, byte_level_backend, write_folder


@pytest.fixture(scope="session")
def chatml_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE without BOS, ChatML template that takes any role."""
    return write_folder(
        tmp_path_factory.mktemp("chatml"),
        byte_level_backend(),
        {"eos_token": "<|endoftext|>", "chat_template": CHATML},
        {"model_type": "llama", "eos_token_id": 0},
    )


@pytest.fixture(scope="session")
def turns_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-fallback BPE with BOS, a template that writes BOS itself and refuses system messages."""
    return write_folder(
        tmp_path_factory.mktemp("turns"),
        byte_fallback_backend(strip=False),
        {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": TURNS},
        {"model_type": "gemma", "eos_token_id": [1]},
    )
