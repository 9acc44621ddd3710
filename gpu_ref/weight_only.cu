// Linear layers with quantized weights and FP16 or BF16 activations, near the speed of the memory that holds the codes.
//
// `weight_only_*` multiply on tensor cores, also for a single token: what costs time is decoding, and the tensor core
// takes 8 tokens for the price of one. They read a layout that gpu_ref/layout.py makes of the packed bytes, once:
//
//   codes     a tile of 16 rows by 128 inputs is what one warp reads at a time. Lane (r = lane / 4, q = lane % 4) has of
//             the rows r and r + 8 the inputs 32 w + 8 q + i of the tile, w = 0..3, i = 0..7: 2 x 32 codes, in 2 x BITS
//             words. Words are stored [tile of rows][tile of inputs][vector][lane][words of a vector].
//   scales    of every group the 16 rows of a tile: FP16 numbers, whose sign is the lower bit of the data type; the upper
//             one is the last bit of a BitMoD scale, which has 8 bits of the 11. [tile of rows][group][16].
//   tables    of every data type the levels as upper bytes of FP16 numbers: PRMT finds four at a time.
//
// A lane's codes of row r and r + 8 are then fragments of the left operand of mma.m16n8k16, activations those of the
// right one, eight inputs of a token in 16 bytes. The order of the inputs within 32 is not the order of memory, but the
// same on both sides. Sums are FP32, over a group without its scale.
//
// `weight_only_any` takes every other format, group and shape, from the packed bytes as they are.

#include "operands.cuh"

constexpr int WARPS = 8;          // of a block: they share the inputs of 16 rows among them
constexpr int ROWS = 16;          // of a tile
constexpr int TILE_INPUTS = 128;
constexpr int MOST_TYPES = 4;

enum OutputKind { OUTPUT_HALF = 0, OUTPUT_BFLOAT = 1, OUTPUT_FLOAT = 2 };

struct FastArguments {
    const u32 *codes;
    const u16 *scales;
    const u32 *tables;            // [MOST_TYPES, 4]; of pairs the normal type's and the outlier type's
    const float *channel_scales;  // [rows]
    const u16 *activations;       // FP16 or BF16, [tokens, padded inputs], zeros behind the inputs; 16-byte aligned
    void *results;                // [tokens, rows]
    i64 padded_inputs;            // a multiple of TILE_INPUTS
    i32 tokens;
    i32 rows;
    i32 groups;
    i32 group_shift;              // inputs of a group are 32 << group_shift; 30 where a row is one group
    i32 type_mask;                // 1 where the last bit of a scale is the upper one of its type; 0 where it is its own
    i32 output_kind;
    float unit;                   // of what the tables hold
};

struct AnyArguments {
    Matrix weights;
    const u16 *activations;  // FP16 or BF16, [tokens, weights.columns]
    void *results;           // [tokens, weights.rows]
    i64 tokens;
    i32 activations_are_bfloat;
    i32 output_kind;
};

namespace {

__device__ inline void store(void *results, i64 place, float value, i32 kind) {
    if (kind == OUTPUT_FLOAT)
        static_cast<float *>(results)[place] = value;
    else
        static_cast<u16 *>(results)[place] = kind == OUTPUT_HALF ? float_to_half(value) : float_to_bfloat(value);
}

// Four upper bytes to two words of two numbers each.
template <bool BFLOAT> __device__ inline void widen(u32 bytes, u32 &first, u32 &second) {
    first = permute_bytes(bytes, 0, 0x1404);
    second = permute_bytes(bytes, 0, 0x3424);
    if (BFLOAT) {  // the same sign, exponent and upper two bits of the significand, times 2^-112
        first = (first & 0x80008000u) | (first >> 3 & 0x0fe00fe0u);
        second = (second & 0x80008000u) | (second >> 3 & 0x0fe00fe0u);
    }
}

// Bytes of four codes of 4 bits from a table of 16.
__device__ inline u32 look_up(const u32 (&table)[4], u32 codes, u32 upper) {
    return permute_bytes(permute_bytes(table[0], table[1], codes), permute_bytes(table[2], table[3], codes), upper);
}

// Numbers of eight codes, in order, two in a word.
template <int BITS, bool PAIRS, bool BFLOAT> struct Decoder;

template <bool BFLOAT> struct Decoder<4, false, BFLOAT> {
    static constexpr int TABLES = 1;
    u32 table[4];
    __device__ inline void numbers(const u32 *words, int index, u32 (&found)[4]) const {
        const u32 codes = words[index] & 0x77777777u, upper = (words[index] >> 1 & 0x44444444u) | 0x32103210u;
        widen<BFLOAT>(look_up(table, codes, upper), found[0], found[1]);
        widen<BFLOAT>(look_up(table, codes >> 16, upper >> 16), found[2], found[3]);
    }
};

template <bool BFLOAT> struct Decoder<4, true, BFLOAT> {
    static constexpr int TABLES = 2;
    u32 table[8];
    __device__ inline void numbers(const u32 *words, int index, u32 (&found)[4]) const {
        const u32 normal[4] = {table[0], table[1], table[2], table[3]};
        const u32 outlier[4] = {table[4], table[5], table[6], table[7]};
        const u32 word = words[index], turned = word ^ 0x88888888u;
        const u32 victims = ~(((turned & 0x77777777u) + 0x77777777u) | turned) & 0x88888888u;
        const u32 outliers = (victims << 4 & 0x80808080u) | (victims >> 4 & 0x08080808u);
        const u32 codes = word & 0x77777777u, upper = (word >> 1 & 0x44444444u) | 0x32103210u;
        const u32 chosen = (outliers >> 1) | 0x32103210u;
        const u32 low = permute_bytes(look_up(normal, codes, upper), look_up(outlier, codes, upper), chosen);
        const u32 high = permute_bytes(
            look_up(normal, codes >> 16, upper >> 16), look_up(outlier, codes >> 16, upper >> 16), chosen >> 16);
        widen<BFLOAT>(low, found[0], found[1]);
        widen<BFLOAT>(high, found[2], found[3]);
    }
};

// Words 0 to 2 hold a code of three bits in each nibble; their upper bits are the fourth word.
template <bool BFLOAT> struct Decoder<3, false, BFLOAT> {
    static constexpr int TABLES = 1;
    u32 table[4];
    __device__ inline void numbers(const u32 *words, int index, u32 (&found)[4]) const {
        const u32 codes = index < 3
            ? words[index < 3 ? index : 0] & 0x77777777u
            : (words[0] >> 3 & 0x11111111u) | (words[1] >> 2 & 0x22222222u) | (words[2] >> 1 & 0x44444444u);
        widen<BFLOAT>(permute_bytes(table[0], table[1], codes), found[0], found[1]);
        widen<BFLOAT>(permute_bytes(table[0], table[1], codes >> 16), found[2], found[3]);
    }
};

// Integers of 6 bits, stored + 32. Each half of word m has those of the pairs m and 6 + m, and four bits of the pairs 12
// to 15: words 0 to 3 the lower four of one pair, words 4 and 5 the upper two of two pairs.
template <bool BFLOAT> struct Decoder<6, false, BFLOAT> {
    static constexpr int TABLES = 0;
    u32 table[1];
    __device__ inline void numbers(const u32 *words, int index, u32 (&found)[4]) const {
        for (int place = 0; place < 4; ++place) {
            const int pair = 4 * index + place;
            u32 bits;
            if (pair < 6) {
                bits = words[pair] & 0x003f003fu;
            } else if (pair < 12) {
                bits = words[pair - 6] >> 6 & 0x003f003fu;
            } else {
                const u32 above = words[4 + (pair - 12) / 2] >> (12 + pair % 2 * 2) & 0x00030003u;
                bits = (words[pair - 12] >> 12 & 0x000f000fu) | above << 4;
            }
            // 1024 + code in FP16, 128 + code in BF16: the code is the end of the significand.
            found[place] = BFLOAT ? add_two<true>(bits | 0x43004300u, 0xc320c320u)
                                  : add_two<false>(bits | 0x64006400u, 0xe420e420u);
        }
    }
};

template <int BITS> struct Words;  // of one lane and two rows, as they are loaded

template <> struct Words<4> {
    u32 row[2][4];
    __device__ inline void load(const u32 *tile, u32 lane) {
        for (int half = 0; half < 2; ++half) {
            const Quad found = stream(reinterpret_cast<const Quad *>(tile) + half * WARP_LANES + lane);
            for (int word = 0; word < 4; ++word) row[half][word] = found.word[word];
        }
    }
};

template <> struct Words<3> {
    u32 row[2][3];
    __device__ inline void load(const u32 *tile, u32 lane) {
        for (int part = 0; part < 3; ++part) {
            const Pair found = stream(reinterpret_cast<const Pair *>(tile) + part * WARP_LANES + lane);
            for (int word = 0; word < 2; ++word) row[(2 * part + word) / 3][(2 * part + word) % 3] = found.word[word];
        }
    }
};

template <> struct Words<6> {
    u32 row[2][6];
    __device__ inline void load(const u32 *tile, u32 lane) {
        for (int part = 0; part < 3; ++part) {
            const Quad found = stream(reinterpret_cast<const Quad *>(tile) + part * WARP_LANES + lane);
            for (int word = 0; word < 4; ++word) row[(4 * part + word) / 6][(4 * part + word) % 6] = found.word[word];
        }
    }
};

template <int BITS, bool PAIRS, bool BFLOAT, int TOKEN_TILES>
__device__ inline void multiply_rows(const FastArguments &arguments) {
    typedef Decoder<BITS, PAIRS, BFLOAT> RowDecoder;
    __shared__ u32 tables[MOST_TYPES][4];
    __shared__ float partial[WARPS][TOKEN_TILES][4][WARP_LANES];
    const u32 lane = threadIdx.x % WARP_LANES, quarter = lane % 4;
    const i32 warp = threadIdx.x / WARP_LANES;
    const i32 first_token = blockIdx.y * TOKEN_TILES * 8, token_of_lane = first_token + lane / 4;
    const i32 tiles = (i32)(arguments.padded_inputs / TILE_INPUTS);
    const i64 tile_words = 2 * BITS * WARP_LANES;
    if (threadIdx.x < MOST_TYPES * 4) tables[threadIdx.x / 4][threadIdx.x % 4] = arguments.tables[threadIdx.x];
    __syncthreads();

    const u32 *codes = arguments.codes + (i64)blockIdx.x * tiles * tile_words;
    const u16 *scales_of_lane = arguments.scales + (i64)blockIdx.x * arguments.groups * ROWS + lane / 4;
    const u16 *activations =
        arguments.activations + token_of_lane * arguments.padded_inputs + quarter * 8;  // read where there is a token
    RowDecoder decoders[2] = {};
    float scales[2] = {0.0f, 0.0f};
    float sums[TOKEN_TILES][4] = {}, results[TOKEN_TILES][4] = {};
    i32 group = -1;
    Words<BITS> next = {};
    u32 next_scales[2] = {0, 0};
    if (warp < tiles) {
        next.load(codes + warp * tile_words, lane);
        const i32 first_group = min((warp * 4) >> arguments.group_shift, arguments.groups - 1);
        for (int half = 0; half < 2; ++half) next_scales[half] = scales_of_lane[(i64)first_group * ROWS + 8 * half];
    }
    for (i32 tile = warp; tile < tiles; tile += WARPS) {
        // Words and scales of the next tile are on their way while those of this one are used.
        const Words<BITS> words = next;
        u32 found[2] = {next_scales[0], next_scales[1]};
        if (tile + WARPS < tiles) {
            next.load(codes + (tile + WARPS) * tile_words, lane);
            const i32 next_group = min(((tile + WARPS) * 4) >> arguments.group_shift, arguments.groups - 1);
            for (int half = 0; half < 2; ++half) next_scales[half] = scales_of_lane[(i64)next_group * ROWS + 8 * half];
        }
        UNROLL for (int index = 0; index < 4; ++index) {
            const i32 group_here = min((tile * 4 + index) >> arguments.group_shift, arguments.groups - 1);
            if (group_here != group) {
                group = group_here;
                for (int token = 0; token < TOKEN_TILES; ++token) {
                    for (int part = 0; part < 4; ++part) {
                        results[token][part] =
                            fused_multiply_add(sums[token][part], scales[part / 2], results[token][part]);
                        sums[token][part] = 0.0f;
                    }
                }
                for (int half = 0; half < 2; ++half) {
                    if (index) found[half] = scales_of_lane[(i64)group * ROWS + 8 * half];
                    const u32 type = found[half] >> 15 | (found[half] & arguments.type_mask) << 1;
                    scales[half] = half_to_float((u16)(found[half] & 0x7fffu & ~arguments.type_mask));
                    for (int part = 0; part < 4 * RowDecoder::TABLES; ++part)
                        decoders[half].table[part] = tables[PAIRS ? part / 4 : type][part % 4];
                }
            }
            u32 upper[4], lower[4];
            decoders[0].numbers(words.row[0], index, upper);
            decoders[1].numbers(words.row[1], index, lower);
            const u32 first[4] = {upper[0], lower[0], upper[1], lower[1]};
            const u32 second[4] = {upper[2], lower[2], upper[3], lower[3]};
            UNROLL for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
                Quad inputs = {};
                if (token_of_lane + token_tile * 8 < arguments.tokens)
                    inputs = *reinterpret_cast<const Quad *>(
                        activations + token_tile * 8 * arguments.padded_inputs + tile * TILE_INPUTS + index * 32);
                multiply_tiles<BFLOAT>(sums[token_tile], first, inputs.word[0], inputs.word[1]);
                multiply_tiles<BFLOAT>(sums[token_tile], second, inputs.word[2], inputs.word[3]);
            }
        }
    }
    for (int token = 0; token < TOKEN_TILES; ++token)
        for (int part = 0; part < 4; ++part)
            partial[warp][token][part][lane] =
                fused_multiply_add(sums[token][part], scales[part / 2], results[token][part]);
    __syncthreads();
    for (u32 place = threadIdx.x; place < TOKEN_TILES * 4 * WARP_LANES; place += WARPS * WARP_LANES) {
        const u32 token_tile = place / (4 * WARP_LANES), part = place / WARP_LANES % 4, of_lane = place % WARP_LANES;
        float sum = 0.0f;
        for (int of_warp = 0; of_warp < WARPS; ++of_warp) sum = sum + partial[of_warp][token_tile][part][of_lane];
        const i32 row = (i32)(blockIdx.x * ROWS + of_lane / 4 + part / 2 * 8);
        const i32 token = first_token + (i32)(token_tile * 8 + of_lane % 4 * 2 + part % 2);
        if (row < arguments.rows && token < arguments.tokens)
            store(
                arguments.results, (i64)token * arguments.rows + row,
                sum * arguments.unit * arguments.channel_scales[row], arguments.output_kind);
    }
}

constexpr int SQUARE = 16;
constexpr int CHUNK = 64;

}  // namespace

#define WEIGHT_ONLY(name, bits, pairs, bfloat, token_tiles)                               \
    ENTRY void __launch_bounds__(32 * WARPS, token_tiles < 8 ? 3 : 1) name(const FastArguments arguments) {               \
        multiply_rows<bits, pairs, bfloat, token_tiles>(arguments);                       \
    }                                                                                     \
    KERNEL(name, FastArguments)
#define OF_TOKENS(name, bits, pairs, bfloat)           \
    WEIGHT_ONLY(name##_8, bits, pairs, bfloat, 1)      \
    WEIGHT_ONLY(name##_16, bits, pairs, bfloat, 2)     \
    WEIGHT_ONLY(name##_64, bits, pairs, bfloat, 8)
#define OF_ACTIVATIONS(name, bits, pairs)         \
    OF_TOKENS(name##_half, bits, pairs, false)    \
    OF_TOKENS(name##_bfloat, bits, pairs, true)

OF_ACTIVATIONS(weight_only_3, 3, false)
OF_ACTIVATIONS(weight_only_4, 4, false)
OF_ACTIVATIONS(weight_only_6, 6, false)
OF_ACTIVATIONS(weight_only_pairs, 4, true)

ENTRY void weight_only_any(const AnyArguments arguments) {
    __shared__ float numerators[SQUARE][CHUNK + 1];
    __shared__ float activations[SQUARE][CHUNK + 1];
    const Matrix &weights = arguments.weights;
    const i32 columns = weights.columns;
    const i64 first_output = (i64)blockIdx.x * SQUARE, first_token = (i64)blockIdx.y * SQUARE;
    const i64 output = first_output + threadIdx.x, token = first_token + threadIdx.y;
    const bool here = output < weights.rows && token < arguments.tokens;
    float result = 0.0f;
    for (i32 group = 0; group < weights.groups; ++group) {
        const i32 begin = group * weights.group_size, end = min(columns, begin + weights.group_size);
        float sum = 0.0f;
        for (i32 start = begin; start < end; start += CHUNK) {
            const i32 count = min(CHUNK, end - start);
            for (i32 place = threadIdx.y * SQUARE + threadIdx.x; place < SQUARE * count; place += SQUARE * SQUARE) {
                const i32 row = place / count, column = place % count;
                numerators[row][column] = first_output + row < weights.rows
                    ? (float)numerator(weights, first_output + row, start + column)
                    : 0.0f;
                float found = 0.0f;
                if (first_token + row < arguments.tokens) {
                    const u16 bits = arguments.activations[(first_token + row) * columns + start + column];
                    found = arguments.activations_are_bfloat ? bfloat_to_float(bits) : half_to_float(bits);
                }
                activations[row][column] = found;
            }
            __syncthreads();
            for (i32 column = 0; column < count; ++column)
                sum = fused_multiply_add(activations[threadIdx.y][column], numerators[threadIdx.x][column], sum);
            __syncthreads();
        }
        if (here) {
            const Scale scale = scale_of_group(weights, output, group);
            result = fused_multiply_add(sum, float_of_product(1, scale.significand, scale.exponent), result);
        }
    }
    if (here)
        store(
            arguments.results, token * weights.rows + output, scaled_by_channel(weights, output, result),
            arguments.output_kind);
}
KERNEL(weight_only_any, AnyArguments)
