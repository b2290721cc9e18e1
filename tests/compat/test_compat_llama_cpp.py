"""llama-cpp-python's interface on the bundled model; what it has in common with the original is compared in interop."""

import json
import pickle
import re
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiquant.compat.llama_cpp import (
    Llama,
    LlamaDraftModel,
    LlamaGrammar,
    LlamaPromptLookupDecoding,
    LlamaTokenizer,
    LogitsProcessorList,
    MinTokensLogitsProcessor,
    StoppingCriteriaList,
)
from phiquant.compat.llama_cpp.llama_tokenizer import BaseLlamaTokenizer
from phiquant.errors import GrammarError, RequestError

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "llama-cpp-python.md"
PROMPT = "Once upon a time there was a little girl"
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12}
MESSAGES = [{"role": "user", "content": "Who was she?"}]

pytestmark = pytest.mark.cpu


def text(completion: Any) -> str:
    found: str = completion["choices"][0]["text"]
    return found


def streamed(chunks: Iterator[Any]) -> str:
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


def test_greedy_text_is_what_llm_generates(llm: Llama) -> None:
    done = llm.llm.generate(PROMPT, temperature=0, max_tokens=12)
    made = llm(PROMPT, **GREEDY)
    assert text(made) == done.text
    assert made["usage"] == {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21}
    assert made["choices"][0]["finish_reason"] == "length"
    assert streamed(llm(PROMPT, stream=True, **GREEDY)) == done.text
    ids = llm.tokenize(PROMPT.encode())
    assert tuple(islice(llm.generate(ids, temp=0), 12)) == done.ids
    assert llm.n_tokens == len(ids) + 11


def test_steps_by_hand_are_the_same(llm: Llama) -> None:
    ids = llm.tokenize(PROMPT.encode())
    wanted = list(islice(llm.generate(ids, temp=0), 8))
    llm.reset()
    made = []
    llm.eval(ids)
    for _ in range(8):
        made.append(llm.sample(temp=0))
        llm.eval(made[-1:])
    assert made == wanted
    assert list(llm.eval_tokens) == ids + made
    llm.n_tokens = len(ids)
    assert llm.sample(temp=0) == wanted[0]
    assert llm.sample(temp=0, idx=3) == int(llm.llm.logits(ids[:4])[-1].argmax())
    assert list(islice(llm.generate(wanted[:1], temp=0, reset=False), 4)) == wanted[1:5]
    assert np.allclose(llm.eval_logits[0], llm.llm.logits(ids + wanted[:4])[-1])


def test_scores_of_all_tokens(path: str, llm: Llama) -> None:
    with pytest.raises(RuntimeError, match="logits_all=True"):
        _ = llm.scores
    with Llama(path, n_ctx=96, logits_all=True, verbose=False) as every:
        made = every(PROMPT, **GREEDY)
        ids = every.input_ids[: every.n_tokens].tolist()
        assert text(made).startswith(every.detokenize(ids[9:]).decode())
        assert np.array_equal(every.scores[: every.n_tokens], every.llm.logits(ids))
        assert np.array_equal(every._scores[-1], every.eval_logits[-1])
        every.reset()
        every.eval(ids[:5])
        assert len(every.eval_logits) == 5


def test_tokens_that_are_sent_come_in(llm: Llama) -> None:
    ids, extra = llm.tokenize(PROMPT.encode()), llm.tokenize(b" and the dog")
    steps = llm.generate(ids, temp=0)
    first = next(steps)
    second = steps.send(extra)
    wanted = list(islice(llm.generate([*ids, first, *extra], temp=0), 3))
    assert [second, *islice(steps, 2)] == wanted


def test_streams_that_interrupt_one_another_go_on(llm: Llama) -> None:
    letters = LlamaGrammar.from_string('root ::= " " [a-z]{20} "."')
    asked: list[tuple[str, dict[str, Any]]] = [
        (PROMPT, {"temperature": 0.0}),
        ("The sun", {"mirostat_mode": 2, "seed": 3}),  # its sampler remembers
        ("One day Tom and his dog", {"grammar": letters, "seed": 4}),  # so does a grammar
    ]
    alone = [text(llm(prompt, max_tokens=12, **more)) for prompt, more in asked]
    streams = [llm(prompt, max_tokens=12, stream=True, **more) for prompt, more in asked]
    made = ["", "", ""]
    for _ in range(14):
        for i, stream in enumerate(streams):
            made[i] += "".join(chunk["choices"][0]["text"] for chunk in islice(stream, 1))
            llm.eval([300])  # whatever comes in between
            llm.reset()
    assert made == alone


def test_a_stream_that_nobody_reads_is_not_computed(llm: Llama) -> None:
    stream = llm(PROMPT, stream=True, temperature=0, max_tokens=200)
    next(stream)
    before = llm.llm.stats().generated_tokens
    llm("The sun", temperature=0, max_tokens=4)
    assert llm.llm.stats().generated_tokens - before <= 4 + 16
    assert len(streamed(stream)) > 100


def test_threads_get_what_they_would_get_alone(llm: Llama) -> None:
    prompts = [PROMPT, "The sun", "Lily had a red ball and"]
    alone = [text(llm(prompt, **GREEDY)) for prompt in prompts]
    made: dict[int, str] = {}
    threads = [threading.Thread(target=lambda i=i: made.update({i: text(llm(prompts[i], **GREEDY))})) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [made[i] for i in range(3)] == alone


def test_seeds(path: str, llm: Llama) -> None:
    ask: dict[str, Any] = {"max_tokens": 16, "temperature": 1.0}
    assert text(llm(PROMPT, seed=7, **ask)) == text(llm(PROMPT, seed=7, **ask)) != text(llm(PROMPT, seed=8, **ask))
    llm.set_seed(3)
    first = [text(llm(PROMPT, **ask)) for _ in range(2)]
    llm.set_seed(3)
    assert [text(llm(PROMPT, **ask)) for _ in range(2)] == first
    assert first[0] != first[1], "without a seed it follows from the last"
    ids = llm.tokenize(PROMPT.encode())
    assert list(islice(llm.generate(ids), 8)) != list(islice(llm.generate(ids, temp=-1.0), 8))
    for mode in (1, 2):
        made = [text(llm(PROMPT, mirostat_mode=mode, seed=5, **ask)) for _ in range(2)]
        assert made[0] == made[1] == streamed(llm(PROMPT, mirostat_mode=mode, seed=5, stream=True, **ask))


def test_the_end_is_not_counted(llm: Llama) -> None:
    made = llm(PROMPT, logit_bias={llm.token_eos(): 1000}, **GREEDY)
    assert (text(made), made["choices"][0]["finish_reason"], made["usage"]["completion_tokens"]) == ("", "stop", 0)
    once = MinTokensLogitsProcessor(3, llm.token_eos())
    made = llm(PROMPT, logits_processor=LogitsProcessorList([lambda ids, s: s, once]), **GREEDY)
    assert made["usage"]["completion_tokens"] == 12


def test_as_many_tokens_as_the_context_holds(path: str) -> None:
    with Llama(path, n_ctx=32, verbose=False) as small:
        for most in (None, 0, -1, 999):
            made = small.create_completion(PROMPT, max_tokens=most, temperature=0)
            assert made["usage"]["total_tokens"] == 32
        assert len(list(small.generate(small.tokenize(PROMPT.encode()), temp=0))) == 32 - 9
        with pytest.raises(ValueError, match="40 tokens does not fit the context of 32"):
            small([300] * 40)
        with pytest.raises(RequestError, match="context of 32"):
            small.eval([300] * 40)


def test_processors_and_criteria(llm: Llama) -> None:
    seen: list[int] = []

    def force(ids: Any, scores: Any) -> Any:
        seen.append(len(ids))
        scores[300 + len(ids)] = np.inf
        return scores

    made = llm(PROMPT, max_tokens=5, logits_processor=LogitsProcessorList([force]), logprobs=0, seed=1)
    assert seen == [9, 10, 11, 12, 13]
    assert text(made) == llm.detokenize([309, 310, 311, 312, 313]).decode()
    rows = []

    def enough(ids: Any, scores: Any) -> bool:
        rows.append(scores)
        return len(ids) == 12

    made = llm(PROMPT, stopping_criteria=StoppingCriteriaList([enough]), **GREEDY)
    assert (made["usage"]["completion_tokens"], made["choices"][0]["finish_reason"]) == (3, "stop")
    assert [int(row.argmax()) for row in rows] == list(islice(llm.generate(llm.tokenize(PROMPT.encode()), temp=0), 4))
    ids = llm.tokenize(PROMPT.encode())
    stop = StoppingCriteriaList([lambda ids, scores: len(ids) == 12])
    assert len(list(llm.generate(ids, temp=0, stopping_criteria=stop))) == 3
    with pytest.raises(RequestError, match="shape"):
        llm(PROMPT, logits_processor=LogitsProcessorList([lambda ids, scores: scores[:5]]))


def test_penalties_count_what_was_generated(llm: Llama) -> None:
    once = llm(PROMPT, temperature=0, max_tokens=40, presence_penalty=1000.0)
    ids = list(islice(llm.generate(llm.tokenize(PROMPT.encode()), temp=0, presence_penalty=1000.0), 40))
    assert llm.detokenize(ids).decode(errors="ignore") == text(once)
    assert len(set(ids)) == 40
    assert set(ids) & set(llm.tokenize(PROMPT.encode())), "the prompt is not penalised"


def test_echo_stop_and_refusals(llm: Llama) -> None:
    plain = text(llm(PROMPT, **GREEDY))
    assert text(llm(PROMPT, echo=True, **GREEDY)) == PROMPT + plain
    assert text(llm(PROMPT, stop=plain[9:13], **GREEDY)) == plain[:9]
    assert streamed(llm(PROMPT, stop=[plain[9:13], "zzz"], stream=True, **GREEDY)) == plain[:9]
    with pytest.raises(ValueError, match="infill"):
        llm(PROMPT, suffix="the end")
    with pytest.raises(ValueError, match="logit_bias names the token 99999"):
        llm(PROMPT, logit_bias={99999: 1.0})
    with pytest.raises(ValueError, match="LlamaGrammar"):
        llm(PROMPT, grammar="root ::= [a-z]")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="call eval first"):
        llm.sample(idx=5000)
    with pytest.raises(ValueError, match="n_tokens is 5000"):
        llm.n_tokens = 5000
    with pytest.warns(RuntimeWarning, match="two tokens that begin a text"):
        llm([1, 1, 300], **GREEDY)


def test_log_probabilities(llm: Llama) -> None:
    made = llm(PROMPT, logprobs=2, echo=True, **GREEDY)["choices"][0]
    found, ids = made["logprobs"], llm.tokenize(PROMPT.encode())
    ids += llm.llm.generate(PROMPT, temperature=0, max_tokens=12).ids
    rows = Llama.logits_to_logprobs(llm.llm.logits(ids))
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    assert np.allclose(found["token_logprobs"][1:], [rows[i, token] for i, token in enumerate(ids[1:])], atol=1e-5)
    assert found["tokens"] == [llm.detokenize([token]).decode() for token in ids]
    whole = llm.detokenize(ids).decode()
    for offset, token in zip(found["text_offset"], found["tokens"], strict=True):
        assert whole[offset:].startswith(token)
    assert all(len(top) in (2, 3) for top in found["top_logprobs"][1:])
    assert np.allclose(np.exp(rows).sum(axis=-1), 1, atol=1e-4)


def test_grammars(llm: Llama, tmp_path: Any) -> None:
    file = tmp_path / "one.gbnf"
    file.write_text('root ::= " who " [a-z]{3} "."')
    for grammar in (LlamaGrammar.from_file(file), LlamaGrammar.from_string(file.read_text())):
        made = llm(PROMPT, grammar=grammar, seed=4)
        assert len(text(made)) == 9
        assert text(made).startswith(" who ")
        ids = islice(llm.generate(llm.tokenize(PROMPT.encode()), grammar=grammar), 12)
        assert llm.detokenize(list(ids)).decode().startswith(" who ")
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    made = llm(PROMPT, grammar=LlamaGrammar.from_json_schema(json.dumps(schema)), temperature=0, max_tokens=40)
    assert set(json.loads(text(made))) == {"yes"}, "properties that are not listed are left out"
    with pytest.raises(GrammarError):
        llm(PROMPT, grammar=LlamaGrammar.from_string("root ::= nothing"))
    with pytest.raises(ValueError, match="cannot be read"):
        LlamaGrammar.from_file(tmp_path / "none.gbnf")


def test_guesses_change_nothing(path: str, llm: Llama) -> None:
    class Wrong(LlamaDraftModel):
        calls = 0

        def __call__(self, input_ids: Any, /, **kwargs: Any) -> Any:
            self.calls += 1
            return np.array([input_ids[-1], 99999, -5], np.intc)

    wanted = text(llm(PROMPT, temperature=0, max_tokens=60))
    wrong = Wrong()
    for model in (wrong, LlamaPromptLookupDecoding(num_pred_tokens=4)):
        with Llama(path, n_ctx=256, draft_model=model, verbose=False) as llama:
            assert text(llama(PROMPT, temperature=0, max_tokens=60)) == wanted
    assert wrong.calls > 0
    lookup = LlamaPromptLookupDecoding(max_ngram_size=2, num_pred_tokens=3)
    assert lookup(np.array([1, 2, 3, 4, 5, 1, 2], np.intc)).tolist() == [3, 4, 5]
    assert lookup(np.array([1, 2, 3], np.intc)).tolist() == []


def test_a_tokenizer_of_the_script(path: str, llm: Llama) -> None:
    class Shouting(BaseLlamaTokenizer):
        def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
            return llm.tokenize(text.lower(), add_bos, special)

        def detokenize(self, tokens: Any, prev_tokens: Any = None, special: bool = False) -> bytes:
            return llm.detokenize(tokens, prev_tokens, special).upper()

    with Llama(path, n_ctx=256, tokenizer=Shouting(), verbose=False) as llama:
        assert text(llama(PROMPT.upper(), **GREEDY)) == text(llm(PROMPT.lower(), **GREEDY)).upper()
        answer = llama.create_chat_completion(MESSAGES, **GREEDY)["choices"][0]["message"]["content"]
        assert answer == answer.upper()
    alone = LlamaTokenizer.from_ggml_file(path)
    assert alone.encode(PROMPT) == llm.tokenize(PROMPT.encode())
    assert alone.decode([1, *alone.encode(PROMPT)]) == PROMPT
    with pytest.raises(ValueError, match="UTF-8"):
        llm.tokenize(b"\xff")
    with pytest.raises(ValueError, match="encode it"):
        llm.tokenize("text")  # type: ignore[arg-type]


def test_embeddings(llm: Llama, path: str) -> None:
    ids = llm.tokenize(PROMPT.encode())
    rows = llm.embed(PROMPT, normalize=True)
    assert np.allclose(rows, llm.llm.embed(ids, pooling="none").vectors, atol=1e-6)
    for pooling, row in ((2, 0), (3, -1)):
        with Llama(path, n_ctx=64, embedding=True, pooling_type=pooling, verbose=False) as one:
            assert np.allclose(one.embed(PROMPT, normalize=True), rows[row], atol=1e-6)
            assert one.pooling_type() == pooling
    with Llama(path, n_ctx=64, n_batch=16, embedding=True, pooling_type=1, verbose=False) as mean:
        made = mean.create_embedding([PROMPT, "The sun"], model="tiny")
        assert (made["model"], made["usage"]["prompt_tokens"]) == ("tiny", 11)
        vector = np.array(made["data"][0]["embedding"])
        assert np.allclose(vector / np.linalg.norm(vector), llm.llm.embed(ids).vectors[0], atol=1e-6)
        assert len(vector) == mean.n_embd()
        assert mean.create_embedding(PROMPT * 9)["usage"]["total_tokens"] == 16
        with pytest.raises(ValueError, match="n_batch, which is 16"):
            mean.embed(PROMPT * 9, truncate=False)


def test_what_is_assumed_is_told_unless_it_is_not_wanted(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    for verbose in (True, False):
        with Llama(path, n_ctx=32, n_gpu_layers=-1, verbose=verbose) as llama:
            assert llama.n_ctx() == 32
        told = capsys.readouterr()
        assert told.out == ""
        assert ("no GPU backend" in told.err) == verbose
    assert told.err == ""


def test_the_example_of_the_documentation_runs(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").symlink_to(path)
    exec(example.replace("n_ctx=4096", "n_ctx=64"), {})


def test_a_copy_for_another_process_loads_the_file_again(llm: Llama) -> None:
    with pickle.loads(pickle.dumps(llm)) as copy:
        assert copy.n_ctx() == 256
        assert text(copy(PROMPT, **GREEDY)) == text(llm(PROMPT, **GREEDY))
