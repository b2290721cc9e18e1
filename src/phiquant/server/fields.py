"""Fields that several families' requests share, with their ranges; None is as good as not given."""

from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict

from phiquant.completion import Options
from phiquant.errors import RequestError
from phiquant.server.failures import refuse
from phiquant.text.grammar import Grammar

__all__ = [
    "MOST_TOKENS",
    "Body",
    "JsonSchema",
    "LlamaSampling",
    "Name",
    "Number",
    "ResponseFormat",
    "Stop",
    "Stops",
    "Switch",
    "Whole",
    "bias_of",
    "grammar_of",
    "seed_of",
    "stops_of",
]

MOST_TOKENS: Final = 1 << 30


def _number(value: object) -> object:
    """1.0 is 1, as JSON has it; true and "1" are not."""
    if isinstance(value, bool | str):
        raise ValueError("must be a number")
    return value


Whole = Annotated[int, BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number)]
Switch = Annotated[bool, Strict()]  # true or false, and neither 1 nor "yes"
Name = Annotated[str, Field(max_length=500)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Stops = Annotated[list[Stop], Field(max_length=64)] | Annotated[str, Field(min_length=1, max_length=1000)]


class Body(BaseModel):
    """A request's body; what is not declared is ignored, unless a family says otherwise."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())

    def given(self, names: Iterable[str]) -> Any:
        """Those of these fields that are not None, as a dictionary: options of the engine."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class LlamaSampling(Body):
    """llama-server's names for what a sampler can be told, on all endpoints but those whose clients have their own."""

    top_k: Annotated[Whole, Field(ge=-1, le=1 << 30)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_n_sigma: Annotated[Number, Field(ge=-1, le=1000)] | None = None
    xtc_probability: Annotated[Number, Field(ge=0, le=1)] | None = None
    xtc_threshold: Annotated[Number, Field(ge=0, le=1)] | None = None
    dynatemp_range: Annotated[Number, Field(ge=0, le=100)] | None = None
    dynatemp_exponent: Annotated[Number, Field(ge=0, le=100)] | None = None
    repeat_penalty: Annotated[Number, Field(gt=0, le=100)] | None = None
    repeat_last_n: Annotated[Whole, Field(ge=-1, le=1 << 30)] | None = None
    dry_multiplier: Annotated[Number, Field(ge=0, le=100)] | None = None
    dry_base: Annotated[Number, Field(ge=0, le=100)] | None = None
    dry_allowed_length: Annotated[Whole, Field(ge=0, le=1 << 30)] | None = None
    dry_penalty_last_n: Annotated[Whole, Field(ge=-1, le=1 << 30)] | None = None
    dry_sequence_breakers: Annotated[list[Annotated[str, Field(max_length=100)]], Field(max_length=100)] | None = None
    mirostat: Annotated[Whole, Field(ge=0, le=2)] | None = None
    mirostat_tau: Annotated[Number, Field(gt=0, le=1000)] | None = None
    mirostat_eta: Annotated[Number, Field(gt=0, le=1000)] | None = None
    samplers: (
        Annotated[list[Annotated[str, Field(max_length=50)]], Field(max_length=50)]
        | Annotated[str, Field(max_length=1000)]
        | None
    ) = None
    min_tokens: Annotated[Whole, Field(ge=0, le=MOST_TOKENS)] | None = None
    ignore_eos: Switch | None = None
    cache_prompt: Switch | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | Switch | None = None

    def sampling(self) -> Options:
        """What was given, as the engine's options."""
        options: Options = self.given(set(LlamaSampling.model_fields) - {"grammar", "json_schema"})
        if "top_k" in options:
            options["top_k"] = max(options["top_k"], 0)
        return options


class JsonSchema(Body):
    """OpenAI's wrapper around a schema."""

    name: Name = ""
    description: str | None = None
    schema_: dict[str, Any] | Switch | None = Field(default=None, alias="schema")
    strict: Switch | None = None


class ResponseFormat(Body):
    """What an answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | Switch | None = Field(default=None, alias="schema")  # llama-server's, beside json_object


def grammar_of(
    form: ResponseFormat | None, grammar: str | None, schema: dict[str, Any] | bool | None
) -> Grammar | None:
    """The one constraint that a request asks for, if it does. Failure 400 for two."""
    asked: list[Grammar] = []
    try:
        if form is not None and form.type == "json_schema":
            wrapped = form.json_schema
            if wrapped is None and form.schema_ is None:
                raise refuse("response_format.json_schema is missing", "response_format.json_schema")
            inner = form.schema_ if wrapped is None else wrapped.schema_
            asked.append(Grammar.json() if inner is None else Grammar.json_schema(inner))
        elif form is not None and form.type == "json_object":
            asked.append(Grammar.json() if form.schema_ is None else Grammar.json_schema(form.schema_))
        if grammar:
            asked.append(Grammar("gbnf", grammar))
        if schema is not None:
            asked.append(Grammar.json_schema(schema))
    except RequestError as error:
        raise refuse(str(error), "response_format") from error
    if len(asked) > 1:
        raise refuse("response_format, grammar and json_schema exclude one another; give one", "response_format")
    return asked[0] if asked else None


def stops_of(stop: list[str] | str | None) -> list[str]:
    """Stop texts as a list."""
    return [] if stop is None else [stop] if isinstance(stop, str) else list(stop)


def bias_of(bias: dict[str, float] | None, vocabulary: int) -> dict[int, float]:
    """OpenAI's logit_bias, whose keys are token ids in texts. Failure 400 for what is none."""
    found = {}
    for key, value in (bias or {}).items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocabulary):
            raise refuse(f"logit_bias: {key[:30]!r} is no token id from 0 to {vocabulary - 1}", "logit_bias")
        found[int(key)] = value
    return found


def seed_of(seed: int | None) -> int | None:
    """A seed as the engine takes it: any 64 bits; negative ones, as everywhere, stand for chance only as -1."""
    return None if seed is None or seed == -1 else seed % (1 << 64)
