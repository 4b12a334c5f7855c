"""The page of kept tokens: its data, and how it behaves in a real browser."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, Browser
from command_line import run
from eval_model import save_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import homer_triton as ht
from homer_triton.evaluation.kept_page import build_page
from homer_triton.text.pieces import piece_texts

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

STORY = "The sun is yellow. The water is </script> cold. " * 120 + "A dark magnet lies here. "
STORY += "There and back again. " * 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    path = tmp_path_factory.mktemp("encoded") / "story.safetensors"
    config = ht.HomerConfig(max_chunk_len=256, target_len=100, layers_warmup=0)
    ht.encode(ht.load(model), STORY, suffix="What is the pass key?", config=config).save(path)
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, model: Path, encoded: Path) -> Path:
    folder = tmp_path_factory.mktemp("page")
    output, png = folder / "kept.html", folder / "kept.png"
    result = run("show", encoded, "--model", model, "-o", output, "--png", png)
    assert result.exit_code == 0, result.output
    assert "100 of" in result.stdout
    assert png.read_bytes().startswith(b"\x89PNG")
    return output


@pytest.fixture
def browser(page: Path) -> Iterator[Browser]:
    with Browser(page.as_uri()) as opened:
        yield opened


def data_of(html: str) -> dict[str, object]:
    (embedded,) = re.findall(r'<script id="data"[^>]*>(.*?)</script>', html, re.DOTALL)
    return json.loads(embedded)


def wait(browser: Browser, condition: str) -> None:
    browser.run(
        f"new Promise(done => {{ const look = () => ({condition})"
        " ? done() : setTimeout(look, 20); look(); })"
    )


@pytest.mark.slow
def test_the_page_holds_every_token_and_its_fate(page: Path, encoded: Path) -> None:
    context = ht.EncodedContext.load(encoded)
    data = data_of(page.read_text())
    fates = [-1 if c == "-" else int(c, 36) for c in str(data["heights"])]
    assert fates == context.pruned_at.tolist()
    kept = [index for index, fate in enumerate(fates) if fate < 0]
    assert kept == context.source_indices.tolist()
    assert data["height"] == context.plan.height == 3
    assert {0, 1} <= set(fates)


@pytest.mark.slow
def test_the_page_needs_nothing_else(page: Path) -> None:
    html = page.read_text()
    assert "default-src 'none'" in html
    assert not re.search(
        r"(src|href)=|https?:|@import", re.sub(r"<script id=.*?</script>", "", html)
    )


def test_texts_that_do_not_fit_are_refused(encoded: Path) -> None:
    with pytest.raises(ValueError, match="2 texts do not fit"):
        build_page(ht.EncodedContext.load(encoded), ["a", "b"], "title")


@pytest.mark.slow
@needs_browser
def test_the_text_can_be_read_in_a_browser(browser: Browser, encoded: Path) -> None:
    context = ht.EncodedContext.load(encoded)
    total = len(context.token_ids)
    assert browser.run("document.title") == "story.safetensors"
    assert browser.run("byId('summary').textContent") == f"100 of {total:,} tokens kept"
    wait(browser, "filled.size >= 2")
    shown = browser.run(
        "[...document.querySelectorAll('.page:first-child .block > span')].map(t => t.className)"
    )
    fates = context.pruned_at[: len(shown)].tolist()
    assert shown == ["kept" if fate < 0 else f"h{fate}" for fate in fates]
    text = browser.run("document.querySelector('.page').textContent")
    assert text.startswith("<s> The sun is yellow.")
    legend = browser.run("[...document.querySelectorAll('#legend button')].map(b => b.textContent)")
    assert legend[0].startswith("kept · 100 (")
    assert len(legend) == context.plan.height + 2


@pytest.mark.slow
@needs_browser
def test_search_finds_words_and_token_numbers(
    browser: Browser, encoded: Path, tmp_path: Path
) -> None:
    context = ht.EncodedContext.load(encoded)
    browser.run(
        "byId('query').value = 'DARK MAGNET'; byId('query').dispatchEvent(new Event('input'))"
    )
    wait(browser, "byId('found').textContent")
    assert browser.run("byId('found').textContent").startswith("1 of 1, ")
    marked = "[...document.querySelectorAll('.here')].map(t => t.textContent)"
    assert browser.run(marked) == ["dark", "magnet"]
    wait(
        browser,
        "Math.abs(document.querySelector('.here').getBoundingClientRect().top - "
        "innerHeight / 2) < innerHeight / 3",
    )
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000
    last = len(context.token_ids) - 1
    browser.run(f"search('#{last}')")
    assert browser.run("byId('found').textContent") == "1 of 1, 1 kept"
    assert browser.run(marked) == ["?"]
    browser.run("byId('query').value = 'unicorn'; search('unicorn')")
    assert browser.run("byId('found').textContent") == "not in the text"
    browser.run("search('back again')")
    browser.run("byId('previous').click()")
    assert browser.run("byId('found').textContent").startswith("60 of 60, ")


@pytest.mark.slow
@needs_browser
def test_a_link_opens_the_page_at_what_it_names(page: Path) -> None:
    with Browser(page.as_uri() + "#q=dark%20magnet") as browser:
        assert browser.run("byId('query').value") == "dark magnet"
        browser.run("new Promise(done => setTimeout(done, 500))")
        top = browser.run("document.querySelector('.here').getBoundingClientRect().top")
        assert 0.3 < top / browser.run("innerHeight") < 0.7


@pytest.mark.slow
@needs_browser
def test_a_legend_button_shows_one_fate_only(browser: Browser) -> None:
    browser.run("document.querySelector('#legend button').click()")
    bright = "[...document.querySelectorAll('.block > span')].filter(t => "
    bright += "getComputedStyle(t).opacity === '1').map(t => t.className)"
    assert set(browser.run(bright)) == {"kept shown"}
    browser.run("document.querySelector('#legend button').click()")
    assert len(set(browser.run(bright))) > 1


@pytest.mark.slow
@needs_browser
def test_long_texts_are_drawn_only_where_they_are_seen(
    model: Path, encoded: Path, tmp_path: Path
) -> None:
    context = ht.EncodedContext.load(encoded)
    count = 100_000
    generator = torch.Generator().manual_seed(0)
    long = replace(
        context,
        token_ids=torch.randint(3, 96, (count,), generator=generator),
        pruned_at=torch.randint(-1, 3, (count,), generator=generator, dtype=torch.int8),
    )
    texts = piece_texts(AutoTokenizer.from_pretrained(model), long.token_ids)
    path = tmp_path / "long.html"
    path.write_text(build_page(long, texts, "long"), encoding="utf-8")
    with Browser(path.as_uri()) as browser:
        wait(browser, "filled.size >= 2")
        drawn = "document.querySelectorAll('.block > span').length"
        assert browser.run(drawn) < count / 10
        browser.run("goTo(70000)")
        at = "pages[218].firstChild.children[70000 - 218 * 320].getBoundingClientRect().top"
        wait(browser, f"{at} > 100 && {at} < innerHeight")
        assert browser.run(drawn) < count / 5


def test_another_models_encoding_is_refused(model: Path, encoded: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: -tensor for name, tensor in weights.items()}, other / "model.safetensors")
    result = run("show", encoded, "--model", other, "-o", tmp_path / "kept.html")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"was made by another model than {other}" in result.stderr
    assert not (tmp_path / "kept.html").exists()


def test_json_says_what_was_written(model: Path, encoded: Path, tmp_path: Path) -> None:
    output = tmp_path / "kept.html"
    result = run("show", encoded, "--model", model, "-o", output, "--json")
    written = json.loads(result.stdout)
    assert written["output"] == str(output)
    assert written["kept"] == 100


def test_bad_input_is_one_sentence(model: Path, encoded: Path, tmp_path: Path) -> None:
    output = tmp_path / "kept.html"
    (tmp_path / "other.safetensors").write_bytes(b"no")
    bare = save_model(tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    cases = [
        ((encoded,), "name it with --model"),
        ((tmp_path / "none", "--model", model), "There is no encoded context"),
        ((tmp_path / "other.safetensors", "--model", model), "is not an encoded context"),
        ((encoded, "--model", bare), "has no tokenizer"),
        ((encoded, "--model", tmp_path / "nowhere" / "a" / "b"), "no checkpoint folder"),
    ]
    for arguments, reason in cases:
        result = run("show", *arguments, "-o", output)
        assert result.exit_code == 2, reason
        assert reason in result.stderr
        assert result.stderr.count("\n") == 1
        assert not output.exists()
    result = run("show", encoded, "--model", model, "-o", tmp_path)
    assert result.exit_code == 2
    assert "Cannot write" in result.stderr
