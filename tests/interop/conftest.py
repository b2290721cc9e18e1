"""llama.cpp as an oracle: it lives in a virtual environment of its own and is called in subprocesses."""

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from phiquant.gguf import GGUFFile

HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phiquant"
PYTHON = Path(os.environ.get("PHIQUANT_INTEROP_PYTHON", HOME / "interop/bin/python"))
CONVERTER_PYTHON = Path(os.environ.get("PHIQUANT_PARITY_PYTHON", HOME / "parity/bin/python"))
SOURCE = Path(os.environ.get("PHIQUANT_LLAMA_CPP_SOURCE", HOME / "llama.cpp"))

ONLY_OURS = ("quantize.imatrix.", "phiquant.")  # the first are written by llama-quantize, not by its library

_EVALUATE = """
import ctypes, json, sys
import numpy as np, llama_cpp as L
job = json.loads(sys.argv[1])
quiet = L.llama_log_callback(lambda level, text, data: None)
L.llama_log_set(quiet, ctypes.c_void_p(0))
mp = L.llama_model_default_params()
model = L.llama_model_load_from_file(job["model"].encode(), mp)
assert model, "llama.cpp refuses the file"
cp = L.llama_context_default_params()
cp.n_ctx, cp.n_batch, cp.n_ubatch, cp.n_threads, cp.n_threads_batch = job["context"], 512, 512, 2, 2
ctx = L.llama_init_from_model(model, cp)
vocab = L.llama_model_get_vocab(model)
n_vocab = L.llama_vocab_n_tokens(vocab)
out = []
for start in range(0, len(job["ids"]), 512):
    part = job["ids"][start:start + 512]
    batch = L.llama_batch_init(len(part), 0, 1)
    batch.n_tokens = len(part)
    for i, token in enumerate(part):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, 1
        batch.seq_id[i][0] = 0
    assert L.llama_decode(ctx, batch) == 0
    for i in range(len(part)):
        out.append(np.ctypeslib.as_array(L.llama_get_logits_ith(ctx, i), shape=(n_vocab,)).copy())
np.save(job["out"], np.stack(out))
"""

_QUANTIZE = """
import ctypes, json, sys
import llama_cpp as L
job = json.loads(sys.argv[1])
quiet = L.llama_log_callback(lambda level, text, data: None)
L.llama_log_set(quiet, ctypes.c_void_p(0))
p = L.llama_model_quantize_default_params()
p.ftype, p.nthread = job["ftype"], 2
p.pure, p.allow_requantize = job.get("pure", False), True
assert L.llama_model_quantize(job["source"].encode(), job["out"].encode(), ctypes.byref(p)) == 0
"""

_QUANTIZE_MANY = """
import ctypes, json, re, sys
import numpy as np, llama_cpp as L
lines = []
log = L.llama_log_callback(lambda level, text, data: lines.append(text.decode(errors="replace")))
L.llama_log_set(log, ctypes.c_void_p(0))
answers = []
for job in json.load(sys.stdin):
    p = L.llama_model_quantize_default_params()
    p.nthread, p.ftype = 2, job["ftype"]
    for name in ("pure", "allow_requantize", "only_copy", "output_tensor_type", "token_embedding_type", "dry_run"):
        if name in job:
            setattr(p, name, job[name])
    p.quantize_output_tensor = not job.get("leave_output_tensor", False)
    if job.get("tensor_types"):
        patterns = [(pattern.encode(), kind) for pattern, kind in job["tensor_types"]] + [(None, 0)]
        array = (L.llama_model_tensor_override * len(patterns))(*patterns)
        p.tt_overrides = array
    if job.get("int_overrides"):
        overrides = (L.llama_model_kv_override * (len(job["int_overrides"]) + 1))()
        for slot, (key, value) in zip(overrides, job["int_overrides"]):
            slot.tag, slot.key, slot.value.val_i64 = L.LLAMA_KV_OVERRIDE_TYPE_INT, key.encode(), value
        p.kv_overrides = overrides
    if job.get("imatrix"):
        given = {name: np.ascontiguousarray(v, np.float32) for name, v in np.load(job["imatrix"]).items()}
        entries = (L.llama_model_imatrix_data * (len(given) + 1))()
        for slot, (name, values) in zip(entries, given.items()):
            slot.name, slot.size = name.encode(), values.size
            slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        p.imatrix = entries
    if job.get("prune"):
        layers = (ctypes.c_int32 * (len(job["prune"]) + 1))(*job["prune"], -1)
        p.prune_layers = layers
    lines.clear()
    status = L.llama_model_quantize(job["source"].encode(), job["out"].encode(), ctypes.byref(p))
    if job.get("dry_run") and status == 0:
        line = re.compile(r"\\[ *\\d+/ *\\d+\\] +(\\S+) +- \\[.*?\\], type = +(\\S+), size = [^(\\n]*(?:\\((\\w+)\\))?")
        answers.append([[name, (new or old).upper()] for name, old, new in line.findall("".join(lines))])
    else:
        answers.append(status)
print(json.dumps(answers))
"""

_TOKENIZE = """
import ctypes, json, sys
import llama_cpp as L
job = json.loads(sys.argv[1])
quiet = L.llama_log_callback(lambda level, text, data: None)
L.llama_log_set(quiet, ctypes.c_void_p(0))
mp = L.llama_model_default_params()
mp.vocab_only = True
model = L.llama_model_load_from_file(job["model"].encode(), mp)
vocab = L.llama_model_get_vocab(model)
out = []
for text in job["texts"]:
    raw = text.encode()
    room = (L.llama_token * (len(raw) + 16))()
    n = L.llama_tokenize(vocab, raw, len(raw), room, len(room), job["bos"], job["special"])
    out.append(list(room[:n]))
print(json.dumps(out))
"""


class LlamaCpp:
    """What the tests ask of llama.cpp; `python` has llama-cpp-python."""

    python = PYTHON

    def __init__(self, directory: Path) -> None:
        self.directory, self.calls = directory, 0

    def _run(self, program: str, **job: object) -> str:
        done = subprocess.run(
            [PYTHON, "-c", program, json.dumps(job)], capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    @staticmethod
    def answer(program: str, job: object) -> Any:
        """What a program prints, JSON, that reads its job from standard input."""
        done = subprocess.run(
            [PYTHON, "-c", program], input=json.dumps(job), capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    def logits(self, model: Path, ids: Sequence[int], context: int = 1024) -> NDArray[np.float32]:
        """One row for each token."""
        self.calls += 1
        out = self.directory / f"logits-{self.calls}.npy"
        self._run(_EVALUATE, model=str(model), ids=[int(i) for i in ids], context=context, out=str(out))
        return np.load(out)

    def quantize(self, source: Path, ftype: int, *, pure: bool = False) -> Path:
        """llama-quantize's own file."""
        self.calls += 1
        out = self.directory / f"quantized-{self.calls}-{ftype}.gguf"
        self._run(_QUANTIZE, source=str(source), ftype=int(ftype), pure=pure, out=str(out))
        return out

    def tokenize(
        self, model: Path, texts: Sequence[str], *, special: bool = True, bos: bool = False
    ) -> list[list[int]]:
        """Ids of each text."""
        return json.loads(self._run(_TOKENIZE, model=str(model), texts=list(texts), special=special, bos=bos))


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> LlamaCpp:
    if not PYTHON.exists():
        pytest.skip(f"llama.cpp is not installed at {PYTHON}; `make interop` builds it")
    return LlamaCpp(tmp_path_factory.mktemp("llama-cpp"))


@pytest.fixture(scope="session")
def llama_cpp_source() -> Path:
    if not (SOURCE / "convert_hf_to_gguf.py").exists():
        pytest.skip(f"llama.cpp's source is not at {SOURCE}; `make interop` unpacks it")
    return SOURCE


@pytest.fixture(scope="session")
def their_convert(llama_cpp_source: Path) -> Callable[..., Path]:
    """Run llama.cpp's converter: (checkpoint, output, options), and a program to run instead of it.

    The program is given the folder of the source and then the converter's own arguments, its name first.
    """
    if not CONVERTER_PYTHON.exists():
        pytest.skip(
            f"torch and transformers, which llama.cpp's converter needs, are not installed at {CONVERTER_PYTHON}"
        )

    def run(checkpoint: Path, out: Path, *options: str, program: str | None = None) -> Path:
        converter = llama_cpp_source / "convert_hf_to_gguf.py"
        command = [converter] if program is None else ["-c", program, llama_cpp_source, converter]
        done = subprocess.run(
            [CONVERTER_PYTHON, *command, checkpoint, "--outfile", out, *options],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return out

    return run


@pytest.fixture
def their_quantize(llama_cpp: LlamaCpp) -> Callable[[list[dict[str, Any]]], list[Any]]:
    """Run jobs of llama_model_quantize in one process: the status of each, 0 for success; of a dry run that succeeds
    the names and types of all tensors."""

    def run(jobs: list[dict[str, Any]]) -> list[Any]:
        answers: list[Any] = llama_cpp.answer(_QUANTIZE_MANY, jobs)
        return answers

    return run


@pytest.fixture
def compare() -> Callable[[Path, Path], float]:
    """Assert that two files hold the same tensors in the same order and the same keys; the share of equal bytes.

    But for keys that ONLY_OURS names.
    """

    def check(ours: Path, theirs: Path) -> float:
        with GGUFFile.open(ours) as a, GGUFFile.open(theirs) as b:
            assert [(t.name, t.shape, t.type.name) for t in a.tensors.values()] == [
                (t.name, t.shape, t.type.name) for t in b.tensors.values()
            ]
            # llama.cpp copies ours from a source that has them, and knows nothing of what they say.
            mine, its = (
                {key: field for key, field in file.fields.items() if not key.startswith(ONLY_OURS)} for file in (a, b)
            )
            assert set(mine) == set(its)
            for key, field in mine.items():
                assert (field.type, field.item_type) == (its[key].type, its[key].item_type), key
                assert np.array_equal(field.value, its[key].value), key
            equal = sum(int((a.data(name) == b.data(name)).sum()) for name in a.tensors)
            return equal / sum(info.nbytes for info in a.tensors.values())

    return check
