"""The tokenizer in a model folder, as its file describes it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import tokenizers

log = logging.getLogger(__name__)

# A batch of one has nothing to share out; threads of `tokenizers` would only be in the way of a fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class TokenizerError(Exception):
    """A model folder has no tokenizer that can be used; the message says why."""


def load_backend(folder: Path) -> tokenizers.Tokenizer:
    """Read tokenizer.json; only where there is none, let `transformers` build the tokenizer from older files.

    `transformers` is left aside otherwise: it takes seconds to import, checks config.json for what matters to models of
    its own, and for some classes builds a tokenizer that differs from the file. Nothing is fetched and no code from
    the folder is run. Raises TokenizerError.
    """
    file = folder / "tokenizer.json"
    try:
        backend = tokenizers.Tokenizer.from_file(str(file)) if file.is_file() else _built(folder)
    except (TokenizerError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        # Broken files surface as almost any exception type, a panic in Rust among them, which is no Exception.
        log.debug("loading the tokenizer failed", exc_info=True)
        raise TokenizerError(f"cannot load the tokenizer in {folder}: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    return backend


def _built(folder: Path) -> tokenizers.Tokenizer:
    # Read when transformers is first imported; otherwise it greets users with a warning that PyTorch is missing.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    wrapper = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if not isinstance(wrapper, PreTrainedTokenizerFast):
        raise TokenizerError(f"the tokenizer in {folder} ({type(wrapper).__name__}) has no tokenizer.json form")
    backend: tokenizers.Tokenizer = wrapper.backend_tokenizer
    return backend
