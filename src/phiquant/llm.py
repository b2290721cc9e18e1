"""The public Python API, and the only place where file, tokenizer, model, processor and engine meet.

from phiquant import LLM

with LLM.load("phi.gguf") as llm:
    print(llm.generate("Once upon a time", max_tokens=64).text)
    for chunk in llm.chat([{"role": "user", "content": "Why is the sky blue?"}], stream=True):
        print(chunk.text, end="", flush=True)
"""

import math
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Final, Literal, Self, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from phiquant import arch, hub
from phiquant.completion import Completion, CompletionChunk, Options, Timings, Usage
from phiquant.engine import Drafter, Engine, Finish, ModelDraft, PromptLookup, Sampling, TokenMask
from phiquant.engine import Sequence as Job
from phiquant.errors import RequestError
from phiquant.gguf import GGMLType, GGUFFile, open_model
from phiquant.hub import Reference
from phiquant.kernels.cache_types import CACHE_TYPES
from phiquant.kernels.ops import Capacity
from phiquant.kernels.select import select
from phiquant.model import Rope, load_weights, record
from phiquant.text import Message, StopStrings, Tokenizer, chat

__all__ = ["LLM", "Completion", "CompletionChunk", "Options", "Timings", "Usage"]

PAGE_TOKENS: Final = 64
# Logits of a step take at most this many bytes; tokens beyond go into the next step.
LOGITS_BYTES: Final = 1 << 27


class LLM:
    """A loaded model; `LLM.load` makes one. Use it from as many threads as you like: they share the steps.

    Attributes:
        config: hyperparameters of the model.
        tokenizer: text to ids and back.
        context: most tokens of prompt and completion together.
        backend: name of the kind of processor in use.
        notes: what was asked for and is not done, and what the file does not say and was assumed, one sentence each.
    """

    def __init__(
        self,
        gguf: GGUFFile,
        config: arch.Config,
        tokenizer: Tokenizer,
        engine: Engine,
        backend: str,
        *,
        speculate: bool = True,
        smaller: "LLM | None" = None,
    ) -> None:
        """For `load`."""
        self.config, self.tokenizer, self.backend = config, tokenizer, backend
        self.context = engine.context
        self.notes: list[str] = [*config.assumptions]
        self._gguf, self._engine = gguf, engine
        self._speculate, self._smaller = speculate, smaller
        self._closed = False

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        context: int = 4096,
        threads: int = 0,
        gpu_layers: int = 0,
        backend: str = "auto",
        cache_type: str = "f16",
        batch: int = 512,
        parallel: int = 1,
        speculate: bool = True,
        draft_model: str | os.PathLike[str] | None = None,
        pack: bool = True,
        bf16_dot: bool = False,
        progress: Callable[[str], None] | None = None,
    ) -> Self:
        """Open a GGUF file and make it ready.

        Args:
            path: of the file; of a model in several parts, the first.
            context: most tokens of a sequence; 0, or more than the model has been trained for, for all it can.
            threads: native threads; 0 for as many as the process may use.
            gpu_layers: how many layers to put on a GPU; while there is no backend for one, `notes` says so.
            backend: "auto" (the best that this machine can run), "cpu" or "reference".
            cache_type: element type of the key-value cache: "f16", "f32", or quantized and thereby smaller, "q8_0" or
                "q4_0", of models whose heads are a multiple of 32 channels.
            batch: most tokens of a step; prompts are computed in chunks of this size.
            parallel: most sequences of a step.
            speculate: guess tokens where the text repeats itself and let the model check several at once, where that
                is faster; what is generated is the same.
            draft_model: a smaller model with the same vocabulary that guesses, too.
            pack: False runs from the mapped file itself: no second copy of the weights in memory and a quicker start,
                for slower steps.
            bf16_dot: round activations that meet BF16 weights to BF16 themselves, which processors with AVX512_BF16
                multiply twice as fast. A mean KL divergence of 1.2e-5 nats per token, measured on the bundled model,
                is the price.
            progress: is told, in a line, what takes its time, by any thread: the first start compiles kernels.

        Raises:
            FormatError: the file is broken.
            UnsupportedError: an architecture, a type or a backend that there is not.
            RequestError: an argument makes no sense; the vocabulary of the smaller model is another; the processor
                lacks what `bf16_dot` asks for.
            KernelError: a kernel could not be made.
        """
        if cache_type not in CACHE_TYPES:
            raise RequestError(f"cache_type is {cache_type!r} and must be one of {', '.join(CACHE_TYPES)}")
        for name, value, least in (
            ("context", context, 0),
            ("threads", threads, 0),
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
            capacity = Capacity(
                tokens=max(batch, parallel),
                outputs=max(parallel, min(max(batch, parallel), LOGITS_BYTES // (4 * config.vocab_size))),
                sequences=parallel,
                pages=pages * parallel,
                page_tokens=PAGE_TOKENS,
                pages_per_sequence=pages,
                cache_type=CACHE_TYPES[cache_type],
                threads=threads,
                pack=pack,
                bf16_dot=bf16_dot,
            )
            chosen = select(backend, progress)
            executable = chosen.prepare(record(config, load_weights(gguf, config)), capacity)
            tokenizer = Tokenizer.from_gguf(gguf)
            unused = tokenizer.unused_ids
            engine = Engine(executable, Rope(config.rotary), context, unused[unused < config.vocab_size])
        except BaseException:
            gguf.close()
            raise
        smaller = None
        if speculate and draft_model is not None:
            try:
                smaller = cls._load_smaller(
                    draft_model, tokenizer, context=context, threads=threads, backend=backend, cache_type=cache_type
                )
            except BaseException:
                engine.close()
                gguf.close()
                raise
        llm = cls(gguf, config, tokenizer, engine, chosen.name, speculate=speculate, smaller=smaller)
        if gpu_layers > 0:
            llm.notes.append("no GPU backend is installed, so all layers run on the CPU")
        if bf16_dot and not any(tensor.type is GGMLType.BF16 for tensor in gguf.tensors.values()):
            llm.notes.append("dot products of BF16 change nothing, because no weight of this model is BF16")
        return llm

    @classmethod
    def from_pretrained(
        cls,
        repository: str,
        quant: str | None = None,
        *,
        revision: str | None = None,
        quiet: bool = False,
        **options: Any,
    ) -> Self:
        """Load a GGUF model of the Hugging Face Hub; its files are fetched into the Hub's cache if they are not there.

        Args:
            repository: owner/name, or with what follows in one text: `owner/name[@revision][:quant]`.
            quant: which of its GGUF models, such as "Q4_K_M", in any capitalisation, or the path of a file; by default
                Q4_K_M, else Q8_0, else the first.
            revision: a branch, tag or commit.
            quiet: show no bar while files are fetched.
            options: of `load`.

        Raises:
            RequestError: there is no such model, it is one of several, or it cannot be fetched; and as `load` does.
        """
        return cls.load(hub.gguf(Reference.of(repository, quant, revision), quiet=quiet), **options)

    @classmethod
    def _load_smaller(
        cls,
        path: str | os.PathLike[str],
        tokenizer: Tokenizer,
        *,
        context: int,
        threads: int,
        backend: str,
        cache_type: str,
    ) -> Self:
        smaller = cls.load(
            path, context=context, threads=threads, backend=backend, cache_type=cache_type, speculate=False
        )
        if list(smaller.tokenizer.vocabulary.tokens) != list(tokenizer.vocabulary.tokens):
            smaller.close()
            raise RequestError(f"the model that is to guess, {path}, has another vocabulary; its guesses mean nothing")
        return smaller

    def _drafters(self) -> list[Drafter]:
        """Who guesses for a sequence."""
        if not self._speculate:
            return []
        return [PromptLookup(), *([] if self._smaller is None else [ModelDraft(self._smaller._engine)])]

    @overload
    def generate(
        self, prompt: str | Sequence[int], *, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> Completion: ...
    @overload
    def generate(
        self, prompt: str | Sequence[int], *, stream: Literal[True], **options: Unpack[Options]
    ) -> Iterator[CompletionChunk]: ...
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repeat_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Iterable[str] = (),
        mask: TokenMask | None = None,
        ignore_eos: bool = False,
        stream: bool = False,
    ) -> Completion | Iterator[CompletionChunk]:
        """Continue a prompt.

        Args:
            prompt: text, in which special tokens are parsed, or token ids, which are taken as they are.
            max_tokens: generate at most this many; None for as many as the context holds.
            temperature: 0 always takes the likeliest token; above, chance has a say.
            top_k: only the k likeliest tokens; 0 for all.
            top_p: of these the fewest whose probabilities sum up to this.
            min_p: of these the ones at least this fraction as likely as the likeliest.
            repeat_penalty: above 1 makes the last 64 tokens less likely.
            seed: of chance; None for a new one, which the Completion tells.
            stop: strings that end the text and are not part of it.
            mask: constrains the tokens.
            ignore_eos: go on where the model would end.
            stream: give an iterator of chunks instead, as they come; closing it ends the work.

        Raises:
            ContextError: the prompt does not fit the context.
            TokenError: an id outside the vocabulary.
            RequestError: an argument makes no sense.
            KernelError: the computation failed, or gave no numbers.
        """
        self._check_open()
        seed = secrets.randbits(64) if seed is None else seed
        sampling = Sampling(temperature, top_k, top_p, min_p, repeat_penalty, seed)
        ids = self.tokenize(prompt) if isinstance(prompt, str) else prompt
        ends = frozenset[int]() if ignore_eos else self.tokenizer.eog_ids
        job = Job(ids, sampling, max_tokens=max_tokens, end_ids=ends, mask=mask, drafters=self._drafters())
        self._engine.check(job)
        chunks = self._chunks(job, seed, StopStrings([stop] if isinstance(stop, str) else stop))
        if stream:
            return chunks
        *_, last = chunks
        assert last.completion is not None
        return last.completion

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> Completion: ...
    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[True], **options: Unpack[Options]
    ) -> Iterator[CompletionChunk]: ...
    def chat(
        self, messages: Sequence[Message], *, stream: bool = False, **options: Unpack[Options]
    ) -> Completion | Iterator[CompletionChunk]:
        """Answer a conversation, by the model's own chat template.

        Args:
            messages: {"role": "system" | "user" | "assistant", "content": text}; special tokens in them stay text.
            stream: as for `generate`.
            options: as for `generate`.

        Raises:
            TemplateError: there is no template, or it fails.
            PhiquantError: as `generate`.
        """
        ids = chat.encode(self.tokenizer, messages)
        return self.generate(ids, stream=True, **options) if stream else self.generate(ids, **options)

    def tokenize(self, text: str, special: bool = True, add_bos: bool | None = None) -> list[int]:
        """Token ids of a text; `special` parses special tokens in it, `add_bos` None does as the file says."""
        return self.tokenizer.encode(text, special=special, add_bos=add_bos)

    def detokenize(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens left out. Raises TokenError."""
        return self.tokenizer.decode(ids)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits of the token after each of `ids`: float32 [len(ids), vocabulary], one row per token.

        Computed in chunks of at most `batch` tokens; a row's bits do not depend on the chunks. Raises TokenError,
        ContextError.
        """
        self._check_open()
        job = Job(ids, None)
        self._engine.submit(job)
        try:
            self._engine.advance(job, len(job.ids))
        finally:
            self._engine.cancel(job)
        assert job.logits is not None
        return job.logits

    def stream_logits(
        self, sequences: Iterable[Sequence[int]], *, first: int = 0
    ) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Logits of many sequences as they are computed, so that memory does not grow with their length.

        As many sequences as `parallel` was given to `load` are computed at once. Yields a sequence's index, a position
        and rows, float32 [rows, vocabulary]: of each sequence in order, from position `first` on; those of
        neighbouring sequences may take turns. Raises TokenError, ContextError.
        """
        self._check_open()
        blocks: deque[tuple[int, int, NDArray[np.float32]]] = deque()

        def sink(index: int, position: int, rows: NDArray[np.float32]) -> None:
            blocks.append((index, position, rows.copy()))  # the next step, which may be another thread's, overwrites it

        waiting, running = enumerate(sequences), list[Job]()
        try:
            while True:
                while len(running) < self._engine.parallel:
                    index, ids = next(waiting, (-1, ()))
                    if index < 0:
                        break
                    running.append(Job(ids, None, sink=partial(sink, index), first=first))
                    self._engine.submit(running[-1])
                if not running:
                    return
                self._engine.step(running[0])
                running = [job for job in running if job.finish is None]
                while blocks:
                    yield blocks.popleft()
        finally:
            for job in running:
                self._engine.cancel(job)

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return self._engine.threads

    @property
    def weight_bytes(self) -> int:
        """Bytes of the model's tensors in the file."""
        return sum(tensor.nbytes for tensor in self._gguf.tensors.values())

    @property
    def parameter_count(self) -> int:
        """Numbers in the model's tensors."""
        return sum(math.prod(tensor.shape) for tensor in self._gguf.tensors.values())

    def close(self) -> None:
        """Free threads and memory, and unmap the file; work that goes on elsewhere fails."""
        if not self._closed:
            self._closed = True
            self._engine.close()
            if self._smaller is not None:
                self._smaller.close()
            self._gguf.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LLM({self.config.name!r}, context={self.context}, backend={self.backend!r})"

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("the model is closed; load it again")

    def _chunks(self, job: Job, seed: int, stops: StopStrings) -> Iterator[CompletionChunk]:
        """Submit the job and turn its tokens into text as they come."""
        stream = self.tokenizer.stream(continuation=self.tokenizer.continues(job.ids))
        pieces: list[str] = []
        used = job.prompt_length  # tokens that became text; a step that guessed right may have brought more
        begin = first = time.perf_counter()
        self._engine.submit(job)
        try:
            done = False
            while not done:
                if used == len(job.ids):
                    self._engine.advance(job, used)
                    if used == job.prompt_length:
                        first = time.perf_counter()
                new = tuple(job.ids[used : used + 1])
                used += len(new)
                text, done = stops.push("".join(map(stream.push, new)))
                if job.finish is not None and used == len(job.ids) and not done:
                    rest, done = stops.push(stream.finish())
                    text += rest if done else rest + stops.finish()
                    done = True
                pieces.append(text)
                if not done:
                    yield CompletionChunk(text, new)
        finally:
            self._engine.cancel(job)
        finish: Finish = "stop" if stops.stopped is not None else job.finish or "cancelled"
        ids = tuple(job.ids[job.prompt_length : used])
        count, fresh = len(ids), job.prompt_length - job.shared
        usage = Usage(job.prompt_length, job.shared, count)
        prompt_seconds, decode_seconds = first - begin, time.perf_counter() - first
        timings = Timings(
            prompt_seconds,
            decode_seconds,
            fresh / max(prompt_seconds, 1e-9),
            (count - 1) / max(decode_seconds, 1e-9),
            job.drafted,
            job.accepted,
        )
        whole = Completion("".join(pieces), ids, finish, usage, timings, seed)
        yield CompletionChunk(text, new, whole)
