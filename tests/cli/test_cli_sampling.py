"""Options of choosing a text, from llama-cli's names to those of the API."""

import inspect
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from phiquant.cli.commands import models
from phiquant.cli.failures import WrongUsage
from phiquant.cli.sampling import SamplingOptions
from phiquant.completion import Options
from phiquant.engine import Sampling
from phiquant.errors import GrammarError, RequestError
from phiquant.text.grammar import Grammar


def test_every_option_is_one_of_the_api() -> None:
    options = SamplingOptions(samplers="top_k", dry_sequence_breaker=(":",), json_schema="{}").sampling()
    assert options.keys() <= Options.__annotations__.keys()
    left_out = {"min_tokens", "stop", "stop_ids", "mask", "logprobs", "cache_prompt"}
    assert Options.__annotations__.keys() - options.keys() == left_out


def test_defaults_are_those_of_the_api() -> None:
    """They are written in three places, because the command line imports nothing large to say them."""
    run = inspect.signature(models.run).parameters
    for option in fields(SamplingOptions):
        told = run["temp" if option.name == "temperature" else option.name].default
        assert told == (None if option.default == () else option.default), option.name
    options, plain = SamplingOptions().sampling(), {option.name: option.default for option in fields(Sampling)}
    shared = (options.keys() & plain.keys()) - {"seed", "logit_bias"}
    assert len(shared) == 21
    assert {name: options[name] for name in shared} == {name: plain[name] for name in shared}  # type: ignore[literal-required]


@pytest.mark.parametrize(
    ("text", "meant"),
    [("15043+1", (15043, 1.0)), ("15043-1.5", (15043, -1.5)), ("2-inf", (2, -math.inf)), ("3+.5", (3, 0.5))],
)
def test_biases(text: str, meant: tuple[int, float]) -> None:
    assert SamplingOptions(logit_bias=(text,)).sampling()["logit_bias"] == dict([meant])


@pytest.mark.parametrize("text", ["", "5", "+1", "a+1", "5+", "5+x", "5*1", "-5+1", "5+1e9"])
def test_biases_that_cannot_be_read(text: str) -> None:
    with pytest.raises(WrongUsage, match="--logit-bias takes"):
        SamplingOptions(logit_bias=(text,)).sampling()


def test_breakers() -> None:
    assert "dry_sequence_breakers" not in SamplingOptions().sampling()
    assert SamplingOptions(dry_sequence_breaker=("none",)).sampling()["dry_sequence_breakers"] == []
    given = SamplingOptions(dry_sequence_breaker=("\\n", ":")).sampling()["dry_sequence_breakers"]
    assert given == ["\n", ":"]
    with pytest.raises(RequestError, match="--dry-sequence-breaker is empty"):
        SamplingOptions(dry_sequence_breaker=("",)).sampling()


def test_constraints(tmp_path: Path) -> None:
    (tmp_path / "g.gbnf").write_text('root ::= "é"\n', encoding="utf-8")
    (tmp_path / "s.json").write_text('{"type": "integer"}\n', encoding="utf-8")
    (tmp_path / "latin").write_bytes(b"\xe9")
    cases: list[tuple[dict[str, Any], Grammar]] = [
        ({"grammar": 'root ::= "x"'}, Grammar("gbnf", 'root ::= "x"')),
        ({"grammar_file": tmp_path / "g.gbnf"}, Grammar("gbnf", 'root ::= "é"')),
        ({"json_schema": '{"type": "integer"}'}, Grammar.json_schema({"type": "integer"})),
        ({"json_schema_file": tmp_path / "s.json"}, Grammar.json_schema({"type": "integer"})),
    ]
    for given, meant in cases:
        assert SamplingOptions(**given).sampling()["grammar"] == meant
    with pytest.raises(WrongUsage, match="--grammar and --json-schema are two constraints"):
        SamplingOptions(grammar="x", json_schema="{}").sampling()
    with pytest.raises(GrammarError, match="not valid JSON"):
        SamplingOptions(json_schema="{").sampling()
    with pytest.raises(RequestError, match="not text in UTF-8"):
        SamplingOptions(grammar_file=tmp_path / "latin").sampling()
    with pytest.raises(OSError):
        SamplingOptions(grammar_file=tmp_path / "none").sampling()
