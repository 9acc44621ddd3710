// What the PEs of OliVe and ANT have in common: sections 2.4 and 2.5 of docs/microarchitecture.md.
//
// The decoders differ in what they read, and `numerator` reads it all; so both stems are these functions under a name.
// Each block is of TILE outputs x TILE tokens, a thread of one output of one token.

#pragma once

#include "operands.cuh"

struct BitParallelArguments {
    Matrix weights;
    const u16 *activations;  // FP16, finite, [tokens, weights.columns]
    float *results;          // [tokens, weights.rows]
    i64 tokens;
    i32 sum_size;            // columns of a sum: a group, or a piece of a row that is one group
};

struct IntegerArguments {
    Matrix weights;
    Matrix activations;  // a row is a token; one group in a row
    float *results;      // [activations.rows, weights.rows]
    u32 *overflow;       // becomes 1 where magnitudes of products sum to more than an int32 accumulator holds
};

namespace {

constexpr int TILE = 16;
constexpr int CHUNK = 64;
constexpr i64 LARGEST_SUM = 2147483647;

// FP16 activations, sums of a group in FP32, in the order of the inputs.
__device__ inline void multiply_halves(const BitParallelArguments &arguments) {
    __shared__ float numerators[TILE][CHUNK + 1];
    __shared__ float activations[TILE][CHUNK + 1];
    const Matrix &weights = arguments.weights;
    const i32 columns = weights.columns;
    const i64 first_output = (i64)blockIdx.x * TILE, first_token = (i64)blockIdx.y * TILE;
    const i64 output = first_output + threadIdx.x, token = first_token + threadIdx.y;
    const bool here = output < weights.rows && token < arguments.tokens;
    const i32 sums = (columns + arguments.sum_size - 1) / arguments.sum_size;
    float result = 0.0f;
    for (i32 index = 0; index < sums; ++index) {
        const i32 begin = index * arguments.sum_size, end = min(columns, begin + arguments.sum_size);
        float total = 0.0f;
        for (i32 start = begin; start < end; start += CHUNK) {
            const i32 count = min(CHUNK, end - start);
            for (i32 place = threadIdx.y * TILE + threadIdx.x; place < TILE * count; place += TILE * TILE) {
                const i32 row = place / count, column = place % count;
                numerators[row][column] = first_output + row < weights.rows
                    ? (float)numerator(weights, first_output + row, start + column)
                    : 0.0f;
                activations[row][column] = first_token + row < arguments.tokens
                    ? half_to_float(arguments.activations[(first_token + row) * columns + start + column])
                    : 0.0f;
            }
            __syncthreads();
            for (i32 column = 0; column < count; ++column)
                total = total + activations[threadIdx.y][column] * numerators[threadIdx.x][column];
            __syncthreads();
        }
        if (here) {
            const Scale scale = scale_of_group(weights, output, weights.groups == 1 ? 0 : index);
            result = result + total * float_of_product(1, scale.significand, scale.exponent);
        }
    }
    if (here) arguments.results[token * weights.rows + output] = scaled_by_channel(weights, output, result);
}

// Codes on both sides, sums of a group in an int32 accumulator.
__device__ inline void multiply_integers(const IntegerArguments &arguments) {
    __shared__ i32 numerators[TILE][CHUNK + 1];
    __shared__ i32 partners[TILE][CHUNK + 1];
    const Matrix &weights = arguments.weights, &tokens = arguments.activations;
    const i64 first_output = (i64)blockIdx.x * TILE, first_token = (i64)blockIdx.y * TILE;
    const i64 output = first_output + threadIdx.x, token = first_token + threadIdx.y;
    const bool here = output < weights.rows && token < tokens.rows;
    float result = 0.0f;
    for (i32 group = 0; group < weights.groups; ++group) {
        const i32 begin = group * weights.group_size, end = min(weights.columns, begin + weights.group_size);
        i64 sum = 0, magnitudes = 0;
        for (i32 start = begin; start < end; start += CHUNK) {
            const i32 count = min(CHUNK, end - start);
            for (i32 place = threadIdx.y * TILE + threadIdx.x; place < TILE * count; place += TILE * TILE) {
                const i32 row = place / count, column = place % count;
                numerators[row][column] =
                    first_output + row < weights.rows ? numerator(weights, first_output + row, start + column) : 0;
                partners[row][column] =
                    first_token + row < tokens.rows ? numerator(tokens, first_token + row, start + column) : 0;
            }
            __syncthreads();
            for (i32 column = 0; column < count; ++column) {
                const i64 product = (i64)numerators[threadIdx.x][column] * partners[threadIdx.y][column];
                sum += product;
                magnitudes += product < 0 ? -product : product;
            }
            __syncthreads();
        }
        if (here) {
            if (magnitudes > LARGEST_SUM) atomicMax(arguments.overflow, 1u);
            const Scale mine = scale_of_group(weights, output, group), other = scale_of_group(tokens, token, 0);
            // Two significands of 11 bits.
            const float scale =
                float_of_product((i64)mine.significand * other.significand, 1, mine.exponent + other.exponent);
            result = result + (float)(i32)sum * scale;
        }
    }
    if (here) arguments.results[token * weights.rows + output] = result;
}

}  // namespace
