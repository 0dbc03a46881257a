"""Chat templates of every habit: each message is in the prompt, or there is an error that names it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from tiny_tokenizers import CHATML, TURNS, byte_level_backend, write_folder

from millpond.text.template import ChatTemplate, EndlessTemplateError, TemplateError
from millpond.text.template_files import TemplateFileError, find_template
from millpond.text.tokenizer import Tokenizer, TokenizerError

Chat = list[dict[str, object]]

HEAD = "{% for m in messages %}<{{ m['role'] }}>"
TAIL = "</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
PARTS = {
    "loop over parts": "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}",
    "first part": "{{ m['content'][0]['text'] }}",
    "parts by attribute": "{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}"
    "{% endfor %}",
    "system as text": "{% if m.role == 'system' %}{{ m.content + '' }}{% else %}{{ m.content[0].text }}{% endif %}",
    "user as text": "{% if m.role == 'user' %}{{ m.content + '' }}{% else %}{{ m.content[0].text }}{% endif %}",
    "either": "{% if m.content is string %}{{ m.content }}{% else %}{{ 'parts:' + m.content[0].text }}{% endif %}",
}
NO_TOOL = (
    "{% for m in messages %}{% if m.role == 'system' %}<s>{{ m.content }}{% elif m.role == 'user' %}<u>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<a>{{ m.content }}{% endif %}{% endfor %}"
)
FIRST_SYSTEM = (
    "{% if messages[0].role == 'system' %}<s>{{ messages[0].content }}</s>{% endif %}"
    "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
STRICT_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}<{{ m.role }}>{{ m.content }}"
    "{% endfor %}"
)
DEVELOPER_FIRST = (
    "{% if messages[0].role in ('system', 'developer') %}<dev>{{ messages[0].content }}{% endif %}"
    "{% for m in messages %}{% if m.role in ('user', 'assistant', 'tool') %}<{{ m.role }}>{{ m.content }}{% endif %}"
    "{% endfor %}"
)
REASONING = (
    "{% for m in messages %}{% set text = m.content %}{% if m.role == 'assistant' and not loop.last %}"
    "{% set text = m.content.split('</think>')[-1].lstrip('\\n') %}{% endif %}<{{ m.role }}>{{ text | trim }}"
    "{% endfor %}"
)
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<bos>"})


def chat(*messages: str) -> Chat:
    """Messages from ``role: content``."""
    return [dict(zip(("role", "content"), message.split(": ", 1), strict=True)) for message in messages]


@pytest.mark.parametrize("show", PARTS.values(), ids=PARTS)
def test_content_is_given_in_the_form_the_template_takes(show: str) -> None:
    messages = chat("system: Be brief.", "user: What is a lynx?", "assistant: A cat.", "user: Thanks {{ x }}.")
    text = template(HEAD + show + TAIL).render(messages).text
    assert text == (
        "<system>Be brief.</><user>What is a lynx?</><assistant>A cat.</><user>Thanks {{ x }}.</><assistant>"
    )
    assert messages[0]["content"] == "Be brief."


@pytest.mark.parametrize(
    "source", [CHATML, REASONING, TURNS, STRICT_SYSTEM], ids=["chatml", "reasoning", "turns", "strict"]
)
def test_what_a_template_takes_stays_as_it_stands(source: str) -> None:
    form = template(source).form
    assert (form.parts, form.developer) == (frozenset(), "system")


@pytest.mark.parametrize(
    ("messages", "index", "role"),
    [
        (chat("user: a", "tool: a", "user: a"), 1, "tool"),
        (chat("tool: assistant"), 0, "tool"),
        (chat("user: a", "assistant: b", "tool: c", "tool: d"), 2, "tool"),
    ],
)
def test_a_role_without_a_branch_is_an_error(messages: Chat, index: int, role: str) -> None:
    made = template(NO_TOOL)
    assert made.form.hidden == ("tool",)
    with pytest.raises(TemplateError, match=f"does not show a message of role {role} here") as caught:
        made.render(messages)
    assert caught.value.index == index


def test_a_message_without_a_text_has_nothing_to_show() -> None:
    assert template(NO_TOOL).render(chat("user: a", "tool: ", "tool:  \n")).text == "<u>a"


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("source", [FIRST_SYSTEM, STRICT_SYSTEM])
def test_system_messages_at_the_beginning_become_one_if_only_one_is_shown(source: str, role: str) -> None:
    text = template(source).render(chat("system: Be brief.", f"{role}: Be kind.", "system: Be.", "user: Hi")).text
    assert text.startswith(
        ("<s>Be brief.\n\nBe kind.\n\nBe.</s><user>Hi", "<system>Be brief.\n\nBe kind.\n\nBe.<user>Hi")
    )


def test_a_system_message_and_a_developers_become_one_if_only_one_is_shown() -> None:
    made = template(DEVELOPER_FIRST)
    assert made.form.developer == "developer"
    assert made.render(chat("developer: A", "system: B", "developer: C", "user: Hi")).text == "<dev>A\n\nB\n\nC<user>Hi"


def test_system_messages_stay_apart_where_each_is_shown() -> None:
    text = template(CHATML).render(chat("system: A", "developer: B", "user: Hi", "system: C")).text
    assert [part.split("<|im_end|>")[0] for part in text.split("<|im_start|>")[1:]] == [
        "system\nA", "system\nB", "user\nHi", "system\nC", "assistant\n",
    ]  # fmt: skip


@pytest.mark.parametrize("source", [FIRST_SYSTEM, STRICT_SYSTEM])
def test_a_late_system_message_is_a_users_where_it_is_not_shown(source: str) -> None:
    """(M7) In its place, so that what stands before it stays as it was."""
    before = template(source).render(chat("system: A", "user: Hi"), generation_prompt=False).text
    text = template(source).render(chat("system: A", "user: Hi", "assistant: Ho", "system: B", "user: Hey")).text
    assert text.startswith(before)
    assert "<system-reminder>\nB\n</system-reminder>\n\nHey" in text


@pytest.mark.parametrize(
    "cut",
    [
        "m.content[:20]",
        "m.content[-20:]",
        "m.content.split('\n')[0]",
        "m.content.split('\n')[-1]",
        "'x' if 'a' in m.content else m.content",
    ],
)
def test_half_a_message_is_not_enough(cut: str) -> None:
    made = template(f"{{% for m in messages %}}{{{{ {cut} }}}}{{% endfor %}}")
    with pytest.raises(TemplateError, match="does not show"):
        made.render(chat("user: an ordinary question\nin two lines"))


def test_trimming_and_cutting_reasoning_are_no_loss() -> None:
    messages = chat("user:  Hi \n", "assistant: <think>\nhm\n</think>\n\nYes.", "user: And?")
    assert template(REASONING).render(messages).text == "<user>Hi<assistant>Yes.<user>And?"


def test_an_answer_that_is_all_thought_is_no_loss() -> None:
    """Cut off in the midst of it, as ``max_tokens`` does."""
    cut = "{% set text = m.content.split('<think>')[0] if m.role == 'assistant' else m.content %}"
    made = template("{% for m in messages %}" + cut + "<{{ m.role }}>{{ text }}{% endfor %}")
    messages = chat("user: Hi", "assistant: <think>Let me see", "user: And?")
    assert made.render(messages).text == "<user>Hi<assistant><user>And?"
    without = template("{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}")
    with pytest.raises(TemplateError, match="role assistant") as caught:
        without.render(messages)
    assert caught.value.index == 1


def test_editing_within_a_message_is_no_loss() -> None:
    made = template("{% for m in messages %}{{ m.content.replace('/no_think', '') }}{% endfor %}")
    assert made.render(chat("system: Be /no_think brief.")).text == "Be  brief."


def test_json_of_a_message_is_no_loss() -> None:
    made = template("{% for m in messages %}{{ m.content | tojson }}{% endfor %}")
    assert made.render(chat('user: "Größe"\n<b>')).text == '"\\"Größe\\"\\n<b>"'


def test_a_message_may_be_long_or_many() -> None:
    many = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"{i} " * 10} for i in range(20_000)]
    assert template(CHATML).render(many).text.count("<|im_start|>") == 20_001
    long = "x" * 1_000_000
    assert long in template(REASONING).render(chat(f"user: {long}")).text


CONTINUED = [CHATML, TURNS, REASONING, HEAD + PARTS["first part"] + TAIL, HEAD + PARTS["either"] + TAIL]


@pytest.mark.parametrize("answer", ["The answer is", "The answer is ", "two\nlines \n", "<think>hm"])
@pytest.mark.parametrize("source", CONTINUED)
def test_a_continued_message_ends_the_prompt_as_in_transformers(source: str, answer: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = chat("user: Hi", f"assistant: {answer}")
    made = template(source)
    (theirs,), _ = render_jinja_template(
        [made.form.adapt(messages)], chat_template=source, continue_final_message=True, bos_token="<bos>"
    )
    assert made.render(messages, generation_prompt=False, continued=True).text == theirs
    assert theirs.endswith((answer, answer.rstrip()))


def test_without_a_generation_prompt_nothing_is_begun() -> None:
    text = template(CHATML).render(chat("user: Hi", "assistant: Yes"), generation_prompt=False).text
    assert text.endswith("<|im_start|>assistant\nYes<|im_end|>\n")


@pytest.mark.parametrize(
    "source",
    [
        ENDLESS,
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in [[1]] recursive %}{{ loop([[1], [1]]) if loop.depth < 60 }}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) if (b | string) == 'x' %}{% endfor %}{% endfor %}",
        "{{ ([range(99999)] * 99999) | map('sum') | list }}",
        "{% set ns = namespace(go=true) %}{% for a in range(99999) %}{{ range(99999) | list | length }}{% endfor %}",
    ],
    ids=["ranges", "macros", "recursion", "condition", "filters", "long rounds"],
)
def test_a_template_without_an_end_is_ended(source: str) -> None:
    with pytest.raises(EndlessTemplateError, match=r"it has computed for 0\.05 s without coming to an end"):
        ChatTemplate(source, {}, seconds=0.05)


def test_a_template_that_some_messages_keep_busy_is_an_error_for_them_alone() -> None:
    busy = "{% if messages[-1].content == 'go' or 'go!' in messages[0].content %}"
    source = CHATML + busy + ENDLESS + "{% endif %}"
    made = ChatTemplate(source, {}, seconds=0.05)
    for content in ("go", "let's go!"):
        with pytest.raises(TemplateError, match="without coming to an end"):
            made.render(chat(f"user: {content}"))
    assert made.render(chat("user: Hi")).text


@pytest.mark.parametrize("source", ["{{ 9 ** (9 ** 9) }}", "{{ 'x' * 9999999999 }}", "{{ 9999999999 * [1] }}"])
def test_what_one_step_makes_is_limited(source: str) -> None:
    with pytest.raises(TemplateError, match="makes more than"):
        template(source).render(chat("user: Hi"))


def test_an_ordinary_conversation_costs_little() -> None:
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"message {i} " * 20} for i in range(500)]
    made = ChatTemplate(REASONING, {}, seconds=2)
    begun = time.thread_time()
    made.render(messages)
    assert time.thread_time() - begun < 2


def write(folder: Path, **files: object) -> Path:
    for name, value in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json").replace("_jinja", ".jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


NAMED = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, None),
        ({"tokenizer_config_json": {}}, None),
        ({"tokenizer_config_json": {"chat_template": "own"}}, "own"),
        ({"tokenizer_config_json": {"chat_template": NAMED}}, "plain"),
        ({"tokenizer_config_json": {"chat_template": NAMED[1:]}}, None),
        ({"chat_template_jinja": "file"}, "file"),
        ({"chat_template_jinja": "file", "tokenizer_config_json": {"chat_template": "own"}}, "file"),
        ({"chat_template_json": {"chat_template": "old"}}, "old"),
        ({"chat_template_json": {"chat_template": "old"}, "tokenizer_config_json": {"chat_template": "own"}}, "own"),
        ({"chat_template_json": {"chat_template": "old"}, "chat_template_jinja": "file"}, "file"),
        ({"additional_chat_templates__rag_jinja": "rag", "chat_template_jinja": "file"}, "file"),
        ({"additional_chat_templates__default_jinja": "extra"}, "extra"),
        ({"additional_chat_templates__rag_jinja": "rag", "tokenizer_config_json": {"chat_template": "own"}}, None),
    ],
)
def test_the_template_is_where_transformers_finds_it(
    tmp_path: Path, files: dict[str, object], found: str | None
) -> None:
    from transformers import PreTrainedTokenizerFast

    assert find_template(write(tmp_path, **files)) == found
    if "chat_template_json" in files:
        return  # its tokenizers do not read it, only its processors of images
    byte_level_backend().save(str(tmp_path / "tokenizer.json"))
    theirs = PreTrainedTokenizerFast.from_pretrained(str(tmp_path), local_files_only=True).chat_template
    assert (theirs.get("default") if isinstance(theirs, dict) else theirs) == found


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template_json": "{"},
        {"chat_template_json": {"chat_template": 7}},
        {"tokenizer_config_json": {"chat_template": [{"name": "default"}]}},
        {"tokenizer_config_json": {"chat_template": {"default": None}}},
    ],
)
def test_a_file_that_cannot_be_read_is_told_by_its_name(tmp_path: Path, files: dict[str, object]) -> None:
    with pytest.raises(TemplateFileError, match=r"^(chat_template|tokenizer_config)\.json"):
        find_template(write(tmp_path, **files))


def test_a_folder_whose_template_never_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChatTemplate.__init__, "__defaults__", (0.05,))
    folder = write_folder(tmp_path, byte_level_backend(), {"chat_template": ENDLESS}, {})
    with pytest.raises(TokenizerError, match=r"^the chat template cannot be used: it has computed for 0\.05 s"):
        Tokenizer.load(folder)
