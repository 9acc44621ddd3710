"""An accelerator in this process: the compiled model of the hardware behind the driver's ``Transport``."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms.errors import TermwiseError
from termwise.rtl.accelerator import Accelerator, AcceleratorDesign
from termwise.rtl.compiled_model import CompiledModel


class SimulatedBoard:
    """``Transport`` to a compiled ``Accelerator``.

    Args:
        design: of the accelerator.
        gaps: of 256 cycles, how many pass without a beat being offered, and without one being taken.
    """

    def __init__(self, design: AcceleratorDesign, gaps: tuple[int, int] = (0, 0)) -> None:
        self.model = CompiledModel(Accelerator(design), streams=("operands", "outputs", "interrupt"))
        self.gaps = gaps

    def write(self, offset: int, value: int) -> None:
        """Write a register. Raises ``TermwiseError`` where there is none."""
        ports = {"bus__awaddr": offset, "bus__wdata": value, "bus__wstrb": 15, "bus__awvalid": 1, "bus__wvalid": 1}
        self.model.run(ports, 1)
        answer = self.model.run({"bus__bready": 1}, 1)
        if not answer["bus__bvalid"][0] or answer["bus__bresp"][0]:
            raise TermwiseError(f"the register at 0x{offset:x} cannot be written")

    def read(self, offset: int) -> int:
        """Read a register. Raises ``TermwiseError`` where there is none."""
        self.model.run({"bus__araddr": offset, "bus__arvalid": 1}, 1)
        answer = self.model.run({"bus__rready": 1}, 1)
        if not answer["bus__rvalid"][0] or answer["bus__rresp"][0]:
            raise TermwiseError(f"there is no register at 0x{offset:x}")
        return int(answer["bus__rdata"][0])

    def transfer(self, operands: NDArray[np.uint32], outputs: int) -> NDArray[np.uint32]:
        """Send and receive at once."""
        found, _ = self.model.transfer("operands", operands, "outputs", outputs, stop="interrupt", gaps=self.gaps)
        return found
