// What an array of flint PEs (ANT) computes, equal to termwise.algorithms.reference bit for bit.
//
// Sections 2.4 and 2.5 of docs/microarchitecture.md: behind its decoder the PE is that of outlier_victim.

#include "bit_parallel.cuh"

ENTRY void flint(const BitParallelArguments arguments) { multiply_halves(arguments); }
KERNEL(flint, BitParallelArguments)

ENTRY void flint_integer(const IntegerArguments arguments) { multiply_integers(arguments); }
KERNEL(flint_integer, IntegerArguments)
