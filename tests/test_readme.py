"""Every Python snippet of a README runs, in order, in one session. The files that READMEs name
exist, their tables are the results', and the picture is what its script draws.
"""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))
import picture  # noqa: E402
import tables  # noqa: E402

READMES = [
    ROOT / folder / "README.md"
    for folder in (".", "homer_triton", "homer_triton/serving", "model", "kernels", "bench")
]
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return page.parent.name if page.parent != ROOT else "main"


def snippets(page: Path) -> list[str]:
    return SNIPPET.findall(page.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in READMES if snippets(page)], ids=name)
def test_every_snippet_runs(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for snippet in snippets(page):
        exec(compile(snippet.replace("/tmp/", f"{tmp_path}/"), str(page), "exec"), names)
    if page.parent in (ROOT, ROOT / "homer_triton"):
        assert "71432" in re.sub(r"\s", "", capsys.readouterr().out)


def test_the_snippets_are_found() -> None:
    assert [name(page) for page in READMES if snippets(page)] == [
        "main",
        "homer_triton",
        "model",
        "kernels",
    ]
    assert len(snippets(ROOT / "README.md")) == 2


def test_the_main_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 170


@pytest.mark.parametrize("page", READMES, ids=name)
def test_linked_files_and_sections_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    local = [link.partition("#")[::2] for link in links if "://" not in link]
    assert local
    for path, section in local:
        target = page.parent / path if path else page
        assert target.exists(), path
        if section:
            assert section in sections(target), f"{path}#{section}"


def sections(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


def test_tables_are_those_of_the_committed_results() -> None:
    text = [page.read_text(encoding="utf-8") for page in tables.PAGES]
    assert [tables.fill(page) for page in text] == text, "run python bench/tables.py"
    assert tables.REAL_MODEL.read_text(encoding="utf-8") == tables.real_model()
    places = [place[1] for place in tables.PLACE.findall("".join(text))]
    assert sorted(places) == sorted(tables.TABLES)


def test_the_picture_is_what_its_script_draws() -> None:
    for theme, colours in picture.THEMES.items():
        drawn = (picture.FOLDER / f"{theme}.svg").read_text(encoding="utf-8")
        assert drawn == picture.draw(colours), "run python bench/picture.py"
