"""Templates run as in transformers, against which their authors tried them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, tzinfo

import jinja2
import pytest
from jinja2.exceptions import SecurityError
from tiny_tokenizers import CHATML, TURNS

from millpond.text.allowance import Allowance
from millpond.text.environment import Environment

MESSAGES: list[dict[str, object]] = [
    {"role": "system", "content": "Be <b>brief</b> & 'nice'."},
    {"role": "user", "content": "  Größe 世界 🙂\n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nOne."},
    {"role": "user", "content": '{"a": 1}'},
]
TEMPLATES = {
    "chatml": CHATML,
    "turns": TURNS.replace("raise_exception('System role not supported')", "'refused'"),
    "white space": "  {% for m in messages %}\n    {{- m.role }}:\n  {% if m.role == 'user' %}\n{{ m.content }}\n"
    "  {% endif %}\n  {% endfor %}\n  end\n",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=4) }}{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true, "
    "ensure_ascii=true, separators=(',', ':')) }}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% elif loop.index == 4 %}"
    "{% break %}{% endif %}{{ m.content }}{{ loop.length }}{{ loop.revindex }}{{ loop.last }}"
    "{{ loop.nextitem.role }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{% set x = m.role %}{{ x }}{% endgeneration %}{{ x }}"
    "{% endfor %}",
    "namespace": "{% set ns = namespace(n=0, self='me') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}{{ ns.self }}",
    "dict": "{% set d = dict(a=1, b=dict([('c', 2)])) %}{{ d }}{{ dict.fromkeys(['x']) }}{{ dict(d, a=3) }}",
    "strings": "{{ messages[2].content.split('</think>')[-1].lstrip('\\n') }}{{ messages[1].content | trim }}"
    "{{ messages[1]['content'].strip() | length }}{{ messages[::-1][0].content }}",
    "macro": "{% macro show(m, depth=0) %}{{ m.role * 2 }}{% if depth < 3 %}{{ show(m, depth + 1) }}{% endif %}"
    "{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}",
    "macro with caller": "{% macro box(x) %}<{{ caller(x) }}>{% endmacro %}{% call(y) box('b') %}{{ y }}!{% endcall %}",
    "recursive loop": "{% for x in [[1, [2, 3]], [4]] recursive %}{{ loop(x) if x is iterable else x }}{{ loop.depth }}"
    "{% else %}none{% endfor %}",
    "filters": "{% for m in messages | selectattr('role', 'equalto', 'user') %}{{ m.content }}{% else %}none"
    "{% endfor %}"
    "{{ messages | map(attribute='role') | join(', ') }}{% for m in missing %}x{% else %}empty{% endfor %}",
    "dates": "{{ strftime_now('%Y') }}",
    "arguments": "{{ bos_token }}{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}"
    "{{ eos_token is defined }}{{ pad_token is defined }}",
    "loops over all": "{% for k, v in messages[0].items() %}{{ k }}={{ v }}{% endfor %}{% for c in 'abc' %}{{ c }}"
    "{{ loop.previtem }}{% endfor %}{% for i in range(3) if i != 1 %}{{ i }}{{ loop.cycle('a', 'b') }}{% endfor %}",
    "numbers": "{{ 2 ** 10 }}{{ 3 * 'ab' }}{{ [1] * 3 }}{{ 7 // 2 }}",
}
ARGUMENTS: dict[str, object] = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}


def ours(template: str) -> str:
    given = {"messages": MESSAGES, "tools": None, "documents": None, **ARGUMENTS}
    return Environment(Allowance(5)).from_string(template).render(given)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    (theirs,), _ = render_jinja_template([MESSAGES], chat_template=TEMPLATES[name], **ARGUMENTS)
    assert ours(TEMPLATES[name]) == theirs


def test_what_a_template_raises_is_told_in_its_words() -> None:
    with pytest.raises(jinja2.TemplateError, match=r"^only one, please$"):
        ours("{{ raise_exception('only one, please') }}")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ dict.__class__.x }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.x }}",
    ],
)
def test_the_sandbox_holds(template: str) -> None:
    with pytest.raises(SecurityError):
        ours(template)


def test_nothing_else_is_read() -> None:
    with pytest.raises(TypeError, match="no loader"):
        ours("{% include '/etc/passwd' %}")


def test_a_day_has_one_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """(M7) Prompts of one day begin alike, and none has the date of another."""

    class Now(datetime):
        moment = datetime(2026, 11, 28, 23, 59, 58, tzinfo=UTC)

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return cls.moment

    monkeypatch.setattr("millpond.text.environment.datetime", Now)
    template = Environment(Allowance(5)).from_string("{{ strftime_now('%d %H:%M:%S') }}")
    assert template.render() == "28 23:59:58"
    Now.moment += timedelta(seconds=1)
    assert template.render() == "28 23:59:58"
    Now.moment += timedelta(seconds=1)
    assert template.render() == "29 00:00:00"
    Now.moment += timedelta(hours=5)
    assert template.render() == "29 00:00:00"
