"""Chat templates: our renderer against transformers' `apply_chat_template`, on every published template."""

import json
from pathlib import Path
from typing import Any

import pytest

from phiquant.text import ChatTemplate
from phiquant.text.repairs import SYSTEM
from phiquant.text.template import known_templates

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"

# The published formats of which no template is bundled, since only the files of their models have them.
REASONING = (
    "{{ '<|im_start|>system<|im_sep|>Think first.' }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ ' ' + message['content'] }}{% endif %}{% endfor %}{{ '<|im_end|>' }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>' }}{% elif message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant<|im_sep|>' }}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
WITH_BLOCKS = """{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
<|system|>
{{ strftime_now('%Y') }}<|end|>
    {% endif %}
<|{{ message.role }}|>
{{- message.content | trim }}<|end|>
{% endfor %}
{%- if add_generation_prompt %}<|assistant|>
{% endif %}
{{ tools | tojson(indent=2) if tools else '' }}"""
TEMPLATES = {**known_templates(), "Phi-4-reasoning": REASONING, "with blocks and tools": WITH_BLOCKS}

USER = {"role": "user", "content": "What is 1 < 2 & \"3\"?\n  'é' 🙂 <|end|>"}
TALKS: list[list[dict[str, Any]]] = [
    [USER],
    [{"role": "system", "content": "Be brief.\n"}, USER],
    [USER, {"role": "assistant", "content": "Yes."}],
    [
        {"role": "system", "content": ""},
        USER,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."},
        {"role": "user", "content": "  And <|user|>?  "},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": ""},
    ],
    [USER, USER, {"role": "system", "content": "Now be long."}, USER],
]
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "„Adds“", "parameters": {"a": {"type": "int"}}}},
    {"type": "function", "function": {"name": "sub", "description": "", "parameters": {}}},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(TINY / "tokenizer.json"), bos_token="<s>", eos_token="<|endoftext|>"
    )


def ours(source: str, talk: list[dict[str, Any]], prompt: bool, **extra: Any) -> str:
    return ChatTemplate(source, bos_token="<s>", eos_token="<|endoftext|>").render(talk, prompt, **extra)


@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "whole"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_conversation(tokenizer: Any, name: str, prompt: bool) -> None:
    for talk in TALKS:
        theirs = tokenizer.apply_chat_template(
            talk, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=prompt
        )
        assert ours(TEMPLATES[name], talk, prompt) == theirs


def test_tools_as_a_variable(tokenizer: Any) -> None:
    theirs = tokenizer.apply_chat_template(
        TALKS[1], tools=TOOLS, chat_template=WITH_BLOCKS, tokenize=False, add_generation_prompt=True
    )
    assert "add" in theirs
    assert ours(WITH_BLOCKS, TALKS[1], True, tools=TOOLS) == theirs


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name.startswith("Phi-4-mini")])
def test_tools_of_phi_4_mini_stand_where_its_card_puts_them(tokenizer: Any, name: str) -> None:
    """transformers needs them in the system message, as text; with `tools=` it leaves them out without a word."""
    text = json.dumps([tool["function"] for tool in TOOLS], ensure_ascii=False)
    source = TEMPLATES[name]

    def theirs(talk: list[dict[str, Any]], **extra: Any) -> str:
        made: str = tokenizer.apply_chat_template(
            talk, chat_template=source, tokenize=False, add_generation_prompt=True, **extra
        )
        return made

    for talk in TALKS:
        if talk[0]["role"] == "system":
            by_card = [{**talk[0], "tools": text}, *talk[1:]]
            assert ours(source, talk, True, tools=TOOLS) == theirs(by_card)
            assert ours(source, by_card, True) == theirs(by_card)
    assert ours(source, [USER], True, tools=TOOLS) == theirs(
        [{"role": "system", "content": SYSTEM, "tools": text}, USER]
    )
    assert "add" not in theirs([USER], tools=TOOLS)
