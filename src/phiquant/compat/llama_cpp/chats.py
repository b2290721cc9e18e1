"""Answers to conversations, by the model's own chat template."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from phiquant.compat.llama_cpp.completions import Completions
from phiquant.compat.llama_cpp.llama_grammar import LlamaGrammar, json_grammar
from phiquant.compat.llama_cpp.processors import LogitsProcessor
from phiquant.compat.llama_cpp.refusals import ArgumentError, note_ignored
from phiquant.compat.llama_cpp.shapes import called, called_chunks, chat, chat_chunks
from phiquant.errors import TemplateError
from phiquant.text.grammar import Grammar

__all__ = ["Chats"]


class Chats(Completions):
    """A `Completions` that answers.

    Attributes:
        chat_format: what conversations are written by.
        chat_handler: a callable that answers instead; it is given the model as `llama`, and all arguments.
    """

    chat_format: str | None
    chat_handler: Callable[..., Any] | None

    def create_chat_completion(
        self,
        messages: list[Any],
        functions: list[Any] | None = None,
        function_call: str | Mapping[str, Any] | None = None,
        tools: list[Any] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        temperature: float = 0.2,
        top_p: float = 0.95,
        top_k: int = 40,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        stream: bool = False,
        stop: str | list[str] | None = [],  # noqa: B006  as in llama-cpp-python, and never changed
        seed: int | None = None,
        response_format: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        grammar: LlamaGrammar | None = None,
        logit_bias: Mapping[int, float] | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
    ) -> Any:
        """Answer: a CreateChatCompletionResponse, or an iterator of CreateChatCompletionStreamResponse with `stream`.

        Args:
            messages: {"role", "content"}; the content is text, or parts {"type": "text", "text"}. Special tokens in it
                stay text.
            functions, function_call: the older form of `tools` and `tool_choice`.
            tools: what the model may call, shown to it if its template has a place for that.
            tool_choice: {"type": "function", "function": {"name"}} has the answer be a call of it, with arguments that
                fit its parameters; with anything else the answer is text.
            response_format: {"type": "json_object"}, maybe with a "schema"; or OpenAI's "json_schema".
            logprobs, top_logprobs: tell log-probabilities, and of so many alternatives.
            others: as `create_completion`.

        Raises:
            TemplateError: the model has no template, or it fails.
            ArgumentError (a ValueError), GrammarError: as `create_completion`.
        """
        arguments = {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "typical_p": typical_p,
            "stream": stream,
            "stop": stop,
            "seed": seed,
            "max_tokens": max_tokens,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "repeat_penalty": repeat_penalty,
            "tfs_z": tfs_z,
            "mirostat_mode": mirostat_mode,
            "mirostat_tau": mirostat_tau,
            "mirostat_eta": mirostat_eta,
            "model": model,
            "logits_processor": logits_processor,
            "logit_bias": logit_bias,
        }
        if self.chat_handler is not None:
            return self.chat_handler(
                llama=self,
                messages=messages,
                functions=functions,
                function_call=function_call,
                tools=tools,
                tool_choice=tool_choice,
                response_format=response_format,
                grammar=grammar,
                logprobs=logprobs,
                top_logprobs=top_logprobs,
                **arguments,
            )
        variables = {
            name: value
            for name, value in (
                ("functions", functions),
                ("function_call", function_call),
                ("tools", tools),
                ("tool_choice", tool_choice),
            )
            if value is not None
        }
        if functions is not None:
            tools = [{"type": "function", "function": function} for function in functions]
        if isinstance(function_call, Mapping):
            tool_choice = {"type": "function", "function": function_call}
        elif function_call is not None:
            tool_choice = function_call
        tool = _chosen(tools, tool_choice)
        wanted = _format(response_format)
        if wanted is not None:
            grammar = LlamaGrammar(wanted)
        if tool is not None:
            grammar = LlamaGrammar(json_grammar(tool.get("parameters") or {"type": "object"}))
        made = self.create_completion(
            self._conversation(messages, variables),
            grammar=grammar,
            logprobs=(top_logprobs or 0) if logprobs else None,
            **arguments,  # type: ignore[arg-type]
        )
        if tool is not None:
            return called_chunks(tool["name"], made) if stream else called(tool["name"], made)
        return chat_chunks(made) if stream else chat(made)

    def create_chat_completion_openai_v1(self, *args: Any, **kwargs: Any) -> Any:
        """The same as objects of the `openai` package, which must be installed."""
        from openai.types.chat import ChatCompletion, ChatCompletionChunk

        made = self.create_chat_completion(*args, **kwargs)
        if kwargs.get("stream", False):
            return (ChatCompletionChunk(**chunk) for chunk in made)
        return ChatCompletion(**made)

    def _conversation(self, messages: Sequence[Mapping[str, Any]], variables: dict[str, Any]) -> list[int]:
        """Token ids by the template. Tools that it has no place for are left out, with a warning."""
        template = self.llm.tokenizer.chat_template
        if template is None:
            raise TemplateError("the model has no chat template; give the constructor a chat_handler")
        read = [_read(message, at) for at, message in enumerate(messages)]
        if variables.get("tools") and not template.takes_tools:
            why = "the model's chat template has no place for tools; only a tool_choice that names one has an effect"
            note_ignored({"tools": len(variables.pop("tools"))}, {"tools": (None, why)})
        tools = variables.pop("tools", None)
        if self.has_own_tokenizer:
            if tools:
                variables["tools"] = tools
            text = template.render(read, **variables)
            return self.tokenize(text.encode(), add_bos=False, special=True)
        return self.llm.requests.chat_ids(read, tools, variables)


def _read(message: Mapping[str, Any], at: int) -> dict[str, Any]:
    """A message whose content is a text."""
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message  # type: ignore[return-value]  # whatever is wrong with it, the template's reader says so
    texts = []
    for part in message["content"]:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise ArgumentError(f"message {at} has a part of type {kind!r:.60}; this model reads text only")
        texts.append(part["text"])
    return {**message, "content": "\n".join(texts)}


def _chosen(tools: Sequence[Mapping[str, Any]] | None, choice: object) -> Mapping[str, Any] | None:
    """The function that must be called, if one is named."""
    if not isinstance(choice, Mapping) or tools is None:
        return None
    try:
        name = choice["function"]["name"]
        functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    except (KeyError, TypeError):
        raise ArgumentError('tools and tool_choice are {"type": "function", "function": {"name": ...}}') from None
    if name not in functions:
        raise ArgumentError(f"tool_choice names {name!r:.80}, which is none of the tools")
    return functions[name]  # type: ignore[no-any-return]


def _format(wanted: Mapping[str, Any] | None) -> Grammar | None:
    """What a response format allows."""
    kind = "text" if wanted is None else wanted.get("type")
    if wanted is None or kind == "text":
        return None
    if kind == "json_schema" and isinstance(wanted.get("json_schema"), Mapping):
        return json_grammar(wanted["json_schema"].get("schema", {}))
    if kind == "json_object":
        return json_grammar(wanted.get("schema") or {"type": "object"})
    raise ArgumentError(f"response_format has the type {kind!r:.60}; there are text, json_object and json_schema")
