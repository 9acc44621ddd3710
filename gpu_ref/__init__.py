"""The same numbers at speed: CUDA kernels over the packed bytes of ``algorithms``, and their twins on the CPU.

Every kernel is one source. NVIDIA's compiler (nvcc, or NVRTC from a wheel) makes a module for the GPU of it, g++ a
library for the CPU, in which the same text runs thread by thread. The header ``portable.cuh`` says what it may use.
"""
