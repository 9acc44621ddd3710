"""``termwise simulate --trace``: a timeline of one product and the signals of one tile, in a new folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from termwise.algorithms.bit_serial import BitSerialSpec
from termwise.algorithms.errors import unknown_name
from termwise.algorithms.files import directory_written_beside
from termwise.algorithms.formats import Format
from termwise.algorithms.processing_element import BitParallelSpec
from termwise.algorithms.quantize import quantize
from termwise.algorithms.shapes import ModelShape
from termwise.algorithms.workload import Phase, workload
from termwise.sim.accelerators import Accelerator
from termwise.sim.plan import plan_product
from termwise.sim.simulate import product_of
from termwise.sim.tile_run import run_tile
from termwise.sim.trace import timeline, write_signals, write_timeline

TRACED_CYCLES = 20_000
TILE_ROWS, TILE_COLUMNS, TILE_INPUTS = 4, 2, 256
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What was written, as sentences for the user."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]


def write_trace(
    folder: Path,
    shape: ModelShape,
    accelerator: Accelerator,
    *,
    phase: Phase,
    weights: Format,
    context: int,
    batch: int,
    layer: str | None,
) -> Traced:
    """Write ``timeline.json`` and, where its PE has FP16 activations, ``tile.vcd`` to the new ``folder``.

    The product is the one called ``layer`` (as the layers of a simulation are), by default the first. Raises
    ``InputError`` for another name, and a folder that exists or cannot be written.
    """
    gemms = {gemm.name: gemm for gemm in workload(shape, phase=phase, context=context, batch=batch)}
    name = next(iter(gemms)) if layer is None else layer
    if name not in gemms:
        raise unknown_name("layer", name, tuple(gemms))
    program = plan_product(product_of(gemms[name], accelerator, phase, weights))
    ideal = accelerator.memory.ideal_bytes_per_cycle is not None
    memory = None if ideal else accelerator.memory.timing(accelerator.clock_mhz)
    intervals, count = timeline(program, memory=memory, most_cycles=TRACED_CYCLES)
    notes = [f"timeline.json: {name}, {count.cycles:,} cycles of the array and the channel, for ui.perfetto.dev"]
    if count.cycles == TRACED_CYCLES:
        notes[0] += "; the first ones, it goes on"
    files = ["timeline.json"]
    element = accelerator.processing_element
    with directory_written_beside(folder) as temporary:
        title = f"{shape.name} {name} on {accelerator.name}, {weights.name}, {phase}"
        write_timeline(temporary / files[0], intervals, title=title, clock_mhz=accelerator.clock_mhz)
        if isinstance(element, BitParallelSpec) and element.activations == "integer":
            notes.append("no tile.vcd: the signals of PEs with integer activations are not traced")
        else:
            random = np.random.default_rng(SEED)
            inputs = min(TILE_INPUTS, gemms[name].reduction)
            values = (random.standard_t(4, (TILE_ROWS, inputs)) * 0.05).astype(np.float32)
            activations = random.standard_normal((TILE_COLUMNS, inputs)).astype(np.float16)
            run = run_tile(element, quantize(values, weights), activations)
            skipping = isinstance(element, BitSerialSpec) and element.skip_zero_terms != "none"
            said = (
                f"{TILE_ROWS} outputs x {TILE_COLUMNS} tokens, {inputs} inputs in {weights.name}; weights (Student's "
                f"t, 4 degrees of freedom, times 0.05) and activations (normal) are random with seed {SEED}, not the "
                f"model's{'; zero terms are skipped' if skipping else ''}"
            )
            write_signals(temporary / "tile.vcd", run, comment=said)
            files.append("tile.vcd")
            notes.append(f"tile.vcd: {run.cycles:,} cycles of one tile of the PE, a nanosecond each: {said}")
    return Traced(files=tuple(folder / file for file in files), notes=tuple(notes))
