"""From a GGUF file to an engine with the model's weights in it: the place where file, model and processor meet."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Self

from phiquant import __version__, arch
from phiquant.engine import Engine
from phiquant.errors import RequestError
from phiquant.gguf import GGMLType, GGUFFile, open_model
from phiquant.kernels.cache_types import CACHE_TYPES, check_cache
from phiquant.kernels.free_memory import free_memory
from phiquant.kernels.ops import Capacity
from phiquant.kernels.select import select
from phiquant.model import Rope, load_weights, record
from phiquant.text import Tokenizer

__all__ = ["PAGE_TOKENS", "Loaded"]

PAGE_TOKENS: Final = 64
# Logits of a step take at most this many bytes; tokens beyond go into the next step.
LOGITS_BYTES: Final = 1 << 27
# Bytes at either end of a tensor that tell two models apart.
_SAMPLE: Final = 4096


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model that is ready.

    Attributes:
        gguf: its file, which must stay open.
        config: hyperparameters.
        tokenizer: text to ids and back.
        engine: computes it.
        capacity: what room was made.
        cache_bytes: memory that the cache takes once all of it is used.
        backend: name of the kind of processor.
        notes: what was asked for and is not done, and what the file does not say and was assumed.
    """

    gguf: GGUFFile
    config: arch.Config
    tokenizer: Tokenizer
    engine: Engine
    capacity: Capacity
    cache_bytes: int
    backend: str
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        path: str | os.PathLike[str],
        *,
        context: int,
        threads: int,
        gpu_layers: int,
        backend: str,
        cache_type: str,
        cache_tokens: int,
        batch: int,
        parallel: int,
        pack: bool,
        bf16_dot: bool,
        progress: Callable[[str], None] | None,
    ) -> Self:
        """Open a file and make it ready; arguments and errors as `LLM.load`."""
        if cache_type not in CACHE_TYPES:
            raise RequestError(f"cache_type is {cache_type!r} and must be one of {', '.join(CACHE_TYPES)}")
        for name, value, least in (
            ("context", context, 0),
            ("threads", threads, 0),
            ("cache_tokens", cache_tokens, 0),
            ("batch", batch, 1),
            ("parallel", parallel, 1),
        ):
            if value < least:
                raise RequestError(f"{name} is {value} and must be at least {least}")
        gguf = open_model(path)
        try:
            config = arch.load(gguf)
            context = min(context or config.context_length, config.context_length)
            pages = -(-context // PAGE_TOKENS)
            program = record(config, load_weights(gguf, config))
            kind, shape = CACHE_TYPES[cache_type], program.attention
            check_cache(kind, shape.head_size)
            page_bytes = 2 * program.layers * PAGE_TOKENS * kind.row_bytes(shape.kv_width)
            if 0 < cache_tokens < context:
                raise RequestError(
                    f"cache_tokens is {cache_tokens}, less than the context of {context}; ask for more, or for a "
                    "shorter context"
                )
            free = free_memory()
            if free is not None and pack:
                free -= sum(tensor.nbytes for tensor in gguf.tensors.values())
            notes = list(config.assumptions)
            if cache_tokens:
                room = -(-cache_tokens // PAGE_TOKENS)
            else:
                room = _room(pages, parallel, page_bytes, free)
            if room < pages * parallel and not cache_tokens:
                notes.append(
                    f"the cache holds {room * PAGE_TOKENS} tokens, {_sized(room * page_bytes)}, instead of {parallel} "
                    f"times {context}, so that memory suffices; sequences that need more wait for one another"
                )
            elif free is not None and room * page_bytes > free:
                notes.append(
                    f"a full cache takes {_sized(room * page_bytes)}, more memory than the {_sized(max(free, 0))} that "
                    "are free; a shorter context or a quantized cache takes less"
                )
            capacity = Capacity(
                tokens=max(batch, parallel),
                outputs=max(parallel, min(max(batch, parallel), LOGITS_BYTES // (4 * config.vocab_size))),
                sequences=parallel,
                pages=room,
                page_tokens=PAGE_TOKENS,
                pages_per_sequence=pages,
                cache_type=kind,
                threads=threads,
                pack=pack,
                bf16_dot=bf16_dot,
            )
            chosen = select(backend, progress)
            executable = chosen.prepare(program, capacity)
            tokenizer = Tokenizer.from_gguf(gguf)
            unused = tokenizer.unused_ids
            engine = Engine(executable, Rope(config.rotary), context, unused[unused < config.vocab_size])
        except BaseException:
            gguf.close()
            raise
        if gpu_layers > 0:
            notes.append("no GPU backend is installed, so all layers run on the CPU")
        if bf16_dot and not any(tensor.type is GGMLType.BF16 for tensor in gguf.tensors.values()):
            notes.append("dot products of BF16 change nothing, because no weight of this model is BF16")
        return cls(gguf, config, tokenizer, engine, capacity, room * page_bytes, chosen.name, tuple(notes))

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What must be the same for keys and values to mean the same: a line for each thing."""
        model = hashlib.sha256()
        for name, tensor in self.gguf.tensors.items():
            model.update(f"{name}\0{tensor.shape}\0{int(tensor.type)}\n".encode())
            data = self.gguf.data(name)
            model.update(data[:_SAMPLE].tobytes())
            model.update(data[-_SAMPLE:].tobytes())
        capacity = self.capacity
        return {
            "model": f"{self.config.name} {model.hexdigest()}",
            "cache_type": capacity.cache_type.name,
            "page_tokens": str(capacity.page_tokens),
            "backend": self.backend + (" with BF16 dot products" if capacity.bf16_dot else ""),
            "version": __version__,
        }

    def close(self) -> None:
        """Free threads and memory, and unmap the file."""
        self.engine.close()
        self.gguf.close()


def _room(pages: int, parallel: int, page_bytes: int, free: int | None) -> int:
    """Pages for `parallel` sequences of `pages` each: no more than half of the free memory holds, but those of one."""
    if free is None:
        return pages * parallel
    return max(pages, min(pages * parallel, free // 2 // page_bytes))


def _sized(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
