"""The public Python API.

from phiquant import LLM

with LLM.load("phi.gguf") as llm:
    print(llm.generate("Once upon a time", max_tokens=64).text)
    for chunk in llm.chat([{"role": "user", "content": "Why is the sky blue?"}], stream=True):
        print(chunk.text, end="", flush=True)
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from phiquant import hub
from phiquant.completion import Completion, CompletionChunk, Embeddings, Options, Timings, Usage
from phiquant.embedding import Pooling, embeddings, pooled
from phiquant.engine import Drafter, ModelDraft, PromptLookup, Stats
from phiquant.engine import Sequence as Job
from phiquant.errors import RequestError
from phiquant.gguf import parameter_count
from phiquant.gguf.closing import Closing
from phiquant.hub import Reference
from phiquant.loading import PAGE_TOKENS, Loaded
from phiquant.logit_stream import logit_blocks
from phiquant.request import Prompt, Request, Requests, prompts_of
from phiquant.saved_cache import SavedCache
from phiquant.text import Message

__all__ = ["LLM", "PAGE_TOKENS", "Completion", "CompletionChunk", "Embeddings", "Options", "Timings", "Usage"]


class LLM(Closing):
    """A loaded model; `LLM.load` makes one. Use it from as many threads as you like: they share the steps.

    Attributes:
        config: hyperparameters of the model.
        tokenizer: text to ids and back.
        context: most tokens of prompt and completion together.
        backend: name of the kind of processor in use.
        requests: makes requests of what callers ask for.
        engine: computes them.
        notes: what was asked for and is not done, and what the file does not say and was assumed, one sentence each.
    """

    def __init__(self, loaded: Loaded, *, speculate: bool = True, smaller: "LLM | None" = None) -> None:
        """For `load`."""
        self.config, self.tokenizer, self.backend = loaded.config, loaded.tokenizer, loaded.backend
        self.context = loaded.engine.context
        self.notes: list[str] = [*loaded.notes]
        self.requests = Requests(loaded.tokenizer, loaded.config.vocab_size)
        self._loaded, self.engine = loaded, loaded.engine
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
        cache_tokens: int = 0,
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
            cache_tokens: tokens that the cache of all sequences holds, at least a context; 0 for a context each, as
                far as half of the free memory holds them (`notes` says if it does not). If it is less than all of them
                need, some wait for others.
            batch: most tokens of a step; prompts are computed in chunks of this size, or of less while others wait for
                their next token.
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
        loaded = Loaded.of(
            path,
            context=context,
            threads=threads,
            gpu_layers=gpu_layers,
            backend=backend,
            cache_type=cache_type,
            cache_tokens=cache_tokens,
            batch=batch,
            parallel=parallel,
            pack=pack,
            bf16_dot=bf16_dot,
            progress=progress,
        )
        llm = cls(loaded, speculate=speculate)
        if speculate and draft_model is not None:
            try:
                llm._smaller = cls._load_smaller(
                    draft_model, llm, context=context, threads=threads, backend=backend, cache_type=cache_type
                )
            except BaseException:
                llm.close()
                raise
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
        larger: "LLM",
        *,
        context: int,
        threads: int,
        backend: str,
        cache_type: str,
    ) -> Self:
        smaller = cls.load(
            path, context=context, threads=threads, backend=backend, cache_type=cache_type, speculate=False
        )
        if list(smaller.tokenizer.vocabulary.tokens) != list(larger.tokenizer.vocabulary.tokens):
            smaller.close()
            raise RequestError(f"the model that is to guess, {path}, has another vocabulary; its guesses mean nothing")
        return smaller

    def drafters(self) -> list[Drafter]:
        """Who guesses for a new sequence."""
        if not self._speculate:
            return []
        return [PromptLookup(), *([] if self._smaller is None else [ModelDraft(self._smaller.engine)])]

    @overload
    def generate(self, prompt: Prompt, *, stream: Literal[False] = False, **options: Unpack[Options]) -> Completion: ...
    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[True], **options: Unpack[Options]
    ) -> Iterator[CompletionChunk]: ...
    @overload
    def generate(self, prompt: list[str] | list[list[int]], **options: Unpack[Options]) -> list[Completion]: ...
    def generate(
        self, prompt: Prompt | list[str] | list[list[int]], *, stream: bool = False, **options: Unpack[Options]
    ) -> Completion | list[Completion] | Iterator[CompletionChunk]:
        """Continue a prompt, or a list of prompts together.

        Args:
            prompt: text, in which special tokens are parsed, or token ids, which are taken as they are; or a list of
                such prompts.
            stream: give an iterator of chunks instead, as they come; closing it ends the work.
            options: see `Options`.

        Raises:
            ContextError: the prompt does not fit the context.
            TokenError: an id outside the vocabulary.
            GrammarError: the grammar cannot be used, or leads nowhere.
            RequestError: an argument makes no sense.
            KernelError: the computation failed, or gave no numbers.
        """
        self._check_open()
        several = prompts_of(prompt)
        if several is not None:
            if stream:
                raise RequestError("a list of prompts is not streamed; stream them one by one, from a thread each")
            if options.get("mask") is not None:
                raise RequestError("a mask is for one text, and these are several; give a grammar")
            return self._finish([r for one in several for r in self._make(one, options)])
        requests = self._make(prompt, options)  # type: ignore[arg-type]
        return self._stream(requests[0]) if stream else self._finish(requests)[0]

    def generate_many(self, prompt: Prompt, n: int, **options: Unpack[Options]) -> list[Completion]:
        """`n` continuations of one prompt, which is computed once; their seeds are `seed`, `seed` + 1 and so on.

        As many as `parallel` was given to `load` are generated together. Raises as `generate`.
        """
        self._check_open()
        return self._finish(self._make(prompt, options, n))

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[False] = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        **options: Unpack[Options],
    ) -> Completion: ...
    @overload
    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[True],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        **options: Unpack[Options],
    ) -> Iterator[CompletionChunk]: ...
    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        **options: Unpack[Options],
    ) -> Completion | Iterator[CompletionChunk]:
        """Answer a conversation, by the model's own chat template.

        Args:
            messages: {"role": "system" | "user" | "assistant", "content": text}; special tokens in them stay text.
            stream: as for `generate`.
            tools: what the model may call, for templates that have a place for it.
            template_arguments: further variables of the template.
            options: see `Options`.

        Raises:
            TemplateError: there is no template, or it fails.
            PhiquantError: as `generate`.
        """
        ids = self.requests.chat_ids(messages, tools, template_arguments)
        return self.generate(ids, stream=True, **options) if stream else self.generate(ids, **options)

    def embed(self, inputs: Prompt | Sequence[Prompt], *, pooling: Pooling = "mean") -> Embeddings:
        """What texts mean to the model: its hidden states after the last norm.

        Args:
            inputs: a text or token ids, or a list of these.
            pooling: "mean" of all tokens, "last" token, or "none" for a vector for each token.

        Raises:
            TokenError, ContextError, RequestError: an input or the pooling cannot be served.
        """
        self._check_open()
        texts = prompts_of(inputs)
        found = [pooled(self.requests.ids(text), pooling) for text in ([inputs] if texts is None else texts)]  # type: ignore[arg-type]
        self.engine.submit(*(one.job for one in found))
        try:
            for one in found:
                self.engine.advance(one.job, one.job.prompt_length)
        finally:
            self.engine.cancel(*(one.job for one in found))
        return embeddings(found)

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
        self.engine.submit(job)
        try:
            self.engine.advance(job, len(job.ids))
        finally:
            self.engine.cancel(job)
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
        return logit_blocks(self.engine, sequences, first)

    def save_cache(self, path: str | os.PathLike[str], ids: Sequence[int]) -> int:
        """Keep what is computed of a conversation in a file, for a later process that goes on with it.

        Args:
            path: of the file, which holds what the conversation says: treat it as such.
            ids: tokens of the conversation, such as prompt and completion one after the other.

        Returns:
            How many tokens were computed and are kept: whole pages; the rest, less than a page, is computed again.

        Raises:
            RequestError: nothing of these tokens is in the cache. OutputError: the file cannot be written.
        """
        self._check_open()
        return self._saved().save(path, [int(i) for i in ids])

    def load_cache(self, path: str | os.PathLike[str]) -> list[int]:
        """Put what `save_cache` kept back into the cache; gives the tokens of the conversation.

        Raises:
            CacheError: the file is damaged, or was made by another model, cache type or version.
            RequestError: others use too much of the cache. ContextError: the conversation is too long.
        """
        self._check_open()
        return self._saved().load(path)

    def _saved(self) -> SavedCache:
        return SavedCache(self.engine, self._loaded.fingerprint)

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return self.engine.threads

    @property
    def parallel(self) -> int:
        """Most sequences of a step."""
        return self.engine.parallel

    @property
    def cache_tokens(self) -> int:
        """Tokens that the cache of all sequences holds."""
        return self._loaded.capacity.pages * self._loaded.capacity.page_tokens

    @property
    def cache_bytes(self) -> int:
        """Memory of the cache once all of it is used; the system gives it as it comes to be."""
        return self._loaded.cache_bytes

    @property
    def weight_bytes(self) -> int:
        """Bytes of the model's tensors in the file."""
        return sum(tensor.nbytes for tensor in self._loaded.gguf.tensors.values())

    @property
    def parameter_count(self) -> int:
        """Numbers in the model's tensors."""
        return parameter_count(self._loaded.gguf.tensors.values())

    def stats(self) -> Stats:
        """What the engine is doing and has done."""
        return self.engine.stats()

    def close(self) -> None:
        """Free threads and memory, and unmap the file; work that goes on elsewhere fails."""
        if not self._closed:
            self._closed = True
            self._loaded.close()
            if self._smaller is not None:
                self._smaller.close()

    def __repr__(self) -> str:
        return f"LLM({self.config.name!r}, context={self.context}, backend={self.backend!r})"

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("the model is closed; load it again")

    def _make(self, prompt: Prompt, options: Options, count: int = 1) -> list[Request]:
        """Requests that can be computed."""
        found = self.requests.make(prompt, options, count=count, drafters=self.drafters)
        for request in found:
            self.engine.check(request.job)
        return found

    def _stream(self, request: Request) -> Iterator[CompletionChunk]:
        """Submit a request and give its text as it comes."""
        self.engine.submit(request.job)
        try:
            while request.completion is None:
                chunk = request.pull()
                if chunk is None:
                    self.engine.advance(request.job, request.seen)
                elif chunk.completion is None:
                    yield chunk
        finally:
            self.engine.cancel(request.job)
        assert chunk is not None
        yield chunk

    def _finish(self, requests: Sequence[Request]) -> list[Completion]:
        """Submit requests and work until all of them have ended."""
        jobs = [request.job for request in requests]
        self.engine.submit(*jobs)
        try:
            left = list(requests)
            while left:
                self.engine.advance(left[0].job, left[0].seen)
                for request in left:
                    while request.pull() is not None:
                        pass
                    if request.completion is not None:
                        self.engine.cancel(request.job)
                left = [request for request in left if request.completion is None]
        finally:
            self.engine.cancel(*jobs)
        return [request.completion for request in requests if request.completion is not None]
