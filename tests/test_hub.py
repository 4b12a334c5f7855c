"""Where a checkpoint is found, and what is said when it is not."""

from pathlib import Path

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from homer_triton.model import hub
from homer_triton.model.errors import MissingCheckpointError
from homer_triton.model.hub import resolve


def test_resolve_finds_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert resolve(f"~/{tmp_path.name}") == tmp_path


def test_resolve_refuses_files_and_absent_folders(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(MissingCheckpointError, match="is a file; give the folder"):
        resolve(file)
    for absent in (tmp_path / "absent", "./absent", "~/absent", "a/b/absent"):
        with pytest.raises(MissingCheckpointError, match="There is no checkpoint folder"):
            resolve(absent)


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 3000, "~nobody-of-that-name/model"])
def test_resolve_refuses_names_that_no_folder_has(name: str) -> None:
    with pytest.raises(MissingCheckpointError, match="There is no checkpoint folder") as error:
        resolve(name)
    assert len(str(error.value)) < 300


def test_resolve_downloads_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def download(repo_id: str, allow_patterns: list[str]) -> str:
        asked[repo_id] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve("someone/a-model") == tmp_path
    assert {"*.json", "*.safetensors"} <= set(asked["someone/a-model"])
    assert not any("bin" in pattern or "pth" in pattern for pattern in asked["someone/a-model"])


def test_resolve_can_leave_the_weights_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        hub, "snapshot_download", lambda _, allow_patterns: asked.extend(allow_patterns) or "."
    )
    resolve("someone/a-model", weights=False)
    assert "*.json" in asked
    assert "*.safetensors" not in asked


def test_resolve_says_when_the_hub_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(repo_id: str, allow_patterns: list[str]) -> str:
        raise OfflineModeIsEnabled("Cannot reach\nthe hub.")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(MissingCheckpointError, match="neither a local folder") as error:
        resolve("someone/a-model")
    assert str(error.value).endswith("Cannot reach the hub.")
