// The searches of BitMoD and OliVe, and the codes of what they find: equal to the CPU's code for code.
//
// The arithmetic is that of termwise.algorithms.grid and termwise.algorithms.scale_search: comparisons that are exact in
// FP64, and sums that either decide beyond their rounding (BitMoD: what is too close is marked, and decided in whole
// numbers on the CPU) or are taken in the same order (OliVe: a thread per candidate adds as the CPU does).

#include "portable.cuh"

constexpr u8 UNDECIDED = 255;
constexpr double BEYOND = 1.7976931348623157e308;

struct GroupArguments {
    const float *weights;  // [rows, columns]
    const double *levels;  // numerators of every type, [types, level_count], padded with the first
    const double *divisors;  // largest magnitude among them, [types]
    u8 *chosen;            // [rows, groups]
    float *largest;        // [rows, groups]
    const double *units;   // scale of a numerator for a multiple of 1, [rows]; of `settle`
    u8 *multiples;         // [rows, groups]; of `settle`
    i64 rows;
    i32 columns;
    i32 group_size;
    i32 groups;
    i32 types;
    i32 level_count;
    i32 most;              // greatest multiple
};

struct EncodeArguments {
    const float *weights;       // [rows, columns]
    const double *scales;       // of numerators, [rows, groups]
    const u8 *chosen;           // [rows, groups]
    const double *thresholds;   // twice the numerator above which a weight takes the next level, [types, ranks - 1]
    const u8 *ties_up;          // [types, ranks - 1]
    const u8 *code_of_rank;     // [types, ranks]
    const double *outlier_levels;  // of pairs: positive, ascending, [outlier_count], at a scale of 1
    const u8 *outlier_codes;    // [outlier_count]
    u8 *packed;                 // [rows, row_bytes]
    i64 rows;
    i64 row_bytes;
    i32 columns;
    i32 group_size;
    i32 groups;
    i32 ranks;
    i32 bits;
    i32 outlier_count;          // 0 where there are no pairs
    double units;               // numerators per level of the normal type, of pairs
};

struct SearchArguments {
    const float *weights;       // [rows, columns]
    const double *factors;      // percentages over the largest level, ascending, [candidates]
    const double *runs;         // [run_count, 3]: first numerator, step, steps
    const double *outlier_levels;  // positive, ascending, [outlier_count]
    const u8 *outlier_codes;    // [outlier_count]
    double *reach;              // [rows, groups]
    double *scales;             // [rows, groups]
    double *errors;             // [rows, groups]
    i64 rows;
    i32 columns;
    i32 group_size;
    i32 groups;
    i32 candidates;
    i32 run_count;
    i32 outlier_count;
    double per_unit;            // numerators per level
};

namespace {

constexpr int WARPS = 4;
constexpr int MOST_CANDIDATES = 128;
constexpr int SUMMED = 128;  // weights whose errors are summed before they are added to the rest

__device__ inline double shuffled(double value, u32 mask) {
    u64 bits;
    static_assert(sizeof bits == sizeof value, "two words");
    bits = bits_of_double(value);
    const u32 low = __shfl_xor_sync(ALL_LANES, (u32)bits, mask);
    const u32 high = __shfl_xor_sync(ALL_LANES, (u32)(bits >> 32), mask);
    return double_of_bits((u64)high << 32 | low);
}

__device__ inline double warp_sum(double value) {
    for (u32 mask = WARP_LANES / 2; mask; mask /= 2) value = value + shuffled(value, mask);
    return value;
}

__device__ inline double magnitude(double value) { return value < 0 ? -value : value; }

// Distance of value from scale * the nearest of the levels.
__device__ inline double distance(double value, double scale, const double *levels, i32 count) {
    double nearest = BEYOND;
    for (i32 index = 0; index < count; ++index) nearest = min(nearest, magnitude(value - scale * levels[index]));
    return nearest;
}

// FP16 number nearest to a positive value, of ties the even one; from 2^-24 to 65504.
__device__ inline double to_half(double value) {
    const double clipped = min(max(value, 1.0 / 16777216), 65504.0);
    const i32 exponent = (i32)(bits_of_double(clipped) >> 52) - 1022;
    const double unit = double_of_bits((u64)(max(exponent - 11, -24) + 1023) << 52);
    return rint(clipped / unit) * unit;
}

__device__ inline i32 nearest_rank(double value, const double *levels, const u8 *codes, i32 count) {
    i32 low = 0, high = count - 1;
    while (low < high) {
        const i32 middle = (low + high) / 2;
        const double threshold = 0.5 * (levels[middle] + levels[middle + 1]);
        if (value > threshold || (value == threshold && codes[middle + 1] % 2 == 0))
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

// Distance of a magnitude from the nearest level of all runs, in which levels are multiples of unit.
__device__ inline double run_distance(double value, double unit, const double *runs, i32 count) {
    double nearest = BEYOND;
    for (i32 run = 0; run < count; ++run) {
        const double first = runs[3 * run], step = runs[3 * run + 1], steps = runs[3 * run + 2];
        const double rank = min(max(rint(value * (1.0 / (unit * step)) - first / step), 0.0), steps);
        nearest = min(nearest, magnitude(value - (first + step * rank) * unit));
    }
    return nearest;
}

}  // namespace

// BitMoD, Algorithm 1: the type with the least squared error at the scale largest / divisor, the first of equals. A
// warp has a group. The bound on the rounding of a sum of n squares, (n + 8) 2^-52 of it, holds in any order.
ENTRY void choose_types(const GroupArguments arguments) {
    const u32 lane = threadIdx.x % WARP_LANES;
    const i64 place = (i64)blockIdx.x * WARPS + threadIdx.x / WARP_LANES;
    if (place >= arguments.rows * arguments.groups) return;
    const i64 row = place / arguments.groups;
    const i32 start = (i32)(place % arguments.groups) * arguments.group_size;
    const i32 count = min(arguments.group_size, arguments.columns - start);
    const float *weights = arguments.weights + row * arguments.columns + start;
    float largest = 0.0f;
    for (i32 column = lane; column < count; column += WARP_LANES)
        largest = max(largest, weights[column] < 0 ? -weights[column] : weights[column]);
    for (u32 mask = WARP_LANES / 2; mask; mask /= 2) largest = max(largest, __shfl_xor_sync(ALL_LANES, largest, mask));
    const double bound = (count + 8) * (1.0 / 4503599627370496.0);
    i32 best = 0;
    double best_error = 0.0;
    bool undecided = false;
    for (i32 type = 0; type < arguments.types; ++type) {
        const double divisor = arguments.divisors[type], best_divisor = arguments.divisors[best];
        const double *levels = arguments.levels + type * arguments.level_count;
        const double *best_levels = arguments.levels + best * arguments.level_count;
        double sum = 0.0;
        u32 differs = 0;
        for (i32 column = lane; column < count; column += WARP_LANES) {
            const double found =
                distance((double)weights[column] * divisor, (double)largest, levels, arguments.level_count);
            sum = sum + found * found;
            if (type && divisor == best_divisor)
                differs |= found !=
                    distance((double)weights[column] * divisor, (double)largest, best_levels, arguments.level_count);
        }
        const double error = warp_sum(sum) / (divisor * divisor);
        for (u32 mask = WARP_LANES / 2; mask; mask /= 2) differs |= __shfl_xor_sync(ALL_LANES, differs, mask);
        if (type == 0 || error < best_error * (1.0 - bound)) {
            best = type;
            best_error = error;
            undecided = false;
        } else if (error <= best_error * (1.0 + bound) && error > 0.0) {
            undecided = undecided || divisor != best_divisor || differs;
        }
    }
    if (lane == 0) {
        arguments.chosen[place] = undecided ? UNDECIDED : best;
        arguments.largest[place] = largest;
    }
}
KERNEL(choose_types, GroupArguments)

// The better of the two multiples of a row's unit around largest / divisor, of equals the smaller; 0 where the two are
// too close to be told apart.
ENTRY void settle_scales(const GroupArguments arguments) {
    const u32 lane = threadIdx.x % WARP_LANES;
    const i64 place = (i64)blockIdx.x * WARPS + threadIdx.x / WARP_LANES;
    if (place >= arguments.rows * arguments.groups) return;
    const i64 row = place / arguments.groups;
    const i32 start = (i32)(place % arguments.groups) * arguments.group_size;
    const i32 count = min(arguments.group_size, arguments.columns - start);
    const float *weights = arguments.weights + row * arguments.columns + start;
    const i32 type = arguments.chosen[place];
    const double *levels = arguments.levels + type * arguments.level_count;
    const double unit = arguments.units[row];
    const double ideal = floor((double)arguments.largest[place] / arguments.divisors[type] / unit);
    const i32 lower = (i32)min(max(ideal, 1.0), (double)arguments.most), upper = min(lower + 1, arguments.most);
    double down = 0.0, up = 0.0;
    for (i32 column = lane; column < count; column += WARP_LANES) {
        const double below = distance(weights[column], unit * lower, levels, arguments.level_count);
        const double above = distance(weights[column], unit * upper, levels, arguments.level_count);
        down = down + below * below;
        up = up + above * above;
    }
    down = warp_sum(down);
    up = warp_sum(up);
    if (lane) return;
    i32 found = up < down ? upper : lower;
    if (up != down && magnitude(up - down) <= (count + 8) * (1.0 / 4503599627370496.0) * down) found = 0;
    arguments.multiples[place] = found;
}
KERNEL(settle_scales, GroupArguments)

// Codes of the levels nearest to the weights, packed: a thread has eight codes of a row. Of pairs with an outlier the
// outlier's code, and the identifier in the victim's place (OliVe, Algorithm 1).
ENTRY void encode_weights(const EncodeArguments arguments) {
    const i64 per_row = (arguments.columns + 7) / 8;
    const i64 place = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (place >= arguments.rows * per_row) return;
    const i64 row = place / per_row;
    const i32 first = (i32)(place % per_row) * 8, count = min(8, arguments.columns - first);
    const float *weights = arguments.weights + row * arguments.columns;
    const i32 limits = arguments.ranks - 1;
    u8 codes[8];
    for (i32 index = 0; index < count; ++index) {
        const i32 column = first + index, group = column / arguments.group_size;
        const i64 of_group = row * arguments.groups + group;
        const i32 type = arguments.chosen ? arguments.chosen[of_group] : 0;
        const double half_scale = 0.5 * (arguments.scales[of_group] / arguments.units), weight = weights[column];
        i32 rank = 0;
        for (i32 limit = 0; limit < limits; ++limit) {
            const double threshold = half_scale * arguments.thresholds[type * limits + limit];
            rank += weight > threshold || (weight == threshold && arguments.ties_up[type * limits + limit]);
        }
        codes[index] = arguments.code_of_rank[type * arguments.ranks + rank];
    }
    if (arguments.outlier_count) {
        const u8 identifier = (u8)(1 << (arguments.bits - 1));
        for (i32 index = 0; index + 1 < count; index += 2) {
            const i32 column = first + index;
            const double scale = arguments.scales[row * arguments.groups + column / arguments.group_size];
            const double left = magnitude(weights[column]) / scale, right = magnitude(weights[column + 1]) / scale;
            const double larger = max(left, right);
            if (larger > arguments.outlier_levels[0]) {
                const i32 outlier = left > right ? index : index + 1;
                const i32 rank =
                    nearest_rank(larger, arguments.outlier_levels, arguments.outlier_codes, arguments.outlier_count);
                const u8 sign = weights[first + outlier] < 0 ? identifier : 0;
                codes[outlier] = arguments.outlier_codes[rank] | sign;
                codes[outlier ^ 1] = identifier;
            }
        }
    }
    u64 window = 0;
    for (i32 index = 0; index < count; ++index) window |= (u64)codes[index] << index * arguments.bits;
    const i64 byte = (i64)(first / 8) * arguments.bits;
    for (i32 index = 0; index < arguments.bits && byte + index < arguments.row_bytes; ++index)
        arguments.packed[row * arguments.row_bytes + byte + index] = (u8)(window >> 8 * index);
}
KERNEL(encode_weights, EncodeArguments)

// OliVe: max |mean +- 3 standard deviations| of every group, in sums from left to right.
ENTRY void find_reach(const SearchArguments arguments) {
    const i64 place = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (place >= arguments.rows * arguments.groups) return;
    const i64 row = place / arguments.groups;
    const i32 start = (i32)(place % arguments.groups) * arguments.group_size;
    const i32 count = min(arguments.group_size, arguments.columns - start);
    const float *weights = arguments.weights + row * arguments.columns + start;
    double total = 0.0;
    for (i32 column = 0; column < count; ++column) total = total + (double)weights[column];
    const double mean = total / count;
    total = 0.0;
    for (i32 column = 0; column < count; ++column) {
        const double difference = (double)weights[column] - mean;
        total = total + difference * difference;
    }
    arguments.reach[place] = magnitude(mean) + 3.0 * sqrt(total / count);
}
KERNEL(find_reach, SearchArguments)

// The scale with the least squared error of every group: a block has a group, a thread a candidate.
ENTRY void search_scales(const SearchArguments arguments) {
    __shared__ double errors[MOST_CANDIDATES];
    const i64 place = blockIdx.x;
    const i64 row = place / arguments.groups;
    const i32 start = (i32)(place % arguments.groups) * arguments.group_size;
    const i32 count = min(arguments.group_size, arguments.columns - start);
    const float *weights = arguments.weights + row * arguments.columns + start;
    const double reach = arguments.reach[place];
    const i32 candidate = threadIdx.x;
    double error = BEYOND;
    if (candidate < arguments.candidates && reach != 0.0) {
        const double scale = to_half(reach * arguments.factors[candidate]), unit = scale / arguments.per_unit;
        const double limit =
            arguments.outlier_count ? arguments.outlier_levels[0] * to_half(reach * arguments.factors[0]) : BEYOND;
        const double threshold = arguments.outlier_count ? arguments.outlier_levels[0] * scale : BEYOND;
        double total = 0.0;
        for (i32 column = 0; column + 1 < count; column += 2) {  // pairs that hold an outlier at the least candidate
            const double left = magnitude(weights[column]), right = magnitude(weights[column + 1]);
            const double larger = max(left, right), smaller = min(left, right);
            if (!(larger > limit)) continue;
            if (larger > threshold) {
                const i32 rank = nearest_rank(
                    larger / scale, arguments.outlier_levels, arguments.outlier_codes, arguments.outlier_count);
                const double difference = larger - arguments.outlier_levels[rank] * scale;
                total = total + (difference * difference + smaller * smaller);
            } else {
                const double first = run_distance(larger, unit, arguments.runs, arguments.run_count);
                const double second = run_distance(smaller, unit, arguments.runs, arguments.run_count);
                total = total + first * first;
                total = total + second * second;
            }
        }
        double sums[4] = {0.0, 0.0, 0.0, 0.0};
        i32 summed = 0;
        for (i32 column = 0; column < count; column += 2) {
            const double left = magnitude(weights[column]);
            const bool paired = column + 1 < count;
            const double right = paired ? magnitude(weights[column + 1]) : 0.0;
            if (paired && max(left, right) > limit) continue;
            const double first = run_distance(left, unit, arguments.runs, arguments.run_count);
            const double second = run_distance(right, unit, arguments.runs, arguments.run_count);
            sums[summed % 4] = sums[summed % 4] + first * first;
            sums[summed % 4 + 1] = sums[summed % 4 + 1] + second * second;
            summed += 2;
            if (summed == SUMMED) {
                total = total + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
                sums[0] = sums[1] = sums[2] = sums[3] = 0.0;
                summed = 0;
            }
        }
        if (summed) total = total + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
        error = total;
    }
    if (candidate < MOST_CANDIDATES) errors[candidate] = error;
    __syncthreads();
    if (candidate) return;
    i32 chosen = 0;
    for (i32 index = 1; index < arguments.candidates; ++index)
        if (errors[index] < errors[chosen]) chosen = index;
    arguments.scales[place] = reach == 0.0 ? 1.0 : to_half(reach * arguments.factors[chosen]);
    arguments.errors[place] = reach == 0.0 ? 0.0 : errors[chosen];
}
KERNEL(search_scales, SearchArguments)
