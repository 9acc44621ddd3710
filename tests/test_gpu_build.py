"""The kernels compile for every architecture, and the CPU runs them as a GPU would: barriers, shuffles, conversions."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from termwise.algorithms.errors import MissingToolError
from termwise.gpu_ref import build

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "compute_80")
PORTABLE = Path(__file__).parent / "portable.cu"


class Numbers(ctypes.Structure):
    _fields_ = [("given", ctypes.c_void_p), ("found", ctypes.c_void_p), ("count", ctypes.c_uint32)]


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The test kernels as a library."""
    made = tmp_path_factory.mktemp("portable") / "portable.so"
    options = [*build.TWIN_OPTIONS, f"-I{build.SOURCES}"]
    subprocess.run(
        [build.host_compiler()[0], *options, "-x", "c++", str(PORTABLE), "-o", str(made)], check=True, timeout=120
    )
    return ctypes.CDLL(str(made))


def run(
    twins: ctypes.CDLL,
    kernel: str,
    given: NDArray[np.uint32],
    found: NDArray[np.uint32],
    blocks: tuple[int, ...],
    threads: tuple[int, ...],
    processors: int = 2,
) -> int:
    arguments = Numbers(given.ctypes.data, found.ctypes.data, given.size)
    triple = ctypes.c_uint * 3
    function = getattr(twins, f"{kernel}_twin")
    return int(
        function(ctypes.byref(arguments), triple(*blocks), triple(*threads), ctypes.c_uint(processors))  # a TwinError
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stem", build.STEMS)
def test_nvrtc_compiles_every_kernel_without_a_warning(stem: str, architecture: str) -> None:
    library = build.nvrtc()
    assert library is not None, "NVRTC is a dependency of the tests"
    image = build.module(stem, architecture).read_bytes()
    assert image.startswith(b"\x7fELF") or b".target sm_80" in image


@pytest.mark.skipif(build.nvcc() is None, reason="there is no nvcc")
@pytest.mark.parametrize("stem", build.STEMS)
def test_nvcc_compiles_every_kernel_without_a_warning(stem: str, tmp_path: Path) -> None:
    compiler = build.nvcc()
    assert compiler is not None
    build.by_nvcc(compiler, stem, "sm_90", tmp_path / "kernel.cubin")
    assert (tmp_path / "kernel.cubin").read_bytes().startswith(b"\x7fELF")


def test_a_source_that_does_not_compile_is_an_error_with_the_compilers_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "wrong.cu").write_text("ENTRY void wrong() { undefined_name(); }")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for compile in (lambda: build.twin("wrong"), lambda: build.module("wrong", "sm_90")):
        with pytest.raises(build.CompilationError, match=r"(?s)could not compile wrong.cu: .*(ENTRY|undefined_name)"):
            compile()
    assert not list((tmp_path / "cache").rglob("wrong.*"))


def test_a_missing_compiler_is_named_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    build.host_compiler.cache_clear()
    with pytest.raises(MissingToolError, match="no-such-compiler, which was not found: apt install"):
        build.host_compiler()
    build.host_compiler.cache_clear()
    monkeypatch.setattr(build, "nvrtc", lambda: None)
    monkeypatch.setattr(build, "nvcc", lambda: None)
    with pytest.raises(MissingToolError, match="needs nvcc or NVRTC"):
        build.module("bit_serial", "sm_90")


@pytest.mark.parametrize("processors", [1, 2, 5])
def test_threads_see_what_others_wrote_before_a_barrier(twins: ctypes.CDLL, processors: int) -> None:
    given = np.arange(64 * 7, dtype=np.uint32)
    found = np.zeros_like(given)
    assert run(twins, "reversed", given, found, (7, 1, 1), (64, 1, 1), processors) == 0
    assert np.array_equal(found, given.reshape(7, 64)[:, ::-1].ravel())


@pytest.mark.parametrize(("blocks", "threads"), [((3, 1, 1), (64, 1, 1)), ((2, 3, 2), (8, 4, 3))])
def test_shuffles_exchange_within_a_warp(twins: ctypes.CDLL, blocks: tuple[int, ...], threads: tuple[int, ...]) -> None:
    given = np.random.default_rng(0).integers(0, 1000, int(np.prod(blocks) * np.prod(threads))).astype(np.uint32)
    found = np.zeros_like(given)
    assert run(twins, "warp_sums", given, found, blocks, threads) == 0
    warps = given.reshape(-1, 32)
    assert np.array_equal(found.reshape(-1, 32), np.repeat(warps.sum(1, keepdims=True) * 1000 + warps[:, :1], 32, 1))


def test_a_barrier_that_some_threads_never_reach_is_an_error(twins: ctypes.CDLL) -> None:
    assert run(twins, "parted", np.zeros(8, np.uint32), np.zeros(8, np.uint32), (3, 1, 1), (8, 1, 1)) == 1
    found = np.zeros(64, np.uint32)  # and the next kernel runs as if nothing had been
    assert run(twins, "reversed", np.arange(64, dtype=np.uint32), found, (1, 1, 1), (64, 1, 1)) == 0
    assert found[0] == 63


def test_atomic_maxima_of_blocks_on_several_processors(twins: ctypes.CDLL) -> None:
    given = np.random.default_rng(1).integers(0, 1 << 30, 64 * 50).astype(np.uint32)
    found = np.zeros(1, np.uint32)
    assert run(twins, "largest", given, found, (50, 1, 1), (64, 1, 1), processors=4) == 0
    assert found[0] == given.max()


def test_conversions_of_every_half_are_exact(twins: ctypes.CDLL) -> None:
    given = np.arange(1 << 16, dtype=np.uint32)
    found = np.zeros(2 << 16, np.uint32)
    assert run(twins, "converted", given, found, (1 << 10, 1, 1), (64, 1, 1)) == 0
    halves = given.astype(np.uint16).view(np.float16)
    known = ~np.isnan(halves)
    assert np.array_equal(found[::2][known], halves[known].astype(np.float32).view(np.uint32))
    assert np.isnan(found[::2].view(np.float32)[~known]).all()
    wide = (given << 16).view(np.float32)
    with np.errstate(over="ignore"):
        expected = wide.astype(np.float16)
    known = ~np.isnan(wide)
    assert np.array_equal(found[1::2][known], expected[known].view(np.uint16))


def _with_address_sanitizer(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    runtime = subprocess.run(
        [build.host_compiler()[0], "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("the compiler has no AddressSanitizer")
    environment = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "FOLDER": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=500, check=False
    )


_SANITIZED = """
import ctypes
from termwise.gpu_ref import build, launch
launch._twin_library = lambda stem: ctypes.CDLL(str(build.twin(stem, ("-fsanitize=address", "-g"))))
"""


@pytest.mark.slow
def test_address_sanitizer_finds_nothing_in_the_exact_kernels(tmp_path: Path) -> None:
    script = _SANITIZED + (
        "import numpy as np\n"
        "from termwise.algorithms.bit_serial import BitSerialSpec\n"
        "from termwise.algorithms.dictionary import DictionarySpec\n"
        "from termwise.algorithms.flint import FlintSpec\n"
        "from termwise.algorithms.fp16_mac import Fp16MacSpec\n"
        "from termwise.algorithms.outlier_victim import OutlierVictimSpec\n"
        "from termwise.algorithms.quantize import quantize\n"
        "from termwise.gpu_ref import exact\n"
        "random = np.random.default_rng(0)\n"
        "pairs = [(BitSerialSpec(), 'bitmod-w3g32'), (BitSerialSpec(numerics='exact'), 'int-w5g16'),\n"
        "         (BitSerialSpec(numerics='shared_exponent', lanes=3), 'bitmod-w6'), (FlintSpec(), 'ant-w3g16'),\n"
        "         (OutlierVictimSpec(), 'olive-w4'), (DictionarySpec(), 'gobo-w3:threshold=-1'),\n"
        "         (Fp16MacSpec(), 'fp16')]\n"
        "for spec, format in pairs:\n"
        "    for outputs, inputs, tokens in ((1, 1, 1), (17, 131, 3), (5, 64, 17)):\n"
        "        weights = random.standard_normal((outputs, inputs)).astype(np.float32)\n"
        "        activations = random.standard_normal((tokens, inputs)).astype(np.float16)\n"
        "        exact.multiply(spec, quantize(weights, format), activations)\n"
        "print('clean')\n"
    )
    done = _with_address_sanitizer(script, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "clean"


@pytest.mark.slow
def test_address_sanitizer_finds_nothing_in_the_other_kernels(tmp_path: Path) -> None:
    script = _SANITIZED + (
        "import numpy as np, torch\n"
        "from termwise.algorithms.quantize import quantize\n"
        "from termwise.gpu_ref import QuantizedLinear, quantizers\n"
        "from termwise.gpu_ref.bit_planes import bit_planes, multiply\n"
        "random = np.random.default_rng(0)\n"
        "for outputs, inputs, tokens in ((1, 1, 1), (17, 131, 9), (33, 256, 66)):\n"
        "    weights = random.standard_t(4, (outputs, inputs)).astype(np.float32)\n"
        "    for format in ('bitmod-w3g32', 'bitmod-w4', 'bitmod-w6g64', 'olive-w4', 'int-asym-w5g16', 'nvfp4'):\n"
        "        layer = QuantizedLinear(quantize(weights, format))\n"
        "        for type in (torch.float16, torch.bfloat16):\n"
        "            layer(torch.ones((tokens, inputs), dtype=type))\n"
        "    for format in ('bitmod-w3g32', 'bitmod-w6', 'olive-w4', 'olive-w8g16'):\n"
        "        quantizers.quantize(weights, format)\n"
        "    codes = torch.ones((outputs, inputs), dtype=torch.uint8)\n"
        "    multiply(bit_planes(codes, 3, 'signed'), bit_planes(codes[:tokens], 2, 'unsigned'))\n"
        "print('clean')\n"
    )
    done = _with_address_sanitizer(script, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "clean"


def test_address_sanitizer_finds_a_write_behind_the_end(tmp_path: Path) -> None:
    script = (
        "import ctypes, os, subprocess\n"
        "from termwise.gpu_ref import build\n"
        f"path, source = os.environ['FOLDER'] + '/portable.so', {str(PORTABLE)!r}\n"
        "options = [*build.TWIN_OPTIONS, '-fsanitize=address', '-g', f'-I{build.SOURCES}', '-x', 'c++']\n"
        "subprocess.run([build.host_compiler()[0], *options, source, '-o', path], check=True)\n"
        "class Numbers(ctypes.Structure):\n"
        "    _fields_ = [('given', ctypes.c_void_p), ('found', ctypes.c_void_p), ('count', ctypes.c_uint32)]\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype = ctypes.c_void_p\n"
        "memory = libc.malloc(ctypes.c_size_t(32))\n"
        "triple = ctypes.c_uint * 3\n"
        "ctypes.CDLL(path).beyond_twin(ctypes.byref(Numbers(memory, memory, 8)), triple(1, 1, 1), triple(8, 1, 1), 1)\n"
    )
    done = _with_address_sanitizer(script, tmp_path)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "portable.cu" in done.stderr
