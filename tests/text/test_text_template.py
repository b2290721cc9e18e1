import json
import os
import time
from typing import Any

import pytest

from phiquant.errors import RequestError, TemplateError
from phiquant.text import ChatTemplate, Tokenizer
from phiquant.text.sandbox import Sandbox, shared
from phiquant.text.template import LONGEST_SOURCE, known_templates
from phiquant.text.template_worker import environment

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "1 < 2 & \"3\" 'é'"},
]


def make(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>")


def test_the_bundled_template_is_known_and_renders(tokenizer: Tokenizer, tokenizer_config: dict[str, Any]) -> None:
    template = tokenizer.chat_template
    assert template is not None
    assert template.is_known
    expected = (
        "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello!<|end|>\n<|user|>\n"
        + TALK[3]["content"]
    )
    assert template.render(TALK) == expected + "<|end|>\n<|assistant|>\n"
    assert template.render(TALK, add_generation_prompt=False) == expected + "<|end|>\n<|endoftext|>"
    escaped = make(tokenizer_config["chat_template"].replace("\n", "\\n"))
    assert escaped.is_known
    assert escaped.render(TALK) == template.render(TALK)


@pytest.mark.parametrize("name", known_templates())
def test_known_templates_render_alike_here_and_in_the_sandbox(name: str) -> None:
    source = known_templates()[name]
    assert make(source).is_known
    unknown = make(source + "{# changed #}")
    assert not unknown.is_known
    for prompt in (True, False):
        here = make(source).render(TALK, prompt)
        assert here == unknown.render(TALK, prompt)
        assert "Hello!" in here


def test_known_templates_write_nothing_but_the_messages_once() -> None:
    for source in known_templates().values():
        rendered = make(source).render([{"role": "user", "content": "x" * 1000}] * 50)
        assert len(rendered) < 60_000


HOSTILE = {
    "endless": "{% for i in range(10**9) %}{% endfor %}",
    "nested": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "multiplied": "{{ 'a' * 10**10 }}",
    "power": "{{ 9**(9**9) }}",
    "list": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "output": "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'x' * 1000 }}{% endfor %}{% endfor %}",
    "doubled": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "macro": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "format": "{{ '%1000000000d' % 1 }}",
    "center": "{{ 'a' | center(10**10) }}",
    "joined": "{{ (['x' * 1000000] * 1000000) | join }}",
    "parentheses": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "folded": "{{ " + "'a' * 1000 * 1000 * 1000 * 1000" + " }}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "blocks": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_exhausting_templates_are_stopped_in_time(source: str) -> None:
    template = make(source)
    make("{{ 1 }}").render([])  # the worker's own start does not count
    begin = time.monotonic()
    with pytest.raises(TemplateError, match="chat template"):
        template.render([])
    assert time.monotonic() - begin < 2.5
    assert make("{{ 1 + 1 }}").render([]) == "2"  # and the next one works


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the address space is bounded on Linux only")  # noqa: PTH110
def test_memory_is_bounded_on_linux() -> None:
    assert len(make("{% set n = 16 * 2**20 %}{{ 'a' * n }}").render([])) == 16 << 20
    with pytest.raises(TemplateError, match="64 MiB"):
        make("{% set n = 65 * 2**20 %}{{ 'a' * n }}").render([])


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['os'].system('true') }}",
    "{{ strftime_now.__globals__.os }}",
    "{{ cycler.__init__.__globals__.os.listdir('/') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ messages.append(1) }}",
    "{{ messages | attr('__class__') }}{{ (messages | attr('__class__')).x }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_escapes_are_refused(source: str) -> None:
    with pytest.raises(TemplateError, match="chat template failed"):
        make(source).render(TALK)


def test_refusals_of_the_template_carry_its_words() -> None:
    with pytest.raises(TemplateError, match=r"Roles must alternate"):
        make("{{ raise_exception('Roles must alternate') }}").render(TALK)
    with pytest.raises(TemplateError, match=r"line 2"):
        make("\n{% for %}").render(TALK)
    with pytest.raises(TemplateError, match=str(LONGEST_SOURCE)):
        make("x" * (LONGEST_SOURCE + 1))


def test_what_transformers_offers_is_there() -> None:
    source = "{%- for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}\n    {{- i }}\n{%- endfor %}"
    assert make(source).render([]) == "012"
    assert make("{{ messages[3] | tojson }}").render(TALK) == json.dumps(TALK[3], ensure_ascii=False)
    assert make("{{ strftime_now('%Y') }}").render([]) == time.strftime("%Y")
    assert make("{% generation %}{{ bos_token }}{% endgeneration %}{{ eos_token }}").render([]) == "<s></s>"
    assert make("{{ tools[0].name }}").render([], tools=[{"name": "f"}]) == "f"
    assert make("{{ messages[0].x is defined }}").render(TALK) == "False"
    assert make("{{ messages[0].content }}").render([{"role": "user", "content": "\ud800 🙂"}]) == "\ud800 🙂"
    assert environment().from_string("{{ [1] | tojson(indent=2) }}").render() == "[\n  1\n]"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (["x"], "must be an object"),
        ([{"role": "user"}], "content that is text"),
        ([{"role": "user", "content": 5}], "content that is text"),
        ([{"role": "end|><|user", "content": "x"}], "the roles are system"),
        ([{"content": "x"}], "has role None"),
        ([{"role": "user", "content": "x", "more": {1, 2}}], "JSON"),
    ],
)
def test_malformed_messages_are_refused(tokenizer: Tokenizer, messages: list[Any], message: str) -> None:
    assert tokenizer.chat_template is not None
    with pytest.raises(RequestError, match=message):
        tokenizer.chat_template.render(messages)


def test_a_failure_in_a_known_template_is_a_template_error(tokenizer: Tokenizer) -> None:
    assert tokenizer.chat_template is not None
    with pytest.raises(TemplateError, match="TypeError"):
        tokenizer.chat_template.render([{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}])


def test_the_worker_stays_and_is_replaced_when_it_dies() -> None:
    sandbox = Sandbox()
    try:
        assert sandbox.render("{{ 1 }}", {}) == "1"
        first = sandbox._worker
        assert first is not None
        assert sandbox.render("{{ 2 }}", {}) == "2"
        assert sandbox._worker is first
        first.kill()
        first.wait()
        assert sandbox.render("{{ 3 }}", {}) == "3"
        assert sandbox._worker is not first
    finally:
        sandbox.close()
    assert sandbox._worker is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_gets_a_worker_of_its_own() -> None:
    assert make("{{ 1 }}").render([]) == "1"
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, make("{{ 'child' }}").render([]).encode())
            shared.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 100) == b"child"
    assert make("{{ 'parent' }}").render([]) == "parent"
    os.close(reader)
    os.close(writer)
