"""Importance matrices: llama.cpp's own sums over the same tokens, and its quantizer with the files that are made here.

The sums are taken where llama-imatrix takes them, in a callback that sees every matrix multiplication.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import gguf
from phiquant.calibrate import Calibration
from phiquant.convert import Importance, convert, quantize
from phiquant.convert.imatrix import ImportanceMatrix
from phiquant.gguf import FileType, GGUFFile
from phiquant.llm import LLM

pytestmark = pytest.mark.interop

MODEL = Path(__file__).parents[2] / "models/phi3-tiny"
CONTEXT, CHUNKS = 128, 8
# Twice the largest relative difference of a column when this was written; the median was 3.5e-6. Keys and values are
# rounded to half precision, where a last bit may tip over.
BOUND = 6.2e-4

_OBSERVE = """
import ctypes, json, sys
import numpy as np, llama_cpp as L
job = json.loads(sys.argv[1])
quiet = L.llama_log_callback(lambda level, text, data: None)
L.llama_log_set(quiet, ctypes.c_void_p(0))

class Tensor(ctypes.Structure):  # ggml.h
    pass

Tensor._fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4), ("op", ctypes.c_int), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10), ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64), ("extra", ctypes.c_void_p), ("padding", ctypes.c_char * 8)]
sums, rows = {}, {}

def watch(address, ask, data):
    t = ctypes.cast(address, ctypes.POINTER(Tensor)).contents
    if not t.src[0] or not t.src[1]:
        return False
    weight, x = t.src[0].contents, t.src[1].contents
    name = weight.name.decode()
    # a weight of a block; its input float32, one row to a token
    if not (name.startswith("blk.") and name.endswith(".weight") and x.type == 0 and weight.ne[0] == x.ne[0] > 1):
        return False
    if weight.ne[1] == 1:
        return False
    if not ask:
        assert x.nb[0] == 4 and x.nb[1] == 4 * x.ne[0] and x.ne[2] == x.ne[3] == 1
        values = np.ctypeslib.as_array(ctypes.cast(x.data, ctypes.POINTER(ctypes.c_float)), (x.ne[1], x.ne[0]))
        sums[name] = sums.get(name, 0) + (values.astype(np.float64) ** 2).sum(axis=0)
        rows[name] = rows.get(name, 0) + x.ne[1]
    return True

watching = L.ggml_backend_sched_eval_callback(watch)
model = L.llama_model_load_from_file(job["model"].encode(), L.llama_model_default_params())
cp = L.llama_context_default_params()
cp.n_ctx = cp.n_batch = cp.n_ubatch = len(job["chunks"][0])
cp.n_threads = cp.n_threads_batch = 2
cp.cb_eval = watching
ctx = L.llama_init_from_model(model, cp)
for chunk in job["chunks"]:
    L.llama_memory_clear(L.llama_get_memory(ctx), True)
    batch = L.llama_batch_init(len(chunk), 0, 1)
    batch.n_tokens = len(chunk)
    for i, token in enumerate(chunk):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    assert L.llama_decode(ctx, batch) == 0
np.savez(job["out"], **sums)
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imatrix") / "tiny-F32.gguf"
    convert(MODEL, out, "f32", quiet=True)
    return out


@pytest.fixture(scope="module")
def text() -> str:
    return (MODEL / "calibration.txt").read_text("utf-8")


@pytest.fixture(scope="module")
def matrix(base: Path, text: str) -> ImportanceMatrix:
    with Calibration(base, text, context=CONTEXT, chunks=CHUNKS, perplexity=False, dataset="text") as calibration:
        for _ in calibration.run():
            pass
        return calibration.matrix()


def test_sums_equal_llama_cpp(base: Path, text: str, matrix: ImportanceMatrix, llama_cpp: Any) -> None:
    with LLM.load(base, context=CONTEXT) as llm:
        ids = np.array(llm.tokenize(text, special=False)[: CONTEXT * CHUNKS]).reshape(CHUNKS, CONTEXT)
        if llm.tokenizer.add_bos:
            ids[:, 0] = llm.tokenizer.bos_id
    out = base.with_suffix(".npz")
    rows = llama_cpp._run(_OBSERVE, model=str(base), chunks=ids.tolist(), out=str(out))
    with np.load(out) as theirs:
        assert set(theirs.files) == set(matrix.entries)
        assert all(f'"{name}": {CONTEXT * CHUNKS}' in rows for name in theirs.files)
        differences = {name: np.abs(matrix.entries[name].sums[0] / theirs[name] - 1) for name in theirs.files}
    worst = max(differences, key=lambda name: float(differences[name].max()))
    middle = np.median(np.concatenate(list(differences.values())))
    print(f"largest difference {differences[worst].max():.1e} ({worst}), median {middle:.1e}")
    assert differences[worst].max() <= BOUND
    assert {int(entry.counts[0]) for entry in matrix.entries.values()} == {CONTEXT * CHUNKS}


def from_gguf(path: Path) -> dict[str, NDArray[np.float32]]:
    """As llama-quantize reads the current format, through the gguf package."""
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_count"].contents() == CHUNKS
    assert reader.fields["imatrix.chunk_size"].contents() == CONTEXT
    assert reader.fields["imatrix.datasets"].contents() == ["text"]
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    names = [name.removesuffix(".in_sum2") for name in found if name.endswith(".in_sum2")]
    return {name: found[f"{name}.in_sum2"].reshape(-1) / found[f"{name}.counts"].reshape(-1)[0] for name in names}


def from_dat(path: Path) -> dict[str, NDArray[np.float32]]:
    """As llama-quantize reads the older format."""
    data, at, values = path.read_bytes(), 4, {}
    for _ in range(struct.unpack_from("<i", data)[0]):
        (length,) = struct.unpack_from("<i", data, at)
        name = data[at + 4 : at + 4 + length].decode()
        calls, count = struct.unpack_from("<ii", data, at + 4 + length)
        at += 12 + length
        values[name] = np.frombuffer(data, "<f4", count, at) / np.float32(calls)
        at += 4 * count
    assert struct.unpack_from("<i", data, at)[0] == CHUNKS
    assert data[at + 8 :] == b"text"
    return values


_QUANTIZE = """
import ctypes, json, sys
import numpy as np, llama_cpp as L
job = json.loads(sys.argv[1])
quiet = L.llama_log_callback(lambda level, text, data: None)
L.llama_log_set(quiet, ctypes.c_void_p(0))
with np.load(job["importance"]) as file:
    values = {name: np.ascontiguousarray(file[name], np.float32) for name in file.files}
entries = (L.llama_model_imatrix_data * (len(values) + 1))()
for entry, (name, array) in zip(entries, values.items()):
    entry.name, entry.size = name.encode(), array.size
    entry.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
p = L.llama_model_quantize_default_params()
p.ftype, p.nthread, p.imatrix = job["ftype"], 2, entries
assert L.llama_model_quantize(job["source"].encode(), job["out"].encode(), ctypes.byref(p)) == 0
"""


@pytest.mark.parametrize("format", ["gguf", "dat"])
@pytest.mark.parametrize("kind", ["Q2_K_S", "Q3_K_M", "Q4_0"])
def test_llama_cpp_quantizes_by_our_files_as_we_do(
    base: Path, matrix: ImportanceMatrix, tmp_path: Path, llama_cpp: Any, kind: str, format: str
) -> None:
    path, values, theirs, ours = (tmp_path / name for name in ("imatrix", "values.npz", "theirs.gguf", "ours.gguf"))
    if format == "gguf":
        matrix.write_gguf(path)
        importance = from_gguf(path)
    else:
        matrix.write_dat(path)
        importance = from_dat(path)
    assert set(importance) == set(matrix.entries)
    np.savez(values, **importance)
    llama_cpp._run(_QUANTIZE, importance=str(values), source=str(base), out=str(theirs), ftype=int(FileType[kind]))
    quantize(base, ours, kind, importance=Importance.open(path), quiet=True)
    with GGUFFile.open(ours) as a, GGUFFile.open(theirs) as b:
        assert {n: t.type for n, t in a.tensors.items()} == {n: t.type for n, t in b.tensors.items()}
        for name in a.tensors:
            equal = (a.data(name) == b.data(name)).mean()
            assert equal == 1, f"{name}: {equal:.5f} of the bytes are equal"
