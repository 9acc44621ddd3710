// What an array of dictionary PEs (GOBO) computes: section 2.6 of docs/microarchitecture.md.
//
// Activations are added by the index of their weight, in the order of the inputs; the sums are multiplied by the
// centroids, in their order; the outliers of the row come last. All in FP32, equal to termwise.algorithms.reference bit
// for bit.

#include "operands.cuh"

constexpr int MOST_CENTROIDS = 16;

struct DictionaryArguments {
    const u8 *codes;          // packed, [outputs, code_row_bytes]
    const float *dictionary;  // [2^bits]
    const i64 *first_outlier; // [outputs + 1]: of every row, among the outliers
    const u32 *outlier_columns;  // ascending in every row
    const float *outlier_values;
    const u16 *activations;   // FP16, finite, [tokens, inputs]
    float *results;           // [tokens, outputs]
    i64 code_row_bytes;
    i64 tokens;
    i32 outputs;
    i32 inputs;
    i32 bits;
};

namespace {
constexpr int TILE = 16;
constexpr int CHUNK = 64;
constexpr u8 OUTLIER = 255;
}  // namespace

ENTRY void dictionary(const DictionaryArguments arguments) {
    __shared__ u8 codes[TILE][CHUNK];
    __shared__ float activations[TILE][CHUNK + 1];
    const i32 inputs = arguments.inputs, centroids = 1 << arguments.bits;
    const i64 first_output = (i64)blockIdx.x * TILE, first_token = (i64)blockIdx.y * TILE;
    const i64 output = first_output + threadIdx.x, token = first_token + threadIdx.y;
    const bool here = output < arguments.outputs && token < arguments.tokens;
    float sums[MOST_CENTROIDS];
    for (float &sum : sums) sum = 0.0f;
    for (i32 start = 0; start < inputs; start += CHUNK) {
        const i32 count = min(CHUNK, inputs - start);
        for (i32 place = threadIdx.y * TILE + threadIdx.x; place < TILE * count; place += TILE * TILE) {
            const i32 row = place / count, column = place % count;
            codes[row][column] = first_output + row < arguments.outputs
                ? packed_code(
                      arguments.codes + (first_output + row) * arguments.code_row_bytes, start + column, arguments.bits)
                : 0;
            activations[row][column] = first_token + row < arguments.tokens
                ? half_to_float(arguments.activations[(first_token + row) * inputs + start + column])
                : 0.0f;
        }
        __syncthreads();
        if (threadIdx.y == 0 && output < arguments.outputs) {
            for (i64 place = arguments.first_outlier[output]; place < arguments.first_outlier[output + 1]; ++place) {
                const i64 column = (i64)arguments.outlier_columns[place] - start;
                if (column >= 0 && column < count) codes[threadIdx.x][column] = OUTLIER;
            }
        }
        __syncthreads();
        for (i32 column = 0; column < count; ++column) {
            const u8 code = codes[threadIdx.x][column];
            if (code != OUTLIER) sums[code] = sums[code] + activations[threadIdx.y][column];
        }
        __syncthreads();
    }
    if (!here) return;
    float result = 0.0f;
    for (i32 centroid = 0; centroid < centroids; ++centroid)
        result = result + sums[centroid] * arguments.dictionary[centroid];
    for (i64 place = arguments.first_outlier[output]; place < arguments.first_outlier[output + 1]; ++place)
        result = result +
            half_to_float(arguments.activations[token * inputs + arguments.outlier_columns[place]]) *
                arguments.outlier_values[place];
    arguments.results[token * arguments.outputs + output] = result;
}
KERNEL(dictionary, DictionaryArguments)
