"""Questions with two answers each, for whoever measures a model's accuracy."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

NAME = "millpond_questions"
COUNT = int(os.environ.get("MILLPOND_TEST_QUESTIONS", "60"))
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Norway": "Oslo",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Egypt": "Cairo",
    "Greece": "Athens",
    "Portugal": "Lisbon",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Russia": "Moscow",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Hungary": "Budapest",
    "Ireland": "Dublin",
    "Belgium": "Brussels",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Chile": "Santiago",
    "Kenya": "Nairobi",
    "Iraq": "Baghdad",
    "Iran": "Tehran",
    "Thailand": "Bangkok",
    "Vietnam": "Hanoi",
    "Canada": "Ottawa",
    "Turkey": "Ankara",
    "Ukraine": "Kyiv",
    "Romania": "Bucharest",
    "Bulgaria": "Sofia",
    "Croatia": "Zagreb",
    "Serbia": "Belgrade",
    "Nepal": "Kathmandu",
    "Mexico": "Mexico City",
    "Argentina": "Buenos Aires",
    "Colombia": "Bogota",
    "Ecuador": "Quito",
    "Qatar": "Doha",
}
OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "fast": "slow",
    "up": "down",
    "left": "right",
    "open": "closed",
    "wet": "dry",
    "old": "young",
    "rich": "poor",
    "hard": "soft",
    "light": "dark",
    "early": "late",
    "full": "empty",
    "good": "bad",
    "happy": "sad",
    "high": "low",
    "long": "short",
    "loud": "quiet",
    "strong": "weak",
    "thick": "thin",
    "true": "false",
    "wide": "narrow",
    "win": "lose",
    "begin": "end",
    "buy": "sell",
    "day": "night",
    "first": "last",
    "inside": "outside",
    "love": "hate",
    "near": "far",
}


def _asked() -> Iterator[tuple[str, str, list[str]]]:
    """Question, answer, and what else might be answered."""
    for country, capital in CAPITALS.items():
        yield f"The capital of {country} is", capital, list(CAPITALS.values())
    for word, opposite in OPPOSITES.items():
        yield f"The opposite of {word} is", opposite, list(OPPOSITES.values())
    for first in range(2, 12):
        for second in range(2, 9):
            yield f"{first} + {second} =", str(first + second), [str(number) for number in range(4, 20)]
    for start in range(1, 61):
        yield f"{start}, {start + 1}, {start + 2},", str(start + 3), [str(start + 3 + off) for off in range(-3, 9)]


def write_task(folder: Path) -> Path:
    """The questions as a task of lm-eval's; the folder to include."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(7)
    lines = []
    for question, answer, others in list(_asked())[:COUNT]:
        choices = chance.sample([answer, chance.choice(sorted(set(others) - {answer}))], 2)
        lines.append(json.dumps({"question": question, "choices": choices, "answer": choices.index(answer)}))
    assert len(lines) == COUNT
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    (folder / f"{NAME}.yaml").write_text(
        f"""task: {NAME}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "questions.jsonl"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
    )
    return folder
