"""The HTTP tests' servers, for what is put in front of them: real front ends with a scripted engine."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HTTP = Path(__file__).parents[1] / "http"

sys.path.append(str(HTTP))
_spec = importlib.util.spec_from_file_location("http_conftest", HTTP / "conftest.py")
assert _spec is not None
assert _spec.loader is not None
_servers = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _servers
_spec.loader.exec_module(_servers)

byte_tokenizer = _servers.byte_tokenizer
nursery = _servers.nursery
start_server = _servers.start_server
