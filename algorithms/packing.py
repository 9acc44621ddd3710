"""Codes of a few bits in a row of bytes, without gaps: least significant bit first, each row padded to a whole byte."""

from __future__ import annotations

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from termwise.algorithms.formats import packed_row_bytes


@njit  # type: ignore[untyped-decorator]
def _pack_row(codes: NDArray[np.uint8], bits: int, packed: NDArray[np.uint8]) -> None:
    """Eight codes fill ``bits`` bytes; the last of them may be fewer."""
    byte = 0
    for start in range(0, codes.size, 8):
        window = np.uint64(0)
        for index in range(min(8, codes.size - start)):
            window |= np.uint64(codes[start + index]) << np.uint64(index * bits)
        for _ in range(min(bits, packed.size - byte)):
            packed[byte] = np.uint8(window & np.uint64(255))
            window >>= np.uint64(8)
            byte += 1


@njit  # type: ignore[untyped-decorator]
def _unpack_row(packed: NDArray[np.uint8], bits: int, codes: NDArray[np.uint8]) -> None:
    mask = np.uint64((1 << bits) - 1)
    byte = 0
    for start in range(0, codes.size, 8):
        window = np.uint64(0)
        for index in range(min(bits, packed.size - byte)):
            window |= np.uint64(packed[byte]) << np.uint64(8 * index)
            byte += 1
        for index in range(min(8, codes.size - start)):
            codes[start + index] = np.uint8(window & mask)
            window >>= np.uint64(bits)


@njit(cache=True, parallel=True, nogil=True)  # type: ignore[untyped-decorator]
def _pack(codes: NDArray[np.uint8], bits: int, packed: NDArray[np.uint8]) -> None:
    for row in prange(codes.shape[0]):
        _pack_row(codes[row], bits, packed[row])


@njit(cache=True, parallel=True, nogil=True)  # type: ignore[untyped-decorator]
def _unpack(packed: NDArray[np.uint8], bits: int, codes: NDArray[np.uint8]) -> None:
    for row in prange(codes.shape[0]):
        _unpack_row(packed[row], bits, codes[row])


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
