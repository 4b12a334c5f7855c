"""The page of `homer serve` in a real browser: a text dropped, asked, and what survived of it."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from browser import CHROMIUM, Browser
from serving import CONFIG, QUESTION, Library, load_demo, make_service, served, story

import homer_triton as ht

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

PAGE = Path(ht.__file__).with_name("serving") / "page.html"


@pytest.fixture(scope="module")
def model() -> ht.Llama:
    return load_demo()


@pytest.fixture
def url(model: ht.Llama, tmp_path: Path) -> Iterator[str]:
    with served(make_service(tmp_path / "documents", model)) as address:
        yield address


def wait(browser: Browser, condition: str) -> None:
    browser.run(
        "new Promise((done, failed) => { const end = Date.now() + 60000; const look = () => "
        f"({condition}) ? done() : Date.now() > end ? failed(byId('wrong').textContent)"
        " : setTimeout(look, 20); look(); })"
    )


def drop(browser: Browser, name: str, content: str) -> None:
    """A file let go over the page."""
    script = f"""(() => {{
      const moved = new DataTransfer();
      moved.items.add(new File([{content}], "{name}", {{ type: "text/plain" }}));
      document.body.dispatchEvent(
        new DragEvent("drop", {{ dataTransfer: moved, bubbles: true, cancelable: true }}));
    }})()"""
    browser.run(script)


def press(browser: Browser, key: str, code: int = 0, modifiers: int = 0) -> None:
    """A key pressed and let go, as the browser hears it."""
    told = {"key": key, "modifiers": modifiers}
    if code:
        told |= {"windowsVirtualKeyCode": code, "code": key}
    text = {"text": "\r"} if key == "Enter" else {}
    browser.call("Input.dispatchKeyEvent", type="keyDown", **told, **text)
    browser.call("Input.dispatchKeyEvent", type="keyUp", **told)


def focused(browser: Browser) -> str:
    return browser.run("document.activeElement.id || document.activeElement.tagName")


def test_the_page_needs_nothing_else(url: str) -> None:
    html = httpx.get(f"{url}/").text
    assert html == PAGE.read_text(encoding="utf-8")
    assert "default-src 'none'" in html
    assert not re.search(r"src=|https?:|@import", html)


@pytest.mark.slow
def test_a_text_is_dropped_asked_and_seen(url: str, model: ht.Llama, tmp_path: Path) -> None:
    text = story(71432)
    with Browser(url) as browser:
        assert "demo, which reads 256 tokens" in browser.run("byId('model').textContent")
        drop(browser, "story.txt", repr(text))
        wait(browser, "asked")
        assert re.fullmatch(
            r"read: kept \d+ of \d+ tokens", browser.run("byId('walked').textContent")
        )
        assert browser.run("walk.finished && walk.levels.length") > 2
        assert focused(browser) == "question"
        # All of the tree was drawn as done: the leaves, in the lowest row, are of its colour.
        browser.run("new Promise(requestAnimationFrame)")
        leaf = "byId('tree').getContext('2d').getImageData(1, byId('tree').height - 6, 1, 1).data"
        assert browser.run(f"[...{leaf}]") == [0x2B, 0x6D, 0x8F, 255]
        browser.run(f"byId('question').value = {QUESTION!r}; byId('ask').requestSubmit()")
        wait(browser, "!under && messages.length === 2")
        said = browser.run("document.querySelector('#talk .said').textContent")
        assert said == Library(model).about(text, QUESTION, 64)
        assert "71432" in said
        frame = "byId('kept').contentDocument"
        wait(browser, f"{frame}?.body?.dataset.ready")
        kept = f"[...{frame}.querySelectorAll('.kept')].map(t => t.textContent).join(' ')"
        encoded = ht.encode(model, text, suffix=f"\n{QUESTION}", config=CONFIG)
        summary = browser.run(f"{frame}.getElementById('summary').textContent")
        assert summary == f"{len(encoded)} of {len(encoded.token_ids)} tokens kept"
        # The sentence that answers is among the survivors, which its search tells.
        find = "(() => { const w = byId('kept').contentWindow; w.search('pass key is');"
        find += f" return {frame}.getElementById('found').textContent; }})()"
        assert re.fullmatch(r"1 of \d, [1-9] kept", browser.run(find))
        assert browser.run(kept)
        browser.run("byId('survived').scrollIntoView()")
        browser.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 20_000
        # The conversation goes on, and begins anew.
        browser.run("byId('question').value = 'The sky'; byId('ask').requestSubmit()")
        wait(browser, "!under && messages.length === 4")
        browser.run("byId('anew').click()")
        assert browser.run("messages.length + byId('talk').children.length") == 0
        assert browser.run("byId('survived').hidden")


@pytest.mark.slow
def test_with_the_keyboard_alone(url: str) -> None:
    with Browser(url) as browser:
        browser.run("byId('text').focus()")
        browser.call("Input.insertText", text=story(40165))
        press(browser, "Tab", 9)
        assert focused(browser) == "go"
        assert browser.run("getComputedStyle(byId('go')).outlineStyle") == "solid"
        press(browser, "Enter", 13)
        wait(browser, "asked")
        wait(browser, "document.activeElement.id === 'question'")
        browser.call("Input.insertText", text=QUESTION)
        press(browser, "Enter", 13)
        wait(browser, "!under && messages.length === 2")
        assert "40165" in browser.run("messages[1].content")
        reached = []
        for _ in range(12):
            press(browser, "Tab", 9)
            reached.append(focused(browser))
        assert {"send", "anew", "reuse", "kept"} <= set(reached)
        # Backwards to the text's list, from which it can be removed.
        browser.run("byId('remove').focus()")
        press(browser, "Enter", 13)
        wait(browser, "!asked && byId('known').hidden")


@pytest.mark.slow
def test_an_answer_is_stopped(url: str) -> None:
    with Browser(url) as browser:
        browser.run("byId('question').value = 'The sky is blue. The sun is'")
        browser.run("byId('ask').requestSubmit()")
        wait(browser, "document.querySelector('#talk .said')?.textContent.length > 3")
        press(browser, "Escape", 27)
        wait(browser, "!under")
        assert browser.run("byId('wrong').textContent") == ""
        assert browser.run("messages.length") == 0
        assert browser.run("!document.querySelector('.coming') && byId('stop').disabled")


@pytest.mark.slow
def test_a_narrow_screen(url: str, tmp_path: Path) -> None:
    with Browser(url) as browser:
        browser.call(
            "Emulation.setDeviceMetricsOverride",
            width=360, height=740, deviceScaleFactor=2, mobile=True,
        )  # fmt: skip
        drop(browser, "a_file_with_a_rather_long_name_for_such_a_screen.txt", repr(story(52871)))
        wait(browser, "asked")
        browser.run(f"byId('question').value = {QUESTION!r}; byId('ask').requestSubmit()")
        wait(browser, "!under && messages.length === 2")
        wait(browser, "byId('kept').contentDocument?.body?.dataset.ready")
        assert browser.run("document.documentElement.scrollWidth") <= 360
        inside = "byId('kept').contentDocument.documentElement"
        assert browser.run(f"{inside}.scrollWidth <= {inside}.clientWidth")
        outside = browser.run(
            "[...document.querySelectorAll('button, input, select, textarea, iframe, canvas')]"
            ".filter(e => e.offsetParent).map(e => [e.id, e.getBoundingClientRect()])"
            ".filter(([, r]) => r.left < 0 || r.right > 360).map(([id]) => id)"
        )
        assert outside == []
        browser.screenshot(tmp_path / "narrow.png")


@pytest.mark.slow
def test_what_goes_wrong_is_said(url: str, model: ht.Llama, tmp_path: Path) -> None:
    with Browser(url) as browser:
        drop(browser, "picture.png", "new Uint8Array([137, 80, 78, 71, 255])")
        wait(browser, "byId('wrong').textContent")
        assert browser.run("byId('wrong').textContent") == "picture.png is not UTF-8 text."
        browser.run("byId('text').value = ' '; byId('read').requestSubmit()")
        wait(browser, "byId('wrong').textContent.startsWith('There is no text')")
        browser.run("byId('text').value = 'word'; byId('read').requestSubmit()")
        wait(browser, "byId('wrong').textContent.startsWith('The context is one token long')")
    locked = make_service(tmp_path / "locked", model)
    with served(locked, key="sesame") as address, Browser(address) as browser:
        assert browser.run("!byId('locked').hidden")
        assert "The API key is missing" in browser.run("byId('wrong').textContent")
        browser.run("byId('key').value = 'sesame'; byId('unlock').requestSubmit()")
        wait(browser, "byId('locked').hidden && !byId('wrong').textContent")
        assert "demo" in browser.run("byId('model').textContent")
