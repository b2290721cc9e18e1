"""general.*: names taken apart, model cards, sampling defaults. Expectations were taken from llama.cpp's converter."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gguf
from phiquant.convert.metadata import NameParts, general_metadata, model_name, parse_name, read_model_card, size_label
from phiquant.errors import CheckpointError

CARD = """---
license: mit
license_link: https://huggingface.co/microsoft/Phi-3.5-mini-instruct/resolve/main/LICENSE
language:
- multilingual
- no
pipeline_tag: text-generation
tags:
- nlp
- code
base_model: microsoft/Phi-3.5-mini-instruct
datasets:
- org/set-v1.5
- https://huggingface.co/datasets/org/x
---
# Phi
"""


def general(
    name: str = "Phi-3.5-mini-instruct", card: str = "", parameters: int = 3_821_079_552, **parts: Any
) -> dict[str, Any]:
    entries = general_metadata(
        "phi3", name, read_model_card(card), parts.get("config", {}), parts.get("generation", {}), parameters
    )
    assert len({entry.key for entry in entries}) == len(entries)
    return {entry.key.removeprefix("general."): entry.value for entry in entries}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Phi-3.5-mini-instruct", ("Phi-3.5", "instruct", None, "mini")),
        ("Phi-3-mini-4k-instruct", ("Phi-3", "4k-instruct", None, "mini")),
        ("Phi-3-mini-128k-instruct", ("Phi-3", "128k-instruct", None, "mini")),
        ("Phi-3-medium-128k-instruct", ("Phi-3", "128k-instruct", None, "medium")),
        ("phi-4", ("phi", None, "4", None)),
        ("Phi-4-mini-instruct", ("Phi-4", "instruct", None, "mini")),
        ("phi3-tiny", (None, None, None, None)),
        ("Llama-3.2-3B-Instruct-v2", ("Llama-3.2", "Instruct", "v2", "3B")),
        ("My Own Model", (None, None, None, None)),
        ("model-F16-3b", ("model", None, None, "3B")),
        ("x-7b1-chat", ("x", "chat", None, "7.1B")),
    ],
)
def test_names(name: str, expected: tuple[str | None, ...]) -> None:
    found = parse_name(name, 3_821_079_552)
    assert (found.basename, found.finetune, found.version, found.size_label) == expected
    assert found.name == name


PARTS = (
    *(
        "phi",
        "Phi",
        "Phi3",
        "3",
        "3.5",
        "v2",
        "iter7",
        "mini",
        "MEDIUM",
        "small",
        "4k",
        "128k",
        "7b",
        "7b1",
        "1_5B",
        "A3B",
        "8x7B",
    ),
    *(
        "instruct",
        "Chat",
        "vision",
        "lora",
        "Q4_K_M",
        "IQ2",
        "fp16",
        "BF16",
        "awq",
        "",
        "gguf",
        "270M",
        "3.8b",
        "xl",
        "XXL",
        "t",
    ),
)


@given(parts=st.lists(st.sampled_from(PARTS), min_size=1, max_size=6), owner=st.sampled_from(["", "org/", "./", "../"]))
@settings(max_examples=1000)
@pytest.mark.parametrize("parameters", [0, 3_821_079_552, 15_000_000])
def test_names_are_taken_apart_as_gguf_py_does(parameters: int, parts: list[str], owner: str) -> None:
    name = owner + "-".join(parts)
    full, organization, basename, finetune, version, size = gguf.Metadata.get_model_id_components(name, parameters)
    found = parse_name(name, parameters)
    assert (found.name, found.basename, found.finetune, found.version, found.size_label) == (
        full,
        basename,
        finetune,
        version,
        size,
    )
    assert found.organization == (organization or None)


def test_organization_in_a_name() -> None:
    assert parse_name("microsoft/Phi-3.5-mini-instruct", 10**9).organization == "microsoft"
    assert parse_name("./phi", 10**9) == NameParts(name="phi")
    assert parse_name("") == NameParts(name="")


def test_keys_from_a_name_and_a_card() -> None:
    assert general(card=CARD) == {
        "architecture": "phi3",
        "type": "model",
        "name": "Phi-3.5-mini-instruct",
        "finetune": "instruct",
        "basename": "Phi-3.5",
        "size_label": "mini",
        "license": "mit",
        "license.link": "https://huggingface.co/microsoft/Phi-3.5-mini-instruct/resolve/main/LICENSE",
        "base_model.count": 1,
        "base_model.0.name": "Phi 3.5 Mini Instruct",
        "base_model.0.organization": "Microsoft",
        "base_model.0.repo_url": "https://huggingface.co/microsoft/Phi-3.5-mini-instruct",
        "dataset.count": 2,
        "dataset.0.name": "Set v1.5",
        "dataset.0.version": "v1.5",
        "dataset.0.organization": "Org",
        "dataset.0.repo_url": "https://huggingface.co/org/set-v1.5",
        "dataset.1.repo_url": "https://huggingface.co/datasets/org/x",
        "tags": ["nlp", "code", "text-generation"],
        "languages": ["multilingual", "no"],
    }


def test_the_name_keeps_its_hyphens_whatever_its_source() -> None:
    assert general("Phi-3-mini")["name"] == "Phi-3-mini"
    assert general("snapshot", config={"_name_or_path": "microsoft/Phi-3-mini-4k"})["name"] == "Phi-3-mini-4k"
    assert general("snapshot", config={"_name_or_path": "/home/me/models/x"})["name"] == "snapshot"
    assert general("snapshot", card="---\nmodel_name: Phi-3 of mine\n---\n")["name"] == "Phi-3 of mine"


def test_a_directory_of_the_hubs_cache_is_named_by_its_repository(tmp_path: Path) -> None:
    path = tmp_path / "models--microsoft--Phi-3.5-mini-instruct" / "snapshots" / ("0" * 40)
    path.mkdir(parents=True)
    assert model_name(path) == "Phi-3.5-mini-instruct"
    assert model_name(tmp_path) == tmp_path.name


@pytest.mark.parametrize(
    ("count", "label"),
    [
        (3_821_079_552, "3.8B"),
        (14_659_507_200, "15B"),
        (15_025_000, "15M"),
        (999, "1.0K"),
        (1_000_000, "1000K"),
        (2 * 10**12, "2.0T"),
    ],
)
def test_size_labels(count: int, label: str) -> None:
    assert size_label(count) == label


def test_sampling_defaults() -> None:
    found = general(
        generation={
            "temperature": 0.7,
            "top_k": 50,
            "top_p": 1,
            "repetition_penalty": 1.1,
            "min_p": None,
            "do_sample": True,
        }
    )
    assert {key: value for key, value in found.items() if key.startswith("sampling")} == {
        "sampling.top_k": 50,
        "sampling.top_p": 1,
        "sampling.temp": 0.7,
        "sampling.penalty_repeat": 1.1,
    }


@pytest.mark.parametrize("value", ["hot", True, [0.7], float("nan"), 1e300])
def test_sampling_defaults_of_a_wrong_kind(value: Any) -> None:
    with pytest.raises(CheckpointError, match="temperature"):
        general(generation={"temperature": value})


@pytest.mark.parametrize(
    "card", ["", "# no block", "---\nunfinished: 1\n", "---\n- a\n- list\n---\n", "--- \nx: 1\n---\n"]
)
def test_cards_without_a_block(card: str) -> None:
    assert read_model_card(card) == {}


@pytest.mark.parametrize("block", ["a: [", "a: !!python/object/apply:os.system ['true']", "{" * 5000, "a: 2020-99-99"])
def test_bad_cards_are_one_sentence(block: str) -> None:
    with pytest.raises(CheckpointError, match=r"README\.md"):
        read_model_card(f"---\n{block}\n---\n")


def test_a_card_cannot_grow() -> None:
    """Ten levels of ten aliases each would be 10^10 items if they were ever printed."""
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 11)]
    card = "\n".join(
        ["---", "a0: &a0 [x, x]", *levels, "license: *a10", "tags: *a10", "version: *a10", "author: 0x" + "f" * 9999]
    )
    card += "\nbase_model:\n- name: *a10\n  organization: Me\n---\n"
    found = general(card=card)
    assert found["base_model.0.organization"] == "Me"
    assert not {"license", "tags", "version", "author", "base_model.0.name"} & set(found)


def test_odd_values_in_a_card() -> None:
    found = general(
        card="---\nlicense: [mit, apache-2.0]\ntags: one\nlanguage: [en, 7]\nversion: 2\nauthor: {a: 1}\n---\n"
    )
    assert found["license"] == "mit,apache-2.0"
    assert found["tags"] == ["one"]
    assert found["languages"] == ["en"]
    assert found["version"] == "2"
    assert "author" not in found
