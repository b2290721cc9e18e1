"""llama-server's own endpoints."""

import math

import pytest

from .conftest import Make, Server


def test_a_completion_and_its_stream(server: Server) -> None:
    answer = server.post("/completion", prompt="The sky?", n_predict=50, temperature=-1, return_tokens=True).json()
    assert answer["content"] == " It is blue."
    assert answer["stop"] is True
    assert answer["stop_type"] == "eos"
    assert answer["tokens_predicted"] == len(answer["tokens"]) == 4
    assert answer["timings"]["prompt_ms"] == 250
    assert server.engine.options["temperature"] == 0
    pieces = server.events("/completion", prompt="The sky?", n_predict=50)
    assert "".join(piece["content"] for piece in pieces) == " It is blue."
    assert [piece["stop"] for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert server.post("/completions", prompt="x", n_predict=2).json()["stop_type"] == "limit"


def test_the_stop_text_is_told(server: Server) -> None:
    server.engine.stop = "END"
    answer = server.post("/completion", prompt="x", stop=["END"]).json()
    assert (answer["stop_type"], answer["stopping_word"]) == ("word", "END")


def test_prompts_may_mix_texts_and_ids(server: Server) -> None:
    server.post("/completion", prompt=["Hello", 5, 6, " there"])
    tokenizer = server.engine.llm.tokenizer
    assert server.engine.asked[0][0] == [*tokenizer.encode("Hello"), 5, 6, *tokenizer.encode_continuation(" there")]


def test_biases_in_all_their_forms(server: Server) -> None:
    server.post("/completion", prompt="x", logit_bias=[[15, 1.5], [16, False], [" sky", -2]])
    tokens = server.engine.llm.tokenizer.encode_continuation(" sky")
    assert server.engine.options["logit_bias"] == {15: 1.5, 16: -math.inf, **dict.fromkeys(tokens, -2.0)}
    server.post("/completion", prompt="x", logit_bias={"15": 1})
    assert server.engine.options["logit_bias"] == {15: 1.0}


def test_probabilities_and_grammars(server: Server) -> None:
    answer = server.post(
        "/completion", prompt="x", n_probs=2, grammar='root ::= "a"', samplers="top_k;temperature"
    ).json()
    entry = answer["completion_probabilities"][0]
    assert entry["token"] == " It"
    assert [len(entry["top_logprobs"]), entry["id"]] == [2, server.engine.llm.tokenizer.encode_continuation(" It")[0]]
    assert server.engine.options["grammar"].kind == "gbnf"
    assert server.engine.options["samplers"] == "top_k;temperature"


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": ""},
        {"prompt": ["x", 5, "word" * 10_000]},
        {"prompt": "x", "n_predict": 0},
        {"prompt": "x", "n_predict": -5},
        {"prompt": "x", "top_k": "many"},
        {"prompt": "x", "logit_bias": [[1 << 30, 1]]},
        {"prompt": "x", "logit_bias": [[1]]},
        {"prompt": "x", "mirostat": 3},
        {"prompt": "x", "grammar": "nonsense"},
    ],
    ids=str,
)
def test_what_is_wrong_is_refused_in_llama_servers_shape(server: Server, wrong: dict[str, object]) -> None:
    answer = server.post("/completion", **wrong)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == 400
    assert not server.engine.asked


def test_tokens_and_back(server: Server) -> None:
    tokenizer = server.engine.llm.tokenizer
    ids = server.post("/tokenize", content="Hello sky").json()["tokens"]
    assert ids == tokenizer.encode("Hello sky", add_bos=False)
    assert server.post("/detokenize", tokens=ids).json() == {"content": "Hello sky"}
    pieces = server.post("/tokenize", content="\U0001f9ff<|user|>", with_pieces=True, parse_special=False).json()[
        "tokens"
    ]
    assert any(isinstance(piece["piece"], list) for piece in pieces), "bytes that are no character alone"
    assert server.post("/detokenize", tokens=[1 << 30]).status_code == 400


def test_the_prompt_of_a_conversation(server: Server) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    answer = server.post("/apply-template", messages=messages).json()["prompt"]
    assert answer == server.engine.llm.tokenizer.chat_template.render(messages)
    assert answer.startswith("<|user|>")


def test_what_is_served(make: Make) -> None:
    server = make(slots=True)
    assert server.ask("GET", "/health").json() == {"status": "ok"}
    props = server.ask("GET", "/props").json()
    assert props["default_generation_settings"]["n_ctx"] == 256
    assert props["model_alias"] == "tiny"
    params = props["default_generation_settings"]["params"]
    shown = {name: params[name] for name in ("temperature", "top_k", "top_p", "min_p", "repeat_penalty")}
    assert shown == {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.0}
    assert (params["n_predict"], params["seed"], params["samplers"][-1]) == (-1, -1, "temperature")
    assert server.post("/completion", prompt="x", **params).status_code == 200
    assert "<|user|>" in props["chat_template"]
    assert props["eos_token"].startswith("<|")
    assert server.ask("GET", "/props?model=other").status_code == 404
    assert [slot["is_processing"] for slot in server.ask("GET", "/slots").json()] == [False] * 4
