// What an array of fp16_mac PEs computes: products of FP16 numbers, which are exact in FP32, added in FP32 in the order
// of the inputs. Equal to termwise.algorithms.reference bit for bit.

#include "portable.cuh"

struct HalfArguments {
    const u16 *weights;      // FP16, finite, [outputs, inputs]
    const u16 *activations;  // FP16, finite, [tokens, inputs]
    float *results;          // [tokens, outputs]
    i64 outputs;
    i64 inputs;
    i64 tokens;
};

namespace {
constexpr int TILE = 16;
constexpr int CHUNK = 64;
}  // namespace

ENTRY void fp16_mac(const HalfArguments arguments) {
    __shared__ float weights[TILE][CHUNK + 1];
    __shared__ float activations[TILE][CHUNK + 1];
    const i64 first_output = (i64)blockIdx.x * TILE, first_token = (i64)blockIdx.y * TILE;
    const i64 output = first_output + threadIdx.x, token = first_token + threadIdx.y;
    float result = 0.0f;
    for (i64 start = 0; start < arguments.inputs; start += CHUNK) {
        const i32 count = (i32)min((i64)CHUNK, arguments.inputs - start);
        for (i32 place = threadIdx.y * TILE + threadIdx.x; place < TILE * count; place += TILE * TILE) {
            const i32 row = place / count, column = place % count;
            weights[row][column] = first_output + row < arguments.outputs
                ? half_to_float(arguments.weights[(first_output + row) * arguments.inputs + start + column])
                : 0.0f;
            activations[row][column] = first_token + row < arguments.tokens
                ? half_to_float(arguments.activations[(first_token + row) * arguments.inputs + start + column])
                : 0.0f;
        }
        __syncthreads();
        for (i32 column = 0; column < count; ++column)
            result = result + activations[threadIdx.y][column] * weights[threadIdx.x][column];
        __syncthreads();
    }
    if (output < arguments.outputs && token < arguments.tokens)
        arguments.results[token * arguments.outputs + output] = result;
}
KERNEL(fp16_mac, HalfArguments)
