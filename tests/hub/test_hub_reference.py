"""What users write for a model of the Hub."""

import pytest

from phiquant.errors import RequestError
from phiquant.hub import Reference


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("org/name", ("org/name", None, None, None)),
        ("org/name:Q4_K_M", ("org/name", None, "Q4_K_M", None)),
        ("org/na.me-1_x:q8_0", ("org/na.me-1_x", None, "q8_0", None)),
        ("org/name@v1", ("org/name", "v1", None, None)),
        ("org/name@refs/pr/1:F16", ("org/name", "refs/pr/1", "F16", None)),
        ("org/name:sub/model-q4.gguf", ("org/name", None, None, "sub/model-q4.gguf")),
        ("org/name/sub/model.GGUF@v1", ("org/name", "v1", None, "sub/model.GGUF")),
    ],
)
def test_names_are_read(text: str, parts: tuple[str, str | None, str | None, str | None]) -> None:
    read = Reference.parse(text)
    assert (read.repository, read.revision, read.quant, read.file) == parts


@pytest.mark.parametrize(
    "text",
    [
        *("", "name", "a/b/c", "a b/c", "org/name:", "org/name@", "org/..", "org/name@../x", "org/name@/etc", "\0"),
        *("ä/b", "https://huggingface.co/org/name", "org/name/x.gguf:Q4_K_M", "org/name:../x", "org/name:/etc/x.gguf"),
        "x" * 999,
    ],
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="is no model of the Hub; write owner/name"):
        Reference.parse(text)


def test_a_quant_and_a_revision_may_be_said_apart() -> None:
    assert Reference.of("org/name", "Q4_K_M", "v1") == Reference.parse("org/name@v1:Q4_K_M")
    assert Reference.of("org/name@v1", "x.gguf") == Reference.parse("org/name@v1:x.gguf")
    assert Reference.of("org/name:Q8_0", revision="v1") == Reference.parse("org/name@v1:Q8_0")
    for twice in (("org/name:Q8_0", "Q8_0", None), ("org/name@v1", None, "v1")):
        with pytest.raises(RequestError, match="names a quant or a revision already"):
            Reference.of(*twice)


@pytest.mark.parametrize("text", ["org/name", "org/name:Q4_K_M", "org/name@v1:F16", "org/name:sub/x.gguf"])
def test_names_are_written_as_they_are_read(text: str) -> None:
    assert str(Reference.parse(text)) == text
