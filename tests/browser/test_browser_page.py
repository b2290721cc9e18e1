"""The chat page in Chromium: what people do on it, at the size of a desk and of a phone."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_chat import CONTEXT, Canned, FakeChat
from page_visit import SIZES, Open, Visit, expect, until

pytestmark = pytest.mark.browser

LONG = "\n\n".join(f"Paragraph {n} has **some** words, and `code` too." for n in range(60))
RICH = (Path(__file__).parent / "answer.md").read_text()


@pytest.fixture
def server() -> Iterator[FakeChat]:
    with FakeChat(Canned(answers={"": "A short answer.", "long": LONG, "rich": RICH})) as running:
        yield running


@pytest.mark.parametrize("size", SIZES)
def test_a_message_is_answered_stopped_regenerated_edited_and_found_again(
    visit: Open, server: FakeChat, size: str
) -> None:
    on = visit(size)
    bodies = server.canned.bodies
    on.write("long")
    expect(on.answer).to_contain_text("Paragraph 1 has some words")
    assert "Paragraph 59" not in on.answer.inner_text()  # it is being streamed
    expect(on.answer).to_have_attribute("aria-busy", "true")
    on.button("Stop").click()
    on.done(2)
    expect(on.answer.locator(".stats")).to_have_text(re.compile(r"^stopped·≈ [\d.]+ tokens/s"))
    until(lambda: server.canned.cancelled == 1)
    stopped = on.answer.locator(".prose").inner_text()
    assert 0 < len(stopped) < len(LONG)
    assert bodies[0]["stream"] is True
    assert bodies[0]["stream_options"] == {"include_usage": True}
    assert bodies[0]["messages"] == [{"role": "user", "content": "long"}]

    server.canned.pause = 0.0005
    on.answer.get_by_role("button", name="Regenerate").click()
    on.done(2)
    expect(on.answer).to_contain_text("Paragraph 59")
    expect(on.answer.get_by_role("group", name="Answer 2 of 2")).to_be_visible()
    assert bodies[1]["messages"] == bodies[0]["messages"]
    expect(on.answer.locator(".stats")).to_have_text(re.compile(r"\d tokens·[\d.]+ tokens/s"))
    on.button("Previous answer").click()
    assert on.answer.locator(".prose").inner_text() == stopped
    on.button("Next answer").click()

    on.find(".question").hover()
    on.button("Edit message").click()
    field = on.page.get_by_label("Edited message")
    expect(field).to_have_value("long")
    expect(field).to_be_focused()
    field.fill("short")
    on.button("Send", disabled=False).first.click()
    on.done(2)
    expect(on.find(".bubble")).to_have_text("short")
    expect(on.answer).to_contain_text("A short answer.")
    assert bodies[2]["messages"] == [{"role": "user", "content": "short"}]
    on.ask("and more")
    assert [message["content"] for message in bodies[3]["messages"]] == ["short", "A short answer.", "and more"]

    on.page.reload()
    expect(on.find(".message")).to_have_count(4)
    expect(on.answer).to_contain_text("A short answer.")
    on.button("Previous version").click()  # the branch that was left is there, too
    expect(on.find(".bubble")).to_have_text("long")
    expect(on.answer).to_contain_text("Paragraph 59")
    on.drawer()
    expect(on.find("#conversations li")).to_have_count(1)
    expect(on.find("#conversations .current .title")).to_have_text("long")


def test_the_context_used_and_the_speed_are_shown(visit: Open) -> None:
    on = visit()
    expect(on.find("#context")).to_have_text(f"Context of {CONTEXT:,} tokens")
    on.ask("Hello")
    # 5 characters are a token of prompt for the server here; 15 in pieces of 4 are 4 of the answer.
    expect(on.find("#context")).to_have_text(f"Context used: 5 of {CONTEXT:,} tokens")
    expect(on.answer.locator(".stats")).to_contain_text("4 tokens")
    expect(on.answer.locator(".stats")).to_contain_text("tokens/s")


def test_what_is_left_while_it_is_written_is_kept_so_far(visit: Open, server: FakeChat) -> None:
    server.canned.pause = 0.02
    on = visit()
    on.write("long")
    expect(on.answer).to_contain_text("Paragraph 3 has")
    on.page.reload()
    expect(on.answer).to_contain_text("Paragraph 1 has")
    expect(on.answer).to_contain_text("interrupted")
    until(lambda: server.canned.cancelled == 1)


def test_an_answer_goes_on_while_another_conversation_is_open(visit: Open, server: FakeChat) -> None:
    on = visit()
    server.canned.pause = 0.005
    on.write("long")
    expect(on.answer).to_contain_text("Paragraph 1 has")
    on.button("New conversation").click()
    expect(on.find(".message")).to_have_count(0)
    expect(on.page.get_by_role("img", name="is being answered")).to_be_visible()
    on.ask("Hello")
    expect(on.answer).to_contain_text("A short answer.")
    on.find("#conversations .open", has_text="long").click()
    expect(on.answer).to_contain_text("Paragraph 59", timeout=20_000)
    on.done(2)
    assert server.canned.cancelled == 0


def test_the_view_follows_the_stream_until_somebody_scrolls_up(visit: Open, server: FakeChat) -> None:
    on = visit()
    server.canned.pause = 0.004
    on.write("long")
    expect(on.answer).to_contain_text("Paragraph 25 has")
    distance = (
        "() => { const s = document.getElementById('scroll'); return s.scrollHeight - s.clientHeight - s.scrollTop }"
    )
    assert on.run(distance) < 60
    on.find("#scroll").hover()
    on.page.mouse.wheel(0, -600)
    expect(on.button("Scroll to the end")).to_be_visible()
    top = on.run("document.getElementById('scroll').scrollTop")
    expect(on.answer).to_contain_text("Paragraph 45 has")
    assert on.run("document.getElementById('scroll').scrollTop") == top
    on.button("Scroll to the end").click()
    assert on.run(distance) < 60
    on.button("Stop").click()


def test_code_is_coloured_and_copied_and_formulas_are_set(visit: Open, server: FakeChat) -> None:
    on = visit()
    server.canned.pause = 0.001
    on.context.grant_permissions(["clipboard-read", "clipboard-write"])
    on.ask("rich")
    expect(on.find(".code .hljs-keyword").first).to_have_text("def")
    expect(on.find(".code-head span")).to_have_text("python")
    on.button("Copy code").click()
    expect(on.button("Copied")).to_be_visible()
    code = RICH.split("```python\n")[1].split("\n```")[0]
    assert on.run("navigator.clipboard.readText()") == code
    expect(on.find(".prose math")).to_have_count(3)
    expect(on.find(".prose td[align=right]").first).to_have_css("text-align", "right")
    on.answer.get_by_role("button", name="Copy answer").click()
    until(lambda: on.run("navigator.clipboard.readText()") == RICH)


HOSTILE = """
<script>window.hurt = 1</script>
<img src="http://example.org/a.png" onerror="window.hurt = 2">

![picture](http://example.org/b.png) and [a link](javascript:window.hurt=3) and [data](data:text/html,x)

<a href="javascript:window.hurt=4" style="color: red">inline</a> <svg onload="window.hurt=5"></svg>
<iframe src="http://example.org"></iframe> <b onclick="window.hurt=6">bold</b> <b>fine</b>

<style>body { display: none }</style>

$\\href{javascript:window.hurt=7}{x}$ and $\\includegraphics{http://example.org/c.png}$ and $\\style{color:red}{y}$

```html"><img src=x onerror=window.hurt=8>
<script>window.hurt = 9</script>
```

[reference][1] and <http://example.org/auto> and [path](/v1/slots) and [host](//example.org/x) and [hash](#prompt)

[1]: javascript:window.hurt=10
"""


def test_markup_from_a_model_does_nothing(visit: Open, server: FakeChat) -> None:
    on = visit()
    server.canned.answers["hostile"] = HOSTILE
    server.canned.pause = 0.001
    on.ask("hostile")
    expect(on.answer).to_contain_text("<script>window.hurt = 1</script>")  # shown as what it is
    expect(on.answer).to_contain_text("auto")
    on.page.wait_for_timeout(500)
    assert on.run("window.hurt ?? null") is None
    inside = on.run(
        """() => [...document.querySelectorAll('.prose *')].map((element) => ({
            tag: element.localName,
            attributes: element.getAttributeNames().filter((name) => name.startsWith('on')),
            href: element.getAttribute('href') ?? element.getAttribute('src') ?? '',
        }))"""
    )
    assert not {"script", "img", "iframe", "style", "object", "form"} & {element["tag"] for element in inside}
    assert not [element for element in inside if element["attributes"]]
    links = [element["href"] for element in inside if element["href"]]
    assert links == ["http://example.org/b.png", "http://example.org/auto"]
    expect(on.find(".prose a[href]").first).to_have_attribute("rel", "noopener noreferrer nofollow")
    expect(on.find(".prose b", has_text="fine")).to_be_visible()


TEXTS = {
    "rich": RICH,
    "lists": "Things:\n- one\n- **two**\n  - a\n  - b\n\n3. x\n4. y\n\nEnd\n===\n\ntext\n---\n",
    "quotes": "> a\n> b\n\nafter\n\n***\n\n    indented code\n\n~~~\nfence ` ~~\n~~~\n~~gone~~ `a`` b`",
    "references": "See [here][1] and [there].\n\nMore.\n\n[1]: http://example.org/1\n[there]: http://example.org/2\n",
    "formulas": "Cost $5 and $6, \\(a_1\\), \\[\\frac{1}{2}\\]\n\n$$\nx\n$$\n\nopen \\( never closed",
    "returns": "a\r\nb\r\n\r\n| x | y |\r\n|---|--:|\r\n| 1 | 2 |\r\n",
    "html": "<div>\n*x*\n</div>\n\na <br> b <i>c</i> <unknown> &amp; &lt;\n\n<!-- comment -->\n",
    "tasks": "- [ ] open\n- [x] done\n",
    "letters": "Ünïcödé 日本語 🙂 \u202eright to left\u202c\n\n\u0000null",
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_that_comes_letter_by_letter_ends_as_if_it_had_come_at_once(visit: Open, name: str) -> None:
    on = visit()
    grown, whole, kept = on.run(
        """async (text) => {
            const { MarkdownView } = await import('/assets/js/markdown.js');
            const { load } = await import('/assets/js/math.js');
            await load();
            await (await import('/assets/js/highlight.js')).load('python');
            const [a, b] = [document.createElement('div'), document.createElement('div')];
            const growing = new MarkdownView(a);
            let first = null, kept = true;
            for (let end = 1; end <= text.length; end += 1) {
                growing.update(text.slice(0, end), false);
                if (a.children.length > 1) first ??= a.firstElementChild;
                if (first && a.firstElementChild !== first) kept = false;
            }
            growing.update(text, true);
            new MarkdownView(b).update(text, true);
            return [a.innerHTML, b.innerHTML, kept];
        }""",
        TEXTS[name],
    )
    assert grown == whole
    assert kept  # elements that are complete are never made again, or they would flicker and lose the selection


def test_a_block_that_grows_keeps_its_elements_and_what_is_selected_in_them(visit: Open) -> None:
    on = visit()
    kept, selected = on.run(
        """async (texts) => {
            const { MarkdownView } = await import('/assets/js/markdown.js');
            await (await import('/assets/js/highlight.js')).load('python');
            const element = document.createElement('div');
            document.getElementById('scroll').append(element);
            const view = new MarkdownView(element);
            const kept = [], selected = [];
            for (const [begin, end, inside] of texts) {
                for (let at = 1; at <= begin.length; at += 1) view.update(begin.slice(0, at), false);
                const node = element.querySelector(inside);
                getSelection().selectAllChildren(node);
                const before = getSelection().toString();
                for (let at = 1; at <= end.length; at += 1) view.update(begin + end.slice(0, at), false);
                kept.push(element.querySelector(inside) === node);
                selected.push(getSelection().toString().startsWith(before) && before !== '');
            }
            return [kept, selected];
        }""",
        [
            ["```python\nprint(1)\n", "def f():\n    return 2\n", ".code pre"],
            ["- one\n- two", " and more\n- three", "li"],
            ["Some **bold** words", " and more of them, *many*", "strong"],
            ["| a | b |\n|---|---|\n| 1 | 2 |\n", "| 3 | 4 |\n", "th"],
        ],
    )
    assert kept == [True] * 4
    assert selected == [True] * 4


def test_what_is_being_written_does_not_look_like_something_else(visit: Open) -> None:
    on = visit()
    shown = on.run(
        """async (texts) => {
            const { MarkdownView } = await import('/assets/js/markdown.js');
            return texts.map((text) => {
                const element = document.createElement('div');
                new MarkdownView(element).update(text, false);
                return element.innerHTML;
            });
        }""",
        [
            "Items:\n-",
            "a **bo",
            "a **bold*",
            "run `ls",
            "see [the page](http://exam",
            "see [the",
            "| a | b |\n|--",
            "x\n1",
        ],
    )
    assert shown == [
        "<p>Items:</p>",
        "<p>a <strong>bo</strong></p>",
        "<p>a <strong>bold</strong></p>",
        "<p>run <code>ls</code></p>",
        "<p>see the page</p>",
        "<p>see the</p>",
        "",
        "<p>x</p>",
    ]


def test_events_are_read_from_whatever_pieces_the_bytes_come_in(visit: Open) -> None:
    on = visit()
    stream = (
        ': hello\r\n\r\ndata: {"a": "é🙂"}\r\n\r\nevent: x\ndata: one\ndata: two\n\ndata:no space\r\rdata: unfinished'
    )
    for size in (1, 2, 3, 7, 1000):
        found = on.run(
            """async ([text, size]) => {
                const { events } = await import('/assets/js/api.js');
                const bytes = new TextEncoder().encode(text);
                const stream = new ReadableStream({
                    start(controller) {
                        for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
                        controller.close();
                    },
                });
                const found = [];
                for await (const data of events(stream)) found.push(data);
                return found;
            }""",
            [stream, size],
        )
        assert found == ['{"a": "é🙂"}', "one\ntwo", "no space"]


def test_the_key_is_asked_for_and_kept_only_if_wanted(visit: Open, server: FakeChat) -> None:
    on = visit()
    on.expected = re.compile("401")
    server.canned.key = "secret"
    on.write("Hello")
    dialog = on.page.get_by_role("dialog", name="API key")
    expect(dialog).to_be_visible()
    field = dialog.get_by_label("Key", exact=True)
    expect(field).to_be_focused()
    field.fill("wrong")
    field.press("Enter")
    expect(dialog).to_contain_text("The server does not know this key.")
    field.fill("secret")
    dialog.get_by_role("button", name="Continue").click()
    expect(dialog).to_be_hidden()
    on.done(2)  # the message was sent again
    expect(on.answer).to_contain_text("A short answer.")
    assert len(server.canned.bodies) == 1

    on.page.reload()
    expect(dialog).to_be_visible()
    field.fill("secret")
    dialog.get_by_label("Remember it in this browser").check()
    field.press("Enter")
    expect(dialog).to_be_hidden()
    on.open()
    expect(dialog).to_be_hidden()
    expect(on.find(".message")).to_have_count(2)


@pytest.mark.parametrize(
    ("status", "body", "headers", "says"),
    [
        (
            429,
            {"error": {"message": "64 requests wait already"}},
            {"Retry-After": "7"},
            "64 requests wait already. Try again in 7 s.",
        ),
        (
            400,
            {"error": {"message": "the prompt has 9000 tokens", "code": "context_length_exceeded"}},
            {},
            "The prompt has 9000 tokens. A new conversation has room again.",
        ),
        (500, {"error": {"message": "the server failed"}}, {}, "The server failed."),
        (502, "<h1>Bad gateway</h1>", {}, "The server answered with status 502."),
        (0, None, {}, "The connection broke before the answer was complete."),
    ],
)
def test_what_goes_wrong_is_said_and_can_be_tried_again(
    visit: Open, server: FakeChat, status: int, body: Any, headers: dict[str, str], says: str
) -> None:
    on = visit()
    on.expected = re.compile("Failed to load resource")
    server.canned.refusals = [(status, body, headers)]
    on.ask("Hello")
    expect(on.page.get_by_role("alert").filter(has_text=says)).to_be_visible()
    on.button("Try again").click()
    on.done(2)
    expect(on.answer.locator(".prose")).to_have_text("A short answer.")
    expect(on.find(".failure:visible")).to_have_count(0)


def test_a_server_that_is_gone_is_said_to_be(browser: Any) -> None:
    with FakeChat() as server:
        on = Visit(browser, server.url)
        on.expected = re.compile("Failed to load resource")
    on.ask("Hello")
    expect(on.find(".failure span")).to_have_text("The server cannot be reached. Is phiquant serve still running?")
    on.close()


def test_settings_are_sent_and_kept_and_nonsense_is_not(visit: Open, server: FakeChat) -> None:
    on = visit()
    on.button("Settings").click()
    sheet = on.page.get_by_role("dialog", name="Settings")
    expect(sheet.get_by_label("Temperature")).to_have_value("0.7")  # the server's default
    sheet.get_by_label("Temperature").fill("1.2")
    sheet.get_by_label("Top p").fill("7")
    expect(sheet.get_by_label("Top p")).to_have_attribute("aria-invalid", "true")
    expect(sheet).to_contain_text("From 0 to 1.")
    sheet.get_by_label("Top k").fill("")
    sheet.get_by_label("Max tokens").fill("12")
    sheet.get_by_label("Seed").fill("3")
    sheet.get_by_label("System prompt").fill("Be brief.")
    sheet.get_by_label("Begin new conversations with it").check()
    on.page.keyboard.press("Escape")
    expect(sheet).to_be_hidden()
    expect(on.button("Settings")).to_be_focused()
    on.ask("Hello")
    sent = server.canned.bodies[0]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    names = ("model", "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "max_tokens", "seed")
    assert [sent.get(name) for name in names] == ["phi-4-mini-Q4_K_M", 1.2, 40, 0.95, 0.05, 1, 12, 3]

    on.page.reload()
    on.button("New conversation").click()
    on.ask("Again")
    assert server.canned.bodies[1]["messages"][0]["content"] == "Be brief."
    assert server.canned.bodies[1]["temperature"] == 1.2
    on.button("Settings").click()
    on.button("Reset").click()
    expect(sheet.get_by_label("Temperature")).to_have_value("0.7")
    on.page.keyboard.press("Escape")
    on.ask("Once more")
    assert server.canned.bodies[2]["temperature"] == 0.7
    assert "seed" not in server.canned.bodies[2]


def test_a_model_is_picked_and_remembered(visit: Open, server: FakeChat) -> None:
    server.canned.models = ("one", "two")
    on = visit()
    on.page.get_by_label("Model").select_option("two")
    on.page.reload()
    expect(on.page.get_by_label("Model")).to_have_value("two")
    on.ask("Hello")
    assert server.canned.bodies[0]["model"] == "two"


def test_thoughts_are_folded_away_and_not_sent_again(visit: Open, server: FakeChat) -> None:
    server.canned.answers["think"] = "<think>\nFirst I *wonder*.\n</think>\n\nThen I **know**."
    on = visit()
    on.ask("think")
    expect(on.answer.locator(".prose")).to_have_text("Then I know.")
    expect(on.find(".thoughts-text")).to_be_hidden()
    on.find(".thoughts summary").click()
    expect(on.find(".thoughts-text")).to_have_text("First I *wonder*.")
    on.ask("more")
    assert server.canned.bodies[1]["messages"][1] == {"role": "assistant", "content": "Then I **know**."}


@pytest.mark.parametrize("size", SIZES)
def test_conversations_are_renamed_deleted_brought_back_exported_and_imported(
    visit: Open, size: str, tmp_path: Path
) -> None:
    on = visit(size)
    on.ask("The first")
    on.button("New conversation").locator("visible=true").first.click()
    on.ask("The second")
    on.drawer()
    entries = on.find("#conversations .title")
    expect(entries).to_have_text(["The second", "The first"])
    on.find("#conversations li").last.hover()
    on.button("More about The first").click()
    on.page.get_by_role("menuitem", name="Rename").click()
    on.page.get_by_label("Title").fill("Renamed")
    on.page.get_by_label("Title").press("Enter")
    expect(entries).to_have_text(["The second", "Renamed"])

    on.button("More about Renamed").click()
    with on.page.expect_download() as one:
        on.page.get_by_role("menuitem", name="Export").click()
    assert one.value.suggested_filename == "Renamed.json"
    one.value.save_as(tmp_path / "one.json")
    written = json.loads((tmp_path / "one.json").read_text())
    assert [message["content"] for message in written["conversations"][0]["messages"]] == [
        "The first",
        "A short answer.",
    ]

    on.button("More about Renamed").click()
    on.page.get_by_role("menuitem", name="Delete").click()
    expect(entries).to_have_text(["The second"])
    on.button("Undo").click()
    expect(entries).to_have_text(["The second", "Renamed"])
    on.button("More about Renamed").click()
    on.page.get_by_role("menuitem", name="Delete").click()
    expect(entries).to_have_text(["The second"])
    if on.phone:
        on.button("Hide conversations").click()

    on.button("Settings").click()
    (tmp_path / "broken.json").write_text('{"format": "phiquant-conversations", "version": 1, "conversations": [{}]}')
    on.find("#import-file").set_input_files(tmp_path / "broken.json")
    expect(on.find(".toast")).to_have_text("Nothing was imported: conversation 1: it has no messages.")
    on.find("#import-file").set_input_files(tmp_path / "one.json")
    expect(on.find(".toast")).to_have_text("1 conversation was imported.")
    on.page.keyboard.press("Escape")
    on.page.reload()
    on.drawer()
    expect(entries).to_have_text(["The second", "Renamed"])
    on.find("#conversations .open", has_text="Renamed").click()
    expect(on.find(".bubble")).to_have_text("The first")
    on.button("Settings").click()
    on.button("Delete all").click()
    on.page.get_by_role("dialog", name="Delete all conversations?").get_by_role("button", name="Delete all").click()
    expect(on.find("#conversations li")).to_have_count(0)
    expect(on.find(".message")).to_have_count(0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "other"}, "the file holds no conversations of phiquant"),
        ({"version": 2}, "the file has version 2; this page reads version 1"),
        ({"id": "<b>"}, 'conversation 1: "<b>" is no id'),
        ({"parent": "nobody"}, "conversation 1: message m1 follows one that is not there"),
        ({"parent": "m1"}, "conversation 1: message m1 follows one that is not there"),
        ({"role": "assistant"}, "conversation 1: message m1 does not follow one of the other side"),
        ({"role": "system"}, "conversation 1: a message is of neither user nor assistant"),
        ({"content": 3}, "conversation 1: a message is no text"),
    ],
)
def test_a_file_that_is_not_an_export_is_refused_with_the_reason(
    visit: Open, change: dict[str, Any], says: str
) -> None:
    message = {"id": "m1", "parent": None, "role": "user", "content": "Hello", "created": 0}
    message |= {name: value for name, value in change.items() if name in message and name != "id"}
    conversation = {"id": change.get("id", "c1"), "title": "T", "messages": [message], "leaf": "m1"}
    body = {"format": "phiquant-conversations", "version": 1, "conversations": [conversation]}
    body |= {name: value for name, value in change.items() if name in body}
    said = visit().run(
        """async (text) => {
            const { imported } = await import('/assets/js/transfer.js');
            try { imported(text); return null; } catch (error) { return error.message; }
        }""",
        json.dumps(body),
    )
    assert said == says


def test_everything_is_done_with_the_keyboard_alone(visit: Open, server: FakeChat) -> None:
    on = visit()
    keyboard = on.page.keyboard
    expect(on.find("#prompt")).to_be_focused()
    keyboard.type("one")
    keyboard.press("Shift+Enter")
    keyboard.type("two")
    keyboard.press("Enter")
    on.done(2)
    assert server.canned.bodies[0]["messages"][0]["content"] == "one\ntwo"
    expect(on.find("#prompt")).to_be_focused()
    keyboard.press("ArrowUp")
    expect(on.page.get_by_label("Edited message")).to_be_focused()
    keyboard.press("Escape")
    expect(on.page.get_by_label("Edited message")).to_have_count(0)
    keyboard.press("Control+Shift+Enter")
    on.done(2)
    assert len(server.canned.bodies) == 2
    keyboard.press("Shift+Escape")
    keyboard.type("long")
    keyboard.press("Enter")
    expect(on.answer).to_contain_text("Paragraph 1 has")
    keyboard.press("Escape")
    on.done(4)
    expect(on.answer).to_contain_text("stopped")
    keyboard.press("Control+Shift+O")
    expect(on.find(".message")).to_have_count(0)
    keyboard.press("Control+Slash")
    expect(on.page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_visible()
    keyboard.press("Escape")
    keyboard.press("Control+Comma")
    expect(on.page.get_by_role("dialog", name="Settings")).to_be_visible()
    keyboard.press("Escape")
    keyboard.press("Control+Shift+S")
    expect(on.find("#sidebar")).to_be_hidden()
    keyboard.press("Control+Shift+S")
    expect(on.find("#sidebar")).to_be_visible()

    on.open()
    expect(on.find("#prompt")).to_be_focused()
    seen = []
    on.find(".skip").focus()
    for _ in range(12):
        if seen:
            keyboard.press("Tab")
        seen.append(on.run("document.activeElement.getAttribute('aria-label') ?? document.activeElement.innerText"))
        if seen[-1] == "Message":
            break
        outline = on.run("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", f"{seen[-1]} does not show that it has the focus"
    assert seen == [
        "Skip to the message field", "Hide conversations", "New conversation", "one", "More about one",
        "Appearance: system", "Keyboard shortcuts", "Settings", "Conversation", "Message",
    ]  # fmt: skip


def test_the_drawer_of_a_phone_keeps_the_focus_and_closes(visit: Open) -> None:
    on = visit("phone")
    expect(on.find("#sidebar")).to_be_hidden()
    on.drawer()
    expect(on.button("Hide conversations")).to_be_focused()
    on.page.keyboard.press("Escape")
    expect(on.find("#sidebar")).to_be_hidden()
    expect(on.button("Show conversations")).to_be_focused()
    assert on.run("document.documentElement.scrollWidth") <= 390  # nothing is wider than the screen


def test_screen_readers_hear_sentences_and_the_end(visit: Open, server: FakeChat) -> None:
    server.canned.answers["speak"] = "The *first* sentence. The second, with `code`.\n\nThe third."
    on = visit()
    on.ask("speak")
    said = " ".join(on.find("#announcer p").all_inner_texts())
    assert said.startswith("The model is answering.")
    assert said.endswith("The answer is complete.")
    for sentence in ("The first sentence.", "The second, with code .", "The third."):
        assert said.count(sentence) == 1
    expect(on.page.get_by_role("heading", name="You")).to_have_count(1)


def test_the_appearance_is_switched_and_kept(visit: Open) -> None:
    on = visit(scheme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = on.run(ground)
    on.button("Appearance: system").click()
    on.button("Appearance: light").click()
    expect(on.button("Appearance: dark")).to_be_visible()
    assert on.run(ground) != light
    on.page.reload()
    assert on.run(ground) != light


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_axe_finds_nothing_serious(visit: Open, server: FakeChat, size: str, scheme: str) -> None:
    package = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    on = visit(size, scheme)
    source = (Path(package.__file__).parent / "axe.min.js").read_text()
    server.canned.pause = 0.001

    def check(state: str) -> None:
        on.page.wait_for_timeout(250)  # transitions have half-way colours
        if on.run("typeof axe") == "undefined":
            on.run(source)
        found = on.run("axe.run(document, { resultTypes: ['violations'] })")
        wrong = [
            f"{state}: {rule['id']} ({rule['impact']}): {node['html'][:200]}"
            for rule in found["violations"]
            if rule["impact"] in ("serious", "critical", "moderate")
            for node in rule["nodes"]
        ]
        assert wrong == []
        assert len(found["passes"]) > 10

    check("empty")
    on.ask("rich")
    on.answer.get_by_role("button", name="Regenerate").click()
    on.done(2)
    check("with an answer")
    on.find(".question").hover()
    on.button("Edit message").click()
    check("editing")
    on.button("Cancel").click()
    on.button("Settings").click()
    check("settings")
    on.page.keyboard.press("Escape")
    on.drawer()
    on.find("#conversations li").hover()
    on.find("#conversations [aria-haspopup=menu]").click()
    check("menu")
    on.page.keyboard.press("Escape")
    on.button("Keyboard shortcuts").click()
    check("shortcuts")


def test_nothing_that_the_page_names_is_missing(visit: Open, server: FakeChat) -> None:
    on = visit()
    missing: list[str] = []
    on.page.on("response", lambda response: missing.append(response.url) if response.status >= 400 else None)
    loaded = on.run(
        """async () => {
            const { load, languages } = await import('/assets/js/highlight.js');
            return Promise.all(languages.map(load));
        }"""
    )
    assert loaded
    assert all(loaded)
    assert missing == []
