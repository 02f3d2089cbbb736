// A linear layer on a few boxes, its backward-data pass, and the last step of any weight's gradient. One walk over the
// weight feeds midpoint and radius, and |W| exists in registers alone: with few boxes the weight's memory traffic is
// all the cost, and a library would read it three times and write |W| once. With many boxes a library's matrix product
// is faster (see ops/native.py). Sums are taken in another order than in the specification,
// pyxai_bounds/ops/reference.py.
#include "pyxai_bounds/parallel.h"
#include "pyxai_bounds/scratch.h"
#include "pyxai_bounds/stages.h"
#include "pyxai_bounds/vec.h"

namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL {
namespace {

using std::int64_t;

// Elements of the weight per thread, at least: about as long as it takes to wake one.
inline constexpr int64_t linear_grain = 1 << 17;
// Boxes that share one walk over the weight: twice as many sums in registers.
inline constexpr int together = 4;
// Rows of the weight that share one walk over the sums of the backward pass.
inline constexpr int rows_together = 4;
// Columns of the weight whose sums, for all boxes of a walk, stay in the first-level cache.
inline constexpr int64_t columns_together = 512;

template <class T>
T sum_of(Vec<T> v) {
    T lanes[Vec<T>::lanes], sum = 0;
    v.store(lanes);
    for (T lane : lanes) sum += lane;
    return sum;
}

// Calls f(first, Constant<count>) for groups of `most` of n things, then for single ones.
template <int most, class F>
void in_groups(int64_t n, F f) {
    int64_t i = 0;
    for (; i + most <= n; i += most) f(i, Constant<most>{});
    for (; i < n; ++i) f(i, Constant<1>{});
}

template <class T>
void linear(int64_t batch, int64_t n, int64_t m, const T* mid, const T* rad, const T* weight, const T* bias, T* out_mid,
            T* out_rad) {
    using V = Vec<T>;
    constexpr int L = V::lanes;
    parallel_team(team_size(batch * n * m / linear_grain), [=](int rank, int team) {
        for (int64_t row = m * rank / team; row < m * (rank + 1) / team; ++row) {
            const T* w = weight + row * n;
            const T b = bias ? bias[row] : T(0);
            in_groups<together>(batch, [=](int64_t first, auto count) {
                const T *x = mid + first * n, *r = rad + first * n;
                // Two sums of each kind where one box is alone, or additions would wait for one another.
                constexpr int chains = count == 1 ? 4 : 1;
                V sum_mid[count * chains], sum_rad[count * chains];
                for (V& v : sum_mid) v = V::fill(T(0));
                for (V& v : sum_rad) v = V::fill(T(0));
                int64_t i = 0;
                for (; i + chains * L <= n; i += chains * L) {
#pragma GCC unroll 4
                    for (int c = 0; c < chains; ++c) {
                        const V at = V::load(w + i + c * L), size = V::absolute(at);
#pragma GCC unroll 4
                        for (int s = 0; s < count; ++s) {
                            const int k = s * chains + c;
                            sum_mid[k] = V::multiply_add(at, V::load(x + s * n + i + c * L), sum_mid[k]);
                            sum_rad[k] = V::multiply_add(size, V::load(r + s * n + i + c * L), sum_rad[k]);
                        }
                    }
                }
                for (int s = 0; s < count; ++s) {
                    V total_mid = sum_mid[s * chains], total_rad = sum_rad[s * chains];
                    for (int c = 1; c < chains; ++c) {
                        total_mid = total_mid + sum_mid[s * chains + c];
                        total_rad = total_rad + sum_rad[s * chains + c];
                    }
                    T a = sum_of(total_mid), q = sum_of(total_rad);
                    for (int64_t j = i; j < n; ++j) {
                        a += w[j] * x[s * n + j];
                        q += static_cast<T>(__builtin_fabs(w[j])) * r[s * n + j];
                    }
                    out_mid[(first + s) * m + row] = bias ? a + b : a;
                    out_rad[(first + s) * m + row] = q;
                }
            });
        }
    });
}

// Columns [begin, end) of one box: rows are added in groups, so that the sums are read and written once for several.
template <class T>
void backward_columns(int64_t begin, int64_t end, int64_t m, int64_t n, const T* mid, const T* rad, const T* weight,
                      T* out_mid, T* out_rad) {
    using V = Vec<T>;
    for (int64_t j = begin; j < end; ++j) out_mid[j] = out_rad[j] = T(0);
    in_groups<rows_together>(m, [=](int64_t first, auto count) {
        const auto add = [=](auto lanes, int64_t j) {
            using W = decltype(lanes);
            W sum_mid = W::load(out_mid + j), sum_rad = W::load(out_rad + j);
#pragma GCC unroll 4
            for (int i = 0; i < count; ++i) {
                const W at = W::load(weight + (first + i) * n + j);
                sum_mid = sum_mid + at * W::fill(mid[first + i]);
                sum_rad = sum_rad + W::absolute(at) * W::fill(rad[first + i]);
            }
            sum_mid.store(out_mid + j);
            sum_rad.store(out_rad + j);
        };
        int64_t j = begin;
        for (; j + V::lanes <= end; j += V::lanes) add(V{}, j);
        for (; j < end; ++j) add(Scalar<T>{}, j);
    });
}

template <class T>
void linear_backward(int64_t batch, int64_t m, int64_t n, const T* mid, const T* rad, const T* weight, T* out_mid,
                     T* out_rad) {
    parallel_team(team_size(batch * n * m / linear_grain), [=](int rank, int team) {
        // Whole vectors to each thread, so that no two write one cache line.
        const int64_t share = (n / 16 + team) / team * 16;
        const int64_t stop = share * (rank + 1) < n ? share * (rank + 1) : n;
        for (int64_t begin = share * rank; begin < stop; begin += columns_together) {
            const int64_t end = begin + columns_together < stop ? begin + columns_together : stop;
            for (int64_t s = 0; s < batch; ++s)
                backward_columns(begin, end, m, n, mid + s * m, rad + s * m, weight, out_mid + s * n, out_rad + s * n);
        }
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
