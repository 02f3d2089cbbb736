// What the CUDA kernels share: operations that round in one direction, and how a kernel is launched.
//
// Every operation here is one IEEE-754 operation with subnormal numbers, and the build forbids contraction
// (-fmad=false), so that a kernel computes the same bits wherever that arithmetic is kept: tests/cuda emulates these
// few names on the CPU and runs the kernels as they stand.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "pyxai_bounds/cuda.h"

namespace pyxai_bounds::cuda {

using std::int64_t;
using std::uint8_t;

// The real result rounded up (towards +∞) or down; infinite on overflow, NaN where an operand is.
__device__ inline float fma_up(float a, float b, float c) {
    return __fmaf_ru(a, b, c);
}
__device__ inline double fma_up(double a, double b, double c) {
    return __fma_ru(a, b, c);
}
__device__ inline float fma_down(float a, float b, float c) {
    return __fmaf_rd(a, b, c);
}
__device__ inline double fma_down(double a, double b, double c) {
    return __fma_rd(a, b, c);
}
__device__ inline float mul_up(float a, float b) {
    return __fmul_ru(a, b);
}
__device__ inline double mul_up(double a, double b) {
    return __dmul_ru(a, b);
}
__device__ inline float mul_down(float a, float b) {
    return __fmul_rd(a, b);
}
__device__ inline double mul_down(double a, double b) {
    return __dmul_rd(a, b);
}
__device__ inline float add_up(float a, float b) {
    return __fadd_ru(a, b);
}
__device__ inline double add_up(double a, double b) {
    return __dadd_ru(a, b);
}
__device__ inline float sub_up(float a, float b) {
    return __fsub_ru(a, b);
}
__device__ inline double sub_up(double a, double b) {
    return __dsub_ru(a, b);
}
__device__ inline float sub_down(float a, float b) {
    return __fsub_rd(a, b);
}
__device__ inline double sub_down(double a, double b) {
    return __dsub_rd(a, b);
}

// To the element type, to nearest and up.
template <class T>
__device__ T nearest(double x);
template <>
__device__ inline float nearest<float>(double x) {
    return __double2float_rn(x);
}
template <>
__device__ inline double nearest<double>(double x) {
    return x;
}
template <class T>
__device__ T narrow_up(double x);
template <>
__device__ inline float narrow_up<float>(double x) {
    return __double2float_ru(x);
}
template <>
__device__ inline double narrow_up<double>(double x) {
    return x;
}

__device__ inline float magnitude(float x) {
    return fabsf(x);
}
__device__ inline double magnitude(double x) {
    return fabs(x);
}
__device__ inline float with_sign(float x, float sign) {
    return copysignf(x, sign);
}
__device__ inline double with_sign(double x, double sign) {
    return copysign(x, sign);
}

// Unlike fmin and fmax these keep a NaN, which is what unbounded looks like.
template <class T>
__device__ inline T lesser(T a, T b) {
    return a < b || a != a ? a : b;
}
template <class T>
__device__ inline T greater(T a, T b) {
    return a > b || a != a ? a : b;
}

// Zero, or NaN where x is not finite.
template <class T>
__device__ inline T zero_or_nan(T x) {
    return x - x;
}

template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Queues `blocks` blocks of `threads` threads on the stream; null, or what is wrong. Nothing waits, so that the launch
// can be captured in a CUDA graph. A failed launch leaves no error behind for the next one to report.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t device, std::uintptr_t stream, int64_t blocks, int threads,
                   Arguments... arguments) {
    if (blocks == 0) return nullptr;
    if (blocks > 0x7fffffff) return "the result has more tiles than one launch can have";
    cudaError_t status = cudaSetDevice(static_cast<int>(device));
    if (status == cudaSuccess) {
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(static_cast<unsigned>(blocks));
        config.blockDim = dim3(static_cast<unsigned>(threads));
        config.stream = reinterpret_cast<cudaStream_t>(stream);
        status = cudaLaunchKernelEx(&config, kernel, arguments...);
    }
    const cudaError_t left_behind = cudaGetLastError();
    if (status == cudaSuccess) status = left_behind;
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// Calls `run` with a value of the element type that has this size.
template <class Run>
const char* typed(int64_t element_size, Run run) {
    if (element_size == sizeof(float)) return run(float{});
    if (element_size == sizeof(double)) return run(double{});
    return "elements must be float32 or float64";
}

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

}  // namespace pyxai_bounds::cuda
