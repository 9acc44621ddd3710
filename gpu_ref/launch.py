"""Start a kernel: on a GPU through the driver, on the CPU through its twin. Either takes the same structure."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence

import torch

from termwise.algorithms.errors import InputError, MissingToolError, TermwiseError
from termwise.gpu_ref import build

LEAST_CAPABILITY = (8, 0)
"""Oldest GPUs that the kernels are compiled for: Ampere."""

_MOST_BLOCKS = ((1 << 31) - 1, 65535, 65535)
_TWIN_ERRORS = {1: "threads wait at a barrier that others never reach", 2: "there is no memory for its threads"}


class LaunchError(TermwiseError):
    """A kernel could not be started, or failed; the message has what the driver or the twin said."""


def check_device(device: torch.device) -> None:
    """Raises ``InputError`` for a device that has no kernels, ``MissingToolError`` where there is no such GPU."""
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise InputError(f"device {device}; expected cpu, or cuda with a GPU of NVIDIA")
    if not torch.cuda.is_available():
        raise MissingToolError(
            f"device {device}: this torch finds no GPU; expected one, and a torch that is built for CUDA"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        raise InputError(
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; "
            "expected 8.0 or more"
        )


def launch(
    stem: str,
    kernel: str,
    arguments: ctypes.Structure,
    blocks: Sequence[int],
    threads: Sequence[int],
    device: torch.device,
) -> None:
    """Start ``kernel`` of ``stem``.cu on ``device``; on a GPU on torch's current stream, without waiting for its end.

    Args:
        arguments: the structure that the kernel takes; its pointers are to memory of the device.
        blocks: of the grid, along x, y and z; nothing happens where there is none.
        threads: of a block.

    Raises ``InputError`` for a grid that is too large, ``LaunchError``, and what the compilers raise.
    """
    grid = [*blocks, 1, 1][:3]
    block = [*threads, 1, 1][:3]
    if 0 in grid:
        return
    if any(count > most for count, most in zip(grid, _MOST_BLOCKS, strict=True)):
        raise InputError(f"{kernel} needs a grid of {grid} blocks; expected at most {list(_MOST_BLOCKS)}: fewer tokens")
    if device.type == "cpu":
        _launch_twin(stem, kernel, arguments, grid, block)
    else:
        _launch_on_gpu(stem, kernel, arguments, grid, block, device)


@functools.cache
def _twin_library(stem: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(build.twin(stem)))


def _launch_twin(stem: str, kernel: str, arguments: ctypes.Structure, grid: list[int], block: list[int]) -> None:
    function = getattr(_twin_library(stem), f"{kernel}_twin")
    triple = ctypes.c_uint * 3
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    status = function(ctypes.byref(arguments), triple(*grid), triple(*block), ctypes.c_uint(processors))
    if status:
        raise LaunchError(f"the twin of {kernel}: {_TWIN_ERRORS[status]}")


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise MissingToolError("libcuda.so.1, the driver of NVIDIA's GPUs, was not found") from None


def _check(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise LaunchError(f"{what}: {(text.value or b'unknown error').decode()} (CUDA error {status})")


@functools.cache
def _function(stem: str, kernel: str, index: int) -> ctypes.c_void_p:
    """A kernel, loaded into the context that torch has on the GPU of that ``index``, which is the current one."""
    major, minor = torch.cuda.get_device_capability(index)
    module, function = _module(stem, f"sm_{major}{minor}", index), ctypes.c_void_p()
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, kernel.encode()), f"finding {kernel}")
    return function


@functools.cache
def _module(stem: str, architecture: str, index: int) -> ctypes.c_void_p:  # noqa: ARG001
    """The kernels of ``stem`` on the GPU of that ``index``: every GPU has a context of its own."""
    module = ctypes.c_void_p()
    image = build.module(stem, architecture).read_bytes()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), image), f"loading {stem}.cu for {architecture}")
    return module


def _launch_on_gpu(
    stem: str, kernel: str, arguments: ctypes.Structure, grid: list[int], block: list[int], device: torch.device
) -> None:
    index = torch.cuda.current_device() if device.index is None else device.index
    with torch.cuda.device(index):
        function = _function(stem, kernel, index)
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream(index).cuda_stream)
        _check(_driver().cuLaunchKernel(function, *grid, *block, 0, stream, parameters, None), f"starting {kernel}")
