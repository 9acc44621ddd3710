// Kernels that use all that the header of the kernels offers, for tests/test_gpu_build.py.

#include "portable.cuh"

struct Numbers {
    const u32 *given;
    u32 *found;
    u32 count;
};

// Of every block of 64 threads the numbers in reverse, through shared memory.
ENTRY void reversed(const Numbers numbers) {
    __shared__ u32 held[64];
    const u32 place = blockIdx.x * 64 + threadIdx.x;
    held[threadIdx.x] = place < numbers.count ? numbers.given[place] : 0;
    __syncthreads();
    if (place < numbers.count) numbers.found[place] = held[63 - threadIdx.x];
}
KERNEL(reversed, Numbers)

// Sum and first number of every warp, through shuffles; block and thread have three dimensions.
ENTRY void warp_sums(const Numbers numbers) {
    const u32 thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const u32 block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const u32 place = block * blockDim.x * blockDim.y * blockDim.z + thread;
    u32 sum = numbers.given[place];
    for (u32 mask = WARP_LANES / 2; mask; mask /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, mask);
    const u32 first = __shfl_sync(ALL_LANES, numbers.given[place], 0);
    __syncwarp();
    numbers.found[place] = sum * 1000 + first;
}
KERNEL(warp_sums, Numbers)

// A barrier that half of the threads never reach.
ENTRY void parted(const Numbers numbers) {
    if (threadIdx.x % 2) __syncthreads();
    numbers.found[threadIdx.x] = 1;
}
KERNEL(parted, Numbers)

ENTRY void largest(const Numbers numbers) { atomicMax(numbers.found, numbers.given[blockIdx.x * 64 + threadIdx.x]); }
KERNEL(largest, Numbers)

// A write behind the end.
ENTRY void beyond(const Numbers numbers) { numbers.found[numbers.count + threadIdx.x] = 1; }
KERNEL(beyond, Numbers)

// FP16 to FP32 and back, and BF16 to FP32.
ENTRY void converted(const Numbers numbers) {
    const u32 place = blockIdx.x * 64 + threadIdx.x;
    if (place >= numbers.count) return;
    const u16 bits = (u16)numbers.given[place];
    numbers.found[2 * place] = bits_of_float(half_to_float(bits));
    numbers.found[2 * place + 1] = float_to_half(bfloat_to_float(bits));
}
KERNEL(converted, Numbers)
