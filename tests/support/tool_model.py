"""The demo model with a chat template that shows tools, in the manner of Qwen's; its marks are letters."""

from __future__ import annotations

import json
from pathlib import Path

from tool_tokenizer import TEMPLATE


def tool_model(demo: Path, folder: Path, template: str = TEMPLATE) -> Path:
    folder.mkdir(parents=True)
    for file in demo.iterdir():
        if file.name not in ("tokenizer_config.json", "chat_template.jinja", "chat_template.json"):
            (folder / file.name).symlink_to(file)
    settings = json.loads((demo / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    return folder
