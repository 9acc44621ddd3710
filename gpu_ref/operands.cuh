// Packed weights and activations as the exact kernels read them, and numbers that are rounded once.
//
// The C++ twin of termwise.algorithms.operands: section 2.1 of docs/microarchitecture.md. The structures are those of
// gpu_ref/operands.py, member by member.

#pragma once

#include "portable.cuh"

enum ScaleKind { SCALE_INTEGER = 0, SCALE_HALF = 1, SCALE_POWER_OF_TWO = 2, SCALE_E4M3 = 3 };

constexpr int HALF_BIAS = 25;    // an FP16 number is its whole significand * 2^(exponent field - 25)
constexpr int CODES = 256;       // of a table: as many as 8 bits have
constexpr i32 NO_LEVEL = -2147483647 - 1;  // in a table, at a code that no quantizer writes

struct Matrix {
    const u8 *codes;          // packed, [rows, code_row_bytes]
    const u8 *selectors;      // packed types of groups, [rows, selector_row_bytes]; null where the matrix has one type
    const u8 *zero_points;    // [rows, groups], or null
    const void *scales;       // [rows, groups], as scale_kind says
    const i32 *numerators;    // [types, CODES]; of pairs the normal type's and the outlier type's
    const i32 *fraction_bits; // [types]
    const i32 *booth;         // [types], 1 where the terms of a type are Booth digits
    const float *channel_scales;  // of every row, channel_step apart, or null
    u32 *faults;              // becomes 1 where a code is no level
    i64 code_row_bytes;
    i64 selector_row_bytes;
    i32 rows;
    i32 columns;
    i32 group_size;
    i32 groups;
    i32 bits;
    i32 selector_bits;
    i32 matrix_type;          // of every group, where there are no selectors
    i32 scale_kind;
    i32 identifier;           // code in a victim's place; -1 where there are no pairs
    i32 channel_step;         // 1, or 0 where one scale holds for the matrix
};

struct Scale {
    i32 significand, exponent;  // significand * 2^exponent
};

__device__ inline i32 packed_code(const u8 *row, i64 index, i32 bits) {
    const i64 first = index * bits;
    const i32 shift = first & 7;
    u32 window = row[first >> 3];
    if (shift + bits > 8) window |= (u32)row[(first >> 3) + 1] << 8;
    return window >> shift & ((1u << bits) - 1);
}

__device__ inline i32 type_of_group(const Matrix &matrix, i64 row, i32 group) {
    if (!matrix.selectors) return matrix.matrix_type;
    return packed_code(matrix.selectors + row * matrix.selector_row_bytes, group, matrix.selector_bits);
}

__device__ inline i32 level_or_fault(const Matrix &matrix, i32 place) {
    const i32 found = matrix.numerators[place];
    if (found != NO_LEVEL) return found;
    atomicMax(matrix.faults, 1u);
    return 0;
}

// Numerator of a weight. Victims are 0; a code beside an identifier is an outlier.
__device__ inline i32 numerator(const Matrix &matrix, i64 row, i32 column) {
    const u8 *codes = matrix.codes + row * matrix.code_row_bytes;
    const i32 code = packed_code(codes, column, matrix.bits);
    if (matrix.identifier >= 0) {
        if (code == matrix.identifier) return 0;
        const i32 other = column ^ 1;
        const bool outlier = other < matrix.columns && packed_code(codes, other, matrix.bits) == matrix.identifier;
        return level_or_fault(matrix, (outlier ? CODES : 0) + code);
    }
    const i32 group = column / matrix.group_size;
    if (matrix.zero_points) return code - matrix.zero_points[row * matrix.groups + group];
    return level_or_fault(matrix, type_of_group(matrix, row, group) * CODES + code);
}

// Significand and exponent of a finite FP16 number without its sign.
__device__ inline Scale half_parts(u16 bits) {
    const i32 field = bits >> 10 & 31;
    return {(bits & 1023) | (field ? 1024 : 0), field ? field : 1};
}

// Scale of a group over the fraction of its data type.
__device__ inline Scale scale_of_group(const Matrix &matrix, i64 row, i32 group) {
    const i64 place = row * matrix.groups + group;
    Scale scale = {1, 0};
    if (matrix.scale_kind == SCALE_HALF) {
        scale = half_parts(static_cast<const u16 *>(matrix.scales)[place]);
        scale.exponent -= HALF_BIAS;
    } else {
        const i32 code = static_cast<const u8 *>(matrix.scales)[place];
        if (matrix.scale_kind == SCALE_INTEGER) {
            scale.significand = code;
        } else if (matrix.scale_kind == SCALE_POWER_OF_TWO) {
            scale.exponent = code - 127;
        } else {
            const i32 field = code >> 3 & 15;
            scale = {(code & 7) | (field ? 8 : 0), (field ? field : 1) - 10};
        }
    }
    if (matrix.identifier < 0 && !matrix.zero_points)
        scale.exponent -= matrix.fraction_bits[type_of_group(matrix, row, group)];
    return scale;
}

// A finished sum times the scale of its channel.
__device__ inline float scaled_by_channel(const Matrix &matrix, i64 row, float sum) {
    return matrix.channel_scales ? sum * matrix.channel_scales[row * matrix.channel_step] : sum;
}

// number / 2^places as a whole number: towards minus infinity, or the nearest, of ties the even one. places >= 0.
__device__ inline i64 shift_right(i64 number, i32 places, bool nearest_even) {
    if (places > 62) places = 62;  // no number of these kernels is as long
    const i64 quotient = number >> places;
    if (!nearest_even || places == 0) return quotient;
    const i64 rest = number - (quotient << places), half = (i64)1 << (places - 1);
    return quotient + (rest > half || (rest == half && (quotient & 1)));
}

// number * significand * 2^exponent, rounded once to FP32. |number| < 2^63, 0 <= significand < 2^11.
//
// The product is cut to 53 bits, the last one set where anything was lost (round to odd). Such a number is exact in
// FP64, and more than two bits longer than FP32's, so that the conversion rounds as if it saw everything.
__device__ inline float float_of_product(i64 number, i32 significand, i32 exponent) {
    if (number == 0 || significand == 0) return 0.0f;
    const u64 magnitude = number < 0 ? 0 - (u64)number : (u64)number;
    u64 low = (magnitude & 0xfffff) * significand;
    const u64 high = (magnitude >> 20) * significand + (low >> 20);  // below 2^54
    low &= 0xfffff;
    u64 kept;
    if (high >> 32) {
        kept = high << 1 | (low != 0);  // below 2^55
        exponent += 19;
    } else {
        kept = high << 20 | low;
    }
    while (kept >> 53) {
        kept = kept >> 1 | (kept & 1);
        ++exponent;
    }
    // 2^exponent is a normal FP64 number: the least here is above 2^-300.
    const double value = (double)(i64)kept * double_of_bits((u64)(exponent + 1023) << 52);
    return (float)(number < 0 ? -value : value);
}
