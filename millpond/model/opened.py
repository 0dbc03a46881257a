"""From a model's folder to a model that runs: loaded, and found out what can be done with it. Engine thread only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from millpond.model.load import LoadedModel, load, without_head
from millpond.model.probe import Capabilities, probe
from millpond.model.remember import keep, recall
from millpond.types import UNPACKED, KvPacking


@dataclass(frozen=True)
class OpenModel:
    """A model in memory, kept as the probe has found that it can be."""

    model: LoadedModel
    capabilities: Capabilities
    content: str = ""
    """What tells it from others, hex; empty where nobody asked."""


def open_model(
    folder: Path,
    digest: Callable[[], str] | None = None,
    *,
    context_length: int = 0,
    packing: KvPacking = UNPACKED,
    group: mx.distributed.Group | None = None,
    progress: Callable[[str, float], None] = lambda _stage, _done: None,
    share: tuple[int, int] = (0, 1),
    unanimous: Callable[[bool], bool] = bool,
    head: bool = False,
) -> OpenModel:
    """Load ``folder`` as ``load`` does, and probe it, unless the very same, by the ``digest`` of its content, was
    probed by these very versions before. ``progress`` gets a stage and how far it has come, in [0, 1].

    ``head``: see ``load``; one beside which nothing can be guessed is left out. ``share``: which rank of how many. All
    of them run the probe if one has to: ``unanimous`` tells whether all say yes.
    Raises ModelError when the model cannot be served.
    """
    model = load(folder, context_length, lambda done: progress("weights", done), packing, group, head=head)
    content = model.identity(digest()) if digest is not None else ""
    progress("probe", 1.0)
    about = (content, model.dtype, repr(model.form), *map(str, share if share != (0, 1) else ()))
    if model.headed is not None:
        about = (*about, "with its head")
    found = recall(Capabilities, about) if content else None
    if not unanimous(found is not None) or found is None:
        found = probe(model)
        if found.forward_only and model.headed is not None:
            del model  # its weights are loaded once more
            bare = open_model(folder, digest, context_length=context_length, packing=packing, progress=progress)
            return replace(bare, model=without_head(bare.model, found.forward_only))
        # What went wrong may have been the machine's mood: then look again at the next start.
        if content and found.slots and found.pipelined and not found.uncached:
            keep(found, about)
    return OpenModel(found.fitted(model), found, content)
