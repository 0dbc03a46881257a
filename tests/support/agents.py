"""The programs of three coding agents, as their makers publish them, fetched once from the package registry.

Each package has one whole program for Linux on x86; nothing else is installed, and nothing is run to install it.
"""

from __future__ import annotations

import json
import platform
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from isolated import isolated

from millpond.cli.agents import lines
from millpond.hub.cache import cache_root

PACKAGES = {
    "claude": ("@anthropic-ai/claude-code-linux-x64", "2.1.332", "package/claude"),
    "codex": ("@openai/codex", "0.171.0-linux-x64", "package/vendor/x86_64-unknown-linux-musl/bin/codex"),
    "opencode": ("opencode-linux-x64", "1.18.33", "package/bin/opencode"),
}
SECONDS = 120
CONTEXT = 100_000
TOOLS = {"*": False, "bash": True}


def missing() -> str:
    """Why none of them can be had here; empty where they can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the agents' programs are fetched for Linux on x86-64 only"
    return "" if shutil.which("npm") else "npm, with which the agents' programs are fetched, is not installed"


@cache
def program(agent: str) -> Path:
    """Its program; fetched the first time."""
    package, version, inner = PACKAGES[agent]
    folder = cache_root() / "agents" / f"{agent}-{version}"
    found = folder / inner
    if not found.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"{package}@{version}"]
        packed = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=600)
        archive = folder / packed.stdout.split()[-1]
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        archive.unlink()
    found.chmod(0o755)
    return found


@dataclass(frozen=True)
class Ran:
    """What an agent did."""

    status: int
    output: str
    folder: Path
    """Where it worked."""


def run(agent: str, line: str, arguments: Sequence[str], home: Path, environment: Mapping[str, str]) -> Ran:
    """Run the shell's ``line`` that starts it, with more arguments, in a folder of its own, with nothing of this
    process's environment and no way out of the machine."""
    work = home / "work"
    command = ["sh", "-c", f"{line} {shlex.join(arguments)}"]
    done = isolated(command, program(agent).parent, home, work, environment, SECONDS)
    return Ran(done.returncode, done.stdout, work)


def claude(line: str, prompt: str, home: Path, *, small: bool = False) -> Ran:
    """``line``: of ``millpond agents``; ``small``: with few tools and a short system prompt."""
    environment = {"CLAUDE_CODE_SIMPLE": "1"} if small else {}
    return run("claude", line, ["-p", prompt, "--allowedTools", "Bash", "--output-format", "json"], home, environment)


def codex(line: str, prompt: str, home: Path, *, small: bool = False) -> Ran:
    home.mkdir(parents=True, exist_ok=True)
    arguments = ["exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", prompt]
    if small:
        instructions = home / "instructions.md"
        instructions.write_text("You run commands.")
        settings_of = (
            f"model_instructions_file={instructions}",
            "features.multi_agent=false",
            "features.goals=false",
            "web_search=disabled",
            "include_permissions_instructions=false",
            "include_environment_context=false",
        )
        arguments[1:1] = [part for setting in settings_of for part in ("-c", setting)]
    return run("codex", line, arguments, home, {})


def opencode(line: str, prompt: str, home: Path, *, small: bool = False) -> Ran:
    settings = home / ".config" / "opencode" / "opencode.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    mini = {"mode": "primary", "prompt": "You run commands.", "tools": TOOLS}
    own = {"permission": {"bash": "allow"}, "autoupdate": False, "share": "disabled", "agent": {"mini": mini}}
    settings.write_text(json.dumps(own))
    arguments = ["run", *(["--agent", "mini"] if small else []), prompt]
    return run("opencode", line, arguments, home, {"OPENCODE_DISABLE_MODELS_FETCH": "1"})


AGENTS = {"claude": claude, "codex": codex, "opencode": opencode}
NAMES = {"claude": "Claude Code", "codex": "Codex", "opencode": "opencode"}


def started(agent: str, url: str, model: str, prompt: str, home: Path, *, small: bool = False) -> Ran:
    """Run an agent as ``millpond agents`` says it is started."""
    return AGENTS[agent](lines(url, model, CONTEXT, "x")[NAMES[agent]], prompt, home, small=small)
