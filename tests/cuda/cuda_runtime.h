// What the kernels of csrc/cuda use of CUDA, on the CPU: with this file in place of CUDA's own they compile as C++ and
// compute the same bits, one block after the other. The threads of a block are fibers that change at barriers, from the
// first to the last and from the last to the first by turns, so that a barrier that is missing shows in the results.
#pragma once

#include <ucontext.h>

#include <cfenv>
#include <cmath>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

using cudaError_t = int;
using cudaStream_t = void*;
inline constexpr cudaError_t cudaSuccess = 0;
struct cudaFuncAttributes {};
inline cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : 101;
}
inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) {
    return "invalid device ordinal";
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
    return cudaSuccess;
}

struct dim3 {
    unsigned x, y, z;
    explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx;

namespace emulation {

struct Block {
    std::vector<ucontext_t> fibers;
    std::vector<char> done;
    std::vector<std::unique_ptr<char[]>> stacks;
    std::vector<unsigned> predicates;
    ucontext_t scheduler;
    std::function<void()> body;
    unsigned current = 0, round = 0;
};
inline Block block;

inline void start() {
    block.body();
    block.done[block.current] = 1;
    swapcontext(&block.fibers[block.current], &block.scheduler);
}

inline void run(unsigned threads, const std::function<void()>& body) {
    constexpr std::size_t stack = 1 << 17;
    while (block.stacks.size() < threads) block.stacks.emplace_back(new char[stack]);
    block.fibers.resize(threads), block.done.assign(threads, 0), block.predicates.assign(threads, 0);
    block.body = body;
    for (unsigned i = 0; i < threads; ++i) {
        getcontext(&block.fibers[i]);
        block.fibers[i].uc_stack.ss_sp = block.stacks[i].get();
        block.fibers[i].uc_stack.ss_size = stack;
        makecontext(&block.fibers[i], start, 0);
    }
    bool backwards = false;
    for (unsigned left = threads; left > 0; backwards = !backwards, ++block.round) {
        for (unsigned i = 0; i < threads; ++i) {
            block.current = backwards ? threads - 1 - i : i;
            if (block.done[block.current]) continue;
            threadIdx.x = block.current;
            swapcontext(&block.scheduler, &block.fibers[block.current]);
            left -= block.done[block.current];
        }
    }
}

// One operation rounded in a direction. Volatile, so that it stays between the two changes of the mode.
template <class T, class Operation>
T rounded(int mode, Operation operation) {
    std::fesetround(mode);
    volatile T result = operation();
    std::fesetround(FE_TONEAREST);
    return result;
}

}  // namespace emulation

inline void __syncthreads() {
    const unsigned me = emulation::block.current;
    swapcontext(&emulation::block.fibers[me], &emulation::block.scheduler);
}

inline unsigned __ballot_sync(unsigned, bool predicate) {
    emulation::block.predicates[threadIdx.x] = predicate;
    __syncthreads();
    unsigned word = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
        word |= emulation::block.predicates[threadIdx.x / 32 * 32 + lane] << lane;
    __syncthreads();
    return word;
}

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
    for (unsigned i = 0; i < config->gridDim.x; ++i) {
        blockIdx.x = i;
        emulation::run(config->blockDim.x, [&] { kernel(arguments...); });
    }
    return cudaSuccess;
}

using std::fma;

#define EMULATE_BINARY(name, T, mode, operator)                                  \
    inline T name(T a, T b) {                                                    \
        volatile T x = a, y = b;                                                 \
        return emulation::rounded<T>(mode, [&]() -> T { return x operator y; }); \
    }
#define EMULATE_FMA(name, T, mode)                                                    \
    inline T name(T a, T b, T c) {                                                    \
        volatile T x = a, y = b, z = c;                                               \
        return emulation::rounded<T>(mode, [&]() -> T { return std::fma(x, y, z); }); \
    }

EMULATE_BINARY(__fadd_ru, float, FE_UPWARD, +)
EMULATE_BINARY(__dadd_ru, double, FE_UPWARD, +)
EMULATE_BINARY(__fsub_ru, float, FE_UPWARD, -)
EMULATE_BINARY(__dsub_ru, double, FE_UPWARD, -)
EMULATE_BINARY(__fsub_rd, float, FE_DOWNWARD, -)
EMULATE_BINARY(__dsub_rd, double, FE_DOWNWARD, -)
EMULATE_BINARY(__fmul_ru, float, FE_UPWARD, *)
EMULATE_BINARY(__dmul_ru, double, FE_UPWARD, *)
EMULATE_BINARY(__fmul_rd, float, FE_DOWNWARD, *)
EMULATE_BINARY(__dmul_rd, double, FE_DOWNWARD, *)
EMULATE_FMA(__fmaf_ru, float, FE_UPWARD)
EMULATE_FMA(__fma_ru, double, FE_UPWARD)
EMULATE_FMA(__fmaf_rd, float, FE_DOWNWARD)
EMULATE_FMA(__fma_rd, double, FE_DOWNWARD)

inline float __double2float_rn(double a) {
    return static_cast<float>(a);
}
inline float __double2float_ru(double a) {
    volatile double x = a;
    return emulation::rounded<float>(FE_UPWARD, [&] { return static_cast<float>(x); });
}
