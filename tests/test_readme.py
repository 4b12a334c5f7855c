"""Every Python snippet of the README runs, in order, in one session; the files that it and the page
of results name exist, and their tables are the results'.
"""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))
import tables  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_snippet_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snippets = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len(snippets) >= 5
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet.replace("/tmp/", f"{tmp_path}/"), "README.md", "exec"), names)
    assert "71432" in re.sub(r"\s", "", capsys.readouterr().out)


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.parent.name)
def test_linked_files_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert local
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_tables_are_those_of_the_committed_results() -> None:
    text = [page.read_text(encoding="utf-8") for page in tables.PAGES]
    assert [tables.fill(page) for page in text] == text, "run python bench/tables.py"
    assert tables.REAL_MODEL.read_text(encoding="utf-8") == tables.real_model()
    assert len(tables.PLACE.findall("".join(text))) == len(tables.TABLES)
