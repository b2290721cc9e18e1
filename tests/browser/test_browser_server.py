"""The chat page with the server it belongs to and the bundled model, as `phiquant serve` runs them."""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from page_visit import SIZES, Open, expect

from phiquant.convert import convert

pytestmark = pytest.mark.browser

MODEL = Path(__file__).parents[2] / "models" / "phi3-tiny"


@dataclass
class Served:
    url: str


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    file = tmp_path_factory.mktemp("page") / "tiny.gguf"
    convert(MODEL, file, "q8_0")
    command = [sys.executable, "-m", "phiquant", "serve", "-m", str(file), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if found := re.search(r"serving tiny at (http://\S+)", line):
                    yield Served(found[1].rstrip("/") + "/")
                    break
            else:
                pytest.fail("the server ended before it served")
        finally:
            process.terminate()
            process.communicate()  # also reads the log, which must not fill the pipe


@pytest.mark.parametrize("size", SIZES)
def test_the_bundled_model_answers_is_stopped_regenerates_and_is_found_again(visit: Open, size: str) -> None:
    on = visit(size)
    expect(on.find("#model")).to_have_value("tiny")
    expect(on.find("#context")).to_have_text("Context of 2,048 tokens")
    on.button("Settings").click()
    on.page.get_by_label("Max tokens").fill("1500")
    on.page.keyboard.press("Escape")
    on.write("Tell me a story about an old man and a little girl.")
    expect(on.answer.locator(".prose")).to_have_text(re.compile(r"\w+ \w+"))
    on.button("Stop").click()
    on.done(2)
    expect(on.answer).to_contain_text("stopped")

    on.button("Settings").click()
    on.page.get_by_label("Max tokens").fill("20")
    on.page.get_by_label("Seed").fill("5")
    on.page.keyboard.press("Escape")
    texts = []
    for _ in range(2):
        on.answer.get_by_role("button", name="Regenerate").click()
        on.done(2)
        texts.append(on.answer.locator(".prose").inner_text())
        expect(on.answer.locator(".stats")).to_contain_text("cut off at 20 tokens·20 tokens")
        expect(on.answer.locator(".stats")).to_contain_text("tokens/s")
    assert texts[0] == texts[1]  # the seed was sent and heard
    expect(on.find("#context")).to_have_text(re.compile(r"Context used: \d\d of 2,048 tokens"))
    on.page.reload()
    expect(on.answer.locator(".prose")).to_have_text(texts[1])


def test_a_refusal_of_the_server_is_shown(visit: Open) -> None:
    on = visit()
    on.expected = re.compile("400")
    on.write("word " * 9000)
    expect(on.find(".failure span")).to_contain_text("does not fit the context of 2048")
