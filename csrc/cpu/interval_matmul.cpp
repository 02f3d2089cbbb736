// Exact product of two interval matrices and its gradient, in memory that does not grow with m·n·k: packed panels
// and register tiles, as a matrix product is computed. The specification is pyxai_bounds/ops/reference.py; sums are
// taken in another order there, so the two agree within the error bound that is stated in it.
//
// One pair of entries a ± r and b ± s, with u = |a|, v = |b|, q = min(v, s), w = max(v, s), contributes
//     a·b + sign(a)·sign(b)·min(u·s, r·q)   to the midpoint,      max(u·s, r·q) + r·w   to the radius,
// which is the least and greatest of the four end-point products for every sign of the four ends. Nothing is
// subtracted: no radius is ever negative or loses digits.
#include "pyxai_bounds/parallel.h"
#include "pyxai_bounds/scratch.h"
#include "pyxai_bounds/stages.h"
#include "pyxai_bounds/vec.h"

namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL {
namespace {

using std::int64_t;

// A tile of the results lives in registers: tile_rows rows of tile_vectors vectors of midpoints, and as many of radii.
#if defined(__AVX512F__)
inline constexpr int tile_rows = 4, tile_vectors = 2;
#else
inline constexpr int tile_rows = 3, tile_vectors = 1;
#endif
template <class T>
inline constexpr int tile_columns = tile_vectors * Vec<T>::lanes;

// What is packed at a time: `depth` terms of each sum, for at most so many columns of b and rows of a: 4 MiB each in
// float32. A deeper panel writes the results less often; 64, 128 and 256 terms took 0.77, 0.76 and 0.71 ns per 64 bytes
// of results and term at 1024³ (AVX-512, float32), although the last no longer fits the first-level cache.
inline constexpr int64_t depth = 256, block_columns = 1024, block_rows = 2040;
static_assert(block_rows % tile_rows == 0 && block_columns % (tile_vectors * 16) == 0);

// Pairs per thread, at least: about ten microseconds.
inline constexpr int64_t matmul_grain = 1 << 18;

// --- forward -------------------------------------------------------------------------------------------------

// (sign(p)·min(|p|, q), max(|p|, q)) for q ≥ 0. A NaN may vanish in it; packing sees to it that the radius has one.
template <class V>
struct Extremes {
    V least, greatest;
};

template <class V>
Extremes<V> extremes(V p, V q) {
    const V sign = V::copysign(V::fill(0), p), magnitude = V::flip(p, sign);
    // On the bare values, which compiles to minps and maxps: select took 1.3 times as long at the AVX2 level.
    return {V::flip({magnitude.value < q.value ? magnitude.value : q.value}, sign),
            {magnitude.value > q.value ? magnitude.value : q.value}};
}

#if defined(__AVX512DQ__)
inline constexpr int least_magnitude_sign_of_first = 0b0010, greatest_magnitude_no_sign = 0b1011;

template <>
Extremes<Vec<float>> extremes(Vec<float> p, Vec<float> q) {
    return {{_mm512_range_ps(p.value, q.value, least_magnitude_sign_of_first)},
            {_mm512_range_ps(p.value, q.value, greatest_magnitude_no_sign)}};
}
template <>
Extremes<Vec<double>> extremes(Vec<double> p, Vec<double> q) {
    return {{_mm512_range_pd(p.value, q.value, least_magnitude_sign_of_first)},
            {_mm512_range_pd(p.value, q.value, greatest_magnitude_no_sign)}};
}
#endif

// Panels [begin, end) of tile_rows rows of a: per term, pairs (a, r). Rows past the last are zeros, which add nothing.
// A midpoint that is not finite makes its radius NaN, so that no radius it contributes to looks finite.
template <class T>
void pack_rows(int64_t begin, int64_t end, int64_t rows, int64_t terms, int64_t stride, const T* mid, const T* rad,
               T* packed) {
    for (int64_t panel = begin; panel < end; ++panel) {
        T* out = packed + panel * terms * 2 * tile_rows;
        for (int64_t i = 0; i < tile_rows; ++i) {
            const int64_t row = panel * tile_rows + i;
            for (int64_t k = 0; k < terms; ++k) {
                const T a = row < rows ? mid[row * stride + k] : T(0);
                const T r = row < rows ? rad[row * stride + k] : T(0);
                out[k * 2 * tile_rows + 2 * i] = a;
                out[k * 2 * tile_rows + 2 * i + 1] = r + (a - a);
            }
        }
    }
}

// What a pair takes from b ± s: b, s with the sign of b, q and w. A NaN in b or s is one in w.
template <class V, class T>
void pack_one(V b, V s, T* out) {
    const V v = V::absolute(b);
    b.store(out);
    V::copysign(s, b).store(out + tile_columns<T>);
    minimum(v, s).store(out + 2 * tile_columns<T>);
    maximum(v, s).store(out + 3 * tile_columns<T>);
}

// Panels [begin, end) of tile_columns columns of b: per term, four planes. Columns past the last are zeros.
template <class T>
void pack_columns(int64_t begin, int64_t end, int64_t columns, int64_t terms, int64_t stride, const T* mid,
                  const T* rad, T* packed) {
    constexpr int width = tile_columns<T>;
    for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t first = panel * width, count = smaller(width, columns - first);
        for (int64_t k = 0; k < terms; ++k) {
            T* out = packed + (panel * terms + k) * 4 * width;
            const T *b = mid + k * stride + first, *s = rad + k * stride + first;
            int64_t j = 0;
            for (; j + Vec<T>::lanes <= count; j += Vec<T>::lanes)
                pack_one(Vec<T>::load(b + j), Vec<T>::load(s + j), out + j);
            for (; j < count; ++j) pack_one(Scalar<T>::load(b + j), Scalar<T>::load(s + j), out + j);
            for (; j < width; ++j) pack_one(Scalar<T>{T(0)}, Scalar<T>{T(0)}, out + j);
        }
    }
}

// One tile: `terms` terms of its sums, which begin with `first`. Columns past the last are computed and dropped.
template <int rows, class T>
void tile(int64_t terms, const T* a, const T* b, bool first, int64_t columns, int64_t stride, T* out_mid, T* out_rad) {
    using V = Vec<T>;
    constexpr int width = tile_columns<T>;
    V mid[rows][tile_vectors], rad[rows][tile_vectors];
    for (auto& row : mid)
        for (V& x : row) x = V::fill(T(0));
    for (auto& row : rad)
        for (V& x : row) x = V::fill(T(0));
    // All loads of b come first: left to the compiler among the arithmetic, they made it 1.4 times slower (AVX-512).
    for (int64_t k = 0; k < terms; ++k, a += 2 * tile_rows, b += 4 * width) {
        V bm[tile_vectors], bs[tile_vectors], bq[tile_vectors], bw[tile_vectors];
#pragma GCC unroll 4
        for (int j = 0; j < tile_vectors; ++j) {
            bm[j] = V::load(b + j * V::lanes);
            bs[j] = V::load(b + width + j * V::lanes);
            bq[j] = V::load(b + 2 * width + j * V::lanes);
            bw[j] = V::load(b + 3 * width + j * V::lanes);
        }
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i) {
            const V am = V::fill(a[2 * i]), ar = V::fill(a[2 * i + 1]);
#pragma GCC unroll 4
            for (int j = 0; j < tile_vectors; ++j) {
                const Extremes<V> both = extremes(am * bs[j], ar * bq[j]);
                mid[i][j] = V::multiply_add(am, bm[j], mid[i][j]) + both.least;
                rad[i][j] = V::multiply_add(ar, bw[j], rad[i][j]) + both.greatest;
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
        T *to_mid = out_mid + i * stride, *to_rad = out_rad + i * stride;
        if (columns == width) {
#pragma GCC unroll 4
            for (int j = 0; j < tile_vectors; ++j) {
                T *const at_mid = to_mid + j * V::lanes, *const at_rad = to_rad + j * V::lanes;
                (first ? mid[i][j] : V::load(at_mid) + mid[i][j]).store(at_mid);
                (first ? rad[i][j] : V::load(at_rad) + rad[i][j]).store(at_rad);
            }
        } else {
            T row_mid[width], row_rad[width];
            for (int j = 0; j < tile_vectors; ++j) {
                mid[i][j].store(row_mid + j * V::lanes);
                rad[i][j].store(row_rad + j * V::lanes);
            }
            for (int64_t j = 0; j < columns; ++j) {
                to_mid[j] = first ? row_mid[j] : to_mid[j] + row_mid[j];
                to_rad[j] = first ? row_rad[j] : to_rad[j] + row_rad[j];
            }
        }
    }
}

template <int rows, class T>
void tile_of_rows(int64_t count, int64_t terms, const T* a, const T* b, bool first, int64_t columns, int64_t stride,
                  T* out_mid, T* out_rad) {
    if constexpr (rows > 1)
        if (count < rows) return tile_of_rows<rows - 1>(count, terms, a, b, first, columns, stride, out_mid, out_rad);
    tile<rows>(terms, a, b, first, columns, stride, out_mid, out_rad);
}

// The elements of scratch memory that the packed panels of one product take.
template <class T>
struct Packed {
    int64_t a, b;
    Packed(int64_t m, int64_t k, int64_t n)
        : a(ceil_div(smaller(m, block_rows), tile_rows) * tile_rows * 2 * smaller(k, depth)),
          b(ceil_div(smaller(n, block_columns), tile_columns<T>) * tile_columns<T> * 4 * smaller(k, depth)) {
        a = ceil_div(a, 64) * 64;  // b starts at a cache line, too
    }
};

// One product, by member `rank` of a team that all call this with the same arguments.
template <class T>
void product(int rank, int team, int64_t m, int64_t k, int64_t n, const T* a_mid, const T* a_rad, const T* b_mid,
             const T* b_rad, T* out_mid, T* out_rad, T* scratch) {
    T *const packed_a = scratch, *const packed_b = scratch + Packed<T>(m, k, n).a;
    for (int64_t column = 0; column < n; column += block_columns) {
        const int64_t columns = smaller(block_columns, n - column);
        const int64_t b_panels = ceil_div(columns, tile_columns<T>);
        for (int64_t term = 0; term < k; term += depth) {
            const int64_t terms = smaller(depth, k - term);
            pack_columns(b_panels * rank / team, b_panels * (rank + 1) / team, columns, terms, n,
                         b_mid + term * n + column, b_rad + term * n + column, packed_b);
            for (int64_t row = 0; row < m; row += block_rows) {
                const int64_t rows = smaller(block_rows, m - row);
                const int64_t a_panels = ceil_div(rows, tile_rows);
                pack_rows(a_panels * rank / team, a_panels * (rank + 1) / team, rows, terms, k, a_mid + row * k + term,
                          a_rad + row * k + term, packed_a);
                team_barrier(team);
                const int64_t tiles = a_panels * b_panels;
                for (int64_t t = tiles * rank / team; t < tiles * (rank + 1) / team; ++t) {
                    const int64_t j = t / a_panels, i = t % a_panels;  // a panel of b stays in the cache
                    const int64_t at = (row + i * tile_rows) * n + column + j * tile_columns<T>;
                    tile_of_rows<tile_rows>(
                        smaller(tile_rows, rows - i * tile_rows), terms, packed_a + i * terms * 2 * tile_rows,
                        packed_b + j * terms * 4 * tile_columns<T>, term == 0,
                        smaller(tile_columns<T>, columns - j * tile_columns<T>), n, out_mid + at, out_rad + at);
                }
                team_barrier(team);  // before anyone packs again
            }
        }
    }
}

template <class T>
void matmul(int64_t batch, int64_t m, int64_t k, int64_t n, const T* a_mid, const T* a_rad, const T* b_mid,
            const T* b_rad, T* out_mid, T* out_rad) {
    const Packed<T> packed(m, k, n);
    const int threads = team_size(batch * m * k * n / matmul_grain);
    const bool split_batch = batch >= threads;  // each thread computes whole products, else all share each
    const int64_t each = ceil_div(packed.a + packed.b, 64) * 64;
    const Scratch<T> scratch(each * (split_batch ? threads : 1));
    parallel_team(threads, [&](int rank, int team) {
        const int64_t begin = split_batch ? batch * rank / team : 0;
        const int64_t end = split_batch ? batch * (rank + 1) / team : batch;
        for (int64_t i = begin; i < end; ++i) {
            T* memory = scratch.get() + (split_batch ? rank * each : 0);
            product(split_batch ? 0 : rank, split_batch ? 1 : team, m, k, n, a_mid + i * m * k, a_rad + i * m * k,
                    b_mid + i * k * n, b_rad + i * k * n, out_mid + i * m * n, out_rad + i * m * n, memory);
        }
    });
}

// --- backward ------------------------------------------------------------------------------------------------
//
// With g and h the gradients of one midpoint and radius, t = sign(a)·sign(b)·g, and (e, f) = (t, h) if u·s is the least
// of u·s, r·v, r·s, else (h, t), a pair adds
//     to sign(a)·∂a:  t·v + e·s        to ∂r:  h·w + f·q
//     to sign(b)·∂b:  t·u + f·r        to ∂s:  e·u + h·r        if v < s
//                     t·u + h·r                e·u + f·r        otherwise.
// Where b does not straddle 0 (v ≥ s), u < r decides, also if s is 0. So the comparison is u·x < r·y with (s, v) for
// (x, y) if v < s, and (1, 1) otherwise.
//
// Lanes run along k, where every gradient is a sum of whole vectors; slices of k share nothing, so threads take
// different ones.

inline constexpr int64_t backward_columns = 64;     // rows of b whose slices and sums stay in the first-level cache
inline constexpr int64_t backward_bytes = 2 << 20;  // of packed slices of a, unless one takes more
inline constexpr int planes_a = 5, planes_b = 9;    // (u, r, sign) and (v, s, q, w, x, y, sign), each and two sums

template <class T>
void pack_slice(int64_t rows, int64_t k, int64_t begin, int64_t lanes, const T* mid, const T* rad, bool with_ends,
                T* packed) {
    using V = Vec<T>;
    const int planes = with_ends ? planes_b : planes_a;
    for (int64_t row = 0; row < rows; ++row, packed += planes * V::lanes) {
        T m[V::lanes] = {}, r[V::lanes] = {};
        for (int64_t i = 0; i < lanes; ++i) {
            m[i] = mid[row * k + begin + i];
            r[i] = rad[row * k + begin + i];
        }
        const V a = V::load(m), radius = V::load(r), magnitude = V::absolute(a), zero = V::fill(T(0));
        T* out = packed;
        const auto put = [&out](V x) {
            x.store(out);
            out += V::lanes;
        };
        put(magnitude);
        put(radius);
        if (with_ends) {
            put(minimum(magnitude, radius));
            put(maximum(magnitude, radius));
            const auto straddles = V::less(magnitude, radius);
            put(V::select(straddles, radius, V::fill(T(1))));
            put(V::select(straddles, magnitude, V::fill(T(1))));
        }
        put(V::copysign(zero, a));
        put(zero);
        put(zero);
    }
}

// The two sums of every row; the first, which is the midpoint's, times the sign of the midpoint.
template <class T>
void unpack_slice(int64_t rows, int64_t k, int64_t begin, int64_t lanes, int planes, const T* packed, T* mid_grad,
                  T* rad_grad) {
    using V = Vec<T>;
    for (int64_t row = 0; row < rows; ++row, packed += planes * V::lanes) {
        const T* last = packed + (planes - 3) * V::lanes;
        T m[V::lanes], r[V::lanes];
        V::flip(V::load(last + V::lanes), V::load(last)).store(m);
        V::load(last + 2 * V::lanes).store(r);
        for (int64_t i = 0; i < lanes; ++i) {
            mid_grad[row * k + begin + i] = m[i];
            rad_grad[row * k + begin + i] = r[i];
        }
    }
}

// `rows` rows of a against `count` columns of the gradients, which are rows of b.
template <int rows, class T>
void backward_strip(int64_t count, int64_t stride, const T* mid_grad, const T* rad_grad, T* a, T* b) {
    using V = Vec<T>;
    constexpr int L = V::lanes;
    V u[rows], r[rows], sign[rows], sum_mid[rows], sum_rad[rows];
    for (int i = 0; i < rows; ++i) {
        const T* at = a + i * planes_a * L;
        u[i] = V::load(at), r[i] = V::load(at + L), sign[i] = V::load(at + 2 * L);
        sum_mid[i] = V::load(at + 3 * L), sum_rad[i] = V::load(at + 4 * L);
    }
    for (int64_t j = 0; j < count; ++j, b += planes_b * L) {
        const V v = V::load(b), s = V::load(b + L), q = V::load(b + 2 * L), w = V::load(b + 3 * L);
        const V x = V::load(b + 4 * L), y = V::load(b + 5 * L), b_sign = V::load(b + 6 * L);
        V b_mid = V::load(b + 7 * L), b_rad = V::load(b + 8 * L);
        const auto straddles = V::less(v, s);
#pragma GCC unroll 4
        for (int i = 0; i < rows; ++i) {
            const V h = V::fill(rad_grad[i * stride + j]);
            const V t = V::flip(V::flip(V::fill(mid_grad[i * stride + j]), sign[i]), b_sign);
            const auto mid = V::less(u[i] * x, r[i] * y);
            const V e = V::select(mid, t, h), f = V::select(mid, h, t);
            sum_mid[i] = V::multiply_add(e, s, V::multiply_add(t, v, sum_mid[i]));
            sum_rad[i] = V::multiply_add(f, q, V::multiply_add(h, w, sum_rad[i]));
            b_mid = V::multiply_add(V::select(straddles, f, h), r[i], V::multiply_add(t, u[i], b_mid));
            b_rad = V::multiply_add(V::select(straddles, h, f), r[i], V::multiply_add(e, u[i], b_rad));
        }
        b_mid.store(b + 7 * L);
        b_rad.store(b + 8 * L);
    }
    for (int i = 0; i < rows; ++i) {
        T* at = a + i * planes_a * L;
        sum_mid[i].store(at + 3 * L);
        sum_rad[i].store(at + 4 * L);
    }
}

template <class T>
void matmul_backward(int64_t batch, int64_t m, int64_t k, int64_t n, const T* mid_grad, const T* rad_grad,
                     const T* a_mid, const T* a_rad, const T* b_mid, const T* b_rad, T* a_mid_grad, T* a_rad_grad,
                     T* b_mid_grad, T* b_rad_grad) {
    constexpr int L = Vec<T>::lanes;
    const int64_t slices = ceil_div(k, L), a_slice = planes_a * m * L, b_slice = planes_b * backward_columns * L;
    // Slices that go together through a block of columns of the gradients, which stays in the second-level cache.
    const int64_t most = greater(1, smaller(8, backward_bytes / (a_slice * static_cast<int64_t>(sizeof(T)) + 1)));
    const int threads = team_size(batch * m * k * n / matmul_grain);
    const int64_t each = most * a_slice + b_slice;
    const Scratch<T> scratch(each * threads);
    parallel_team(threads, [&](int rank, int team) {
        T *const a = scratch.get() + rank * each, *const b = a + most * a_slice;
        const int64_t end = batch * slices * (rank + 1) / team;
        int64_t group;
        for (int64_t task = batch * slices * rank / team; task < end; task += group) {
            const int64_t item = task / slices, first = task % slices;
            group = smaller(most, smaller(end - task, slices - first));
            const int64_t at_a = item * m * k, at_b = item * n * k;
            const auto lanes = [=](int64_t slice) { return smaller(L, k - (first + slice) * L); };
            for (int64_t slice = 0; slice < group; ++slice)
                pack_slice(m, k, (first + slice) * L, lanes(slice), a_mid + at_a, a_rad + at_a, false,
                           a + slice * a_slice);
            for (int64_t j = 0; j < n; j += backward_columns) {
                const int64_t count = smaller(backward_columns, n - j), at_rows = at_b + j * k;
                const T *g = mid_grad + item * m * n + j, *h = rad_grad + item * m * n + j;
                for (int64_t slice = 0; slice < group; ++slice) {
                    const int64_t begin = (first + slice) * L;
                    pack_slice(count, k, begin, lanes(slice), b_mid + at_rows, b_rad + at_rows, true, b);
                    int64_t i = 0;
                    const auto strips_of = [&](auto rows) {
                        for (; i + rows <= m; i += rows)
                            backward_strip<rows>(count, n, g + i * n, h + i * n, a + slice * a_slice + i * planes_a * L,
                                                 b);
                    };
                    strips_of(Constant<tile_rows>{});
                    strips_of(Constant<1>{});
                    unpack_slice(count, k, begin, lanes(slice), planes_b, b, b_mid_grad + at_rows,
                                 b_rad_grad + at_rows);
                }
            }
            for (int64_t slice = 0; slice < group; ++slice)
                unpack_slice(m, k, (first + slice) * L, lanes(slice), planes_a, a + slice * a_slice, a_mid_grad + at_a,
                             a_rad_grad + at_a);
        }
    });
}

}  // namespace

template <class T>
void set_interval_matmul(Stages<T>& stages) {
    stages.matmul = matmul<T>;
    stages.matmul_backward = matmul_backward<T>;
}

template void set_interval_matmul(Stages<float>&);
template void set_interval_matmul(Stages<double>&);

}  // namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL
