"""(M3) Hundreds of schemas, eight answers at a time among free ones: whatever is finished is valid, neighbours go on as
they were."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import jsonschema
import pytest
from schemas_drawn import drawn

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Launch, Server

pytestmark = [pytest.mark.models, pytest.mark.slow]

SCHEMAS = range(0, 120, int(os.environ.get("MILLPOND_TEST_SCHEMAS_STEP", "2")))
"""Their numbers: they grow."""
CHECKED = jsonschema.Draft202012Validator
NEIGHBOURS = 2


@pytest.fixture(scope="module")
def real(smollm2_folder: Path, launch: Launch) -> Iterator[Server]:
    arguments = ["serve", str(smollm2_folder), "--port", "0", "--model-name", "demo"]
    with launch([sys.executable, "-m", "millpond.cli.main", *arguments]) as server:
        yield server


def test_every_finished_answer_is_valid(real: Server) -> None:
    with real.client() as client:
        ai = client.with_options(timeout=300)

        def bound(number: int) -> str | None:
            """What is wrong; empty where nothing is, None where the answer was cut off."""
            schema = drawn(number)
            form = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}}
            answer = ai.chat.completions.create(
                model="demo",
                messages=[{"role": "user", "content": f"Fill in form {number}."}],
                response_format=form,  # type: ignore[arg-type]
                temperature=1.0,
                seed=number,
                max_tokens=150,
            )
            text = answer.choices[0].message.content or ""
            if answer.choices[0].finish_reason == "length":
                return None
            try:
                # The year 0000 is a date (RFC 3339), but not to Python; both years leap.
                CHECKED(schema, format_checker=CHECKED.FORMAT_CHECKER).validate(
                    json.loads(text.replace('"0000-', '"0004-'))
                )
            except (ValueError, jsonschema.ValidationError) as error:
                return f"{number}: {error} in {text}"
            return ""

        def free(seed: int) -> str:
            answer = ai.chat.completions.create(
                model="demo",
                messages=[{"role": "user", "content": "Tell me of a pond."}],
                temperature=1.0,
                seed=seed % NEIGHBOURS,
                max_tokens=60,
            )
            return answer.choices[0].message.content or ""

        expected = [free(seed) for seed in range(NEIGHBOURS)]
        with ThreadPoolExecutor(8) as bounds, ThreadPoolExecutor(NEIGHBOURS) as others:
            results = bounds.map(bound, SCHEMAS)
            texts = others.map(free, range(20 * NEIGHBOURS))
            found = list(results)
            assert list(texts) == expected * 20
    wrong = [result for result in found if result]
    assert not wrong, wrong[:3]
    assert sum(result == "" for result in found) >= 0.5 * len(SCHEMAS)


def test_they_are_of_every_kind() -> None:
    text = json.dumps([drawn(number) for number in SCHEMAS])
    for word in ("$ref", "enum", "pattern", "format", "anyOf", "minItems", "option_29", "const", "exclusiveMinimum"):
        assert f'"{word}"' in text
    assert max(len(json.dumps(drawn(number))) for number in SCHEMAS) > 2000
