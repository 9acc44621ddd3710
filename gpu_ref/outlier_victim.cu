// What an array of outlier_victim PEs (OliVe) computes, equal to termwise.algorithms.reference bit for bit.
//
// Sections 2.4 (FP16 activations) and 2.5 (codes of 4 bits on both sides, or of 8 bits from four PEs, whose four partial
// products sum to the product) of docs/microarchitecture.md.

#include "bit_parallel.cuh"

ENTRY void outlier_victim(const BitParallelArguments arguments) { multiply_halves(arguments); }
KERNEL(outlier_victim, BitParallelArguments)

ENTRY void outlier_victim_integer(const IntegerArguments arguments) { multiply_integers(arguments); }
KERNEL(outlier_victim_integer, IntegerArguments)
