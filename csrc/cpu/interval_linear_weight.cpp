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
// Of a panel.
inline constexpr int vectors_together = 2;
template <class T>
inline constexpr int64_t panel_width = vectors_together * Vec<T>::lanes;

// One of the two products: of `rows` [batch, m] and `columns` [batch, n], both null where there is none. A sample's
// rows lie `row_stride` from those of the sample before, and so with columns.
template <class T>
struct Factors {
    const T *rows, *columns;
    int64_t row_stride, column_stride;
    explicit operator bool() const { return rows && columns; }
    Factors at(int64_t row, int64_t column) const { return {rows + row, columns + column, row_stride, column_stride}; }
};

// Columns [from, from + width) of a matrix, copied row by row: in place, rows that lie a power of two apart would drive
// one another out of the first cache, and most of them are on a page of their own.
template <class T>
void pack_columns(int64_t rows, int64_t stride, const T* from, int64_t width, T* to) {
    for (int64_t s = 0; s < rows; ++s)
        for (int64_t j = 0; j < width; ++j) to[s * width + j] = from[s * stride + j];
}

template <class T>
struct Gradient {
    int64_t batch, m, n;
    Factors<T> mid, rad;
    const T* weight;
    T* out;
    bool add;

    // `rows` rows from `row` on, `vectors` vectors of columns from `column` on, of which these are the factors; V one
    // of Vec and Scalar.
    template <int rows, int vectors, bool has_mid, bool has_rad, class V>
    void tile(int64_t row, int64_t column, Factors<T> mids, Factors<T> rads) const {
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
            if constexpr (has_mid)
                add_outer_product(mids.rows + s * mids.row_stride, mids.columns + s * mids.column_stride, of_mid);
            if constexpr (has_rad)
                add_outer_product(rads.rows + s * rads.row_stride, rads.columns + s * rads.column_stride, of_rad);
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

    // Columns [begin, end) of `rows` rows; the factors are those of the first.
    template <int rows, int vectors, bool has_mid, bool has_rad>
    void strip(int64_t row, int64_t begin, int64_t end, Factors<T> mids, Factors<T> rads) const {
        constexpr int64_t L = Vec<T>::lanes;
        const auto walk = [&](auto lanes, auto many, int64_t column) {
            tile<rows, many, has_mid, has_rad, decltype(lanes)>(row, column, mids.at(0, column - begin),
                                                                rads.at(0, column - begin));
        };
        int64_t column = begin;
        for (; column + vectors * L <= end; column += vectors * L) walk(Vec<T>{}, Constant<vectors>{}, column);
        for (; column + L <= end; column += L) walk(Vec<T>{}, Constant<1>{}, column);
        for (; column < end; ++column) walk(Scalar<T>{}, Constant<1>{}, column);
    }

    // As many sums in registers as leave room for the factors.
    template <bool has_mid, bool has_rad>
    static constexpr int rows_together = (has_mid && has_rad ? 1 : 2) * (Vec<T>::lanes * sizeof(T) >= 64 ? 4 : 3);

    // Rows [begin, end). `packed` has room for their factors and for those of a panel.
    template <bool has_mid, bool has_rad>
    void part(int64_t begin, int64_t end, T* packed) const {
        if (batch > few_samples) return packed_part<has_mid, has_rad>(begin, end, packed);
        constexpr int together = rows_together<has_mid, has_rad>;
        int64_t row = begin;
        for (; row + together <= end; row += together)
            strip<together, vectors_together, has_mid, has_rad>(row, 0, n, mid.at(row, 0), rad.at(row, 0));
        for (; row < end; ++row)
            strip<1, vectors_together, has_mid, has_rad>(row, 0, n, mid.at(row, 0), rad.at(row, 0));
    }

    // Elements that `packed` needs for so many rows.
    int64_t packed_size(int64_t rows) const { return batch > few_samples ? 2 * batch * (rows + panel_width<T>) : 0; }

    template <bool has_mid, bool has_rad>
    void packed_part(int64_t begin, int64_t end, T* packed) const {
        constexpr int together = rows_together<has_mid, has_rad>;
        T *const mid_rows = packed, *const rad_rows = mid_rows + (end - begin) * batch;
        T *const mid_columns = rad_rows + (end - begin) * batch, *const rad_columns =
                                                                     mid_columns + batch * panel_width<T>;
        const auto in_rows = [=](auto f) {
            int64_t row = begin;
            for (; row + together <= end; row += together) f(row, (row - begin) * batch, Constant<together>{});
            for (; row < end; ++row) f(row, (row - begin) * batch, Constant<1>{});
        };
        in_rows([&](int64_t row, int64_t place, auto rows) {
            if constexpr (has_mid) pack_columns<T>(batch, m, mid.rows + row, rows, mid_rows + place);
            if constexpr (has_rad) pack_columns<T>(batch, m, rad.rows + row, rows, rad_rows + place);
        });
        for (int64_t column = 0; column < n; column += panel_width<T>) {
            const int64_t width = smaller(panel_width<T>, n - column);
            if constexpr (has_mid) pack_columns(batch, n, mid.columns + column, width, mid_columns);
            if constexpr (has_rad) pack_columns(batch, n, rad.columns + column, width, rad_columns);
            in_rows([&](int64_t row, int64_t place, auto rows) {
                strip<rows, vectors_together, has_mid, has_rad>(row, column, column + width,
                                                                {mid_rows + place, mid_columns, rows, width},
                                                                {rad_rows + place, rad_columns, rows, width});
            });
        }
    }
};

template <class T>
void linear_weight(int64_t batch, int64_t m, int64_t n, const T* grad_mid, const T* grad_rad, const T* mid,
                   const T* rad, const T* weight, T* out, bool add) {
    const Gradient<T> gradient{batch, m, n, {grad_mid, mid, m, n}, {grad_rad, rad, m, n}, weight, out, add};
    const bool has_mid(gradient.mid), has_rad(gradient.rad);
    const int threads = team_size(greater(batch, 1) * m * n / grain_of_sums);
    // Made here: no exception may leave a parallel region. A team may turn out smaller than was asked for.
    const int64_t size = gradient.packed_size(m);
    const Scratch<T> packed(threads * size);
    parallel_team(threads, [=, &packed](int rank, int team) {
        const int64_t begin = m * rank / team, end = m * (rank + 1) / team;
        T* const own = packed.get() + rank * size;
        if (has_mid && has_rad)
            gradient.template part<true, true>(begin, end, own);
        else if (has_rad)
            gradient.template part<false, true>(begin, end, own);
        else if (has_mid)
            gradient.template part<true, false>(begin, end, own);
        else
            gradient.template part<false, false>(begin, end, own);
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
