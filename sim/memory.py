"""Energy of the on-chip buffers and of the external memory, and nothing else about them.

The table holds CACTI 7 results for one buffer of 512 KiB in 8 banks with one read and one write port: 28 nm, itrs-hp
transistors, 360 K, optimized for energy × delay². They are the buffers of the accelerators that the BitMoD artifact
simulates (HPCA 2025), made anew with CACTI built from source.
"""

from __future__ import annotations

from typing import Literal

PORT_WIDTHS_BITS = (128, 144, 192, 256, 288, 384, 512, 576, 1024)
READ_PJ = (60.130, 61.542, 66.578, 70.093, 72.596, 82.830, 92.794, 107.696, 138.442)
WRITE_PJ = (37.168, 38.459, 43.318, 51.718, 54.119, 64.048, 83.354, 89.343, 156.090)


def buffer_access_pj(access: Literal["read", "write"], port_width_bits: float) -> float:
    """Energy in pJ of one access of the full width of a port.

    Between two tabulated widths the energy is interpolated linearly. A port narrower than the narrowest one costs as
    much as that one; a port wider than the widest one costs as much as several of them side by side, in proportion.
    """
    table = READ_PJ if access == "read" else WRITE_PJ
    if port_width_bits <= PORT_WIDTHS_BITS[0]:
        return table[0]
    if port_width_bits >= PORT_WIDTHS_BITS[-1]:
        return table[-1] * port_width_bits / PORT_WIDTHS_BITS[-1]
    upper = next(index for index, width in enumerate(PORT_WIDTHS_BITS) if width >= port_width_bits)
    low_width, high_width = PORT_WIDTHS_BITS[upper - 1], PORT_WIDTHS_BITS[upper]
    share = (port_width_bits - low_width) / (high_width - low_width)
    return table[upper - 1] + share * (table[upper] - table[upper - 1])


def buffer_write_pj_per_bit(port_width_bits: float) -> float:
    """Energy in pJ of writing one bit: the cost of a full-width write divided by the width."""
    return buffer_access_pj("write", port_width_bits) / max(port_width_bits, PORT_WIDTHS_BITS[0])
