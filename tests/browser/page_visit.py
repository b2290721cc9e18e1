"""A person at the page: what they see, press and write, at the size of a desk or of a phone."""

import re
import time
from collections.abc import Callable
from typing import Any

SIZES = {"desktop": (1280, 800), "phone": (390, 844)}


def expect(*given: Any) -> Any:
    """Playwright's; imported when it is used, so that tests can be collected without it."""
    from playwright.sync_api import expect

    return expect(*given)


class Visit:
    """A page that is open; what it must not do is remembered for the end of the test."""

    def __init__(self, browser: Any, url: str, size: str = "desktop", scheme: str = "light") -> None:
        width, height = SIZES[size]
        phone = size == "phone"
        self.phone, self.url = phone, url
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=phone, is_mobile=phone
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.troubles: list[str] = []
        self.expected = re.compile(r"(?!)")  # what the console may say in this test
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.troubles.append(f"error: {error}"))
        self.page.on("request", self._request)
        self.open()

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning") and not self.expected.search(message.text):
            self.troubles.append(f"console: {message.text}")

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.url, "blob:", "data:")):
            self.troubles.append(f"request to {request.url}")

    def open(self) -> None:
        self.page.goto(self.url)
        expect(self.page.locator("#model")).not_to_have_value("")

    def find(self, selector: str, **more: Any) -> Any:
        return self.page.locator(selector, **more)

    def button(self, name: str, **more: Any) -> Any:
        return self.page.get_by_role("button", name=name, exact=True, **more)

    def write(self, text: str) -> None:
        self.find("#prompt").fill(text)
        expect(self.find("#send")).to_be_enabled()
        if self.phone:
            self.find("#send").tap()
        else:
            self.find("#prompt").press("Enter")

    def ask(self, text: str) -> None:
        """Send a message and wait for the whole answer."""
        before = self.find(".message").count()
        self.write(text)
        self.done(before + 2)

    def done(self, messages: int) -> None:
        expect(self.find(".message")).to_have_count(messages)
        expect(self.find(".running")).to_have_count(0, timeout=20_000)

    @property
    def answer(self) -> Any:
        return self.find(".answer").last

    def drawer(self, open_: bool = True) -> None:
        """On a phone, show or hide the conversations; on a desk they are there."""
        if self.phone and open_:
            self.button("Show conversations").click()
            expect(self.find("#main")).to_have_attribute("inert", "")

    def run(self, script: str, argument: Any = None) -> Any:
        return self.page.evaluate(script, argument)

    def close(self) -> None:
        self.context.close()
        assert self.troubles == []


Open = Callable[..., Visit]


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
