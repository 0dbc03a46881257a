"""A GGUF file, opened with every length in it checked: whatever it holds, reading ends, and fails in one way only."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, GGUFValueType

from millpond.hub.errors import SourceError

MOST_ENTRIES = 1 << 22
"""Of an array; vocabularies and lists of merges have a tenth of it."""

Parts = tuple[int, list[npt.NDArray[np.generic]], list[int], list[GGUFValueType]]


class CheckedReader(GGUFReader):
    """Reads nothing behind the end of the file, no arrays of arrays, and none that are longer than any vocabulary."""

    def _get(
        self,
        offset: int,
        dtype: npt.DTypeLike,
        count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> npt.NDArray[np.generic]:
        if not 0 <= offset <= offset + int(count) * np.dtype(dtype).itemsize <= len(self.data):
            raise ValueError("it ends before its content does")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Parts:
        if raw_type == GGUFValueType.ARRAY:
            inner, length = int(self._get(orig_offs, np.uint32)[0]), int(self._get(orig_offs + 4, np.uint64)[0])
            if inner == GGUFValueType.ARRAY:
                raise ValueError("arrays of arrays are not allowed")
            if length > MOST_ENTRIES:
                raise ValueError(f"an array of {length} entries: at most {MOST_ENTRIES} are allowed")
        return super()._get_field_parts(orig_offs, raw_type)


def open_gguf(source: Path) -> GGUFReader:
    """Open a whole model. Raises SourceError for a file that is damaged, and for one part of several."""
    try:
        with np.errstate(all="ignore"):  # sizes that overflow are found by what they lead to
            reader = CheckedReader(source)
    except OSError:
        raise
    except Exception as error:  # whatever the reader does with bytes that are not what it expects
        raise SourceError(f"{source} is not a readable GGUF file: {str(error) or type(error).__name__}") from error
    parts, number = (_number(reader, f"split.{name}") for name in ("count", "no"))
    if parts > 1:
        raise SourceError(
            f"{source} is part {number + 1} of {parts} (split.count): only whole files are allowed; "
            "join the parts with llama-gguf-split --merge"
        )
    return reader


def _number(reader: GGUFReader, name: str) -> int:
    value = text_or_number(reader, name) if name in reader.fields else 0
    if isinstance(value, str):
        raise SourceError(f"GGUF field {name} is {value!r}: a number is allowed")
    return int(value)


def text_or_number(reader: GGUFReader, name: str) -> int | float | bool | str:
    """Value of a field that is no array; ``an array`` of one that is. Raises SourceError for a text that is none."""
    field = reader.fields[name]
    if field.types and field.types[0] == GGUFValueType.ARRAY:
        return "an array"
    try:
        value = field.contents()
    except UnicodeDecodeError as error:
        raise SourceError(f"GGUF field {name} is not UTF-8 text") from error
    return value if isinstance(value, str | bool | float) else int(value)
