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
from phiquant.text.grammar import Constraint, Constraints, Grammar


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


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", "((a{0,1000}){0,1000}){0,1000}"),
        Grammar("regex", "(a|b)*a(a|b){400}"),
        Grammar("gbnf", "root ::= root root | " + " | ".join(f'"{i}"' for i in range(3000))),
        Grammar("json_schema", json.dumps({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}})),
        Grammar("json_schema", json.dumps({"type": "array", "minItems": 10**9})),
    ],
    ids=lambda g: g.text[:20],
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
