"""The same numbers at speed: the place of the CUDA reference kernels. It holds none yet (see docs/roadmap.md)."""
