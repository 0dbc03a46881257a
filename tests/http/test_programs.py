"""(M10) Frameworks that people build agents with finish a tool run: their own code, their own requests.

The model is scripted, so that each gets the call that it is to carry out; all around it is real.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from programs import NotFetchedError, environment, run
from questions import COUNT, NAME, write_task
from tool_model import tool_model
from tool_tokenizer import write_answers, write_tool_tokenizer

from millpond.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Launch, Server

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
SERVER = str(HERE / "scripted_server.py")
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
DONE = "It is 21 degrees in Paris."


def serve(folder: Path) -> list[str]:
    return [sys.executable, "-m", "millpond.cli.main", "serve", str(folder), "--port", "0", "--model-name", "demo"]


@pytest.fixture
def server(tmp_path: Path, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Its model calls the tool, and once there is a result in the prompt it has the last word."""
    folder = write_tool_tokenizer(tmp_path / "model")
    answers = [f"<think>\nI shall.\n</think>\n\nI ask.\n{CALL}", DONE]
    monkeypatch.setenv("SCRIPTED_ANSWERS", write_answers(folder, answers))
    heard = Tokenizer.load(folder).vocabulary["<tool_response>"]
    with launch([sys.executable, SERVER, f"written,context=20000,step=3,result={heard}", str(folder)]) as server:
        yield server


@pytest.fixture
def ran(tmp_path: Path) -> Callable[..., str]:
    """What a program printed that ended well and of which no request was refused."""

    def ran(server: Server, name: str, *arguments: str | Path, **environ: str) -> str:
        try:
            environment(name)
        except NotFetchedError as error:
            pytest.skip(str(error))
        done = run(name, arguments, tmp_path / "home", environ)
        assert done.returncode == 0, done.stdout[-3000:]
        refused = [line for line in server.lines if "status=4" in line or "status=5" in line or "Traceback" in line]
        assert not refused, (refused, done.stdout[-2000:])
        return done.stdout

    return ran


def test_langchain(server: Server, ran: Callable[..., str]) -> None:
    printed = ran(server, "langchain", "python", HERE / "programs" / "langchain_agent.py", server.url)
    assert printed.count("called: Paris") == 1
    assert f"said: {DONE}" in printed


@pytest.mark.models
def test_forms_by_langchain(smollm2_folder: Path, launch: Launch, tmp_path: Path, ran: Callable[..., str]) -> None:
    """By the demo model, whatever its weights."""
    folder = tool_model(smollm2_folder, tmp_path / "tools")
    with launch(
        [sys.executable, "-m", "millpond.cli.main", "serve", str(folder), "--port", "0", "--model-name", "demo"]
    ) as real:
        printed = ran(real, "langchain", "python", HERE / "programs" / "langchain_form.py", real.url)
        assert printed.count("form: {") == 2


def test_the_agents_sdk(server: Server, ran: Callable[..., str]) -> None:
    printed = ran(server, "agents_sdk", "python", HERE / "programs" / "agents_sdk_agent.py", server.url)
    assert (printed.count("called: Paris"), printed.count(f"said: {DONE}")) == (4, 4)


def test_pydantic_ai(server: Server, ran: Callable[..., str]) -> None:
    printed = ran(server, "pydantic_ai", "python", HERE / "programs" / "pydantic_ai_agent.py", server.url)
    assert (printed.count("called: Paris"), printed.count(f"said: {DONE}")) == (3, 3)


def test_litellm(server: Server, ran: Callable[..., str]) -> None:
    printed = ran(
        server,
        "litellm",
        "python",
        HERE / "programs" / "litellm_loop.py",
        server.url,
        LITELLM_LOCAL_MODEL_COST_MAP="True",
    )
    assert (printed.count("called: Paris"), printed.count(f"said: {DONE}")) == (2, 2)


def test_llm(server: Server, ran: Callable[..., str], tmp_path: Path) -> None:
    """Simon Willison's command."""
    folder = tmp_path / "llm"
    folder.mkdir()
    (folder / "extra-openai-models.yaml").write_text(
        f"- model_id: pond\n  model_name: test-model\n  api_base: {server.url}/v1\n  supports_tools: true\n"
    )
    functions = 'def get_weather(city: str) -> str:\n    "Tells the weather in a city."\n    return f"21 in {city}"\n'
    arguments = ("llm", "-m", "pond", "--functions", functions, "--td", "--key", "none-at-all", "Paris?")
    for more in ((), ("--no-stream",)):
        printed = ran(server, "llm", *arguments, *more, LLM_USER_PATH=str(folder))
        assert "21 in Paris" in printed
        assert DONE in printed


@pytest.mark.models
def test_lm_eval_finds_what_it_finds_with_mlx_lm(
    smollm2_folder: Path, launch: Launch, tmp_path: Path, ran: Callable[..., str]
) -> None:
    """(M8) The same accuracy, and of each answer the same likelihood."""
    tasks = write_task(tmp_path / "tasks")
    command = [
        sys.executable,
        "-m",
        "millpond.cli.main",
        "serve",
        str(smollm2_folder),
        "--port",
        "0",
        "--model-name",
        "demo",
    ]
    found = {}
    with launch(command) as real:
        for how in ("server", "mlx"):
            printed = ran(
                real, "lm_eval", "python", HERE / "programs" / "accuracy.py", how, real.url, smollm2_folder, tasks, NAME
            )
            found[how] = json.loads(printed.rpartition("accuracy:")[2])
    ours, theirs = found["server"], found["mlx"]
    assert len(ours["likelihoods"]) == COUNT
    differ = [
        abs(one - other)
        for mine, others in zip(ours["likelihoods"], theirs["likelihoods"], strict=True)
        for one, other in zip(mine, others, strict=True)
    ]
    print("accuracy", ours["accuracy"], theirs["accuracy"], "likelihoods differ by at most", max(differ))
    assert ours["accuracy"] == theirs["accuracy"] > 0.6  # by chance a half
    assert max(differ) < 0.1
