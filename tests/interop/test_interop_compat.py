"""The same script with both imports, on the same file: llama-cpp-python and `phiquant.compat.llama_cpp`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiquant.convert import convert

pytestmark = pytest.mark.interop

MODEL = Path(__file__).parents[2] / "models/phi3-tiny"

_SCRIPT = """
import importlib, inspect, json, sys
import numpy as np
package, path = sys.argv[1:]
L = importlib.import_module(package)
grammars = importlib.import_module(package + ".llama_grammar")
out = {}

def parameters(method):
    found = []
    for p in inspect.signature(method).parameters.values():
        default = p.default if isinstance(p.default, (int, float, str, bool, list, type(None))) else "none"
        found.append([p.name, str(p.kind), default])
    return found

names = "__init__ tokenize detokenize eval sample generate reset set_seed set_cache create_completion __call__"
names += " create_chat_completion create_embedding embed save_state load_state n_ctx n_embd n_vocab tokenizer"
names += " token_eos token_bos token_nl pooling_type close from_pretrained longest_token_prefix logits_to_logprobs"
out["signatures"] = {name: parameters(getattr(L.Llama, name)) for name in names.split()}

llm = L.Llama(path, n_ctx=512, verbose=False, logits_all=True, n_threads=2)
texts = ["Once upon a time", " two  spaces\\n\\ttab", "caf\\u00e9 \\u65e5 \\U0001f642", "<|end|> and <|user|>", ""]
out["tokens"] = [llm.tokenize(t.encode(), add_bos=b, special=s) for t in texts for b in (0, 1) for s in (0, 1)]
out["texts"] = [llm.detokenize(ids, special=s).decode() for ids in out["tokens"] for s in (False, True)]
out["numbers"] = [llm.n_ctx(), llm.n_vocab(), llm.n_embd(), llm.token_eos(), llm.token_bos(), llm.token_nl()]
out["metadata"] = llm.metadata

prompt = "Once upon a time there was a little girl"
ids = llm.tokenize(prompt.encode())
llm.eval(ids[:4]); llm.eval(ids[4:])
out["state"] = [llm.n_tokens, list(llm.eval_tokens), llm.input_ids[: llm.n_tokens].tolist()]
out["logits"] = np.asarray(llm.eval_logits).tolist()
out["sampled"] = llm.sample(temp=0.0)
state = llm.save_state()
generated = []
for token in llm.generate(ids, temp=0.0):
    generated.append(token)
    if len(generated) == 12: break
out["generated"] = generated
out["evaluated"] = llm.n_tokens
llm.load_state(state)
out["restored"] = [llm.n_tokens, list(llm.eval_tokens)]
llm.eval(generated[:1])
out["continued"] = llm.sample(temp=0.0)
penalized = []
for token in llm.generate(ids, temp=0.0, repeat_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2):
    penalized.append(token)
    if len(penalized) == 24: break
out["penalized"] = penalized

out["completion"] = llm(prompt, max_tokens=16, temperature=0.0)
out["logprobs"] = llm(prompt, max_tokens=6, temperature=0.0, logprobs=3)
out["echo"] = llm(prompt, max_tokens=6, temperature=0.0, echo=True)
out["ids"] = llm.create_completion(ids, max_tokens=6, temperature=0.0)
out["stopped"] = llm(prompt, max_tokens=64, temperature=0.0, stop=["girl", "zzz"])
out["biased"] = llm(prompt, max_tokens=6, temperature=0.0, logit_bias={generated[0]: -100.0})
out["chunks"] = list(llm(prompt, max_tokens=8, temperature=0.0, stream=True))
out["stopped chunks"] = list(llm(prompt, max_tokens=64, temperature=0.0, stop="girl", stream=True))
out["logprob chunks"] = list(llm(prompt, max_tokens=4, temperature=0.0, stream=True, logprobs=2))

seen = []
def forbid(input_ids, scores):
    seen.append([input_ids.tolist(), str(input_ids.dtype), list(scores.shape), str(scores.dtype)])
    scores[generated[0]] = -np.inf
    return scores
out["processed"] = llm(prompt, max_tokens=6, temperature=0.0, logits_processor=L.LogitsProcessorList([forbid]))
out["seen"] = seen
enough = L.StoppingCriteriaList([lambda input_ids, scores: len(input_ids) >= len(ids) + 3])
out["criterion"] = llm(prompt, max_tokens=16, temperature=0.0, stopping_criteria=enough)
grammar = grammars.LlamaGrammar.from_string('root ::= " who " [a-z]+ "."', verbose=False)
out["grammar"] = llm(prompt, max_tokens=16, temperature=0.0, grammar=grammar)

messages = [{"role": "system", "content": "Tell a story."}, {"role": "user", "content": "Who was she?"}]
chat = dict(messages=messages, max_tokens=10, temperature=0.0)
out["chat"] = llm.create_chat_completion(**chat)
out["chat logprobs"] = llm.create_chat_completion(**chat, logprobs=True, top_logprobs=2)
out["chat chunks"] = list(llm.create_chat_completion(**chat, stream=True))
tool = {"type": "function", "function": {"name": "who", "parameters": {
    "type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}}}
call = dict(messages=messages, max_tokens=40, temperature=0.0, tools=[tool],
            tool_choice={"type": "function", "function": {"name": "who"}})
out["call"] = llm.create_chat_completion(**call)
out["call chunks"] = list(llm.create_chat_completion(**call, stream=True))
caches = importlib.import_module(package + ".llama_cache")
llm.set_cache(caches.LlamaRAMCache())
out["cached"] = [llm(prompt, max_tokens=8, temperature=0.0)["choices"] for _ in range(2)]
llm.set_cache(None)
errors = {}
for name, ask in {
    "long": lambda: llm(list(range(300, 900))),
    "file": lambda: L.Llama("/no/such/file.gguf", verbose=False),
    "embed": lambda: llm.embed("x"),
}.items():
    try:
        ask(); errors[name] = "none"
    except ValueError: errors[name] = "ValueError"
    except RuntimeError: errors[name] = "RuntimeError"
out["errors"] = errors
llm.close()
for name, pooling in (("mean", 1), ("cls", 2), ("last", 3), ("none", -1)):
    e = L.Llama(path, n_ctx=512, verbose=False, embedding=True, pooling_type=pooling, n_threads=2)
    out["embedding " + name] = [e.create_embedding(["Hello there", prompt]), e.embed("Hello there", normalize=True),
                                e.pooling_type()]
    e.close()
json.dump(out, sys.stdout, default=float)  # llama-cpp-python gives some numbers as NumPy has them
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compat") / "tiny.gguf"
    convert(MODEL, out, "f16", quiet=True)
    return out


def run(python: str | Path, package: str, model: Path) -> dict[str, Any]:
    done = subprocess.run(
        [python, "-c", _SCRIPT, package, str(model)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def theirs(llama_cpp: Any, model: Path) -> dict[str, Any]:
    return run(llama_cpp.python, "llama_cpp", model)


@pytest.fixture(scope="module")
def ours(model: Path) -> dict[str, Any]:
    return run(sys.executable, "phiquant.compat.llama_cpp", model)


def shape(value: Any) -> Any:
    """Keys and types; of a list the types of what it holds."""
    if isinstance(value, dict):
        return {key: shape(part) for key, part in value.items()}
    if isinstance(value, list):
        return [shape(part) for part in value]
    return type(value).__name__


def without_chance(value: Any) -> Any:
    """A result without what is new in each."""
    if isinstance(value, dict):
        return {key: without_chance(part) for key, part in value.items() if key not in ("id", "created")}
    return [without_chance(part) for part in value] if isinstance(value, list) else value


def test_methods_have_the_same_parameters(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, parameters in theirs["signatures"].items():
        assert ours["signatures"][name] == parameters, name


@pytest.mark.parametrize("name", ["tokens", "texts", "numbers", "metadata", "state", "restored", "evaluated", "errors"])
def test_tokens_and_state_are_the_same(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> None:
    assert ours[name] == theirs[name]


def test_logits_are_close(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    a, b = np.array(ours["logits"]), np.array(theirs["logits"])
    assert a.shape == b.shape == (len(ours["state"][1]), ours["numbers"][1])
    assert np.abs(a - b).max() < 0.05


@pytest.mark.parametrize("name", ["sampled", "generated", "penalized", "continued"])
def test_greedy_steps_take_the_same_tokens(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> None:
    assert ours[name] == theirs[name]


@pytest.mark.parametrize(
    "name",
    [
        *("completion", "echo", "ids", "stopped", "biased", "chunks", "stopped chunks", "processed", "criterion"),
        *("grammar", "chat", "chat chunks", "cached"),
    ],
)
def test_greedy_results_are_the_same(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> None:
    assert without_chance(ours[name]) == without_chance(theirs[name])
    assert shape(ours[name]) == shape(theirs[name])


@pytest.mark.parametrize("name", ["logprobs", "logprob chunks", "chat logprobs"])
def test_log_probabilities_are_close(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> None:
    def numbers(value: Any) -> list[float]:
        if isinstance(value, dict):
            return [x for part in value.values() for x in numbers(part)]
        if isinstance(value, list):
            return [x for part in value for x in numbers(part)]
        return [value] if isinstance(value, float) else []

    def rest(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rest(part) for key, part in value.items()}
        if isinstance(value, list):
            return [rest(part) for part in value]
        return "number" if isinstance(value, float) else value

    a, b = without_chance(ours[name]), without_chance(theirs[name])
    assert rest(a) == rest(b)
    assert len(numbers(a)) >= 8
    assert np.allclose(numbers(a), numbers(b), atol=0.02)


def test_processors_see_the_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert len(ours["seen"]) == 6
    assert ours["seen"] == theirs["seen"]


def test_calls_have_the_same_shape_and_arguments(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert shape(ours["call"]) == shape(theirs["call"])
    a, b = (found["call"]["choices"][0] for found in (ours, theirs))
    assert a["finish_reason"] == b["finish_reason"] == "tool_calls"
    arguments = [json.loads(one["message"]["tool_calls"][0]["function"]["arguments"]) for one in (a, b)]
    assert arguments[0] == arguments[1]
    assert set(arguments[0]) == {"yes"}
    # How many chunks there are, and who has which tokens, is the grammar's affair.
    for chunk in (0, 1, -1):
        assert shape(ours["call chunks"][chunk]) == shape(theirs["call chunks"][chunk])
    streamed = [
        "".join(
            chunk["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"]
            for chunk in found["call chunks"]
            if chunk["choices"][0]["delta"]["tool_calls"]
        )
        for found in (ours, theirs)
    ]
    assert json.loads(streamed[0]) == json.loads(streamed[1])


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "none"])
def test_embeddings_are_close(ours: dict[str, Any], theirs: dict[str, Any], pooling: str) -> None:
    (a, one_a, kind_a), (b, one_b, kind_b) = (found[f"embedding {pooling}"] for found in (ours, theirs))
    assert kind_a == kind_b
    assert shape(without_chance(a)) == shape(without_chance(b))
    assert a["usage"] == b["usage"]
    assert np.allclose(one_a, one_b, atol=2e-3)
    # Without pooling llama-cpp-python 0.3.36 gives the second text of a batch rows that begin within the first.
    compared = zip(a["data"], b["data"][: 1 if pooling == "none" else 2], strict=False)
    for mine, its in compared:
        assert np.allclose(mine["embedding"], its["embedding"], atol=2e-2)
