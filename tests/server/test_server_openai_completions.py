"""/v1/completions."""

import pytest
from openai.types import Completion

from phiquant.engine import TokenLogprob
from phiquant.server.generation import Answer
from phiquant.server.openai_completions import CompletionBody

from .conftest import Make, Server

PATH = "/v1/completions"


def test_a_continuation_and_its_stream(server: Server) -> None:
    found = Completion.model_validate(server.post(PATH, prompt="The sky?", max_tokens=50).json(), strict=True)
    assert found.choices[0].text == " It is blue."
    assert server.engine.prompt.endswith("The sky?")
    streamed = server.events(PATH, prompt="The sky?", max_tokens=50, stream_options={"include_usage": True})
    assert streamed.pop() == "[DONE]"
    assert [chunk["choices"][0]["finish_reason"] for chunk in streamed[:-1]] == [None] * 4 + ["stop"]
    chunks = [Completion.construct(**chunk) for chunk in streamed]  # as the client does: the type knows no null there
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == " It is blue."
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_sixteen_tokens_unless_told_otherwise(make: Make) -> None:
    assert make("a " * 40).post(PATH, prompt="x").json()["usage"]["completion_tokens"] == 16


def test_special_tokens_of_a_prompt_are_parsed_and_ids_taken_as_they_are(server: Server) -> None:
    server.post(PATH, prompt="<|user|>hello")
    marks = {token.content: token.id for token in server.engine.llm.tokenizer.marks}
    assert marks["<|user|>"] in server.engine.asked[0][0]
    server.post(PATH, prompt=[5, 6, 7])
    assert server.engine.asked[1][0] == [5, 6, 7]


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_and_choices_are_numbered(make: Make, stream: bool) -> None:
    server = make(lambda prompt, choice: f" after {prompt}")
    asked = {"prompt": ["one", "two"], "n": 2, "echo": True}
    if stream:
        texts = [""] * 4
        for chunk in server.events(PATH, **asked)[:-1]:
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    else:
        answer = server.post(PATH, **asked).json()
        texts = [choice["text"] for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]
        assert answer["usage"]["prompt_tokens"] == sum(len(ids) for ids, _ in server.engine.asked[::2])
    assert texts == ["one after one"] * 2 + ["two after two"] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_side_by_side(server: Server, stream: bool) -> None:
    asked = {"prompt": "x", "logprobs": 3}
    if stream:
        found: dict[str, list[object]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for chunk in server.events(PATH, **asked)[:-1]:
            for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
                found[name] += values
    else:
        found = server.post(PATH, **asked).json()["choices"][0]["logprobs"]
    assert found["tokens"] == [" It", " is", " blue", "."]
    assert found["token_logprobs"] == [-0.5] * 4
    assert found["text_offset"] == [0, 3, 6, 11]
    assert {len(entry) for entry in found["top_logprobs"]} <= {1, 2, 3}  # type: ignore[arg-type]


def test_the_best_of_several_are_chosen_by_their_mean_log_probability() -> None:
    body = CompletionBody(prompt="x", n=2, best_of=3)
    answers = [Answer(str(p), logprobs=[TokenLogprob(0, p)] * n) for p, n in ((-3.0, 1), (-1.0, 9), (-2.0, 2))]
    assert [answer.text for answer in body.chosen(answers)] == ["-1.0", "-2.0"]


def test_more_texts_are_drawn_than_are_shown(server: Server) -> None:
    answer = server.post(PATH, prompt="x", best_of=3).json()
    assert len(answer["choices"]) == 1
    assert len(server.engine.asked) == 3
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": []},
        {"prompt": ""},
        {"prompt": [[]]},
        {"prompt": [-1]},
        {"prompt": [10**9]},
        {"prompt": ["a"] * 200},
        {"prompt": {"text": "a"}},
        {},
        {"prompt": "x", "suffix": "y"},
        {"prompt": "x", "echo": True, "logprobs": 1},
        {"prompt": "x", "n": 2, "best_of": 1},
        {"prompt": "x", "best_of": 2, "stream": True},
        {"prompt": "x", "messages": []},
    ],
    ids=str,
)
def test_what_is_wrong_is_refused(server: Server, wrong: dict[str, object]) -> None:
    answer = server.post(PATH, **wrong)
    assert answer.status_code == 400, answer.text
    assert not server.engine.asked
