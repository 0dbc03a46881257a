"""docs/api.md: field by field, what each API makes of what clients send. Written by ``make reference``.

Listed are the fields that the official client of an API knows, and all others that mean something here.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from anthropic.types.beta.message_create_params import MessageCreateParamsBase
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase
from openai.types.embedding_create_params import EmbeddingCreateParams
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from pydantic import BaseModel

from millpond.http.anthropic.schemas import MessagesRequest
from millpond.http.openai import schemas as openai
from millpond.http.openai.embeddings import EmbeddingsRequest
from millpond.http.responses import schemas as responses

PAGE = Path(__file__).parent.parent.parent / "docs" / "api.md"
BEGIN = """\
# What each API takes

Field by field: what the official client of an API can send, and what else means something here. A field that is null
counts as absent. What is *ignored* has no meaning for a server like this one, or is unknown; unknown fields are counted
(`millpond_unknown_fields`), never refused, so that a new client works with an old server. What has a meaning that is
not implemented is *refused* with a 400 that names the field, unless its value asks for nothing. A value that is not as
said here is a 400, too. `GET /openapi.json` has the schemas, of answers as well. Written by `make reference`, and each
line is tried by a test.
"""


@dataclass(frozen=True)
class Api:
    """One of them."""

    title: str
    path: str
    request: type[BaseModel]
    official: Collection[str]
    """Fields that its own client can send."""
    refused: Mapping[str, str]
    """Field → the values that ask for nothing."""
    remarks: Mapping[str, str] = field(default_factory=dict)
    """Of fields that are read in other ways."""

    @property
    def fields(self) -> list[str]:
        """All of them."""
        return sorted({*self.official, *self.request.model_fields, *self.refused, *self.remarks})

    def line(self, name: str) -> str:
        """What becomes of a field."""
        if name in self.remarks:
            return self.remarks[name]
        if name in self.request.model_fields:
            return f"taken: {self.request.model_fields[name].description or 'any string'}"
        if name in self.refused:
            return f"refused unless {self.refused[name]}"
        return "ignored"


def _refused(given: Mapping[str, tuple[object, str]], taken: Collection[str]) -> dict[str, str]:
    return {name: allowed for name, (_, allowed) in given.items() if name not in taken}


APIS = (
    Api(
        "Chat completions",
        "/v1/chat/completions",
        openai.ChatRequest,
        ChatParams.__annotations__.keys() | {"stream"},
        _refused(openai.NOT_IMPLEMENTED, openai.ChatRequest.model_fields),
    ),
    Api(
        "Completions",
        "/v1/completions",
        openai.CompletionRequest,
        CompletionCreateParamsBase.__annotations__.keys() | {"stream"},
        _refused(openai.NOT_IMPLEMENTED, openai.CompletionRequest.model_fields),
    ),
    Api(
        "Anthropic's Messages",
        "/v1/messages",
        MessagesRequest,
        MessageCreateParamsBase.__annotations__.keys() - {"betas"} | {"stream"},  # a header
        {"mcp_servers": "none", "container": "none"},
        {"context_management": "taken: edits that clear thinking and keep all, as is done here; others are refused"},
    ),
    Api(
        "Responses",
        "/v1/responses",
        responses.ResponsesRequest,
        ResponseCreateParamsBase.__annotations__.keys() | {"stream"},
        _refused(responses.NOT_IMPLEMENTED, responses.ResponsesRequest.model_fields),
    ),
    Api(
        "Embeddings",
        "/v1/embeddings",
        EmbeddingsRequest,
        EmbeddingCreateParams.__annotations__.keys(),
        {},
    ),
)


def rows(api: Api, text: str) -> dict[str, str]:
    """Field → what a page says of it."""
    section = text.partition(f"`POST {api.path}`\n")[2].partition("\n## ")[0]
    lines = [line.strip("| ").split("` | ", 1) for line in section.splitlines() if line.startswith("| `")]
    return {name.strip("`"): said.replace("\\|", "|") for name, said in lines}


def page() -> str:
    """All of it."""
    parts = [BEGIN]
    for api in APIS:
        parts.append(f"\n## {api.title}\n\n`POST {api.path}`\n\n| field | |\n|---|---|\n")
        parts += [f"| `{name}` | {api.line(name).replace('|', chr(92) + '|')} |\n" for name in api.fields]
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.exit()
