"""Outputs: what they may take the place of, and with which permissions."""

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import homer_triton as ht
from homer_triton.storage.files import check_outputs, check_writable, is_leftover, write_atomically


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def write(path: Path, content: str = "new") -> None:
    write_atomically(path, lambda file: file.write_text(content))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path: Path, umask: int) -> None:
    write(tmp_path / "text")
    ht.Calibration(torch.zeros(2, 8)).save(tmp_path / "bias.safetensors")
    assert {mode(file) for file in tmp_path.iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize("own", [0o664, 0o600, 0o640, 0o755])
def test_a_file_that_was_there_keeps_its_permissions(tmp_path: Path, umask: int, own: int) -> None:
    for path in (tmp_path / "text", tmp_path / "bias.safetensors"):
        path.write_text("old")
        path.chmod(own)
    write(tmp_path / "text")
    ht.Calibration(torch.zeros(2, 8)).save(tmp_path / "bias.safetensors")
    assert {mode(file) for file in tmp_path.iterdir()} == {own}


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target, link, far = tmp_path / "folder" / "target", tmp_path / "link", tmp_path / "far"
    link.symlink_to("folder/target")
    far.symlink_to(link)
    for content in ("first", "second"):  # a target that is not there yet, and one that is
        write(far, content)
        assert target.read_text() == content
        assert link.is_symlink()
        assert far.is_symlink()
    assert os.listdir(tmp_path / "folder") == ["target"]


def test_what_is_no_file_is_refused_and_stays(tmp_path: Path) -> None:
    pipe, folder, loop = (tmp_path / name for name in ("pipe", "folder", "loop"))
    os.mkfifo(pipe)
    folder.mkdir()
    loop.symlink_to(loop)
    device = tmp_path / "device"
    device.symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        cases = {
            pipe: "is a pipe",
            folder: "is a folder",
            loop: "Too many levels",
            device: "is a device",
            Path("/dev/null"): "is a device",
            tmp_path / "socket": "is a socket",
            tmp_path / "absent" / "file": "No such file",
            Path(""): "give the name of a file",
        }
        before = sorted(tmp_path.iterdir())
        for path, reason in cases.items():
            for put in (check_writable, write):
                with pytest.raises(ValueError, match=reason):
                    put(path)
        assert sorted(tmp_path.iterdir()) == before
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anything")
def test_a_write_protected_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_text("old")
    path.chmod(0o444)
    with pytest.raises(ValueError, match="is write-protected"):
        write(path)
    assert path.read_text() == "old"


@pytest.mark.parametrize("output", ["/dev/stdout", "/dev/fd/1", "/dev/stderr", "file"])
@pytest.mark.parametrize("redirected", ["file", "pipe"])
def test_standard_output_is_no_place_for_a_file(
    tmp_path: Path, output: str, redirected: str
) -> None:
    (tmp_path / "file").write_text("")
    code = "import sys; from homer_triton.storage.files import check_writable as c; c(sys.argv[1])"
    with (tmp_path / "file").open("w") as file:
        done = subprocess.run(
            [sys.executable, "-c", code, output],
            stdout=file if redirected == "file" or output == "file" else subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            text=True,
        )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ValueError: Cannot write {output}: ")
    assert "standard output goes there" in last or "it is a pipe" in last


def test_outputs_that_are_inputs_are_refused_by_any_name(tmp_path: Path) -> None:
    text, model, free = tmp_path / "text", tmp_path / "model", tmp_path / "free"
    text.write_text("dear")
    model.mkdir()
    (model / "weights").write_text("dear")
    (tmp_path / "link").symlink_to(text)
    os.link(text, tmp_path / "hard")
    os.link(model / "weights", tmp_path / "hard weights")
    (tmp_path / "linked").symlink_to(model)
    inputs = {"--text": [tmp_path / "absent", str(text)], "--model": model, "--none": None}
    cases = {
        "--text": (text, tmp_path / "link", tmp_path / "hard", tmp_path / "x" / ".." / "text"),
        "--model": (
            model / "weights",
            tmp_path / "hard weights",
            tmp_path / "linked" / "weights",
        ),
    }
    (tmp_path / "x").mkdir()
    for source, outputs in cases.items():
        for output in outputs:
            with pytest.raises(ValueError, match=f"--png would write over .*, which {source} rea"):
                check_outputs({"-o": free, "--png": output}, inputs)
    check_outputs({"-o": free, "--png": None}, inputs)
    check_outputs({"-o": model / "new"}, inputs)
    assert text.read_text() == (model / "weights").read_text() == "dear"
    assert not free.exists()


def test_two_outputs_are_two_files(tmp_path: Path) -> None:
    one, link, there = (tmp_path / name for name in ("one", "link", "there"))
    link.symlink_to(one)
    there.write_text("")
    os.link(there, tmp_path / "hard")
    for first, second in ((one, one), (one, link), (there, tmp_path / "hard")):
        with pytest.raises(ValueError, match="-o and --png both name"):
            check_outputs({"-o": first, "--png": second}, {})
    check_outputs({"-o": one, "--png": there}, {})


def test_names_may_be_as_long_as_they_may_be(tmp_path: Path) -> None:
    write(tmp_path / ("x" * 255))
    assert [file.name for file in tmp_path.iterdir()] == ["x" * 255]


def test_a_temporary_file_is_known_by_its_name(tmp_path: Path) -> None:
    seen = []
    write_atomically(tmp_path / "file", seen.append)
    assert is_leftover(seen[0])
    assert not is_leftover(tmp_path / "file")


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path: Path) -> None:
    seen: list[Path] = []

    def look(temporary: Path) -> None:
        write_atomically(tmp_path / "file", seen.append)  # another process, at the same time
        seen.append(temporary)
        assert temporary.exists()

    write_atomically(tmp_path / "file", seen.append)
    left = seen[0]
    left.write_text("half")  # nobody locks it
    other = tmp_path / ("." + "0" * 32 + ".tmp")
    other.write_text("another file's")
    write_atomically(tmp_path / "file", look)
    assert sorted(tmp_path.iterdir()) == [other, tmp_path / "file"]
