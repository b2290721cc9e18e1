"""Our key names are those of the `gguf` package."""

from collections.abc import Iterator

import gguf
from phiquant.gguf import keys

# Keys of llama.cpp that the package of this version does not name.
UNNAMED = {keys.CLS_ID, *(value for name, value in vars(keys).items() if name.startswith("QUANTIZE_IMATRIX_"))}


def strings(holder: type) -> Iterator[str]:
    for value in vars(holder).values():
        if isinstance(value, str):
            yield value
        elif isinstance(value, type):
            yield from strings(value)


KNOWN = set(strings(gguf.Keys))


def test_constants_are_known_names() -> None:
    ours = {value for name, value in vars(keys).items() if name.isupper()}
    assert len(ours) > 60
    assert {key for key in ours if key not in KNOWN and not key.startswith("phiquant.")} == UNNAMED


def test_keys_of_an_architecture_are_known_names() -> None:
    ours = set(vars(keys.ArchitectureKeys("{arch}")).values())
    assert len(ours) == 23
    assert ours <= KNOWN
    assert keys.ArchitectureKeys("phi3").head_count_kv == "phi3.attention.head_count_kv"


def test_numbered_keys() -> None:
    assert keys.base_model(3, "name") == gguf.Keys.General.BASE_MODEL_NAME.format(id=3)
    assert keys.dataset(0, "url") == gguf.Keys.General.DATASET_URL.format(id=0)
    assert keys.chat_template("tools") == gguf.Keys.Tokenizer.CHAT_TEMPLATE_N.format(name="tools")
