"""Files of repositories as they are named in the wild."""

import pytest

from phiquant.errors import RequestError
from phiquant.hub.naming import choose, label_of, models_among

BARTOWSKI = ["README.md", *(f"Phi-3.5-mini-instruct-{kind}.gguf" for kind in ("IQ4_XS", "Q4_K_L", "Q4_K_M", "Q8_0"))]
MICROSOFT = ["Phi-3-mini-4k-instruct-fp16.gguf", "Phi-3-mini-4k-instruct-q4.gguf", "config.json"]
PARTS = [
    *(f"q4_k_m/phi-0000{i}-of-00003.gguf" for i in (3, 1, 2)),
    *(f"Q8_0/phi-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2)),
]


def chosen(files: list[str], quant: str | None = None) -> tuple[str, ...]:
    return choose(models_among(files), quant, "org/phi").files


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("Phi-3-mini-4k-instruct-q4.gguf", "Q4"),
        ("Phi-3-mini-4k-instruct-fp16.gguf", "F16"),
        ("phi.Q4_K_M.gguf", "Q4_K_M"),
        ("q4_k_m/phi-00001-of-00003.gguf", "Q4_K_M"),
        ("phi-UD-IQ2_XXS.gguf", "UD-IQ2_XXS"),
        ("phi-4-bf16.gguf", "BF16"),
        ("phi-mxfp4_moe.gguf", "MXFP4_MOE"),
        ("phi-Q4_0_4_4.gguf", "Q4_0_4_4"),
        ("Q4-team/phi-TQ1_0.gguf", "TQ1_0"),
        ("phi3.gguf", ""),
        ("FAQ1.gguf", ""),
        ("phi-q4b.gguf", ""),
    ],
)
def test_the_quant_is_read_from_a_path(path: str, label: str) -> None:
    assert label_of(path) == label


def test_a_quant_is_found_in_any_capitalisation_and_place() -> None:
    for quant in ("Q4_K_M", "q4_k_m", "Q4_k_M"):
        assert chosen(BARTOWSKI, quant) == ("Phi-3.5-mini-instruct-Q4_K_M.gguf",)
    assert chosen(BARTOWSKI, "IQ4_XS") == ("Phi-3.5-mini-instruct-IQ4_XS.gguf",)
    assert chosen(MICROSOFT, "Q4") == ("Phi-3-mini-4k-instruct-q4.gguf",)
    assert chosen(MICROSOFT, "F16") == chosen(MICROSOFT, "fp16") == ("Phi-3-mini-4k-instruct-fp16.gguf",)
    assert chosen(["phi-q4-v2.gguf", "phi-q8-v2.gguf"], "Q4") == ("phi-q4-v2.gguf",)


def test_a_word_of_the_name_will_do_where_no_quant_is_stated() -> None:
    assert chosen(["phi-small.gguf", "phi-large.gguf"], "LARGE") == ("phi-large.gguf",)


def test_a_part_of_a_quant_is_not_the_quant() -> None:
    for wrong in ("Q4_K", "Q4", "K_M", "4_XS", "Q4_XS"):
        with pytest.raises(RequestError, match=f"org/phi has no {wrong}; it has IQ4_XS, Q4_K_L, Q4_K_M, Q8_0"):
            chosen(BARTOWSKI, wrong)


def test_all_parts_of_a_split_model_come_in_their_order() -> None:
    assert chosen(PARTS) == chosen(PARTS, "Q4_K_M") == tuple(f"q4_k_m/phi-0000{i}-of-00003.gguf" for i in (1, 2, 3))
    assert chosen(PARTS, "q8_0") == ("Q8_0/phi-Q8_0-00001-of-00002.gguf", "Q8_0/phi-Q8_0-00002-of-00002.gguf")


def test_a_split_model_that_lacks_a_part_is_refused() -> None:
    with pytest.raises(RequestError, match="org/phi has 2 of the 3 parts of q4_k_m/phi-00001-of-00003"):
        chosen([PARTS[1], PARTS[2]])


def test_without_a_quant_it_is_q4_k_m_else_q8_0_else_the_first() -> None:
    assert chosen(BARTOWSKI) == ("Phi-3.5-mini-instruct-Q4_K_M.gguf",)
    assert chosen([name for name in BARTOWSKI if "Q4_K_M" not in name]) == ("Phi-3.5-mini-instruct-Q8_0.gguf",)
    assert chosen(MICROSOFT) == ("Phi-3-mini-4k-instruct-fp16.gguf",)


def test_projectors_and_importance_matrices_are_no_models() -> None:
    files = [
        "mmproj-Phi-3-Q4_K_M.gguf",
        "sub/Phi-MMPROJ-f16.gguf",
        "Phi-3-imatrix.gguf",
        "imatrix.dat",
        "phi-Q5_K_M.gguf",
    ]
    assert [model.files for model in models_among(files)] == [("phi-Q5_K_M.gguf",)]
    assert chosen(["phi-imatrix-Q4_K_M.gguf"]) == ("phi-imatrix-Q4_K_M.gguf",)
    with pytest.raises(RequestError, match="org/phi holds no GGUF model"):
        chosen(["mmproj-Q4_K_M.gguf"])


def test_several_models_of_a_quant_are_listed() -> None:
    files = ["phi-3-mini-Q4_K_M.gguf", "phi-3-medium-q4_k_m.gguf"]
    for quant in ("Q4_K_M", None):
        with pytest.raises(
            RequestError,
            match="org/phi has several models that are Q4_K_M; name one of them: "
            r"org/phi:phi-3-mini-Q4_K_M\.gguf, org/phi:phi-3-medium-q4_k_m\.gguf\.",
        ):
            chosen(files, quant)


def test_a_long_list_of_choices_is_cut() -> None:
    with pytest.raises(RequestError, match=r"model-23\.gguf and 6 more\."):
        chosen([f"model-{i}.gguf" for i in range(30)], "Q2_K")
