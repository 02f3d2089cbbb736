// Exact product of two interval matrices and its gradient, rounded to nearest. The specification, with the error bound
// that holds for every order of summation, is interval_matmul in pyxai_bounds/ops/reference.py; there is no case to
// decide, so nothing waits for the device. Formulas are derived there and in csrc/cpu/interval_matmul.cpp.
//
// All three kernels are tiled alike: a block of threads computes `rows` × `columns` results, each thread row_count ×
// column_count of them in registers, and `depth` terms of both factors at a time go through shared memory.
#include "pyxai_bounds/device.cuh"

namespace pyxai_bounds::cuda {
namespace {

constexpr int threads = 128, row_threads = 8, column_threads = 16;
constexpr int depth = 8;

constexpr int column_count = 4, columns = column_threads * column_count;
// As many as there are registers for: float64 takes two for every number, a gradient four numbers for every result.
template <class T>
constexpr int forward_count = sizeof(T) == sizeof(float) ? 8 : 4;
template <class T>
constexpr int gradient_count = sizeof(T) == sizeof(float) ? 4 : 2;

template <class T, int width>
using Tile = T[depth][width + 4];  // 4 more, so that the threads of a warp store to different banks

// `depth` terms of `width` rows or columns of a matrix, on their way through registers to shared memory, so that the
// next ones are under way while these are worked on. Neighbouring threads read along the dimension that is contiguous:
// the terms, or the rows or columns. Zeros stand for what lies outside, and add nothing.
template <class T, int width, bool along_terms>
struct Panel {
    static constexpr int loads = depth * width / threads;
    T value[loads];

    __device__ static int term(int l) {
        return along_terms ? threadIdx.x % depth : threadIdx.x / width + l * (threads / width);
    }
    __device__ static int index(int l) {
        return along_terms ? threadIdx.x / depth + l * (threads / depth) : threadIdx.x % width;
    }
    __device__ void fetch(const T* matrix, int64_t stride, int64_t index0, int64_t count, int64_t term0,
                          int64_t terms) {
#pragma unroll
        for (int l = 0; l < loads; ++l) {
            const int64_t k = term0 + term(l), i = index0 + index(l);
            const bool inside = k < terms && i < count;
            value[l] = inside ? matrix[along_terms ? i * stride + k : k * stride + i] : T(0);
        }
    }
    __device__ void store(Tile<T, width>& tile) const {
#pragma unroll
        for (int l = 0; l < loads; ++l) tile[term(l)][index(l)] = value[l];
    }
};

// Where in the results a block and a thread work. Blocks with the same rows stand side by side.
struct Place {
    int64_t batch, row0, column0;
    int row, column;  // of the thread's first result in the tile
};

template <int row_count>
__device__ Place place(int64_t row_total, int64_t column_total) {
    const int64_t row_tiles = ceil_div(row_total, row_threads * row_count),
                  column_tiles = ceil_div(column_total, columns);
    const int64_t block = blockIdx.x, tile = block / column_tiles;
    const int thread = threadIdx.x;
    return {tile / row_tiles, tile % row_tiles * (row_threads * row_count), block % column_tiles * columns,
            thread / column_threads * row_count, thread % column_threads * column_count};
}

int64_t blocks(int64_t batch, int row_count, int64_t row_total, int64_t column_total) {
    return batch * ceil_div(row_total, row_threads * row_count) * ceil_div(column_total, columns);
}

// With u = |a|, v = |b|, q = min(v, s), w = max(v, s): mid = Σ a·b ± min(u·s, r·q), rad = Σ max(u·s, r·q) + r·w. No
// entry that is not finite can vanish from the radius: of a it is in u·s, which the choice of the greater keeps where
// it is NaN, and of r, b and s in r·w.
template <class T, int row_count = forward_count<T>>
__global__ void __launch_bounds__(threads, 2)
    interval_matmul_kernel(int64_t m, int64_t terms, int64_t n, const T* __restrict__ a_mid,
                           const T* __restrict__ a_rad, const T* __restrict__ b_mid, const T* __restrict__ b_rad,
                           T* __restrict__ out_mid, T* __restrict__ out_rad) {
    constexpr int rows = row_threads * row_count;
    __shared__ Tile<T, rows> of_a, of_r;
    __shared__ Tile<T, columns> of_b, of_s, of_q, of_w;
    const Place at = place<row_count>(m, n);
    a_mid += at.batch * m * terms, a_rad += at.batch * m * terms;
    b_mid += at.batch * terms * n, b_rad += at.batch * terms * n;
    Panel<T, rows, true> a, r;
    Panel<T, columns, false> b, s;
    const auto fetch = [&](int64_t term0) {
        a.fetch(a_mid, terms, at.row0, m, term0, terms);
        r.fetch(a_rad, terms, at.row0, m, term0, terms);
        b.fetch(b_mid, n, at.column0, n, term0, terms);
        s.fetch(b_rad, n, at.column0, n, term0, terms);
    };
    T mid[row_count][column_count] = {}, rad[row_count][column_count] = {};
    fetch(0);
    for (int64_t term0 = 0; term0 < terms; term0 += depth) {
        a.store(of_a), r.store(of_r), b.store(of_b);
#pragma unroll
        for (int l = 0; l < b.loads; ++l) {
            const int k = b.term(l), j = b.index(l);
            const T v = magnitude(b.value[l]);
            of_s[k][j] = with_sign(s.value[l], b.value[l]);
            of_q[k][j] = lesser(v, s.value[l]);
            of_w[k][j] = greater(v, s.value[l]);
        }
        __syncthreads();
        fetch(term0 + depth);
#pragma unroll 2  // no further: the compiler would spend the registers on loading ahead
        for (int k = 0; k < depth; ++k) {
#pragma unroll
            for (int i = 0; i < row_count; ++i) {
                const T one_a = of_a[k][at.row + i], one_r = of_r[k][at.row + i];
#pragma unroll
                for (int j = 0; j < column_count; ++j) {
                    const int column = at.column + j;
                    const T us = one_a * of_s[k][column], rq = one_r * of_q[k][column];
                    const T size = magnitude(us);
                    mid[i][j] = fma(one_a, of_b[k][column], mid[i][j]) + with_sign(size < rq ? size : rq, us);
                    rad[i][j] = fma(one_r, of_w[k][column], rad[i][j]) + (size < rq ? rq : size);
                }
            }
        }
        __syncthreads();
    }
    out_mid += at.batch * m * n, out_rad += at.batch * m * n;
#pragma unroll
    for (int i = 0; i < row_count; ++i) {
#pragma unroll
        for (int j = 0; j < column_count; ++j) {
            const int64_t row = at.row0 + at.row + i, column = at.column0 + at.column + j;
            if (row >= m || column >= n) continue;
            out_mid[row * n + column] = mid[i][j];
            out_rad[row * n + column] = rad[i][j];
        }
    }
}

// Is u·s the least of u·s, r·v and r·s? Where b does not straddle 0, u·s < r·s is u < r, and still right where s is 0.
template <class T>
__device__ bool first_is_least(T u, T r, T v, T s) {
    return v < s ? u * s < r * v : u < r;
}

// The gradient in a ± r: sign(a)·∂a = Σ_j t·v + e·s, ∂r = Σ_j h·w + f·q. `rows` run along m, columns along k, terms
// along n.
template <class T, int row_count = gradient_count<T>>
__global__ void __launch_bounds__(threads, 2)
    interval_matmul_grad_a_kernel(int64_t m, int64_t k, int64_t terms, const T* __restrict__ mid_grad,
                                  const T* __restrict__ rad_grad, const T* __restrict__ a_mid,
                                  const T* __restrict__ a_rad, const T* __restrict__ b_mid, const T* __restrict__ b_rad,
                                  T* __restrict__ a_mid_grad, T* __restrict__ a_rad_grad) {
    constexpr int rows = row_threads * row_count;
    __shared__ Tile<T, rows> of_g, of_h;
    __shared__ Tile<T, columns> of_b, of_s;
    const Place at = place<row_count>(m, k);
    mid_grad += at.batch * m * terms, rad_grad += at.batch * m * terms;
    b_mid += at.batch * k * terms, b_rad += at.batch * k * terms;
    a_mid += at.batch * m * k, a_rad += at.batch * m * k;
    Panel<T, rows, true> g, h;
    Panel<T, columns, true> b, s;
    const auto fetch = [&](int64_t term0) {
        g.fetch(mid_grad, terms, at.row0, m, term0, terms);
        h.fetch(rad_grad, terms, at.row0, m, term0, terms);
        b.fetch(b_mid, terms, at.column0, k, term0, terms);
        s.fetch(b_rad, terms, at.column0, k, term0, terms);
    };
    T a[row_count][column_count], r[row_count][column_count];
    T of_mid[row_count][column_count] = {}, of_rad[row_count][column_count] = {};
#pragma unroll
    for (int i = 0; i < row_count; ++i) {
#pragma unroll
        for (int j = 0; j < column_count; ++j) {
            const int64_t row = at.row0 + at.row + i, column = at.column0 + at.column + j;
            const bool inside = row < m && column < k;
            a[i][j] = inside ? a_mid[row * k + column] : T(0);
            r[i][j] = inside ? a_rad[row * k + column] : T(0);
        }
    }
    fetch(0);
    for (int64_t term0 = 0; term0 < terms; term0 += depth) {
        g.store(of_g), h.store(of_h), b.store(of_b), s.store(of_s);
        __syncthreads();
        fetch(term0 + depth);
#pragma unroll 1  // or the compiler would spend the registers on loading ahead
        for (int l = 0; l < depth; ++l) {
#pragma unroll
            for (int j = 0; j < column_count; ++j) {
                const T one_b = of_b[l][at.column + j], one_s = of_s[l][at.column + j], v = magnitude(one_b);
                const T q = lesser(v, one_s), w = greater(v, one_s), b_sign = with_sign(T(1), one_b);
#pragma unroll
                for (int i = 0; i < row_count; ++i) {
                    const T one_h = of_h[l][at.row + i];
                    const T t = of_g[l][at.row + i] * (b_sign * with_sign(T(1), a[i][j]));
                    const bool least = first_is_least(magnitude(a[i][j]), r[i][j], v, one_s);
                    of_mid[i][j] = fma(least ? t : one_h, one_s, fma(t, v, of_mid[i][j]));
                    of_rad[i][j] = fma(least ? one_h : t, q, fma(one_h, w, of_rad[i][j]));
                }
            }
        }
        __syncthreads();
    }
    a_mid_grad += at.batch * m * k, a_rad_grad += at.batch * m * k;
#pragma unroll
    for (int i = 0; i < row_count; ++i) {
#pragma unroll
        for (int j = 0; j < column_count; ++j) {
            const int64_t row = at.row0 + at.row + i, column = at.column0 + at.column + j;
            if (row >= m || column >= k) continue;
            a_mid_grad[row * k + column] = with_sign(T(1), a[i][j]) * of_mid[i][j];
            a_rad_grad[row * k + column] = of_rad[i][j];
        }
    }
}

// The gradient in b ± s: sign(b)·∂b = Σ_i t·u + (f if v < s else h)·r, ∂s = Σ_i e·u + (h if v < s else f)·r. `rows` run
// along k, columns along n, terms along m.
template <class T, int row_count = gradient_count<T>>
__global__ void __launch_bounds__(threads, 2)
    interval_matmul_grad_b_kernel(int64_t k, int64_t n, int64_t terms, const T* __restrict__ mid_grad,
                                  const T* __restrict__ rad_grad, const T* __restrict__ a_mid,
                                  const T* __restrict__ a_rad, const T* __restrict__ b_mid, const T* __restrict__ b_rad,
                                  T* __restrict__ b_mid_grad, T* __restrict__ b_rad_grad) {
    constexpr int rows = row_threads * row_count;
    __shared__ Tile<T, rows> of_a, of_r;
    __shared__ Tile<T, columns> of_g, of_h;
    const Place at = place<row_count>(k, n);
    mid_grad += at.batch * terms * n, rad_grad += at.batch * terms * n;
    a_mid += at.batch * terms * k, a_rad += at.batch * terms * k;
    b_mid += at.batch * k * n, b_rad += at.batch * k * n;
    Panel<T, rows, false> a, r;
    Panel<T, columns, false> g, h;
    const auto fetch = [&](int64_t term0) {
        a.fetch(a_mid, k, at.row0, k, term0, terms);
        r.fetch(a_rad, k, at.row0, k, term0, terms);
        g.fetch(mid_grad, n, at.column0, n, term0, terms);
        h.fetch(rad_grad, n, at.column0, n, term0, terms);
    };
    T b[row_count][column_count], s[row_count][column_count];
    T of_mid[row_count][column_count] = {}, of_rad[row_count][column_count] = {};
#pragma unroll
    for (int i = 0; i < row_count; ++i) {
#pragma unroll
        for (int j = 0; j < column_count; ++j) {
            const int64_t row = at.row0 + at.row + i, column = at.column0 + at.column + j;
            const bool inside = row < k && column < n;
            b[i][j] = inside ? b_mid[row * n + column] : T(0);
            s[i][j] = inside ? b_rad[row * n + column] : T(0);
        }
    }
    fetch(0);
    for (int64_t term0 = 0; term0 < terms; term0 += depth) {
        a.store(of_a), r.store(of_r), g.store(of_g), h.store(of_h);
        __syncthreads();
        fetch(term0 + depth);
#pragma unroll 1  // or the compiler would spend the registers on loading ahead
        for (int l = 0; l < depth; ++l) {
#pragma unroll
            for (int i = 0; i < row_count; ++i) {
                const T one_a = of_a[l][at.row + i], one_r = of_r[l][at.row + i], u = magnitude(one_a);
                const T a_sign = with_sign(T(1), one_a);
#pragma unroll
                for (int j = 0; j < column_count; ++j) {
                    const T one_h = of_h[l][at.column + j], v = magnitude(b[i][j]);
                    const T t = of_g[l][at.column + j] * (a_sign * with_sign(T(1), b[i][j]));
                    const bool least = first_is_least(u, one_r, v, s[i][j]), straddles = v < s[i][j];
                    const T e = least ? t : one_h, f = least ? one_h : t;
                    of_mid[i][j] = fma(straddles ? f : one_h, one_r, fma(t, u, of_mid[i][j]));
                    of_rad[i][j] = fma(straddles ? one_h : f, one_r, fma(e, u, of_rad[i][j]));
                }
            }
        }
        __syncthreads();
    }
    b_mid_grad += at.batch * k * n, b_rad_grad += at.batch * k * n;
#pragma unroll
    for (int i = 0; i < row_count; ++i) {
#pragma unroll
        for (int j = 0; j < column_count; ++j) {
            const int64_t row = at.row0 + at.row + i, column = at.column0 + at.column + j;
            if (row >= k || column >= n) continue;
            b_mid_grad[row * n + column] = with_sign(T(1), b[i][j]) * of_mid[i][j];
            b_rad_grad[row * n + column] = of_rad[i][j];
        }
    }
}

}  // namespace
}  // namespace pyxai_bounds::cuda

extern "C" const char* cuda_matmul(std::int64_t device, std::uintptr_t stream, std::int64_t element_size,
                                   std::int64_t batch, std::int64_t m, std::int64_t k, std::int64_t n,
                                   std::uintptr_t a_mid, std::uintptr_t a_rad, std::uintptr_t b_mid,
                                   std::uintptr_t b_rad, std::uintptr_t out_mid, std::uintptr_t out_rad) {
    using namespace pyxai_bounds::cuda;
    return typed(element_size, [&](auto element) {
        using T = decltype(element);
        return launch(interval_matmul_kernel<T>, device, stream, blocks(batch, forward_count<T>, m, n), threads, m, k,
                      n, at<const T>(a_mid), at<const T>(a_rad), at<const T>(b_mid), at<const T>(b_rad), at<T>(out_mid),
                      at<T>(out_rad));
    });
}

extern "C" const char* cuda_matmul_backward(std::int64_t device, std::uintptr_t stream, std::int64_t element_size,
                                            std::int64_t batch, std::int64_t m, std::int64_t k, std::int64_t n,
                                            std::uintptr_t mid_grad, std::uintptr_t rad_grad, std::uintptr_t a_mid,
                                            std::uintptr_t a_rad, std::uintptr_t b_mid, std::uintptr_t b_rad,
                                            std::uintptr_t a_mid_grad, std::uintptr_t a_rad_grad,
                                            std::uintptr_t b_mid_grad, std::uintptr_t b_rad_grad) {
    using namespace pyxai_bounds::cuda;
    return typed(element_size, [&](auto element) {
        using T = decltype(element);
        const T *g = at<const T>(mid_grad), *h = at<const T>(rad_grad), *a = at<const T>(a_mid),
                *r = at<const T>(a_rad), *b = at<const T>(b_mid), *s = at<const T>(b_rad);
        const char* const wrong =
            launch(interval_matmul_grad_a_kernel<T>, device, stream, blocks(batch, gradient_count<T>, m, k), threads, m,
                   k, n, g, h, a, r, b, s, at<T>(a_mid_grad), at<T>(a_rad_grad));
        if (wrong != nullptr) return wrong;
        return launch(interval_matmul_grad_b_kernel<T>, device, stream, blocks(batch, gradient_count<T>, k, n), threads,
                      k, n, m, g, h, a, r, b, s, at<T>(b_mid_grad), at<T>(b_rad_grad));
    });
}
