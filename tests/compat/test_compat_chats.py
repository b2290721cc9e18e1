"""Answers of a `Llama`: messages, formats, calls of functions, handlers."""

import json
from typing import Any

import pytest

from phiquant.compat.llama_cpp import Llama
from phiquant.errors import TemplateError

PROMPT = "Once upon a time there was a little girl"
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12}
MESSAGES = [{"role": "user", "content": "Who was she?"}]

pytestmark = pytest.mark.cpu


def text(completion: Any) -> str:
    found: str = completion["choices"][0]["text"]
    return found


def test_chats(llm: Llama) -> None:
    ids = llm.llm.requests.chat_ids(MESSAGES)
    made = llm.create_chat_completion(MESSAGES, **GREEDY)
    assert made["usage"]["prompt_tokens"] == len(ids)
    answer = made["choices"][0]["message"]
    assert answer == {"role": "assistant", "content": text(llm(ids, **GREEDY))}
    chunks = list(llm.create_chat_completion(MESSAGES, stream=True, **GREEDY))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant"}
    assert deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == answer["content"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Who was she?"}]}]
    assert llm.create_chat_completion(parts, **GREEDY)["choices"] == made["choices"]
    for shape in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": {"enum": ["a", "b"]}}}):
        made = llm.create_chat_completion(MESSAGES, response_format=shape, max_tokens=100, temperature=0)
        if made["choices"][0]["finish_reason"] == "stop":
            json.loads(made["choices"][0]["message"]["content"])
        else:
            assert made["choices"][0]["message"]["content"].startswith("{")
    with pytest.raises(ValueError, match="reads text only"):
        llm.create_chat_completion([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}])
    with pytest.raises(ValueError, match="response_format"):
        llm.create_chat_completion(MESSAGES, response_format={"type": "xml"})


def test_calls_of_functions(llm: Llama, recwarn: pytest.WarningsRecorder) -> None:
    parameters = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    function = {"name": "count", "parameters": parameters}
    tools = {
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "count"}},
    }
    for ask in (tools, {"functions": [function], "function_call": {"name": "count"}}):
        made = llm.create_chat_completion(MESSAGES, temperature=0, max_tokens=30, **ask)  # type: ignore[arg-type]
        choice = made["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])["n"] in (1, 2)
        assert choice["message"]["function_call"] == choice["message"]["tool_calls"][0]["function"]
    plain = llm.create_chat_completion(MESSAGES, tool_choice="auto", **GREEDY)
    assert plain["choices"][0]["message"]["content"]
    with pytest.raises(ValueError, match="names 'other'"):
        llm.create_chat_completion(MESSAGES, tools=tools["tools"], tool_choice={"function": {"name": "other"}})  # type: ignore[arg-type]


def test_results_are_those_of_the_openai_package(llm: Llama) -> None:
    chat = pytest.importorskip("openai.types.chat")
    made = llm.create_chat_completion_openai_v1(MESSAGES, logprobs=True, top_logprobs=2, **GREEDY)
    assert isinstance(made, chat.ChatCompletion)
    assert len(made.choices[0].logprobs.content) == 12
    chunks = list(llm.create_chat_completion_openai_v1(MESSAGES, stream=True, **GREEDY))
    assert all(isinstance(chunk, chat.ChatCompletionChunk) for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_handler_answers_instead(path: str) -> None:
    def handler(*, llama: Llama, messages: Any, max_tokens: int, **others: Any) -> Any:
        assert others["temperature"] == 0.2
        return llama.create_completion(messages[0]["content"], max_tokens=max_tokens, temperature=0)

    with Llama(path, n_ctx=64, chat_handler=handler, verbose=False) as llama:
        made = llama.create_chat_completion([{"role": "user", "content": PROMPT}], max_tokens=5)
        assert text(made) == text(llama(PROMPT, max_tokens=5, temperature=0))


def test_a_model_without_a_template_says_so(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.llm.tokenizer, "chat_template", None)
    with pytest.raises(TemplateError, match="chat_handler"):
        llm.create_chat_completion(MESSAGES)
