"""Grammars as masks over real vocabularies: what is allowed, what may end, what is refused."""

import json
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiquant.errors import GrammarError
from phiquant.text import Tokenizer
from phiquant.text.grammar import MOST_TEXT, Constraint, Constraints, Grammar


@pytest.fixture(scope="module")
def constraints(tokenizer: Tokenizer) -> Constraints:
    return Constraints(tokenizer)


def walk(constraint: Constraint, tokenizer: Tokenizer, seed: int, most: int = 400) -> str:
    """A random text that the mask allows, ended as soon as it may be after a while."""
    chance, ids = random.Random(seed), []
    for step in range(most):
        allowed = constraint.allowed()
        ends = [i for i in tokenizer.eog_ids if allowed[i]]
        if ends and (step > most // 2 or chance.random() < 0.3 or allowed.sum() == len(ends)):
            constraint.accept(ends[0])
            return b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8")
        choices = np.flatnonzero(allowed)
        assert len(choices), "a dead end"
        token = int(chance.choice(choices))
        if token in tokenizer.eog_ids:
            continue
        ids.append(token)
        constraint.accept(token)
    raise AssertionError("it does not end")


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Bo"]}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(10))
def test_a_schema_is_followed(constraints: Constraints, tokenizer: Tokenizer, seed: int) -> None:
    found = json.loads(walk(constraints.constraint(Grammar.json_schema(SCHEMA)), tokenizer, seed))
    assert found["name"] in ("Ada", "Bo")
    assert 0 <= found["age"] <= 150
    assert found.keys() == {"name", "age"}


@pytest.mark.parametrize("seed", range(10))
def test_a_regular_expression_is_followed(constraints: Constraints, tokenizer: Tokenizer, seed: int) -> None:
    pattern = r"[a-z]{3,8}(, (été|猫|🙂)){1,3}\."
    assert re.fullmatch(pattern, walk(constraints.constraint(Grammar("regex", pattern)), tokenizer, seed))


@pytest.mark.parametrize("seed", range(5))
def test_grammars_of_llama_cpp_and_lark_say_the_same(constraints: Constraints, tokenizer: Tokenizer, seed: int) -> None:
    gbnf = 'root ::= item ("+" item)*\nitem ::= [0-9]+ | "(" root ")"\n'
    lark = 'start: item ("+" item)*\nitem: /[0-9]+/ | "(" start ")"\n'
    for kind, text in (("gbnf", gbnf), ("lark", lark)):
        found = None
        for attempt in range(20):  # a random walk may go deeper than its steps reach
            try:
                found = walk(constraints.constraint(Grammar(kind, text)), tokenizer, 100 * seed + attempt, 60)  # type: ignore[arg-type]
                break
            except AssertionError:
                continue
        assert found is not None
        assert set(found) <= set("0123456789+()")
        assert found.count("(") == found.count(")")


def test_nothing_comes_after_the_end(constraints: Constraints, tokenizer: Tokenizer) -> None:
    constraint = constraints.constraint(Grammar("regex", "yes"))
    assert not any(constraint.allowed()[i] for i in tokenizer.eog_ids)
    ids = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"yes"]
    constraint.accept(ids[0])
    assert set(np.flatnonzero(constraint.allowed())) == set(tokenizer.eog_ids)


def test_special_tokens_never_come(constraints: Constraints, tokenizer: Tokenizer) -> None:
    allowed = constraints.constraint(Grammar("regex", r"(.|\n)*")).allowed()
    silent = [i for i in range(tokenizer.vocab_size) if not tokenizer.token_bytes(i)]
    assert not allowed[[i for i in silent if i not in tokenizer.eog_ids]].any()
    assert allowed.sum() > 30000


@pytest.mark.parametrize(
    ("grammar", "what"),
    [
        (lambda: Grammar.json_schema("{"), "not valid JSON"),
        (lambda: Grammar.json_schema("[1]"), "is an object, not list"),
        (lambda: Grammar("regex", "a("), "regular expression cannot be used"),
        (lambda: Grammar("lark", "start: missing"), "Lark grammar cannot be used"),
        (lambda: Grammar("gbnf", "root ::= ("), "the grammar cannot be used"),
        (lambda: Grammar("gbnf", "nothing here"), "the grammar cannot be used"),
        (lambda: Grammar("json_schema", '{"type": "nonsense"}'), "JSON schema cannot be used"),
        (lambda: Grammar("regex", "x" * (1 << 21)), "characters"),
    ],
)
def test_what_is_no_grammar_is_refused(constraints: Constraints, grammar: Any, what: str) -> None:
    with pytest.raises(GrammarError, match=what) as caught:
        constraints.constraint(grammar())
    assert "\n" not in str(caught.value)


def chained(rules: int, form: str) -> Grammar:
    """Rules that refer each to the next."""
    lines = [f"r{i} ::= {form.format(f'r{i + 1}')}" for i in range(rules)]
    return Grammar("gbnf", "\n".join(["root ::= r0", *lines, f'r{rules} ::= "x"']))


def test_what_a_grammar_is_too_large_for_is_said(constraints: Constraints) -> None:
    for grammar, told in (
        (chained(100, "{0} {0}"), "more than 8,192 characters"),
        (chained(600, '"x" {0}'), "more than 100,000 parts"),
        (chained(1000, "{0}"), "1,002 rules"),
        (Grammar("gbnf", f'root ::= "{"x" * 9000}"'), "more than 8,192 characters"),
        (Grammar.json_schema({"enum": ["x" * 9000]}), "9,000 characters"),
        (Grammar.json_schema({"properties": {"x" * 9000: {}}}), "9,000 characters"),
    ):
        with pytest.raises(GrammarError, match=told):
            constraints.constraint(grammar)
    for kind, most in MOST_TEXT.items():
        with pytest.raises(GrammarError, match=f"has {most + 1:,} characters; {most:,} are the most"):
            Grammar(kind, "x" * (most + 1))
    assert constraints.constraint(chained(300, '"x" {0}')).allowed().any()
    assert constraints.constraint(chained(300, '"x" {0} | "y" root | "z"')).allowed().any()  # no terminals
    assert constraints.constraint(Grammar.json_schema({"type": "string", "description": "x" * 9000})).allowed().any()


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", "((a{0,1000}){0,1000}){0,1000}"),
        Grammar("regex", "(a|b)*a(a|b){400}"),
        Grammar("gbnf", "root ::= root root | " + " | ".join(f'"{i}"' for i in range(3000))),
        Grammar("json_schema", json.dumps({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}})),
        Grammar("json_schema", json.dumps({"type": "array", "minItems": 10**9})),
        Grammar(
            "gbnf", "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1} r{i + 1}\n" for i in range(1400)) + 'r1400 ::= "x"'
        ),
        chained(1400, "{0} {0}"),
        chained(900, "{0} {0}"),
        chained(900, '"x" {0}'),
        chained(100, "{0} {0} | {0}"),
        Grammar("gbnf", 'root ::= r r\nr ::= "' + "a" * 8_000 + '"'),
        Grammar("json_schema", json.dumps({"const": "a" * 8_000})),
        Grammar("gbnf", 'root ::= "' + "a" * 65_000 + '"'),
        Grammar("gbnf", "root ::= " + '"a" | ' * 10_000 + '"a"'),
        Grammar("gbnf", "#\n" * 32_000 + 'root ::= "a"'),
        Grammar("json_schema", json.dumps({"const": "a" * 260_000})),
        Grammar("json_schema", json.dumps({"enum": [f"x{i}" for i in range(26_000)]})),
        Grammar("json_schema", json.dumps({"type": "string", "pattern": "(a|b|c)?" * 30_000})),
    ],
    ids=lambda g: f"{g.kind} {g.text[:40]}",
)
def test_grammars_that_explode_are_bounded(constraints: Constraints, tokenizer: Tokenizer, grammar: Grammar) -> None:
    """Refused, or followed at a price that is bounded."""
    begin = time.perf_counter()
    try:
        constraint = constraints.constraint(grammar)
        for _ in range(20):
            allowed = constraint.allowed()
            choices = [i for i in np.flatnonzero(allowed)[:5] if i not in tokenizer.eog_ids]
            if not choices:
                break
            constraint.accept(int(choices[0]))
    except GrammarError:
        pass
    assert time.perf_counter() - begin < 30  # a bound of sanity; the limits are counted in steps


def test_the_module_costs_nothing_until_it_is_used() -> None:
    import subprocess
    import sys

    program = "import sys, phiquant.text.grammar; assert 'llguidance' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent)
