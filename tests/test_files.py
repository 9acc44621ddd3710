"""Files appear whole or not at all, and a refusal of the operating system becomes one sentence."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from termwise.algorithms.errors import InputError, unknown_name
from termwise.algorithms.files import directory_written_beside, make_directory, write_text, written_beside


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_text_is_written_and_nothing_is_left_beside(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "é")
    assert (tmp_path / "new" / "a.txt").read_text(encoding="utf-8") == "é"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]


def test_a_failure_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), written_beside(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_text", no_space)
    with pytest.raises(InputError, match=r"cannot write .*a\.txt: No space left on device"):
        write_text(tmp_path / "a.txt", "text")
    assert list(tmp_path.iterdir()) == []


def test_a_place_below_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for attempt in (lambda path: write_text(path / "a", ""), make_directory):
        with pytest.raises(InputError, match=r"cannot write .*Not a directory|cannot write .*File exists"):
            attempt(tmp_path / "file" / "below")


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    with directory_written_beside(tmp_path / "d") as temporary:
        (temporary / "a").write_text("1")
        (temporary / "a").chmod(0o600)
        assert not (tmp_path / "d").exists()
    assert (tmp_path / "d" / "a").read_text() == "1"
    (tmp_path / "as usual").touch()
    assert (tmp_path / "d" / "a").stat().st_mode == (tmp_path / "as usual").stat().st_mode
    (tmp_path / "as usual").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_failed_directory_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), directory_written_beside(tmp_path / "d") as temporary:
        (temporary / "a").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_content_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine").write_text("")
    with pytest.raises(InputError, match="exists already"), directory_written_beside(tmp_path / "d"):
        pass
    assert (tmp_path / "d" / "mine").exists()


def test_the_nearest_name_is_proposed() -> None:
    assert "did you mean 'olive'?" in str(unknown_name("accelerator", "oliv", ["fp16", "olive"]))
    assert "did you mean" not in str(unknown_name("accelerator", "zzz", ["fp16", "olive"]))
