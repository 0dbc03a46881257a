"""millpond doctor as a process: the machine, the installation and models."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import msgspec
import pytest
import tiny_models
from doctor_report import doctor
from mlx.utils import tree_flatten
from model_infos import SMALL
from tool_tokenizer import write_tool_tokenizer

from millpond.cli.doctor import machine, model
from millpond.cli.doctor.finding import Finding, ok
from millpond.config import ServeConfig, read_config
from millpond.hub.cache import cache_root
from millpond.hub.weights import weight_bytes
from millpond.model.load import load

# --- the machine and the installation ---------------------------------------------------------------------------


def test_a_low_limit_of_open_files() -> None:
    """The soft one is raised by serve itself."""
    report = doctor("--max-connections", "300", before=("sh", "-c", 'ulimit -S -n 256; exec "$@"', "sh"))
    assert report.state["files"] == "ok"
    report = doctor("--max-connections", "300", before=("sh", "-c", 'ulimit -n 256; exec "$@"', "sh"))
    assert report.state["files"] == "warn"
    assert "hard limit" in report.remedy["files"]
    assert machine.open_files(read_config({"max_connections": "10"}, {})).state == "ok"


def test_packages_of_another_version_and_missing_ones(tmp_path: Path) -> None:
    for name, version in (("mlx_lm", "0.1"), ("numpy", "1.0")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    report = doctor(PYTHONPATH=str(tmp_path))
    assert report.state["mlx-lm"] == report.state["packages"] == "warn"
    assert "0.1" in report.text["mlx-lm"]
    assert "pip install 'mlx-lm" in report.remedy["mlx-lm"]
    assert "numpy 1.0" in report.text["packages"]


def test_a_broken_mlx(tmp_path: Path) -> None:
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('no such symbol')\n")
    report = doctor(PYTHONPATH=str(tmp_path))
    assert report.failed == {"device"}
    assert "no such symbol" in report.text["device"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux CPUs need one")
def test_no_compiler(tmp_path: Path) -> None:
    report = doctor(PATH=str(tmp_path))
    assert report.state["compiler"] == "warn"
    assert "g++" in report.remedy["compiler"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux CPUs use it")
def test_no_c_part(tmp_path: Path) -> None:
    """A copy of the package without the library."""
    source = Path(machine.__file__).parents[2]
    shutil.copytree(source, tmp_path / "millpond", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    report = doctor(cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert report.state["C part"] == "warn"
    assert "compiler" in report.remedy["C part"]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert not (tmp_path / "millpond" / "native" / f"_rowblas{suffix}").exists()


def test_a_processor_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its maker's, or else at least an architecture."""
    assert machine.processor()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(machine, "CPUS", tmp_path / "cpuinfo")
    assert machine.processor() == platform.machine()
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A Fast One @ 3GHz\n\nprocessor\t: 1\n")
    assert machine.processor() == "A Fast One @ 3GHz"


# --- models -----------------------------------------------------------------------------------------------------


def test_a_model_and_the_room_it_leaves(tmp_path: Path) -> None:
    folder = tiny_models.save("llama", tmp_path / "tiny")
    report = doctor(str(folder), "--kv-memory-mb", "64", MILLPOND_CACHE=str(cache_root()))
    assert not report.failed
    assert report.state["model"] == report.state["tokens"] == report.state["batching"] == "ok"
    # Keys and values of 4 layers, 2 heads of 16 numbers in float32.
    assert "1 KiB per token" in report.text["tokens"]
    assert "64 MiB hold 65536 tokens, 128 full contexts" in report.text["tokens"]
    assert "float32, context 512" in report.text["model"]


def test_more_memory_for_keys_and_values_than_there_is(tmp_path: Path) -> None:
    folder = tiny_models.save("llama", tmp_path / "tiny")
    report = doctor(str(folder), "--kv-memory-mb", "1000000", "--cache-ram", "0")
    assert report.state["tokens"] == "warn"
    assert "--kv-memory-mb" in report.remedy["tokens"]
    assert report.state["prefixes"] == "warn"
    assert "--cache-ram" in report.remedy["prefixes"]


def test_how_tokens_are_guessed_ahead() -> None:
    """What is offered and which of it is used, or why there is nothing."""

    def found(modes: list[str], spec: str, reason: str = "") -> Finding:
        config = read_config({"spec": spec, "draft_model": "demo"}, {})
        return model._speculation(msgspec.structs.replace(SMALL, speculation=modes, speculation_reason=reason), config)

    assert found(["ngram"], "ngram") == ok("guessing", "ngram; ngram unless a request says otherwise")
    assert found(["ngram", "draft"], "off") == ok("guessing", "ngram, draft; off unless a request says otherwise")
    assert found(["ngram", "draft"], "draft").text == "ngram, draft; draft unless a request says otherwise"
    assert found(["ngram", "mtp"], "auto").text == "ngram, mtp; mtp unless a request says otherwise"
    assert found(["ngram"], "auto").text == "ngram; ngram unless a request says otherwise"
    without = found([], "ngram", "its state cannot be taken back")
    assert without.state == "warn"
    assert "its state cannot be taken back" in without.text
    assert "--spec off" in without.remedy
    assert found([], "off", "its state cannot be taken back").state == "ok"


def test_how_answers_are_read(tmp_path: Path) -> None:
    """What of calls and thoughts a model's own files tell, and whether answers can be made to have a form."""
    folder = write_tool_tokenizer(tmp_path / "tools")
    found = model._writing(folder, SMALL, ServeConfig())
    calls, rest = "calls as hermes writes them", "thoughts between <think> and </think>; forms and forced calls"
    assert found == ok("answers", f"{calls}, by what its chat template writes; {rest}")
    without = model._writing(folder, msgspec.structs.replace(SMALL, grammars="no token ends an answer"), ServeConfig())
    assert without.state == "warn"
    assert "no forms and forced calls: no token ends an answer" in without.text
    assert model._writing(tmp_path, SMALL, ServeConfig()).state == "warn"
    otherwise = model._writing(folder, SMALL, ServeConfig(tool_format="mistral"))
    assert (otherwise.state, "its chat template writes calls in another way" in otherwise.text) == ("warn", True)


def test_a_draft_model_that_is_not_there(tmp_path: Path) -> None:
    folder = tiny_models.save("llama", tmp_path / "tiny")
    report = doctor(str(folder), "--draft-model", "no-such-model", "--spec", "draft")
    assert report.failed == {"draft"}
    assert "no-such-model" in report.text["draft"]
    assert "--draft-model" in report.remedy["draft"]
    assert doctor("--spec", "draft").failed == {"settings"}


def test_models_that_cannot_be_served(tmp_path: Path) -> None:
    assert "no-such-model" in doctor("no-such-model").text["model"]
    folder = tiny_models.save("llama", tmp_path / "tiny")
    (folder / "config.json").write_text('{"model_type": "nonsense"}')
    report = doctor(str(folder))
    assert report.failed == {"model"}
    assert "nonsense" in report.text["model"]
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    assert "not a whole safetensors file" in doctor(str(folder)).text["model"]


def test_a_model_that_is_too_large_is_not_loaded(tmp_path: Path) -> None:
    """Its file is all hole behind the head."""
    size = 2**42
    head = json.dumps({"a.weight": {"dtype": "F16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    os.truncate(tmp_path / "model.safetensors", 8 + len(head) + size)
    (tmp_path / "config.json").write_text("{}")
    report = doctor(str(tmp_path))
    assert report.failed == {"model"}
    assert "weights take" in report.text["model"]


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_the_estimate_of_the_weights_is_what_they_take(bits: int | None, tmp_path: Path) -> None:
    folder = tiny_models.save("llama", tmp_path / "tiny")
    if bits is not None:
        network = tiny_models.build("llama")
        nn.quantize(network, group_size=32, bits=bits)
        mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(network.parameters())))
        config = json.loads((folder / "config.json").read_text())
        config["quantization"] = {"group_size": 32, "bits": bits}
        (folder / "config.json").write_text(json.dumps(config))
    assert weight_bytes(folder) == load(folder, 0, lambda _: None).weight_bytes


def test_files_that_are_not_followed_to_the_letter_are_told(tmp_path: Path) -> None:
    folder = tiny_models.save("llama", tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text()) | {"sliding_window": 64}
    (folder / "config.json").write_text(json.dumps(config))
    report = doctor(str(folder))
    assert "sliding_window: 64 is not followed" in report.text["files"]
    assert report.remedy["files"]
