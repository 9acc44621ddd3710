"""Codes of a few bits in a row of bytes, without gaps: least significant bit first, each row padded to a whole byte."""

from __future__ import annotations

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from termwise.algorithms.formats import packed_row_bytes


@njit(cache=True, parallel=True, nogil=True)  # type: ignore[untyped-decorator]
def _pack(codes: NDArray[np.uint8], bits: int, packed: NDArray[np.uint8]) -> None:
    for row in prange(codes.shape[0]):
        window = np.uint32(0)
        held = 0
        byte = 0
        for column in range(codes.shape[1]):
            window |= np.uint32(codes[row, column]) << np.uint32(held)
            held += bits
            while held >= 8:
                packed[row, byte] = np.uint8(window & np.uint32(255))
                window >>= np.uint32(8)
                held -= 8
                byte += 1
        if held:
            packed[row, byte] = np.uint8(window)


@njit(cache=True, parallel=True, nogil=True)  # type: ignore[untyped-decorator]
def _unpack(packed: NDArray[np.uint8], bits: int, codes: NDArray[np.uint8]) -> None:
    mask = np.uint32((1 << bits) - 1)
    for row in prange(codes.shape[0]):
        window = np.uint32(0)
        held = 0
        byte = 0
        for column in range(codes.shape[1]):
            while held < bits:
                window |= np.uint32(packed[row, byte]) << np.uint32(held)
                held += 8
                byte += 1
            codes[row, column] = np.uint8(window & mask)
            window >>= np.uint32(bits)
            held -= bits


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack ``codes`` [rows, columns], each below 2**bits (1 .. 8 bits), into bytes [rows, packed_row_bytes]."""
    packed = np.zeros((codes.shape[0], packed_row_bytes(codes.shape[1], bits)), dtype=np.uint8)
    _pack(codes, bits, packed)
    return packed


def unpack(packed: NDArray[np.uint8], bits: int, columns: int) -> NDArray[np.uint8]:
    """Exact inverse of ``pack``: the codes [rows, columns] in ``packed`` [rows, packed_row_bytes]."""
    codes = np.empty((packed.shape[0], columns), dtype=np.uint8)
    _unpack(packed, bits, codes)
    return codes
