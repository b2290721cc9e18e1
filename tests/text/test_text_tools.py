"""Tools shown to models, and the grammars of their calls."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiquant.errors import GrammarError, RequestError
from phiquant.gguf import open_model
from phiquant.text import ChatTemplate, Tokenizer
from phiquant.text.grammar import Constraints, Grammar
from phiquant.text.template import known_templates
from phiquant.text.tool_reader import CallArguments, CallBegun, ToolReader
from phiquant.text.tools import Tool, Toolbox, arranged, form_of

WEATHER = Tool(
    "weather",
    "Of a city.",
    {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/city"}, "near": {"type": "array", "items": {"$ref": "#/$defs/city"}}},
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"city": {"enum": ["Rome", "Oslo"]}},
    },
)
TIME = Tool("time")
SAY = [{"role": "user", "content": "Hello"}]


def template(name: str) -> ChatTemplate:
    return ChatTemplate(known_templates()[name], bos_token="<s>", eos_token="</s>")


MARKED, PLAIN = template("Phi-4-mini-instruct"), template("Phi-4")
TAGGED = ChatTemplate(
    "{% for t in tools %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ m.content }}"
    "{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% endfor %}",
    bos_token="",
    eos_token="",
)


@pytest.fixture(scope="module")
def constraints(tmp_path_factory: pytest.TempPathFactory) -> Constraints:
    from phiquant.convert import convert

    file = tmp_path_factory.mktemp("tools") / "tiny.gguf"
    convert(Path(__file__).parents[2] / "models" / "phi3-tiny", file, "q8_0")
    with open_model(file) as gguf:
        return Constraints(Tokenizer.from_gguf(gguf))


def fits(constraints: Constraints, grammar: Grammar, text: str) -> bool:
    """Whether the whole of a text is what the grammar describes."""
    constraint = constraints.constraint(grammar)
    tokenizer = constraints._tokenizer
    for token in tokenizer.encode_continuation(text):
        if not constraint.allowed()[token]:
            return False
        constraint.accept(token)
    return bool(constraint.allowed()[min(tokenizer.eog_ids)])


def test_the_form_of_calls_follows_the_template() -> None:
    assert [form_of(t) for t in (MARKED, PLAIN, TAGGED, None)] == ["marked", "plain", "tagged", "plain"]


ROME = '{"name": "weather", "arguments": {"city": "Rome"}}'
NOW = '{"name": "time", "arguments": {}}'
WRAPPED = {
    "marked": lambda *calls: f"<|tool_call|>[{', '.join(calls)}]<|/tool_call|>",
    "tagged": lambda *calls: "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls),
    "plain": lambda *calls: f'{{"tool_calls": [{", ".join(calls)}]}}',
}


@pytest.mark.parametrize("of", [MARKED, PLAIN, TAGGED], ids=["marked", "plain", "tagged"])
def test_required_calls_fit_the_schema_and_nothing_else_does(constraints: Constraints, of: ChatTemplate) -> None:
    wrap = WRAPPED[form_of(of)]
    grammar = Toolbox([WEATHER, TIME], of, mode="required").grammar()
    assert grammar is not None
    assert fits(constraints, grammar, wrap(ROME))
    assert fits(constraints, grammar, wrap(ROME, NOW))
    assert not fits(constraints, grammar, wrap(ROME.replace("Rome", "Atlantis")))
    assert not fits(constraints, grammar, wrap(ROME.replace("weather", "other")))
    assert not fits(constraints, grammar, wrap())
    assert not fits(constraints, grammar, "Hello")
    single = Toolbox([WEATHER, TIME], of, mode="required", parallel=False).grammar()
    assert single is not None
    assert not fits(constraints, single, wrap(ROME, NOW))
    named = Toolbox([WEATHER, TIME], of, mode="required", name="time").grammar()
    assert named is not None
    assert fits(constraints, named, wrap(NOW))
    assert not fits(constraints, named, wrap(ROME))


@pytest.mark.parametrize("of", [MARKED, PLAIN, TAGGED], ids=["marked", "plain", "tagged"])
def test_what_the_grammar_lets_through_is_read_as_calls(of: ChatTemplate) -> None:
    reader = Toolbox([WEATHER, TIME], of).reader()
    found = [*reader.push(WRAPPED[form_of(of)](ROME, NOW)), *reader.finish()]
    assert [item.name for item in found if isinstance(item, CallBegun)] == ["weather", "time"]
    assert json.loads("".join(i.text for i in found if isinstance(i, CallArguments) and i.call == 0)) == {
        "city": "Rome"
    }


@pytest.mark.parametrize("of", [MARKED, PLAIN], ids=["marked", "plain"])
def test_an_answer_with_a_form_of_its_own_may_stand_beside_calls(constraints: Constraints, of: ChatTemplate) -> None:
    grammar = Toolbox([TIME], of).grammar(
        Grammar.json_schema(
            {
                "type": "object",
                "properties": {"x": {"type": "integer"}},
                "required": ["x"],
                "additionalProperties": False,
            }
        )
    )
    assert grammar is not None
    assert fits(constraints, grammar, WRAPPED[form_of(of)](NOW))
    assert fits(constraints, grammar, '{"x": 1}')
    assert not fits(constraints, grammar, '{"y": 1}')
    with pytest.raises(RequestError, match="exclude one another"):
        Toolbox([TIME], of).grammar(Grammar("regex", "a"))


def test_tools_that_are_not_asked_for_change_nothing() -> None:
    assert Toolbox([TIME], MARKED).grammar() is None
    assert Toolbox([], MARKED).grammar() is None
    hidden = Toolbox([TIME], MARKED, mode="none")
    assert not hidden.active
    assert hidden.arranged(SAY) == (SAY, {})


def test_templates_with_a_place_for_tools_are_given_them() -> None:
    messages, extra = Toolbox([WEATHER], MARKED).arranged(SAY)
    text = MARKED.render(messages, **extra)
    assert '<|tool|>[{"name": "weather"' in text
    messages, extra = Toolbox([WEATHER], TAGGED).arranged(SAY)
    assert "Of a city." in TAGGED.render(messages, **extra)


def test_others_are_told_in_the_system_message() -> None:
    messages, extra = Toolbox([WEATHER, TIME], PLAIN).arranged([{"role": "system", "content": "Be kind."}, *SAY])
    assert extra == {}
    assert messages[0]["role"] == "system"
    assert messages[0]["content"].startswith("Be kind.\n\n")
    assert '"Of a city."' in messages[0]["content"]
    assert "tool_calls" in messages[0]["content"]
    assert messages[1:] == SAY


def test_or_in_the_first_of_the_user_where_system_messages_are_left_out() -> None:
    silent = template("Phi-3-medium-instruct")
    messages, _ = Toolbox([WEATHER], silent).arranged([{"role": "system", "content": "x"}, *SAY])
    assert messages[0] == {"role": "system", "content": "x"}
    assert messages[1]["content"].endswith("\n\nHello")
    assert '"Of a city."' in silent.render(messages)


CALLED = {
    "role": "assistant",
    "content": "I look.",
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}


def test_calls_and_results_are_shown_by_every_kind_of_template() -> None:
    for of in (MARKED, PLAIN, TAGGED):
        text = of.render(arranged([*SAY, CALLED, RESULT], of))
        assert '"city": "Rome"' in text
        assert text.index("I look.") < text.index("Rome") < text.index("sunny")
    assert "The call of weather returned:\nsunny" in PLAIN.render(arranged([*SAY, CALLED, RESULT], PLAIN))


def test_what_makes_no_sense_is_refused() -> None:
    for wrong, match in (
        (lambda: Toolbox([TIME, TIME], None), "two tools"),
        (lambda: Toolbox([TIME], None, mode="required", name="other"), "none of the tools"),
        (lambda: Toolbox([], None, mode="required"), "no tools"),
        (lambda: Toolbox([Tool(f"t{i}") for i in range(200)], None), "200 tools"),
        (
            lambda: arranged(
                [{"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "{"}}]}], None
            ),
            "not JSON",
        ),
    ):
        with pytest.raises(RequestError, match=match):
            wrong()


def test_schemas_that_cannot_be_followed_are_refused(constraints: Constraints) -> None:
    deep: dict[str, object] = {"type": "object"}
    for _ in range(200):
        deep = {"type": "object", "properties": {"x": deep}}
    with pytest.raises(RequestError, match="nested"):
        Toolbox([Tool("deep", "", deep)], None, mode="required").grammar()
    grammar = Toolbox([Tool("odd", "", {"properties": {"x": {"type": "nonsense"}}})], None, mode="required").grammar()
    assert grammar is not None
    with pytest.raises(GrammarError):
        constraints.constraint(grammar)


STRICT = [replace(WEATHER, strict=True), TIME]
BAD = ROME.replace("Rome", "Atlantis")


def words_or_calls(*, parallel: bool = True, tools: Sequence[Tool] = STRICT, of: ChatTemplate = PLAIN) -> Grammar:
    grammar = Toolbox(tools, of, parallel=parallel).grammar()
    assert grammar is not None
    return grammar


ANSWERS = [
    "",
    "It is warm in Rome.",
    "Call <tool_cal or <|tool_call| or functools, if you like; \u00e9\U0001f600\n\n```json\nnot yet",
    '{"city": "Rome", "name": "Atlantis"}',
    '{"name": "Ann", "arguments": {"city": "Atlantis"}}',
    '```json\n{"name": "Ann"}\n```',
    '[1, 2, {"name": "Ann"}]',
    '[]',
    '{"tool_call',
]  # fmt: skip
FORMS = [
    *(wrap(ROME) for wrap in WRAPPED.values()),
    *(wrap(ROME, NOW) for wrap in WRAPPED.values()),
    ROME,
    f"```json\n{ROME}\n```",
    f"[{ROME}, {NOW}]",
    f"functools[{ROME}]",
    ' {\n"tool_calls" : [' + ROME + "]}",
    f"I will look.\n<tool_call>{ROME}\n</tool_call>",
    f"I will look. <|tool_call|>[{ROME}]<|/tool_call|>",
]


@pytest.mark.parametrize("text", ANSWERS)
def test_beside_strict_tools_words_are_free(constraints: Constraints, text: str) -> None:
    assert fits(constraints, words_or_calls(), text)
    assert calls_in(text) == []


@pytest.mark.parametrize("text", FORMS)
def test_strict_calls_fit_their_schema_in_every_form(constraints: Constraints, text: str) -> None:
    grammar = words_or_calls()
    assert fits(constraints, grammar, text)
    assert calls_in(text)[0] == ("weather", {"city": "Rome"})
    for wrong in (
        text.replace("Rome", "Atlantis"),
        text.replace('"city": "Rome"', '"town": "Rome"'),
        text.replace('{"city": "Rome"}', '"Rome"'),
        text.replace('"weather"', '"we\\u0061ther"'),
        text + " " + wrapped_in_marks(BAD),
    ):
        assert not fits(constraints, grammar, wrong), wrong


def test_tools_that_are_not_strict_stay_free_beside_those_that_are(constraints: Constraints) -> None:
    schema = {"type": "object", "properties": {"zone": {"enum": ["UTC"]}}, "additionalProperties": False}
    loose = Tool("time", "", schema)
    call = '{"tool_calls": [{"name": "time", "arguments": {"zone": "CET"}}]}'
    assert fits(constraints, words_or_calls(tools=[STRICT[0], loose]), call)
    assert not fits(constraints, words_or_calls(tools=[STRICT[0], replace(loose, strict=True)]), call)
    assert Toolbox([loose, WEATHER], PLAIN).grammar() is None


def test_one_strict_call_at_a_time_if_that_is_asked(constraints: Constraints) -> None:
    grammar = words_or_calls(parallel=False)
    for wrap in WRAPPED.values():
        assert fits(constraints, grammar, wrap(ROME))
        assert not fits(constraints, grammar, wrap(ROME, NOW))


def test_names_of_strict_tools_may_be_anything(constraints: Constraints) -> None:
    names = ['a"b', "a/b", "a.b", "\u00e9t\u00e9", "a", "a\\b", "x" * 64, "time|weather", "^$"]
    grammar = words_or_calls(tools=[Tool(name, "", WEATHER.parameters, strict=True) for name in names])
    for name in names:
        for said in {json.dumps(name), json.dumps(name, ensure_ascii=False)}:
            call = f'{{"name": {said}, "arguments": {{"city": "Rome"}}}}'
            good, bad = f"[{call}]", f"[{call.replace('Rome', 'Atlantis')}]"
            assert calls_in(good, *names) == [(name, {"city": "Rome"})]
            assert not fits(constraints, grammar, bad)
        assert fits(constraints, grammar, good) == (said == json.dumps(name, ensure_ascii=False)), name


def test_many_strict_tools_are_within_the_bounds_of_a_grammar(constraints: Constraints) -> None:
    tools = [Tool(f"tool_{i}", "", WEATHER.parameters, strict=True) for i in range(128)]
    begin = time.perf_counter()
    grammar = words_or_calls(tools=tools)
    assert fits(constraints, grammar, ROME.replace("weather", "tool_77"))
    assert not fits(constraints, grammar, BAD.replace("weather", "tool_77"))
    assert fits(constraints, grammar, "Some words.")
    assert time.perf_counter() - begin < 20


def calls_in(text: str, *names: str) -> list[tuple[str, Any]]:
    reader = ToolReader(names or ("weather", "time"))
    found = [*reader.push(text), *reader.finish()]
    begun = [item for item in found if isinstance(item, CallBegun)]
    said = {item.call: "" for item in begun}
    for item in found:
        if isinstance(item, CallArguments):
            said[item.call] += item.text
    return [(item.name, json.loads(said[item.call])) for item in begun]


def wrapped_in_marks(call: str) -> str:
    return f"<|tool_call|>[{call}]<|/tool_call|>"


PIECES = st.sampled_from(
    [
        *(
            '{"tool_calls": [',
            '{"name": "weather"',
            ', "arguments": ',
            '{"city": "Rome"}',
            '{"city": "Oslo"}',
            "}",
            "]",
        ),
        *("[", "{", ", ", ": ", " ", "\n", "```json\n", "```", "<tool_call>", "</tool_call>", "<|tool_call|>", "]}"),
        *("<|/tool_call|>", "functools[", '"name"', '"weather"', '"time"', '"arguments"', '{"x": 1}', '"id": 1', '"'),
        *('{"name": "time", "arguments": {}}', ROME, BAD, "words", "\\", '"function": {', '"type": "function"', "1"),
        *('{"city": "Atlantis"}', '"parameters": ', '{"a": 5}', '"w\\u0065ather"', "<tool_", "call>"),
    ]
)


@st.composite
def changed_calls(draw: st.DrawFn) -> str:
    text = draw(st.sampled_from(FORMS))
    for _ in range(draw(st.integers(0, 2))):
        first = draw(st.integers(0, len(text)))
        last = min(len(text), first + draw(st.sampled_from([0, 0, 1, 7, 20])))
        text = text[:first] + draw(PIECES | st.just("")) + text[last:]
    return text


def test_no_text_that_passes_holds_a_strict_call_with_other_arguments(constraints: Constraints) -> None:
    """Whatever is put together of the pieces of calls."""
    grammar = words_or_calls()
    seen: Counter[str] = Counter()

    @settings(max_examples=300, deadline=None, database=None)
    @given(st.lists(PIECES, max_size=9).map("".join) | changed_calls())
    def run(text: str) -> None:
        if not fits(constraints, grammar, text):
            seen["refused"] += 1
            return
        calls = calls_in(text)
        seen["called" if calls else "said"] += 1
        for name, arguments in calls:
            assert name in ("weather", "time"), text
            assert isinstance(arguments, dict), text
            assert name == "time" or arguments in ({"city": "Rome"}, {"city": "Oslo"}), text

    run()
    assert min(seen[kind] for kind in ("refused", "called", "said")) > 5, seen
