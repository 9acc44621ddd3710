"""Records: one JSON file per result, named by a digest of everything that the result depends on.

A record is reused when its name matches: same inputs, same source code, same versions of the packages that compute.
A file is trusted only when its content matches its own checksum; anything else is computed again. Records are written
whole or not at all, so a process may be killed at any moment and loses only what it was computing.

Status: ``done`` (``outputs`` holds the result), ``skipped`` (not computable by design; ``reason`` says why), ``failed``
(``error`` says what went wrong; a failed record is tried again by the next run).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import math
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

from termwise.algorithms.errors import TermwiseError
from termwise.algorithms.files import write_text

RECORD_VERSION: Final = 1
"""Raised when the content of a record changes its meaning; older records are then computed again."""

Kind = Literal["quality", "point", "synthesis"]
Status = Literal["done", "skipped", "failed"]

FOLDERS: Final[Mapping[Kind, str]] = {"quality": "quality", "point": "points", "synthesis": "synthesis"}
"""Folder of each kind of record below ``records/``."""

DIGEST_PACKAGES: Final = ("numpy", "torch", "transformers")
"""Packages whose version is part of a record's digest: their arithmetic is in the result."""

REPORTED_PACKAGES: Final = ("termwise", *DIGEST_PACKAGES, "numba", "tokenizers", "safetensors")
"""Packages whose version a record states."""


def strict(value: Any) -> Any:
    """``value`` as strict JSON takes it: no NaN, no infinity (both become None), plain Python numbers and lists."""
    if isinstance(value, Mapping):
        return {str(key): strict(entry) for key, entry in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # a NumPy scalar or array
        return strict(value.tolist())
    if isinstance(value, Iterable):
        return [strict(entry) for entry in value]
    raise TypeError(f"{type(value).__name__} has no place in a JSON document")


def to_json(document: Any) -> str:
    """``document`` as strict JSON, indented, keys in the order given, one line feed at the end."""
    return json.dumps(strict(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def digest_of(document: Any) -> str:
    """32 hexadecimal digits that name ``document``, whatever the order of its keys."""
    text = json.dumps(strict(document), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def package_version(package: str) -> str | None:
    """Installed version of a package, read without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Version of Python and of the packages that take part in a result."""
    return {"python": platform.python_version()} | {name: package_version(name) for name in REPORTED_PACKAGES}


def _source_files(folder: Path, prefix: str) -> Iterable[tuple[str, bytes]]:
    """Name and content of every Python and TOML file below an importable folder."""
    for entry in folder.iterdir():
        name = f"{prefix}/{entry.name}"
        if entry.is_dir():
            if entry.name != "__pycache__":
                yield from _source_files(entry, name)
        elif entry.name.endswith((".py", ".toml")):
            yield name, entry.read_bytes()


@cache
def source_digest(*packages: str) -> str:
    """Digest of the source code of importable packages or modules, for example ``termwise.algorithms``."""
    total = hashlib.sha256()
    for package in packages:
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise ValueError(f"{package} has no source code to take a digest of")
        origin = Path(found.origin)
        if found.submodule_search_locations is None:
            files = [(package, origin.read_bytes())]
        else:
            files = sorted(_source_files(origin.parent, package))
        for name, content in files:
            total.update(f"{name}\0{len(content)}\0".encode())
            total.update(content)
    return total.hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One result, with all that is needed to obtain it again.

    Attributes:
        kind: ``quality`` (a model in a format), ``point`` (that, on an accelerator, in a phase) or ``synthesis``
            (a unit on a target).
        inputs: everything the result depends on; its digest names the record.
        status: ``done``, ``skipped`` or ``failed``.
        outputs: the result, units in the names; empty unless ``done``.
        reason: why it was skipped.
        error: what failed.
        specification_digest: the sweep that first asked for it.
        command: the command that computed it.
        seed: of random numbers; None, since nothing here is random.
        versions: of Python and packages at that time.
    """

    kind: Kind
    inputs: Mapping[str, Any]
    status: Status
    outputs: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    error: str | None = None
    specification_digest: str | None = None
    command: str | None = None
    seed: int | None = None
    versions: Mapping[str, str | None] = field(default_factory=versions)

    @property
    def digest(self) -> str:
        """The name of the record: a digest of its kind and inputs."""
        return record_digest(self.kind, self.inputs)

    def to_dict(self) -> dict[str, Any]:
        """The record as it is stored, with its digest and a checksum of everything else."""
        body: dict[str, Any] = strict({"record_version": RECORD_VERSION, "digest": self.digest, **asdict(self)})
        return body | {"checksum": digest_of(body)}


def record_digest(kind: Kind, inputs: Mapping[str, Any]) -> str:
    """Digest of a record of this kind with these inputs."""
    return digest_of({"record_version": RECORD_VERSION, "kind": kind, "inputs": inputs})


class CorruptRecordError(TermwiseError):
    """A record file is not what was written there; the message says in which respect."""


def parse_record(text: str) -> Record:
    """The record that ``text`` holds. Raises ``CorruptRecordError`` unless it is exactly what was once written."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise CorruptRecordError(f"not JSON ({error})") from error
    if not isinstance(document, dict) or "checksum" not in document:
        raise CorruptRecordError("not a record")
    checksum = document.pop("checksum")
    if checksum != digest_of(document):
        raise CorruptRecordError("the checksum does not match the content")
    version = document.pop("record_version", None)
    if version != RECORD_VERSION:
        raise CorruptRecordError(f"record version {version}; expected {RECORD_VERSION}")
    digest = document.pop("digest", None)
    try:
        record = Record(**document)
    except TypeError as error:
        raise CorruptRecordError(f"fields differ ({error})") from error
    if record.digest != digest:
        raise CorruptRecordError("the digest does not match the inputs")
    return record


@dataclass(frozen=True)
class RecordStore:
    """The records of a run, below ``RUN/records``.

    Attributes:
        run: folder of the run.
        warn: receives one sentence for every record file that cannot be trusted.
    """

    run: Path
    warn: Callable[[str], None]

    def path(self, kind: Kind, digest: str) -> Path:
        """Where the record of this kind and digest is kept."""
        return self.run / "records" / FOLDERS[kind] / f"{digest}.json"

    def load(self, kind: Kind, digest: str) -> Record | None:
        """The record, or None where there is none that can be trusted (then ``warn`` was told)."""
        path = self.path(kind, digest)
        try:
            record = parse_record(path.read_text(encoding="utf-8"))
            if record.kind != kind or record.digest != digest:
                raise CorruptRecordError("it belongs to another name")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (CorruptRecordError, UnicodeDecodeError, OSError) as error:
            self.warn(f"{path} is not a valid record ({error}); it is not used")
            return None
        return record

    def save(self, record: Record) -> None:
        """Write the record, whole or not at all. Raises ``InputError`` where the folder cannot be written."""
        write_text(self.path(record.kind, record.digest), to_json(record.to_dict()))
