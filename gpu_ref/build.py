"""Compile the kernels: by g++ into a library for the CPU, by nvcc or NVRTC into a module for a GPU.

What is compiled is kept under the digest of its sources, options and compiler, in ``$XDG_CACHE_HOME/termwise/kernels``
or ``~/.cache/termwise/kernels``.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from termwise.algorithms.errors import MissingToolError, TermwiseError

SOURCES = Path(__file__).resolve().parent
STEMS = tuple(sorted(path.stem for path in SOURCES.glob("*.cu")))
"""The sources of kernels."""

TWIN_OPTIONS = (
    *("-std=c++17", "-O2", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror"),
    *("-ffp-contract=off", "-U_FORTIFY_SOURCE"),  # every rounding as written; fibers jump between stacks
)
MODULE_OPTIONS = ("-std=c++17", "-fmad=false")
"""Of both compilers for GPUs. No fused operation but where a kernel asks for one."""

_MESSAGE_CHARACTERS = 3000


class CompilationError(TermwiseError):
    """A compiler refused a kernel; the message has what it said."""


def _cached(name: str, key: Sequence[str], make: Callable[[Path], None]) -> Path:
    """The file ``name`` of that ``key`` and of the sources, made beside its place where it is not there yet."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*.cu*"))]
    digest = hashlib.sha256("\0".join([*key, *texts]).encode()).hexdigest()[:24]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "termwise" / "kernels"
    path = base / digest / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / name
            make(made)
            os.replace(made, path)
    return path


@functools.cache
def host_compiler() -> tuple[str, str]:
    """Path and version of g++, or of ``$CXX``. Raises ``MissingToolError``."""
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is None:
        raise MissingToolError(f"the kernels' twins on the CPU need {name}, which was not found: apt install g++")
    return path, _version(path)


def _version(path: str) -> str:
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[-1] if "nvcc" in Path(path).name else done.stdout.partition("\n")[0]


def _run(command: Sequence[str], stem: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr + done.stdout).strip()[-_MESSAGE_CHARACTERS:]
        raise CompilationError(f"{Path(command[0]).name} could not compile {stem}.cu: {said}")


def twin(stem: str, extra: Sequence[str] = ()) -> Path:
    """The library of ``stem``'s kernels for the CPU, with ``extra`` options.

    Raises ``MissingToolError`` without a compiler, ``CompilationError``.
    """
    compiler, version = host_compiler()
    options = [*TWIN_OPTIONS, *extra]

    def make(made: Path) -> None:
        _run([compiler, *options, "-x", "c++", str(SOURCES / f"{stem}.cu"), "-o", str(made)], stem)

    return _cached(f"{stem}.so", [stem, version, *options], make)


def nvcc() -> str | None:
    """Path of nvcc: on the ``PATH``, or that of NVIDIA's wheels."""
    found = shutil.which("nvcc")
    if found:
        return found
    try:
        import nvidia
    except ImportError:
        return None
    for root in nvidia.__path__:
        for path in sorted(Path(root).glob("cu*/bin/nvcc")) + sorted(Path(root).glob("cuda_nvcc/bin/nvcc")):
            return str(path)
    return None


def nvrtc() -> ModuleType | None:
    """NVIDIA's compiler as a library, where it is installed: ``termwise.gpu_ref.nvrtc``."""
    from termwise.gpu_ref import nvrtc as library

    return library if library.available() else None


def module(stem: str, architecture: str) -> Path:
    """The kernels of ``stem`` for GPUs of an ``architecture`` such as ``sm_90``, or PTX for ``compute_90``.

    NVRTC compiles them where it is installed, else nvcc. Raises ``MissingToolError`` without either,
    ``CompilationError``.
    """
    library = nvrtc()
    if library is not None:
        key = [stem, architecture, "nvrtc", library.version(), *MODULE_OPTIONS]
        return _cached(f"{stem}.bin", key, lambda made: _by_nvrtc(library, stem, architecture, made))
    compiler = nvcc()
    if compiler is None:
        raise MissingToolError(
            "compiling kernels for a GPU needs nvcc or NVRTC; neither was found: pip install nvidia-cuda-nvrtc"
        )
    key = [stem, architecture, _version(compiler), *MODULE_OPTIONS]
    return _cached(f"{stem}.bin", key, lambda made: by_nvcc(compiler, stem, architecture, made))


def by_nvcc(compiler: str, stem: str, architecture: str, made: Path) -> None:
    """Compile ``stem`` by nvcc into ``made``; warnings are errors. Raises ``CompilationError``."""
    kind = "-ptx" if architecture.startswith("compute") else "-cubin"
    options = [*MODULE_OPTIONS, "-O3", "-Werror", "all-warnings", f"-arch={architecture}", kind]
    _run([compiler, *options, str(SOURCES / f"{stem}.cu"), "-o", str(made)], stem)


def _by_nvrtc(library: ModuleType, stem: str, architecture: str, made: Path) -> None:
    source = (SOURCES / f"{stem}.cu").read_text(encoding="utf-8")
    options = [*MODULE_OPTIONS, f"-arch={architecture}", f"-I{SOURCES}"]
    try:
        made.write_bytes(library.compile(source, f"{stem}.cu", options, ptx=architecture.startswith("compute")))
    except library.NvrtcError as error:
        raise CompilationError(f"NVRTC could not compile {stem}.cu: {error}") from None
