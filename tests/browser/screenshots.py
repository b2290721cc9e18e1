"""Pictures of the chat page for the documentation: python tests/browser/screenshots.py FOLDER."""

import shutil
import sys
from pathlib import Path

from fake_chat import Canned, FakeChat
from page_visit import SIZES, Visit
from playwright.sync_api import sync_playwright

ANSWER = (Path(__file__).parent / "answer.md").read_text()
QUESTION = "How does a binary search work, and how fast is it?"
OTHERS = ("Three rivers of Lapland", "A packing list for a week in the mountains", "Why is the evening sky red?")


def main(folder: Path) -> None:
    """Take one at each size in each appearance; those of phones show the end of the answer."""
    folder.mkdir(parents=True, exist_ok=True)
    canned = Canned(answers={"": "Certainly.", QUESTION: ANSWER})
    with FakeChat(canned) as server, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for size, size_of in SIZES.items():
            for scheme in ("light", "dark"):
                on = Visit(browser, server.url, size, scheme)
                for question in (*OTHERS, QUESTION):
                    on.button("New conversation").locator("visible=true").first.click()
                    on.ask(question)
                if not on.phone:
                    on.run("document.getElementById('scroll').scrollTop = 0")
                on.page.mouse.move(size_of[0] / 2, size_of[1] / 2)
                on.page.wait_for_timeout(500)
                on.page.screenshot(path=folder / f"chat-{size}-{scheme}.png")
                on.close()
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
