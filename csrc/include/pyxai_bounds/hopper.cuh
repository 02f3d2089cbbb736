// The instructions of compute capability 9.0 that csrc/hopper uses, one function each: barriers that count bytes,
// copies of boxes of tensors into shared memory, products of tiles in shared memory. Kernels name nothing else of the
// machine, so that tests/cuda can run them on the CPU: there, pyxai_bounds/hopper.cuh of that folder stands in for this
// file.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace pyxai_bounds::hopper {

using std::int64_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

using Map = CUtensorMap;
using BFloat16 = __nv_bfloat16;
using Half = __half;
using Barrier = uint64_t;

constexpr int most_memory = 232448;  // bytes of shared memory that a block may have

// --- shared memory and barriers ---------------------------------------------------------------------------------

__device__ inline uint8_t* dynamic_memory() {
    extern __shared__ __align__(1024) uint8_t memory[];
    return memory;
}

__device__ inline uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ inline void barrier_init(Barrier* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// After all of them, by the thread that made them and before the block's barrier: the copy engine sees them.
__device__ inline void barriers_are_made() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ inline void arrive_and_expect(Barrier* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Waits until the phase with this parity is over.
__device__ inline void wait(Barrier* barrier, uint32_t parity) {
    uint32_t done = 0;
    while (done == 0) {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    }
}

// A box of the tensor, from these places on in each dimension, innermost first; zeros where there is no tensor. The
// barrier is told of its bytes.
__device__ inline void copy_box(void* to, const Map* map, Barrier* barrier, int at0, int at1, int at2, int at3,
                                int at4) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(to)),
        "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)), "r"(at0), "r"(at1), "r"(at2), "r"(at3),
        "r"(at4)
        : "memory");
}

// --- products ---------------------------------------------------------------------------------------------------

// The lower half of what tensor cores are told of a tile: where it begins in shared memory, in units of 16 bytes. Rows
// are of 128 bytes, swizzled, the first of eight at a multiple of 1024: as copy_box leaves them. Rows are what is
// multiplied with, and the terms of the sums lie along them; or, of `multiply_columns`, rows are terms, 64 numbers of
// each lie along them, and the next 64 in the row that begins so many bytes further on.
using Tile = uint32_t;
__device__ inline Tile tile_at(const void* p, int next_numbers = 16) {
    return shared_address(p) >> 4 | static_cast<uint32_t>(next_numbers >> 4) << 16;
}
// The tile that begins so many bytes further on.
__device__ inline Tile moved(Tile tile, int bytes) {
    return tile + static_cast<uint32_t>(bytes >> 4);
}
__device__ inline uint64_t described(Tile tile) {
    constexpr uint32_t eight_rows = 1024 >> 4, swizzled_128_bytes = 1u << 30;
    return static_cast<uint64_t>(eight_rows | swizzled_128_bytes) << 32 | tile;
}

// Before the first of a group of products, and where one adds to sums that one of another shape has added to.
__device__ inline void products_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void products_are_queued() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most so many of the queued groups are unfinished.
template <int unfinished>
__device__ inline void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(unfinished) : "memory");
}

#define ACCUMULATORS_8(d, i)                                                                                    \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define ACCUMULATORS_16(d, i) ACCUMULATORS_8(d, i), ACCUMULATORS_8(d, i + 8)
#define ACCUMULATORS_32(d, i) ACCUMULATORS_16(d, i), ACCUMULATORS_16(d, i + 16)
#define SUMS_32                                                                                            \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SUMS_48 SUMS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define SUMS_56 SUMS_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define SUMS_64 SUMS_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define SUMS_96                                                                                         \
    SUMS_64                                                                                             \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, " \
    "%83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
// `by_columns` says of a and of b whether terms are rows; then come the sums.
#define MULTIPLY_TYPE(type, columns, sums, a_b, added, by_columns, ...)                                   \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " added                                                \
                 ", 0;\n"                                                                                 \
                 "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" sums "}, " a_b \
                 ", p, 1, 1, " by_columns ";\n}"                                                          \
                 : __VA_ARGS__                                                                            \
                 : "l"(described(a)), "l"(described(b)), "r"(add))
#define MULTIPLY(T, ...)                   \
    if constexpr (std::is_same_v<T, Half>) \
        MULTIPLY_TYPE("f16", __VA_ARGS__); \
    else                                   \
        MULTIPLY_TYPE("bf16", __VA_ARGS__)

// d (+)= a·bᵀ for a of 64 rows and b of 128, sixteen terms each. The four warps of a group hold d: of rows
// 16·warp + lane / 4 and eight further on, columns 8·j + 2·(lane % 4) and the next: d[4·j + 2·(which row) + (column)].
// With fewer rows of b, the first so many columns of d.
template <class T, int columns = 128>
__device__ inline void multiply(float (&d)[64], Tile a, Tile b, int add) {
    if constexpr (columns == 128) {
        MULTIPLY(T, "128", SUMS_64, "%64, %65", "%66", "0, 0", ACCUMULATORS_32(d, 0), ACCUMULATORS_32(d, 32));
    } else if constexpr (columns == 112) {
        MULTIPLY(T, "112", SUMS_56, "%56, %57", "%58", "0, 0", ACCUMULATORS_32(d, 0), ACCUMULATORS_16(d, 32),
                 ACCUMULATORS_8(d, 48));
    } else if constexpr (columns == 96) {
        MULTIPLY(T, "96", SUMS_48, "%48, %49", "%50", "0, 0", ACCUMULATORS_32(d, 0), ACCUMULATORS_16(d, 32));
    } else {
        static_assert(columns == 64);
        MULTIPLY(T, "64", SUMS_32, "%32, %33", "%34", "0, 0", ACCUMULATORS_32(d, 0));
    }
}

// d (+)= aᵀ·b for sixteen rows of a, of 64 numbers, and of b, of 64, 128 or 192; d as above.
template <class T, int sums>
__device__ inline void multiply_columns(float (&d)[sums], Tile a, Tile b, int add) {
    if constexpr (sums == 32) {
        MULTIPLY(T, "64", SUMS_32, "%32, %33", "%34", "1, 1", ACCUMULATORS_32(d, 0));
    } else if constexpr (sums == 64) {
        MULTIPLY(T, "128", SUMS_64, "%64, %65", "%66", "1, 1", ACCUMULATORS_32(d, 0), ACCUMULATORS_32(d, 32));
    } else {
        static_assert(sums == 96);
        MULTIPLY(T, "192", SUMS_96, "%96, %97", "%98", "1, 1", ACCUMULATORS_32(d, 0), ACCUMULATORS_32(d, 32),
                 ACCUMULATORS_32(d, 64));
    }
}

// --- registers --------------------------------------------------------------------------------------------------

template <int registers>
__device__ inline void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// The number that the warp's first thread has, in all of them.
__device__ inline int of_warp(int x) {
    return __shfl_sync(0xffffffffu, x, 0);
}
// A barrier of some of the block's threads; the block's own has number 0.
template <int threads = 128>
__device__ inline void group_barrier(int number) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(threads) : "memory");
}
// Transposes of four tiles of eight rows of eight 16-bit numbers, of whose row i / 4 thread i has the numbers 2·(i % 4)
// and the next. Thread i says where row i % 8 of the transpose of tile i / 8 goes.
__device__ inline void store_transposed(void* row, const uint32_t (&words)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
}

// --- pairs of 16-bit numbers in a word, the first in its lower half -----------------------------------------------

template <class T>
using Pair = std::conditional_t<std::is_same_v<T, Half>, __half2, __nv_bfloat162>;

template <class T>
__device__ inline Pair<T> pair_of(uint32_t word) {
    return reinterpret_cast<const Pair<T>&>(word);
}
template <class P>
__device__ inline uint32_t word_of(P pair) {
    return reinterpret_cast<const uint32_t&>(pair);
}
// Rounded to nearest.
template <class T>
__device__ inline uint32_t packed(float first, float second) {
    if constexpr (std::is_same_v<T, Half>)
        return word_of(__floats2half2_rn(first, second));
    else
        return word_of(__floats2bfloat162_rn(first, second));
}
template <class T>
__device__ inline uint32_t plus(uint32_t a, uint32_t b) {
    return word_of(__hadd2(pair_of<T>(a), pair_of<T>(b)));
}
template <class T>
__device__ inline uint32_t minus(uint32_t a, uint32_t b) {
    return word_of(__hsub2(pair_of<T>(a), pair_of<T>(b)));
}
template <class T>
__device__ inline uint32_t halved(uint32_t a) {
    return word_of(__hmul2(pair_of<T>(a), pair_of<T>(packed<T>(0.5f, 0.5f))));
}
// All bits of a half where its number is positive, where it is at least 0, at most 0: none of these of a NaN.
template <class T>
__device__ inline uint32_t is_positive(uint32_t a) {
    return __hgt2_mask(pair_of<T>(a), pair_of<T>(0));
}
template <class T>
__device__ inline uint32_t is_not_below(uint32_t a) {
    return __hge2_mask(pair_of<T>(a), pair_of<T>(0));
}
template <class T>
__device__ inline uint32_t is_not_above(uint32_t a) {
    return __hle2_mask(pair_of<T>(a), pair_of<T>(0));
}
__device__ inline float widened(Half x) {
    return __half2float(x);
}
__device__ inline float widened(BFloat16 x) {
    return __bfloat162float(x);
}
__device__ inline Half magnitude(Half x) {
    return __habs(x);
}
__device__ inline BFloat16 magnitude(BFloat16 x) {
    return __habs(x);
}

// --- the host ---------------------------------------------------------------------------------------------------

inline int processors(int device) {
    int count = 0;
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}
inline bool is_hopper(int device) {
    int major = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    return major == 9;
}

inline auto map_encoder() {
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
        if (found != cudaDriverEntryPointSuccess) function = nullptr;
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    return encode;
}
inline bool can_make_maps() {
    return map_encoder() != nullptr;
}

// The copy engine's view of a dense tensor of 16-bit numbers; null, or what is wrong. Pitches are bytes, of the outer
// four dimensions. A box is 64 numbers wide, and its rows of 128 bytes are swizzled.
template <class T>
const char* make_map(Map* map, const void* tensor, const uint64_t (&sizes)[5], const uint64_t (&pitches)[4],
                     const uint32_t (&box)[5]) {
    const uint32_t steps[5] = {1, 1, 1, 1, 1};
    const CUtensorMapDataType type =
        std::is_same_v<T, Half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const CUresult status = map_encoder()(map, type, 5, const_cast<void*>(tensor), sizes, pitches, box, steps,
                                          CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                          CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return status == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused the shape";
}

// Queues a kernel with dynamic shared memory; null, or what CUDA says is wrong.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int device, std::uintptr_t stream, int64_t blocks, int threads,
                   int shared_bytes, const Arguments&... arguments) {
    cudaError_t status = cudaSetDevice(device);
    if (status == cudaSuccess && shared_bytes > 0)  // not as much as it needs now: another thread may need more
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_memory);
    if (status == cudaSuccess) {
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(static_cast<unsigned>(blocks));
        config.blockDim = dim3(static_cast<unsigned>(threads));
        config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
        config.stream = reinterpret_cast<cudaStream_t>(stream);
        status = cudaLaunchKernelEx(&config, kernel, arguments...);
    }
    const cudaError_t left_behind = cudaGetLastError();
    if (status == cudaSuccess) status = left_behind;
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace pyxai_bounds::hopper
