// A linear layer on a few boxes, its backward-data pass, and the last step of any weight's gradient. One walk over the
// weight feeds midpoint and radius, and |W| exists in registers alone: with few boxes the weight's memory traffic is
// all the cost, and a library would read it three times and write |W| once. With many boxes a library's matrix product
// is faster (see ops/native.py). Sums are taken in another order than in the specification,
// pyxai_bounds/ops/reference.py.
#include "pyxai_bounds/parallel.h"
#include "pyxai_bounds/stages.h"
#include "pyxai_bounds/vec.h"

namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL {
namespace {

using std::int64_t;

// Elements of the weight per thread, at least. A weight [256, 784] and one box, forward: one thread 12.0 us, two 7.5;
// in a program the rest gains as much again, since each core's cache has to hold half of the weight only.
inline constexpr int64_t linear_grain = 1 << 16;
// Boxes that share one walk over the weight: twice as many sums in registers.
inline constexpr int together = 4;
// Rows of the weight that one box alone meets at a time: it is loaded once for all of them.
inline constexpr int rows_together = 4;
// Vectors of columns whose sums stay in registers while the backward pass walks down the rows, over all boxes of a
// walk.
#if defined(__AVX512F__)
inline constexpr int columns_together = 8;
#else
inline constexpr int columns_together = 4;
#endif
// The backward pass leaves a row after a few cache lines, too soon for the hardware to see where it goes on.
inline constexpr int64_t rows_ahead = 4;

template <int value>
struct Constant {
    constexpr operator int() const { return value; }
};

// Calls f(first, Constant<count>) for groups of `most` of n things, then for single ones.
template <int most, class F>
void in_groups(int64_t n, F f) {
    int64_t i = 0;
    for (; i + most <= n; i += most) f(i, Constant<most>{});
    for (; i < n; ++i) f(i, Constant<1>{});
}

// `boxes` boxes by `rows` rows of the weight, whose first ones are at mid, rad and weight.
template <int boxes, int rows, class T>
void linear_tile(int64_t n, int64_t m, const T* mid, const T* rad, const T* weight, const T* bias, T* out_mid,
                 T* out_rad) {
    using V = Vec<T>;
    V sum_mid[boxes * rows], sum_rad[boxes * rows];
    for (V& v : sum_mid) v = V::fill(T(0));
    for (V& v : sum_rad) v = V::fill(T(0));
    int64_t i = 0;
    for (; i + V::lanes <= n; i += V::lanes) {
#pragma GCC unroll 4
        for (int row = 0; row < rows; ++row) {
            const V at = V::load(weight + row * n + i), size = V::absolute(at);
#pragma GCC unroll 4
            for (int s = 0; s < boxes; ++s) {
                V &a = sum_mid[row * boxes + s], &b = sum_rad[row * boxes + s];
                a = V::multiply_add(at, V::load(mid + s * n + i), a);
                b = V::multiply_add(size, V::load(rad + s * n + i), b);
            }
        }
    }
    for (int row = 0; row < rows; ++row) {
        for (int s = 0; s < boxes; ++s) {
            T a = V::sum(sum_mid[row * boxes + s]), b = V::sum(sum_rad[row * boxes + s]);
            for (int64_t j = i; j < n; ++j) {
                const T at = weight[row * n + j];
                a += at * mid[s * n + j];
                b += static_cast<T>(__builtin_fabs(at)) * rad[s * n + j];
            }
            out_mid[s * m + row] = bias ? a + bias[row] : a;
            out_rad[s * m + row] = b;
        }
    }
}

template <class T>
void linear(int64_t batch, int64_t n, int64_t m, const T* mid, const T* rad, const T* weight, const T* bias, T* out_mid,
            T* out_rad) {
    parallel_team(team_size(batch * n * m / linear_grain), [=](int rank, int team) {
        const int64_t begin = m * rank / team, end = m * (rank + 1) / team;
        in_groups<rows_together>(end - begin, [=](int64_t from, auto rows) {
            const int64_t row = begin + from;
            const T *w = weight + row * n, *b = bias ? bias + row : nullptr;
            in_groups<together>(batch, [=](int64_t first, auto boxes) {
                const T *x = mid + first * n, *r = rad + first * n;
                T *to_mid = out_mid + first * m + row, *to_rad = out_rad + first * m + row;
                if constexpr (boxes == 1)
                    linear_tile<1, rows>(n, m, x, r, w, b, to_mid, to_rad);
                else
                    for (int k = 0; k < rows; ++k)
                        linear_tile<boxes, 1>(n, m, x, r, w + k * n, b ? b + k : nullptr, to_mid + k, to_rad + k);
            });
        });
    });
}

// `vectors` of columns of `boxes` boxes, the first of which are at weight and out; V one of Vec and Scalar.
template <int boxes, int vectors, class V, class T>
void linear_backward_tile(int64_t m, int64_t n, const T* mid, const T* rad, const T* weight, T* out_mid, T* out_rad) {
    V sum_mid[boxes * vectors], sum_rad[boxes * vectors];
    for (V& v : sum_mid) v = V::fill(T(0));
    for (V& v : sum_rad) v = V::fill(T(0));
    for (int64_t row = 0; row < m; ++row) {
        const T* const w = weight + row * n;
        const T* const soon = row + rows_ahead < m ? w + rows_ahead * n : w;
#pragma GCC unroll 8
        for (int k = 0; k < vectors; ++k) {
            __builtin_prefetch(soon + k * V::lanes);
            const V at = V::load(w + k * V::lanes), size = V::absolute(at);
#pragma GCC unroll 4
            for (int s = 0; s < boxes; ++s) {
                V &a = sum_mid[k * boxes + s], &b = sum_rad[k * boxes + s];
                a = V::multiply_add(at, V::fill(mid[s * m + row]), a);
                b = V::multiply_add(size, V::fill(rad[s * m + row]), b);
            }
        }
    }
    for (int k = 0; k < vectors; ++k) {
        for (int s = 0; s < boxes; ++s) {
            sum_mid[k * boxes + s].store(out_mid + s * n + k * V::lanes);
            sum_rad[k * boxes + s].store(out_rad + s * n + k * V::lanes);
        }
    }
}

template <class T>
void linear_backward(int64_t batch, int64_t m, int64_t n, const T* mid, const T* rad, const T* weight, T* out_mid,
                     T* out_rad) {
    using V = Vec<T>;
    parallel_team(team_size(batch * n * m / linear_grain), [=](int rank, int team) {
        // Whole vectors to each thread, so that no two write one cache line.
        const int64_t share = (n / 16 + team) / team * 16;
        const int64_t stop = share * (rank + 1) < n ? share * (rank + 1) : n;
        in_groups<together>(batch, [=](int64_t first, auto boxes) {
            constexpr int vectors = columns_together / boxes;
            const T *g = mid + first * m, *r = rad + first * m;
            T *to_mid = out_mid + first * n, *to_rad = out_rad + first * n;
            int64_t j = share * rank;
            for (; j + vectors * V::lanes <= stop; j += vectors * V::lanes)
                linear_backward_tile<boxes, vectors, V>(m, n, g, r, weight + j, to_mid + j, to_rad + j);
            for (; j + V::lanes <= stop; j += V::lanes)
                linear_backward_tile<boxes, 1, V>(m, n, g, r, weight + j, to_mid + j, to_rad + j);
            for (; j < stop; ++j)
                linear_backward_tile<boxes, 1, Scalar<T>>(m, n, g, r, weight + j, to_mid + j, to_rad + j);
        });
    });
}

// The sign of 0 and of NaN is 0, as PyTorch has it.
template <class T>
void signed_sum(int64_t n, const T* a, const T* b, const T* weight, T* out) {
    const auto step = [=](auto lanes, int64_t i) {
        using V = decltype(lanes);
        const V w = V::load(weight + i), zero = V::fill(T(0));
        const V sign = V::select(V::less(zero, w), V::fill(T(1)), V::select(V::less(w, zero), V::fill(T(-1)), zero));
        const V part = sign * V::load(b + i);
        (a ? V::load(a + i) + part : part).store(out + i);
    };
    parallel_ranges(n, [=](int64_t begin, int64_t end) {
        int64_t i = begin;
        for (; i + Vec<T>::lanes <= end; i += Vec<T>::lanes) step(Vec<T>{}, i);
        for (; i < end; ++i) step(Scalar<T>{}, i);
    });
}

}  // namespace

template <class T>
void set_interval_linear(Stages<T>& stages) {
    stages.signed_sum = signed_sum<T>;
    stages.linear = linear<T>;
    stages.linear_backward = linear_backward<T>;
}

template void set_interval_linear(Stages<float>&);
template void set_interval_linear(Stages<double>&);

}  // namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL
