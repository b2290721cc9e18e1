"""The constructor's parameters: followed, warned of, or refused, as the table in the documentation says."""

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiquant.compat import llama_cpp
from phiquant.compat.llama_cpp import Llama, parameters, pretrained, refusals
from phiquant.errors import RequestError

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "llama-cpp-python.md"


def given(path: Path, **changed: Any) -> dict[str, Any]:
    """The constructor's arguments."""
    signature = inspect.signature(Llama.__init__).parameters
    defaults = {name: p.default for name, p in signature.items() if name not in ("self", "kwargs")}
    return {**defaults, "kwargs": {}, "model_path": str(path), **changed}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(refusals, "_noted", set())
    (tmp_path / "model.gguf").touch()
    return tmp_path / "model.gguf"


def test_every_parameter_is_in_the_table_of_the_documentation() -> None:
    rows = re.findall(r"^\| (`.*?`) +\| (.*?) \|$", PAGE.read_text(), re.M)
    told = {name: what for names, what in rows for name in re.findall(r"`(\w+)`", names)}
    assert set(inspect.signature(Llama.__init__).parameters) - {"self", "kwargs"} <= set(told)
    for name in parameters._REFUSED:
        assert told[name].startswith("refused"), name
    for name in parameters._IGNORED:
        assert told[name].startswith("changes nothing"), name


def test_defaults_are_taken_without_a_word(file: Path) -> None:
    found = parameters.settings(given(file))
    assert (found.context, found.batch, found.threads, found.gpu_layers) == (512, 512, 0, 0)
    assert (found.cache_type, found.pooling) == ("f16", llama_cpp.LLAMA_POOLING_TYPE_NONE)


def test_what_is_followed(file: Path) -> None:
    asked = {"n_ctx": 0, "n_batch": 64, "n_threads": 3, "n_gpu_layers": -1, "pooling_type": 3, "type_k": 8, "type_v": 8}
    found = parameters.settings(given(file, **asked))
    assert (found.context, found.batch, found.threads) == (0, 64, 3)
    assert (found.cache_type, found.pooling) == ("q8_0", llama_cpp.LLAMA_POOLING_TYPE_LAST)
    assert found.gpu_layers > 1000
    assert parameters.settings(given(file, n_ctx=32)).batch == 32


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("vocab_only", True), ("kv_overrides", {"phi3.context_length": 64}), ("rope_freq_base", 1e6)),
        *(("rope_scaling_type", 2), ("yarn_orig_ctx", 4096), ("attention_type", 1), ("lora_path", "lora.gguf")),
        *(("chat_format", "llama-2"), ("pooling_type", 4), ("type_k", 8), ("type_v", 12), ("model_path", "/none.gguf")),
    ],
)
def test_what_would_change_results_is_refused(file: Path, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=re.escape(str(value))) as caught:
        parameters.settings(given(file, **{name: value}))
    assert isinstance(caught.value, RequestError)


def test_what_changes_nothing_is_warned_of_once(file: Path) -> None:
    asked = given(file, flash_attn=True, use_mlock=True, n_threads=2, n_threads_batch=4, kwargs={"n_parts": 1})
    with pytest.warns(UserWarning, match="changes nothing") as caught:
        parameters.settings(asked)
    texts = " ".join(str(one.message) for one in caught)
    assert all(name in texts for name in ("flash_attn", "use_mlock", "n_threads_batch", "n_parts"))
    assert len(caught) == 4
    parameters.settings(asked)  # another warning would be an error here


def test_files_of_a_repository(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    names = ["README.md", "Phi-Q4_K_M.gguf", "big/Phi-F16-00001-of-00002.gguf", "big/Phi-F16-00002-of-00002.gguf"]
    fetched: list[dict[str, Any]] = []

    def fetch(repo_id: str, **asked: Any) -> str:
        fetched.append({"repo_id": repo_id, **asked})
        return f"/there/{asked['subfolder'] or '.'}/{asked['filename']}"

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo_id: names)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    where = {"local_dir": None, "cache_dir": file.parent}
    assert pretrained.download("a/b", "*Q4_K_M.gguf", [], **where) == "/there/Phi-Q4_K_M.gguf"
    path = pretrained.download("a/b", "big/*00001-of*", ["big/*00002-of*"], **where)
    assert path == "/there/big/Phi-F16-00001-of-00002.gguf"
    assert [f"{one['subfolder']}/{one['filename']}" for one in fetched[1:]] == names[2:]
    assert all(one["cache_dir"] == file.parent for one in fetched)
    for pattern, message in (("*.gguf", "several files"), ("*Q8_0*", "no file")):
        with pytest.raises(ValueError, match=message):
            pretrained.download("a/b", pattern, [], **where)
    with pytest.raises(ValueError, match="no file /there"):
        Llama.from_pretrained("a/b", "*Q4_K_M.gguf")


def test_names_of_modules_and_constants() -> None:
    from phiquant.compat.llama_cpp.llama import LogitsProcessorList, StoppingCriteriaList
    from phiquant.compat.llama_cpp.llama_cache import LlamaRAMCache
    from phiquant.compat.llama_cpp.llama_grammar import LlamaGrammar
    from phiquant.compat.llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    for thing in (LogitsProcessorList, StoppingCriteriaList, LlamaRAMCache, LlamaGrammar, LlamaPromptLookupDecoding):
        assert getattr(llama_cpp, thing.__name__) is thing
    assert all(hasattr(llama_cpp, name) for name in llama_cpp.__all__)
    assert (llama_cpp.GGML_TYPE_Q8_0, llama_cpp.LLAMA_DEFAULT_SEED) == (8, 0xFFFFFFFF)


def test_log_probabilities_of_impossible_tokens() -> None:
    scores = np.array([[0.0, -np.inf, 0.0], [3.0, 3.0, -np.inf]], np.single)
    assert np.allclose(np.exp(Llama.logits_to_logprobs(scores)), [[0.5, 0, 0.5], [0.5, 0.5, 0]])
    assert Llama.longest_token_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
