// The gradient of a linear layer on boxes in its weight: of each element, a sum over the samples for the midpoints, and
// one for the radii, whose sign is the weight's. One walk writes it, where products of a library would write two
// matrices and a third pass join them; the matrices are as large as the weight, and that traffic is most of the cost.
// That third pass is here, too, for what a library multiplies.
#include "pyxai_bounds/parallel.h"
#include "pyxai_bounds/scratch.h"
#include "pyxai_bounds/stages.h"
#include "pyxai_bounds/vec.h"
#include "pyxai_bounds/weight_gradient.h"

namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL {
namespace {

using std::int64_t;

// Terms of sums, times outputs, per thread at least; as in interval_linear.cpp.
inline constexpr int64_t grain_of_sums = 1 << 16;
// Up to so many samples, the weight and its gradient are walked along as they lie in memory; beyond, panels of columns
// are, whose part of the boxes stays in the first cache for all rows.
inline constexpr int64_t few_samples = 8;

// One of the two products: of `rows` [batch, m] and `columns` [batch, n], both null where there is none.
template <class T>
struct Factors {
    const T *rows, *columns;
    explicit operator bool() const { return rows && columns; }
};

template <class T>
struct Gradient {
    int64_t batch, m, n;
    Factors<T> mid, rad;
    const T* weight;
    T* out;
    bool add;

    // `rows` rows from `row` on, `vectors` vectors of columns from `column` on; V one of Vec and Scalar.
    template <int rows, int vectors, bool has_mid, bool has_rad, class V>
    void tile(int64_t row, int64_t column) const {
        V of_mid[rows][vectors], of_rad[rows][vectors];
        for (int i = 0; i < rows; ++i)
            for (int k = 0; k < vectors; ++k) of_mid[i][k] = of_rad[i][k] = V::fill(T(0));
        // Each tile reads and writes a few lines of rows that are far apart, which come while it sums: 1.1 times as
        // fast for a weight [256, 4096] and 32 samples.
        for (int i = 0; i < rows; ++i)
            for (int k = 0; k < vectors; ++k) {
                const int64_t at = (row + i) * n + column + k * V::lanes;
                if constexpr (has_rad) __builtin_prefetch(weight + at);
                __builtin_prefetch(out + at, 1);
            }
        for (int64_t s = 0; s < batch; ++s) {
            if constexpr (has_mid) add_outer_product(mid.rows + s * m + row, mid.columns + s * n + column, of_mid);
            if constexpr (has_rad) add_outer_product(rad.rows + s * m + row, rad.columns + s * n + column, of_rad);
        }
        for (int i = 0; i < rows; ++i) {
            for (int k = 0; k < vectors; ++k) {
                const int64_t at = (row + i) * n + column + k * V::lanes;
                V sum = of_mid[i][k];
                if constexpr (has_rad) {
                    const V part = with_sign(V::load(weight + at), of_rad[i][k]);
                    sum = has_mid ? sum + part : part;
                }
                (add ? V::load(out + at) + sum : sum).store(out + at);
            }
        }
    }

    // Columns [begin, end) of `rows` rows.
    template <int rows, int vectors, bool has_mid, bool has_rad>
    void strip(int64_t row, int64_t begin, int64_t end) const {
        constexpr int64_t L = Vec<T>::lanes;
        int64_t column = begin;
        for (; column + vectors * L <= end; column += vectors * L)
            tile<rows, vectors, has_mid, has_rad, Vec<T>>(row, column);
        for (; column + L <= end; column += L) tile<rows, 1, has_mid, has_rad, Vec<T>>(row, column);
        for (; column < end; ++column) tile<rows, 1, has_mid, has_rad, Scalar<T>>(row, column);
    }

    // As many sums in registers as leave room for the factors.
    template <bool has_mid, bool has_rad>
    void part(int64_t begin, int64_t end) const {
        constexpr int vectors = 2, rows = (has_mid && has_rad ? 1 : 2) * (Vec<T>::lanes * sizeof(T) >= 64 ? 4 : 3);
        const int64_t width = batch <= few_samples ? n : vectors * Vec<T>::lanes;
        for (int64_t column = 0; column < n; column += width) {
            const int64_t stop = smaller(n, column + width);
            int64_t row = begin;
            for (; row + rows <= end; row += rows) strip<rows, vectors, has_mid, has_rad>(row, column, stop);
            for (; row < end; ++row) strip<1, vectors, has_mid, has_rad>(row, column, stop);
        }
    }
};

template <class T>
void linear_weight(int64_t batch, int64_t m, int64_t n, const T* grad_mid, const T* grad_rad, const T* mid,
                   const T* rad, const T* weight, T* out, bool add) {
    const Gradient<T> gradient{batch, m, n, {grad_mid, mid}, {grad_rad, rad}, weight, out, add};
    const bool has_mid(gradient.mid), has_rad(gradient.rad);
    parallel_team(team_size(greater(batch, 1) * m * n / grain_of_sums), [=](int rank, int team) {
        const int64_t begin = m * rank / team, end = m * (rank + 1) / team;
        if (has_mid && has_rad)
            gradient.template part<true, true>(begin, end);
        else if (has_rad)
            gradient.template part<false, true>(begin, end);
        else if (has_mid)
            gradient.template part<true, false>(begin, end);
        else
            gradient.template part<false, false>(begin, end);
    });
}

template <class T>
void signed_sum(int64_t n, const T* a, const T* b, const T* weight, T* out) {
    const auto step = [=](auto lanes, int64_t i) {
        using V = decltype(lanes);
        const V part = with_sign(V::load(weight + i), V::load(b + i));
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
void set_interval_linear_weight(Stages<T>& stages) {
    stages.signed_sum = signed_sum<T>;
    stages.linear_weight = linear_weight<T>;
}

template void set_interval_linear_weight(Stages<float>&);
template void set_interval_linear_weight(Stages<double>&);

}  // namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL
