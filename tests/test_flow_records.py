"""Records: named by what they depend on, trusted only when whole, strict JSON always."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from termwise.algorithms.errors import InputError
from termwise.flow import records
from termwise.flow.records import Record, RecordStore, digest_of, record_digest, source_digest, to_json

RECORD = Record(kind="point", inputs={"a": 1, "b": [2.5, None]}, status="done", outputs={"energy_uj": 3.0})


def test_a_record_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    store = RecordStore(tmp_path, pytest.fail)
    store.save(RECORD)
    assert store.path("point", RECORD.digest).parent == tmp_path / "records" / "points"
    assert store.load("point", RECORD.digest) == RECORD
    assert store.load("quality", RECORD.digest) is None
    assert [path.name for path in (tmp_path / "records" / "points").iterdir()] == [f"{RECORD.digest}.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace("3.0", "4.0"),
        lambda text: text.replace('"done"', '"skipped"'),
        lambda text: text + "x",
        lambda text: "\0" * len(text),
    ],
)
def test_a_damaged_record_is_not_used_and_said(tmp_path: Path, damage: Any) -> None:
    said: list[str] = []
    store = RecordStore(tmp_path, said.append)
    store.save(RECORD)
    path = store.path("point", RECORD.digest)
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    assert store.load("point", RECORD.digest) is None
    assert len(said) == 1
    assert str(path) in said[0]


def test_a_record_under_another_name_is_not_used(tmp_path: Path) -> None:
    said: list[str] = []
    store = RecordStore(tmp_path, said.append)
    store.save(RECORD)
    other = record_digest("point", {"a": 2})
    store.path("point", RECORD.digest).rename(store.path("point", other))
    assert store.load("point", other) is None
    assert "another name" in said[0]


def test_the_digest_depends_on_every_input_and_not_on_their_order() -> None:
    assert replace(RECORD, inputs={"b": [2.5, None], "a": 1}).digest == RECORD.digest
    assert replace(RECORD, inputs={"a": 1, "b": [2.5, 0]}).digest != RECORD.digest
    assert replace(RECORD, kind="quality").digest != RECORD.digest


def test_no_infinity_and_no_nan_reach_a_document() -> None:
    document = {"a": math.inf, "b": [math.nan, np.float32(1.5), np.int64(2)], "c": np.array([-math.inf]), "d": True}
    assert json.loads(to_json(document), parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, 1.5, 2],
        "c": [None],
        "d": True,
    }


def test_what_json_cannot_hold_raises() -> None:
    with pytest.raises(TypeError, match="no place in a JSON document"):
        to_json({"a": object()})


def test_the_source_of_packages_and_modules_is_in_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "sample_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text("one = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def found(*names: str) -> str:
        source_digest.cache_clear()
        return source_digest(*names)

    whole, module = found("sample_package"), found("sample_package.part")
    assert found("sample_package") == whole != module
    (package / "part.py").write_text("one = 2\n")
    assert found("sample_package") != whole
    assert found("sample_package.part") != module
    source_digest.cache_clear()


def test_versions_are_read_without_importing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert records.package_version("no-such-package-here") is None
    assert records.package_version("numpy") == np.__version__


def test_a_place_that_cannot_be_written_is_bad_input(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="cannot write"):
        RecordStore(file, pytest.fail).save(RECORD)
    assert file.read_text() == ""


def test_digests_are_stable() -> None:
    assert digest_of({"b": 1, "a": 2.0}) == digest_of({"a": 2.0, "b": 1})
