// Products of integers of any widths up to 8 bits from their bits, on the tensor cores (arXiv 2409.17870): the planes of
// all weights' bits i and of all activations' bits j have so many ones in common, times what bits i and j stand for.
//
// Ones in common are counted by AND, so that a bit stands for any factor: bits of unsigned and of two's complement
// numbers do so as they are; bipolar ones (each bit is +-1) follow from the unsigned product and the sums of both sides.

#include "portable.cuh"

constexpr int MOST_BITS = 8;
constexpr int WARPS = 4;

struct BitPlaneArguments {
    const u32 *weights;      // [weight_bits, outputs, words]: bit k % 32 of word k / 32 is that of input k
    const u32 *activations;  // [activation_bits, tokens, words]
    i32 *results;            // [tokens, outputs]
    i64 outputs;
    i64 tokens;
    i32 words;               // a multiple of 8: zeros behind the inputs
    i32 weight_bits;
    i32 activation_bits;
    i32 weight_factors[MOST_BITS];      // of a bit
    i32 activation_factors[MOST_BITS];
};

// A warp has 16 outputs of 8 tokens.
ENTRY void multiply_bit_planes(const BitPlaneArguments arguments) {
    const u32 lane = threadIdx.x % WARP_LANES, quarter = lane % 4;
    const i64 first_output = ((i64)blockIdx.x * WARPS + threadIdx.x / WARP_LANES) * 16, first_token = (i64)blockIdx.y * 8;
    const i64 output = first_output + lane / 4, token = first_token + lane / 4;
    i32 sums[4] = {0, 0, 0, 0};
    for (i32 start = 0; start < arguments.words; start += 8) {
        for (i32 j = 0; j < arguments.activation_bits; ++j) {
            u32 right[2] = {0, 0};
            if (token < arguments.tokens) {
                const u32 *row = arguments.activations + (j * arguments.tokens + token) * arguments.words + start;
                right[0] = row[quarter];
                right[1] = row[4 + quarter];
            }
            for (i32 i = 0; i < arguments.weight_bits; ++i) {
                u32 left[4] = {0, 0, 0, 0};
                for (i32 half = 0; half < 2; ++half) {
                    if (output + 8 * half >= arguments.outputs) continue;
                    const u32 *row =
                        arguments.weights + (i * arguments.outputs + output + 8 * half) * arguments.words + start;
                    left[half] = row[quarter];
                    left[2 + half] = row[4 + quarter];
                }
                i32 common[4] = {0, 0, 0, 0};
                count_common_bits(common, left, right[0], right[1]);
                const i32 factor = arguments.weight_factors[i] * arguments.activation_factors[j];
                for (i32 part = 0; part < 4; ++part) sums[part] += factor * common[part];
            }
        }
    }
    for (i32 part = 0; part < 4; ++part) {
        const i64 row = output + part / 2 * 8, column = first_token + quarter * 2 + part % 2;
        if (row < arguments.outputs && column < arguments.tokens)
            arguments.results[column * arguments.outputs + row] = sums[part];
    }
}
KERNEL(multiply_bit_planes, BitPlaneArguments)
