"""Chromium, and pages in it that have to behave."""

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from page_visit import Open, Visit

NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed; make browser does that"
    )
    chromium = os.environ.get("PHIQUANT_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if chromium is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium), or PHIQUANT_CHROMIUM must name it")
    with playwright.sync_playwright() as driver:
        # Chromium's own sandbox does not work for root, as whom containers run.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        launched = driver.chromium.launch(executable_path=chromium, args=arguments)
        yield launched
        launched.close()


@pytest.fixture
def visit(browser: Any, server: Any) -> Iterator[Open]:
    """Opens the page of the module's `server`; at the end none of them may have done what pages must not."""
    opened: list[Visit] = []

    def open_page(size: str = "desktop", scheme: str = "light") -> Visit:
        opened.append(Visit(browser, server.url, size, scheme))
        return opened[-1]

    yield open_page
    for one in opened:
        one.close()
