"""(M12) docs/api.md says what is true: each field of each API is sent, and taken, refused or ignored as it says."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from api_page import APIS, PAGE, Api, page, rows
from in_process import scripted, served, serving
from tool_tokenizer import write_tool_tokenizer

from millpond.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path

NEEDED = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/responses": {"input": "a", "max_output_tokens": 1},
    "/v1/embeddings": {"input": "a"},
}
ODD: tuple[object, ...] = ({"no_such_name": 1}, [[]])
"""No field takes both."""


@pytest.mark.parametrize("api", APIS, ids=lambda api: api.path.rpartition("/")[2])
def test_the_page_is_what_would_be_written(api: Api) -> None:
    """But for what newer clients than those that it was written with can send, which is ignored."""
    there, now = rows(api, PAGE.read_text(encoding="utf-8")), rows(api, page())
    assert now == {name: api.line(name) for name in api.fields}
    assert {*api.request.model_fields, *api.refused, *api.remarks} <= there.keys(), "make reference"
    assert there == {name: api.line(name) for name in there}, "make reference"


@pytest.mark.parametrize("api", APIS, ids=lambda api: api.path.rpartition("/")[2])
@pytest.mark.anyio
async def test_each_line_is_true(api: Api, tmp_path: Path) -> None:
    folder = write_tool_tokenizer(tmp_path / "model")
    async with serving(served("m", scripted("context=4000,embeds=8"), lambda: Tokenizer.load(folder))) as (http, _):
        assert (await http.post(api.path, json=NEEDED[api.path])).status_code == 200
        for name in api.fields:
            answers = [await http.post(api.path, json={**NEEDED[api.path], name: value}) for value in ODD]
            told = [json.dumps(answer.json()) for answer in answers]
            line = api.line(name)
            if line == "ignored":
                assert [answer.status_code for answer in answers] == [200, 200], (name, told)
                continue
            refused = [text for answer, text in zip(answers, told, strict=True) if answer.status_code == 400]
            assert all(name in text for text in refused), (name, told)
            assert len(refused) == 2 if line.startswith("refused") else refused or name in api.remarks, (name, told)
