// What the kernels of this folder are written in: one source for NVIDIA GPUs (nvcc or NVRTC) and for the CPU (g++).
//
// On the GPU these are names for what CUDA has, without a header of CUDA. On the CPU a block runs its threads as fibers,
// one after the other, each until it waits; the blocks of a grid are shared out to the cores. This is no emulation of
// CUDA: there is what the kernels use, and whatever else one writes does not compile.
//
// A kernel takes one structure by value:
//
//     __global__ void name(const Arguments arguments) { ... }
//     KERNEL(name, Arguments)
//
// KERNEL makes `name` launchable: on the GPU the function is an entry of the compiled module, on the CPU there is
// `int name_twin(const Arguments *, const unsigned grid[3], const unsigned block[3], unsigned processors)`, which
// returns 0, or a `TwinError`.
//
// So that every bit is the same on both: no contraction (-fmad=false, -ffp-contract=off) but where a kernel says
// fused_multiply_add, no approximate functions, sums in a fixed order, no atomic additions of floating point.

#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef short i16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;
typedef long long i64;

static_assert(sizeof(i32) == 4 && sizeof(i64) == 8 && sizeof(void *) == 8, "the structures of arguments need this");

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)

#define ON_GPU 1
#define UNROLL _Pragma("unroll")
#define KERNEL(name, Arguments)  // an extern "C" function is an entry as it is
#define ENTRY extern "C" __global__

#define WARP_LANES 32
#define ALL_LANES 0xffffffffu

__device__ inline float float_of_bits(u32 bits) { return __uint_as_float(bits); }
__device__ inline u32 bits_of_float(float value) { return __float_as_uint(value); }
__device__ inline double double_of_bits(u64 bits) { return __longlong_as_double((i64)bits); }
__device__ inline u64 bits_of_double(double value) { return (u64)__double_as_longlong(value); }

// FP32 of an FP16 number given by its bits, exact.
__device__ inline float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// Bits of the FP16 number nearest to an FP32 number, of ties the even one.
__device__ inline u16 float_to_half(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ inline float fused_multiply_add(float factor, float other, float addend) {
    return __fmaf_rn(factor, other, addend);
}

// Four bytes of eight, each chosen by the lower three bits of a nibble of the selector; the nibbles' upper bits are 0.
__device__ inline u32 permute_bytes(u32 low, u32 high, u32 selector) {
    u32 found;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(found) : "r"(low), "r"(high), "r"(selector));
    return found;
}

// Four 32-bit words, read once: past the first-level cache.
struct alignas(16) Quad {
    u32 word[4];
};
struct alignas(8) Pair {
    u32 word[2];
};
__device__ inline Quad stream(const Quad *place) {
    Quad found;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(found.word[0]), "=r"(found.word[1]), "=r"(found.word[2]), "=r"(found.word[3])
                 : "l"(place));
    return found;
}
__device__ inline Pair stream(const Pair *place) {
    Pair found;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(found.word[0]), "=r"(found.word[1])
                 : "l"(place));
    return found;
}

// sums[16, 8] += left[16, 16] * right[16, 8] by the warp, in the fragments of mma.m16n8k16: exact products of FP16 or
// BF16 numbers, FP32 sums whose order and rounding are the tensor core's.
template <bool BFLOAT> __device__ inline void multiply_tiles(float (&sums)[4], const u32 (&left)[4], u32 right_0, u32 right_1) {
    if (BFLOAT)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                     "{%0, %1, %2, %3};"
                     : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                     : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_0), "r"(right_1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                     "{%0, %1, %2, %3};"
                     : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                     : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_0), "r"(right_1));
}

// sums[16, 8] += ones in both of left[16, 256] and right[256, 8], bits, in the fragments of mma.m16n8k256; exact.
__device__ inline void count_common_bits(i32 (&sums)[4], const u32 (&left)[4], u32 right_0, u32 right_1) {
    asm volatile("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
                 : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_0), "r"(right_1));
}

// left + right of two FP16 or BF16 numbers in a word each, rounded to the nearest.
template <bool BFLOAT> __device__ inline u32 add_two(u32 left, u32 right) {
    u32 found;
    if (BFLOAT)
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(found) : "r"(left), "r"(0x3f803f80), "r"(right));
    else
        asm("add.rn.f16x2 %0, %1, %2;" : "=r"(found) : "r"(left), "r"(right));
    return found;
}

#else  // the twin

#include <csetjmp>
#include <cstdlib>
#include <cstring>

#include <atomic>
#include <cmath>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define ON_GPU 0
#define UNROLL
#define ENTRY static
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define __syncthreads() twin::wait(twin::AT_BLOCK)
#define __syncwarp() twin::wait(twin::AT_WARP)
#define WARP_LANES 32
#define ALL_LANES 0xffffffffu

struct dim3 {
    u32 x = 1, y = 1, z = 1;
};

enum TwinError { DONE = 0, PARTED = 1, NO_MEMORY = 2 };  // PARTED: threads wait that others never join

namespace twin {

// Thread of the kernel that runs now; each core has its own.
inline thread_local dim3 thread_index, block_index, block_size, grid_size;

enum State : u8 { FRESH, READY, AT_BLOCK, AT_WARP, ENDED };

constexpr size_t STACK_BYTES = 256 << 10;

// The stack of threads that run one after the other: of one that has ended the next takes it over.
struct Fiber {
    char *stack = nullptr;
    bool begun = false;
    ucontext_t beginning;
#if defined(__SANITIZE_ADDRESS__)
    ucontext_t context;
    void *fake_stack = nullptr;
#else
    jmp_buf context;
#endif
    ~Fiber() {
        if (stack) munmap(stack, STACK_BYTES);
    }
};

constexpr u32 SHOWN = 6;  // as many as the fragments of a matrix product

// One block at a time; of every core one.
struct Block {
    void (*run)(const void *) = nullptr;
    const void *arguments = nullptr;
    std::vector<std::unique_ptr<Fiber>> fibers;  // all
    std::vector<Fiber *> idle;
    std::vector<Fiber *> fiber_of;  // by thread
    std::vector<State> states;      // by thread
    std::vector<u32> exchanged;     // by thread: what it shows to its warp, SHOWN words
    u32 current = 0;
#if defined(__SANITIZE_ADDRESS__)
    ucontext_t scheduler;
    const void *scheduler_stack = nullptr;
    size_t scheduler_bytes = 0;
#else
    jmp_buf scheduler;
#endif
};

inline thread_local Block *block = nullptr;

// From a thread to the scheduler.
inline void leave() {
    Fiber *fiber = block->fiber_of[block->current];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fiber->fake_stack, block->scheduler_stack, block->scheduler_bytes);
    swapcontext(&fiber->context, &block->scheduler);
    __sanitizer_finish_switch_fiber(fiber->fake_stack, nullptr, nullptr);
#else
    if (_setjmp(fiber->context) == 0) _longjmp(block->scheduler, 1);
#endif
}

inline void begin() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_bytes);
#endif
    for (;;) {
        block->run(block->arguments);
        block->states[block->current] = ENDED;
        leave();
    }
}

// From the scheduler to the current thread, until it waits or ends.
inline void enter(Fiber *fiber) {
#if defined(__SANITIZE_ADDRESS__)
    void *fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, fiber->stack, STACK_BYTES);
    swapcontext(&block->scheduler, fiber->begun ? &fiber->context : &fiber->beginning);
    fiber->begun = true;
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
    if (_setjmp(block->scheduler) == 0) {
        if (fiber->begun) _longjmp(fiber->context, 1);
        fiber->begun = true;
        setcontext(&fiber->beginning);
    }
#endif
}

inline Fiber *idle_fiber() {
    if (block->idle.empty()) {
        auto fiber = std::make_unique<Fiber>();
        void *memory = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) return nullptr;
        fiber->stack = static_cast<char *>(memory);
        getcontext(&fiber->beginning);
        fiber->beginning.uc_stack.ss_sp = fiber->stack;
        fiber->beginning.uc_stack.ss_size = STACK_BYTES;
        fiber->beginning.uc_link = nullptr;
        makecontext(&fiber->beginning, begin, 0);
        block->idle.push_back(fiber.get());
        block->fibers.push_back(std::move(fiber));
    }
    Fiber *fiber = block->idle.back();
    block->idle.pop_back();
    return fiber;
}

inline void wait(State where) {
    block->states[block->current] = where;
    leave();
}

// Sets the threads [first, last) on their way again if all of them wait at `where`.
inline bool release(u32 first, u32 last, State where) {
    for (u32 thread = first; thread < last; ++thread)
        if (block->states[thread] != where) return false;
    for (u32 thread = first; thread < last; ++thread) block->states[thread] = READY;
    return true;
}

inline int run_block() {
    const u32 threads = block_size.x * block_size.y * block_size.z;
    block->states.assign(threads, FRESH);
    block->fiber_of.assign(threads, nullptr);
    block->exchanged.assign(threads * SHOWN, 0);
    for (u32 ended = 0; ended < threads;) {
        bool moved = false;
        for (u32 thread = 0; thread < threads; ++thread) {
            if (block->states[thread] != FRESH && block->states[thread] != READY) continue;
            Fiber *fiber = block->fiber_of[thread];
            if (!fiber && !(fiber = idle_fiber())) return NO_MEMORY;
            block->fiber_of[thread] = fiber;
            block->current = thread;
            thread_index.x = thread % block_size.x;
            thread_index.y = thread / block_size.x % block_size.y;
            thread_index.z = thread / block_size.x / block_size.y;
            enter(fiber);
            moved = true;
            if (block->states[thread] == ENDED) {
                block->idle.push_back(fiber);
                ++ended;
            }
        }
        for (u32 first = 0; first < threads; first += WARP_LANES) {
            const u32 last = first + WARP_LANES < threads ? first + WARP_LANES : threads;
            moved |= release(first, last, AT_WARP);
        }
        moved |= release(0, threads, AT_BLOCK);
        if (!moved) return PARTED;
    }
    return DONE;
}

inline int launch(
    void (*run)(const void *), const void *arguments, const u32 grid[3], const u32 size[3], u32 processors) {
    const u64 blocks = (u64)grid[0] * grid[1] * grid[2];
    std::atomic<u64> next{0};
    std::atomic<int> status{DONE};
    auto work = [&] {
        Block mine;
        mine.run = run;
        mine.arguments = arguments;
        block = &mine;
        block_size = {size[0], size[1], size[2]};
        grid_size = {grid[0], grid[1], grid[2]};
        for (u64 index; status == DONE && (index = next++) < blocks;) {
            block_index.x = index % grid[0];
            block_index.y = index / grid[0] % grid[1];
            block_index.z = index / grid[0] / grid[1];
            if (int found = run_block()) status = found;
        }
        block = nullptr;
    };
    std::vector<std::thread> others;
    for (u32 other = 1; other < processors && other < blocks; ++other) others.emplace_back(work);
    work();
    for (std::thread &other : others) other.join();
    return status;
}

template <typename T> inline T exchange(T value, u32 source_lane) {
    static_assert(sizeof(T) == 4 && std::is_trivially_copyable<T>::value, "a shuffle takes 32 bits");
    const u32 warp = block->current / WARP_LANES * WARP_LANES;
    memcpy(&block->exchanged[block->current * SHOWN], &value, 4);
    wait(AT_WARP);
    const u32 source = warp + source_lane % WARP_LANES;
    T found = value;
    if (source < block->states.size()) memcpy(&found, &block->exchanged[source * SHOWN], 4);
    wait(AT_WARP);
    return found;
}

inline u32 lane() { return block->current % WARP_LANES; }

}  // namespace twin

#define threadIdx twin::thread_index
#define blockIdx twin::block_index
#define blockDim twin::block_size
#define gridDim twin::grid_size

// All lanes of a warp take part: the mask is a type, so that another one does not compile.
struct AllLanes {};
#undef ALL_LANES
#define ALL_LANES (AllLanes())

template <typename T> inline T __shfl_sync(AllLanes, T value, u32 lane) { return twin::exchange(value, lane); }
template <typename T> inline T __shfl_xor_sync(AllLanes, T value, u32 mask) {
    return twin::exchange(value, twin::lane() ^ mask);
}

inline u32 atomicMax(u32 *place, u32 value) {
    u32 found = __atomic_load_n(place, __ATOMIC_RELAXED);
    while (found < value && !__atomic_compare_exchange_n(place, &found, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return found;
}

inline float float_of_bits(u32 bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline u32 bits_of_float(float value) {
    u32 bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline double double_of_bits(u64 bits) {
    double value;
    memcpy(&value, &bits, 8);
    return value;
}
inline u64 bits_of_double(double value) {
    u64 bits;
    memcpy(&bits, &value, 8);
    return bits;
}
inline float half_to_float(u16 bits) {
    _Float16 half;
    memcpy(&half, &bits, 2);
    return half;
}
inline u16 float_to_half(float value) {
    const _Float16 half = (_Float16)value;
    u16 bits;
    memcpy(&bits, &half, 2);
    return bits;
}
inline float fused_multiply_add(float factor, float other, float addend) {
    return __builtin_fmaf(factor, other, addend);
}

inline u32 permute_bytes(u32 low, u32 high, u32 selector) {
    const u64 bytes = (u64)high << 32 | low;
    u32 found = 0;
    for (u32 place = 0; place < 4; ++place) {
        const u32 chosen = selector >> 4 * place & 15;
        // With an upper bit a GPU replicates the byte's sign, which no kernel means: all ones show in every result.
        found |= (chosen & 8 ? 255 : (u32)(bytes >> 8 * chosen) & 255) << 8 * place;
    }
    return found;
}

struct alignas(16) Quad {
    u32 word[4];
};
struct alignas(8) Pair {
    u32 word[2];
};
template <typename T> inline T stream(const T *place) { return *place; }

template <bool BFLOAT> inline float half_of_pair(u32 pair, u32 place) {
    const u16 bits = (u16)(pair >> 16 * place);
    return BFLOAT ? float_of_bits((u32)bits << 16) : half_to_float(bits);
}

// What the lanes of a warp hold of a product of fragments, [lane][SHOWN], once all have shown theirs. Whoever has read it
// waits for the warp again.
inline const u32 *shown_fragments(const u32 (&left)[4], u32 right_0, u32 right_1) {
    u32 *mine = &twin::block->exchanged[twin::block->current * twin::SHOWN];
    for (u32 part = 0; part < 4; ++part) mine[part] = left[part];
    mine[4] = right_0;
    mine[5] = right_1;
    twin::wait(twin::AT_WARP);
    return &twin::block->exchanged[twin::block->current / WARP_LANES * WARP_LANES * twin::SHOWN];
}

// The tensor core's sums are the twin's in FP64, rounded once.
template <bool BFLOAT> inline void multiply_tiles(float (&sums)[4], const u32 (&left)[4], u32 right_0, u32 right_1) {
    const u32 *shown = shown_fragments(left, right_0, right_1);
    for (u32 part = 0; part < 4; ++part) {
        const u32 row = twin::lane() / 4 + part / 2 * 8, column = twin::lane() % 4 * 2 + part % 2;
        double sum = sums[part];
        for (u32 inner = 0; inner < 16; ++inner) {
            const u32 of_left = row % 8 * 4 + inner % 8 / 2, of_right = column * 4 + inner % 8 / 2;
            const u32 left_pair = shown[of_left * twin::SHOWN + row / 8 + inner / 8 * 2];
            const u32 right_pair = shown[of_right * twin::SHOWN + 4 + inner / 8];
            sum += (double)half_of_pair<BFLOAT>(left_pair, inner % 2) * half_of_pair<BFLOAT>(right_pair, inner % 2);
        }
        sums[part] = (float)sum;
    }
    twin::wait(twin::AT_WARP);
}

inline void count_common_bits(i32 (&sums)[4], const u32 (&left)[4], u32 right_0, u32 right_1) {
    const u32 *shown = shown_fragments(left, right_0, right_1);
    for (u32 part = 0; part < 4; ++part) {
        const u32 row = twin::lane() / 4 + part / 2 * 8, column = twin::lane() % 4 * 2 + part % 2;
        for (u32 word = 0; word < 8; ++word) {
            const u32 left_word = shown[(row % 8 * 4 + word % 4) * twin::SHOWN + row / 8 + word / 4 * 2];
            const u32 right_word = shown[(column * 4 + word % 4) * twin::SHOWN + 4 + word / 4];
            sums[part] += __builtin_popcount(left_word & right_word);
        }
    }
    twin::wait(twin::AT_WARP);
}

template <typename T> inline T min(T left, T right) { return right < left ? right : left; }
template <typename T> inline T max(T left, T right) { return left < right ? right : left; }

#define KERNEL(name, Arguments)                                                                                      \
    extern "C" int name##_twin(                                                                                      \
        const Arguments *arguments, const u32 *grid, const u32 *block, u32 processors) {                             \
        return twin::launch(                                                                                         \
            [](const void *given) { name(*static_cast<const Arguments *>(given)); }, arguments, grid, block,          \
            processors);                                                                                             \
    }

#endif

// FP32 of a BF16 number: the upper half of its bits, exact.
__device__ inline float bfloat_to_float(u16 bits) { return float_of_bits((u32)bits << 16); }

// Bits of the BF16 number nearest to an FP32 number, of ties the even one.
__device__ inline u16 float_to_bfloat(float value) {
    const u32 bits = bits_of_float(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return (u16)(bits >> 16 | 64);  // a NaN stays one
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#if !ON_GPU
template <bool BFLOAT> inline u32 add_two(u32 left, u32 right) {
    u32 found = 0;
    for (u32 place = 0; place < 2; ++place) {
        const float sum = half_of_pair<BFLOAT>(left, place) + half_of_pair<BFLOAT>(right, place);
        found |= (u32)(BFLOAT ? float_to_bfloat(sum) : float_to_half(sum)) << 16 * place;
    }
    return found;
}
#endif
