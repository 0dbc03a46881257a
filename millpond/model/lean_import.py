"""mlx-lm's models and loader without its tokenizers and its hub client, which no engine calls.

They stand behind transformers, whose import is two seconds of processor time: half of an engine's start, and of its
return after a death.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType

PACKAGE = "mlx_lm"
CALLED_LATER = (f"{PACKAGE}.tokenizer_utils", "huggingface_hub")
"""Modules of which mlx-lm's loader takes functions, and calls none for a folder's weights."""


class _PackageOnDemand(ModuleType):
    """A package whose submodules can be imported; its own content is run when a name of it is asked for."""

    whole = False

    def __getattr__(self, name: str) -> object:
        loader = self.__spec__.loader if self.__spec__ else None
        if self.whole or name.startswith("__") or loader is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.whole = True
        loader.exec_module(self)
        return getattr(self, name)


class _CalledLater(ModuleType):
    """Has every name, as a function that imports the true module when it is called."""

    def __getattr__(self, name: str) -> Callable[..., object]:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*positional: object, **named: object) -> object:
            function: Callable[..., object] = getattr(importlib.import_module(self.__name__), name)
            return function(*positional, **named)

        return call


@contextmanager
def without_tokenizers() -> Iterator[None]:
    """Import mlx-lm's modules in this block. What is imported already stays as it is."""
    spec = find_spec(PACKAGE)
    if PACKAGE not in sys.modules and spec is not None:
        package = _PackageOnDemand(PACKAGE)
        package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations or ())
        sys.modules[PACKAGE] = package
    absent = [name for name in CALLED_LATER if name not in sys.modules]
    sys.modules.update({name: _CalledLater(name) for name in absent})
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
