// What an array of bit_serial PEs (BitMoD) computes: section 2.3 of docs/microarchitecture.md, in its three numerics.
//
// The twin of termwise.algorithms.reference, equal to it bit for bit. A thread computes one output of one token; a block
// TILE x TILE of them, which share numerators and activations in chunks of whole steps.

#include "operands.cuh"

constexpr int TILE = 16;
constexpr int CHUNK = 64;       // most columns of a chunk
constexpr int MOST_TERMS = 4;
constexpr int NUMERATORS = 512; // of a table of digits: -256 to 255

enum Numerics { PAPER = 0, EXACT = 1, SHARED_EXPONENT = 2 };

struct BitSerialArguments {
    Matrix weights;
    const u16 *activations;  // FP16, finite, [tokens, weights.columns]
    const i8 *digits;        // [2, NUMERATORS, MOST_TERMS]: 0, or +-(1 + power of two); 1: Booth
    float *results;          // [tokens, weights.rows]
    i64 tokens;
    i32 sum_size;            // columns of a sum: a group, or a piece of a row that is one group
    i32 numerics;
    i32 lanes;
    i32 align_bits;
    i32 accumulator_bits;
    i32 nearest_even;
    i32 terms[2];            // of fixed-point numbers, of Booth digits
    i32 bases[2][MOST_TERMS];
};

namespace {

struct Accumulator {
    i64 sum;
    i32 exponent;
};

// A magnitude of 11 bits, shifted into align_bits bits and then right by distance.
__device__ inline i64 aligned(const BitSerialArguments &spec, i32 significand, i32 distance) {
    const i32 places = distance - (spec.align_bits - 11);
    return places > 0 ? shift_right(significand, places, spec.nearest_even) : (i64)significand << -places;
}

// Stages 1 to 3 of the PE for one term of one step: the dot product, aligned to its greatest exponent, is accumulated.
__device__ inline void add_term(
    const BitSerialArguments &spec, const i32 *numerators, const u16 *activations, i32 lanes, i32 booth, i32 term,
    Accumulator &accumulator) {
    const i8 *digits = spec.digits + booth * NUMERATORS * MOST_TERMS + term;
    i32 greatest = -1;
    for (i32 lane = 0; lane < lanes; ++lane) {
        const i32 digit = digits[(numerators[lane] + NUMERATORS / 2) * MOST_TERMS];
        const Scale activation = half_parts(activations[lane]);
        if (digit && activation.significand)
            greatest = max(greatest, activation.exponent + (digit < 0 ? -digit : digit) - 1);
    }
    if (greatest < 0) return;
    i64 dot = 0;
    for (i32 lane = 0; lane < lanes; ++lane) {
        const i32 digit = digits[(numerators[lane] + NUMERATORS / 2) * MOST_TERMS];
        const Scale activation = half_parts(activations[lane]);
        if (!digit || !activation.significand) continue;
        const i32 power = (digit < 0 ? -digit : digit) - 1;
        const i64 magnitude = aligned(spec, activation.significand, greatest - activation.exponent - power);
        dot += (digit < 0) != (activations[lane] >> 15) ? -magnitude : magnitude;
    }
    if (dot == 0) return;
    const i32 dot_exponent = greatest + spec.bases[booth][term];
    i32 exponent = accumulator.sum ? max(accumulator.exponent, dot_exponent) : dot_exponent;
    i64 total = accumulator.sum ? shift_right(accumulator.sum, exponent - accumulator.exponent, spec.nearest_even) : 0;
    total += shift_right(dot, exponent - dot_exponent, spec.nearest_even);
    const i64 limit = (i64)1 << (spec.accumulator_bits - 1);
    i32 excess = 0;
    i64 kept = total;
    while (kept < -limit || kept >= limit) kept = shift_right(total, ++excess, spec.nearest_even);
    accumulator = {kept, exponent + excess};
}

}  // namespace

ENTRY void bit_serial(const BitSerialArguments arguments) {
    __shared__ i32 numerators[TILE][CHUNK];
    __shared__ u16 activations[TILE][CHUNK];
    const Matrix &weights = arguments.weights;
    const i32 columns = weights.columns;
    const i64 first_output = (i64)blockIdx.x * TILE, first_token = (i64)blockIdx.y * TILE;
    const i64 output = first_output + threadIdx.x, token = first_token + threadIdx.y;
    const bool here = output < weights.rows && token < arguments.tokens;
    const i32 chunk = CHUNK / arguments.lanes * arguments.lanes;
    const i32 sums = (columns + arguments.sum_size - 1) / arguments.sum_size;
    const i32 up = arguments.align_bits - 11;
    float result = 0.0f;
    for (i32 index = 0; index < sums; ++index) {
        const i32 begin = index * arguments.sum_size, end = min(columns, begin + arguments.sum_size);
        const i32 group = weights.groups == 1 ? 0 : index;
        const i32 booth =
            here ? (weights.zero_points ? 1 : weights.booth[type_of_group(weights, output, group)]) : 0;
        Accumulator accumulator = {0, 0};
        i32 exponent = 1 - HALF_BIAS;
        i32 greatest = 0;
        if (arguments.numerics == SHARED_EXPONENT && here) {
            for (i32 column = begin; column < end; ++column)
                greatest = max(greatest, half_parts(arguments.activations[token * columns + column]).exponent);
            exponent = greatest - HALF_BIAS - up;
        }
        for (i32 start = begin; start < end; start += chunk) {
            const i32 count = min(chunk, end - start);
            for (i32 place = threadIdx.y * TILE + threadIdx.x; place < TILE * count; place += TILE * TILE) {
                const i32 row = place / count, column = place % count;
                numerators[row][column] =
                    first_output + row < weights.rows ? numerator(weights, first_output + row, start + column) : 0;
                activations[row][column] = first_token + row < arguments.tokens
                    ? arguments.activations[(first_token + row) * columns + start + column]
                    : 0;
            }
            __syncthreads();
            if (here && arguments.numerics == PAPER) {
                for (i32 step = 0; step < count; step += arguments.lanes)
                    for (i32 term = 0; term < arguments.terms[booth]; ++term)
                        add_term(
                            arguments, numerators[threadIdx.x] + step, activations[threadIdx.y] + step,
                            min(arguments.lanes, count - step), booth, term, accumulator);
            } else if (here) {
                for (i32 column = 0; column < count; ++column) {
                    const u16 bits = activations[threadIdx.y][column];
                    const Scale activation = half_parts(bits);
                    const i64 magnitude = arguments.numerics == EXACT
                        ? (i64)activation.significand << (activation.exponent - 1)
                        : aligned(arguments, activation.significand, greatest - activation.exponent);
                    accumulator.sum += (bits >> 15 ? -magnitude : magnitude) * numerators[threadIdx.x][column];
                }
            }
            __syncthreads();
        }
        if (here) {
            if (arguments.numerics == PAPER) exponent = accumulator.exponent - HALF_BIAS - up;
            const Scale scale = scale_of_group(weights, output, group);
            result += float_of_product(accumulator.sum, scale.significand, exponent + scale.exponent);
        }
    }
    if (here) arguments.results[token * weights.rows + output] = scaled_by_channel(weights, output, result);
}
KERNEL(bit_serial, BitSerialArguments)
