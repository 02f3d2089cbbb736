// A linear layer on boxes and its backward-data pass. One walk over the weight
// feeds midpoint and radius, and |W| exists in registers alone; a library would read W three times and write |W| once.
// With few boxes that traffic is all the cost, and the weight is read where it lies; with more it is packed for the
// tiles of tile.h. Sums are taken in another order than in the specification, pyxai_bounds/ops/reference.py.
#include <atomic>
#include <cstring>

#include "pyxai_bounds/parallel.h"
#include "pyxai_bounds/scratch.h"
#include "pyxai_bounds/stages.h"
#include "pyxai_bounds/tile.h"
#include "pyxai_bounds/transpose.h"
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

// Calls f(first, Constant<count>) for groups of `most` of n things, then for single ones.
template <int most, class F>
void in_groups(int64_t n, F f) {
    int64_t i = 0;
    for (; i + most <= n; i += most) f(i, Constant<most>{});
    for (; i < n; ++i) f(i, Constant<1>{});
}

// `boxes` boxes by `rows` rows of the weight, whose first ones are at mid, rad and weight.
template <bool has_mid, int boxes, int rows, class T>
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
                if constexpr (has_mid) a = V::multiply_add(at, V::load(mid + s * n + i), a);
                b = V::multiply_add(size, V::load(rad + s * n + i), b);
            }
        }
    }
    for (int row = 0; row < rows; ++row) {
        for (int s = 0; s < boxes; ++s) {
            T a = V::sum(sum_mid[row * boxes + s]), b = V::sum(sum_rad[row * boxes + s]);
            for (int64_t j = i; j < n; ++j) {
                const T at = weight[row * n + j];
                if constexpr (has_mid) a += at * mid[s * n + j];
                b += static_cast<T>(__builtin_fabs(at)) * rad[s * n + j];
            }
            if constexpr (has_mid) out_mid[s * m + row] = bias ? a + bias[row] : a;
            out_rad[s * m + row] = b;
        }
    }
}

template <bool has_mid, class T>
void linear_few(int64_t batch, int64_t n, int64_t m, const T* mid, const T* rad, const T* weight, const T* bias,
                T* out_mid, T* out_rad) {
    parallel_team(team_size(batch * n * m / linear_grain), [=](int rank, int team) {
        const int64_t begin = m * rank / team, end = m * (rank + 1) / team;
        in_groups<rows_together>(end - begin, [=](int64_t from, auto rows) {
            const int64_t row = begin + from;
            const T *w = weight + row * n, *b = bias ? bias + row : nullptr;
            in_groups<together>(batch, [=](int64_t first, auto boxes) {
                const T *x = mid + (has_mid ? first * n : 0), *r = rad + first * n;
                T *to_mid = out_mid + (has_mid ? first * m + row : 0), *to_rad = out_rad + first * m + row;
                if constexpr (boxes == 1)
                    linear_tile<has_mid, 1, rows>(n, m, x, r, w, b, to_mid, to_rad);
                else
                    for (int k = 0; k < rows; ++k)
                        linear_tile<has_mid, boxes, 1>(n, m, x, r, w + k * n, b ? b + k : nullptr,
                                                       to_mid + (has_mid ? k : 0), to_rad + k);
            });
        });
    });
}

template <class T>
void linear(int64_t batch, int64_t n, int64_t m, const T* mid, const T* rad, const T* weight, const T* bias, T* out_mid,
            T* out_rad) {
    (mid ? linear_few<true, T> : linear_few<false, T>)(batch, n, m, mid, rad, weight, bias, out_mid, out_rad);
}

// `vectors` of columns of `boxes` boxes, the first of which are at weight and out; V one of Vec and Scalar.
template <bool has_mid, int boxes, int vectors, class V, class T>
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
                if constexpr (has_mid) a = V::multiply_add(at, V::fill(mid[s * m + row]), a);
                b = V::multiply_add(size, V::fill(rad[s * m + row]), b);
            }
        }
    }
    for (int k = 0; k < vectors; ++k) {
        for (int s = 0; s < boxes; ++s) {
            if constexpr (has_mid) sum_mid[k * boxes + s].store(out_mid + s * n + k * V::lanes);
            sum_rad[k * boxes + s].store(out_rad + s * n + k * V::lanes);
        }
    }
}

template <bool has_mid, class T>
void linear_backward_few(int64_t batch, int64_t m, int64_t n, const T* mid, const T* rad, const T* weight, T* out_mid,
                         T* out_rad) {
    using V = Vec<T>;
    parallel_team(team_size(batch * n * m / linear_grain), [=](int rank, int team) {
        // Whole vectors to each thread, so that no two write one cache line.
        const int64_t share = (n / 16 + team) / team * 16;
        const int64_t stop = share * (rank + 1) < n ? share * (rank + 1) : n;
        in_groups<together>(batch, [=](int64_t first, auto boxes) {
            constexpr int vectors = columns_together / boxes;
            const T *g = mid + (has_mid ? first * m : 0), *r = rad + first * m;
            const auto walk = [=](auto lanes, auto many, int64_t j) {
                linear_backward_tile<has_mid, boxes, many, decltype(lanes)>(
                    m, n, g, r, weight + j, out_mid + (has_mid ? first * n + j : 0), out_rad + first * n + j);
            };
            int64_t j = share * rank;
            for (; j + vectors * V::lanes <= stop; j += vectors * V::lanes) walk(V{}, Constant<vectors>{}, j);
            for (; j + V::lanes <= stop; j += V::lanes) walk(V{}, Constant<1>{}, j);
            for (; j < stop; ++j) walk(Scalar<T>{}, Constant<1>{}, j);
        });
    });
}

template <class T>
void linear_backward(int64_t batch, int64_t m, int64_t n, const T* mid, const T* rad, const T* weight, T* out_mid,
                     T* out_rad) {
    (mid ? linear_backward_few<true, T> : linear_backward_few<false, T>)(batch, m, n, mid, rad, weight, out_mid,
                                                                         out_rad);
}

// --- many boxes ----------------------------------------------------------------------------------------------

// Pairs (weight, box) per thread, at least: about ten microseconds.
inline constexpr int64_t products_grain = 1 << 19;
// Terms of a panel that is packed at a time and stays in the cache while all boxes walk over it. Their sums are rounded
// apart from those of other panels: a sum of thousands of terms loses less.
inline constexpr int64_t panel_terms = 1024;
// Elements of the packed boxes that share one walk over the weight.
inline constexpr int64_t boxes_elements = 1 << 20;

// The weight as a sum uses it: of `outputs`, each of `terms` terms.
template <class T>
struct Factors {
    int64_t outputs, terms, output_stride, term_stride;
    const T* data;
    bool absolute;  // |W| in its place

    // Terms [begin, end) of outputs from `output` on, `vectors` vectors of them; outputs past the last are zeros.
    void pack(int64_t output, int64_t begin, int64_t end, int vectors, T* out) const {
        constexpr int64_t L = Vec<T>::lanes;
        const int64_t width = vectors * L, count = smaller(width, outputs - output);
        const T* const from = data + output * output_stride;
        if (output_stride == 1 && count == width) {
            for (int64_t k = begin; k < end; ++k, out += width)
                for (int64_t o = 0; o < width; o += L) Vec<T>::load(from + k * term_stride + o).store(out + o);
            return;
        }
        if (term_stride != 1) {
            for (int64_t k = begin; k < end; ++k, out += width)
                for (int64_t o = 0; o < width; ++o)
                    out[o] = o < count ? from[o * output_stride + k * term_stride] : T(0);
            return;
        }
        for (int64_t k = begin; k < end; k += L, out += L * width)
            for (int64_t o = 0; o < width; o += L) {
                const int some = static_cast<int>(smaller(L, end - k));
                T* to[L];
                for (int i = 0; i < some; ++i) to[i] = out + i * width + o;
                transpose(from + o * output_stride + k, output_stride,
                          static_cast<int>(greater(0, smaller(L, count - o))), some, to);
            }
    }
};

// One panel: outputs from `output` on, for `boxes` boxes.
template <int vectors, class T>
bool panel_of_products(const Factors<T>& weight, int64_t output, int64_t boxes, const T* packed, int64_t first_box,
                       const Results<T>& results, T* panel, T least) {
    bool fits = true;
    for (int64_t k = 0; k < weight.terms; k += panel_terms) {
        const int64_t count = smaller(panel_terms, weight.terms - k);
        weight.pack(output, k, k + count, vectors, panel);
        if (weight.absolute)
            for (int64_t i = 0; i < count * vectors * Vec<T>::lanes; i += Vec<T>::lanes)
                Vec<T>::absolute(Vec<T>::load(panel + i)).store(panel + i);
        if (least > T(0)) fits = fits && no_less(count * vectors * Vec<T>::lanes, panel, least);
        in_tiles(boxes, [&](int64_t first, int64_t here, auto pixels) {
            const T* sources[pixels];
            int64_t at[pixels];
            for (int64_t i = 0; i < pixels; ++i) {
                const int64_t box = first + (i < here ? i : 0);
                sources[i] = packed + 2 * (box * weight.terms + k);
                at[i] = (first_box + box) * weight.outputs;
            }
            Sums<T, pixels, vectors> sums;
            sums.clear();
            add_blocks({{1, 0}, {1, 0}, count, count}, sources, {}, panel, sums);
            if (k > 0) results.add_to(here, at, output, sums);
            if (k + count < weight.terms)
                results.partial().write(here, at, output, sums);
            else
                results.write(here, at, output, sums);
        });
    }
    return fits;
}

// Rounded outward in float32, midpoints are summed in float64, where a product of two float32 numbers is exact: in
// float32 the sum would lose γ_n |x|, which for n = 4096 is more than the radius of many a box. A term of a packed box
// is then this:
struct Wide {
    double mid;
    float rad;
};

inline Vec<double> load_wide(const float* p) {
#if defined(__AVX512F__)
    return {_mm512_cvtps_pd(_mm256_loadu_ps(p))};
#elif defined(__AVX2__)
    return {_mm256_cvtps_pd(_mm_loadu_ps(p))};
#else
    Vec<double> v;
    for (int i = 0; i < Vec<double>::lanes; ++i) v.value[i] = p[i];
    return v;
#endif
}

// The float32 numbers nearest to two vectors of float64.
inline Vec<float> narrow(Vec<double> low, Vec<double> high) {
#if defined(__AVX512F__)
    return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low.value)), _mm512_cvtpd_ps(high.value), 1)};
#elif defined(__AVX2__)
    return {_mm256_set_m128(_mm256_cvtpd_ps(high.value), _mm256_cvtpd_ps(low.value))};
#else
    constexpr int half = Vec<double>::lanes;
    Vec<float> v;
    for (int i = 0; i < 2 * half; ++i) v.value[i] = static_cast<float>(i < half ? low.value[i] : high.value[i - half]);
    return v;
#endif
}

// Sums of `boxes` boxes and one vector of outputs, which is two of float64.
template <int boxes>
struct WideSums {
    Vec<double> mid[boxes][2];
    Vec<float> rad[boxes];
};

template <int boxes>
__attribute__((noinline)) void add_wide(int64_t count, const Wide* const* sources, const float* panel,
                                        WideSums<boxes>& into) {
    constexpr int L = Vec<float>::lanes;
    WideSums<boxes> sums;
    const Wide* source[boxes];
#pragma GCC unroll 8
    for (int s = 0; s < boxes; ++s) {
        sums.mid[s][0] = sums.mid[s][1] = Vec<double>::fill(0);
        sums.rad[s] = Vec<float>::fill(0);
        source[s] = sources[s];
    }
    for (int64_t k = 0; k < count; ++k, panel += L) {
        __builtin_prefetch(panel + terms_ahead * L);
        const Vec<float> size = Vec<float>::absolute(Vec<float>::load(panel));
        const Vec<double> low = load_wide(panel), high = load_wide(panel + L / 2);
#pragma GCC unroll 8
        for (int s = 0; s < boxes; ++s) {
            const Vec<double> mid = Vec<double>::fill(source[s][k].mid);
            sums.mid[s][0] = Vec<double>::multiply_add(low, mid, sums.mid[s][0]);
            sums.mid[s][1] = Vec<double>::multiply_add(high, mid, sums.mid[s][1]);
            sums.rad[s] = Vec<float>::multiply_add(size, Vec<float>::fill(source[s][k].rad), sums.rad[s]);
        }
    }
    into = sums;
}

// One panel of one vector of outputs; the bias is added in float64, too.
inline void panel_of_wide_products(const Factors<float>& weight, int64_t output, int64_t boxes, const Wide* packed,
                                   int64_t first_box, const Results<float>& results, const float* panel) {
    constexpr int L = Vec<float>::lanes;
    float bias[L] = {};
    for (int64_t j = 0; results.bias && j < smaller(L, weight.outputs - output); ++j)
        bias[j] = results.bias[output + j];
    const Vec<double> low = load_wide(bias), high = load_wide(bias + L / 2);
    const Results<float> rest = results.without_bias();
    in_tiles(boxes, [&](int64_t first, int64_t here, auto tile) {
        const Wide* sources[tile];
        int64_t at[tile];
        for (int64_t i = 0; i < tile; ++i) {
            const int64_t box = first + (i < here ? i : 0);
            sources[i] = packed + box * weight.terms;
            at[i] = (first_box + box) * weight.outputs;
        }
        WideSums<tile> sums;
        add_wide(weight.terms, sources, panel, sums);
        Sums<float, tile, 1> narrowed;
        for (int i = 0; i < tile; ++i) {
            narrowed.mid[i][0] = narrow(sums.mid[i][0] + low, sums.mid[i][1] + high);
            narrowed.rad[i][0] = sums.rad[i];
        }
        rest.write(here, at, output, narrowed);
    });
}

// Boxes times weight, ReLU' before it if there is a state of it, a bias and ReLU after it if there is somewhere to go.
// Rounded outward, `least` is the smallest weight that may be met; false if there is a smaller one.
template <class T>
bool products(int64_t batch, const T* mid, const T* rad, const Packing<T>& packing, const Factors<T>& weight,
              const Results<T>& results) {
    constexpr bool has_wide = sizeof(T) == sizeof(float);
    const bool wide = has_wide && packing.widening;
    const T least = packing.widening ? packing.widening->least / 2 : T(0);
    const int64_t width = wide ? int64_t{Vec<T>::lanes} : tile_width<T>, panels = ceil_div(weight.outputs, width);
    const int64_t terms = weight.terms, depth = wide ? terms : smaller(terms, panel_terms);
    const int64_t together = greater(tile_pixels, smaller(batch, boxes_elements / greater(terms, 1)));
    const Scratch<T> packed(2 * together * terms);
    const Scratch<Wide> widened(wide ? together * terms : 0);
    std::atomic<bool> fits{true};
    const int threads = team_size(batch * terms * weight.outputs / products_grain);
    // A panel for each thread. Made here: no exception may leave a parallel region.
    const int64_t panel_size = (depth + Vec<T>::lanes + terms_ahead) * width;
    const Scratch<T> packed_panels(threads * panel_size);
    Tickets tickets;
    parallel_team(threads, [&](int rank, int team) {
        T* const panel = packed_panels.get() + rank * panel_size;
        int64_t ticket = tickets.next();  // one that is drawn too early serves the next boxes
        for (int64_t first = 0, before = 0; first < batch; first += together, before += panels) {
            const int64_t boxes = smaller(together, batch - first);
            for (int64_t box = first + boxes * rank / team; box < first + boxes * (rank + 1) / team; ++box) {
                T* const out = packed.get() + 2 * (box - first) * terms;
                packing.pack(terms, box * terms, mid + box * terms, rad + box * terms, out, nullptr);
                if constexpr (has_wide)
                    if (wide)
                        for (int64_t k = 0; k < terms; ++k)
                            widened.get()[(box - first) * terms + k] = {out[2 * k], out[2 * k + 1]};
            }
            team_barrier(team);
            for (; ticket < before + panels; ticket = tickets.next()) {
                const int64_t p = ticket - before;
                if constexpr (has_wide)
                    if (wide) {
                        weight.pack(p * width, 0, terms, 1, panel);
                        if (!no_less(terms * width, panel, least)) fits = false;
                        panel_of_wide_products(weight, p * width, boxes, widened.get(), first, results, panel);
                        continue;
                    }
                if (!(weight.outputs - p * width > Vec<T>::lanes ? panel_of_products<tile_vectors, T>
                                                                 : panel_of_products<1, T>)(weight, p * width, boxes,
                                                                                            packed.get(), first,
                                                                                            results, panel, least))
                    fits = false;
            }
            team_barrier(team);  // nobody packs the next boxes while somebody reads these
        }
    });
    return fits;
}

// The same for radii alone: the second half of them takes the midpoints' place. Of an odd number the one in the middle
// is in both halves.
template <class T>
bool products_of_radii(int64_t batch, const T* rad, const Factors<T>& weight, T* out) {
    const int64_t half = ceil_div(batch, 2), second = batch - half, outputs = weight.outputs;
    const Scratch<T> apart(second < half ? half * outputs : 0);
    T* const other = second < half ? apart.get() : out + second * outputs;
    products<T>(half, rad + second * weight.terms, rad, {nullptr, 0, nullptr}, weight,
                {outputs, nullptr, nullptr, other, out, {}, 0, false});
    if (second < half)
        for (int64_t i = outputs; i < half * outputs; ++i) out[second * outputs + i] = other[i];
    return true;
}

// --- many boxes of one radius ----------------------------------------------------------------------------------

// Boxes of one size, like those about samples of a training batch, have one image of radii: it is summed once, in the
// order that it has elsewhere, and midpoints take the radii's place in the tiles.
template <class T>
bool has_one_radius(int64_t batch, int64_t n, const T* rad) {
    for (int64_t s = 1; s < batch; ++s)
        if (std::memcmp(rad, rad + s * n, static_cast<std::size_t>(n) * sizeof(T)) != 0) return false;
    return true;
}

// One panel. `pairs`: boxes of the first half with those of the second, which begins at box `second`.
template <int vectors, class T>
void panel_of_one_radius(const Factors<T>& weight, int64_t output, int64_t half, int64_t second, const T* pairs,
                         const T* radius, const Results<T>& results, T* panel) {
    const Terms terms{{1, 0}, {1, 0}, weight.terms, weight.terms};
    weight.pack(output, 0, weight.terms, vectors, panel);
    Sums<T, 1, vectors> of_radius;
    of_radius.clear();
    add_block<false>(terms, &radius, {}, 0, panel, of_radius);
    in_tiles(half, [&](int64_t first, int64_t here, auto pixels) {
        const T* sources[pixels];
        for (int64_t i = 0; i < pixels; ++i) sources[i] = pairs + 2 * (first + (i < here ? i : 0)) * weight.terms;
        Sums<T, pixels, vectors> sums;
        sums.clear();
        add_block<false, true>(terms, sources, {}, 0, panel, sums);
        for (int part = 0; part < 2; ++part) {
            const auto& mids = part ? sums.rad : sums.mid;
            Sums<T, pixels, vectors> boxes;
            int64_t at[pixels];
            for (int64_t i = 0; i < pixels; ++i) {
                at[i] = (first + i + part * second) * weight.outputs;
                for (int v = 0; v < vectors; ++v) boxes.mid[i][v] = mids[i][v], boxes.rad[i][v] = of_radius.rad[0][v];
            }
            results.write(here, at, output, boxes);
        }
    });
}

// Of an odd number of boxes the one in the middle is in both halves.
template <class T>
bool products_of_one_radius(int64_t batch, const T* mid, const T* rad, const Factors<T>& weight,
                            const Results<T>& results) {
    const int64_t half = ceil_div(batch, 2), second = batch - half, terms = weight.terms;
    const int64_t panels = ceil_div(weight.outputs, tile_width<T>);
    const Scratch<T> pairs(2 * (half + 1) * terms);  // and the radius
    const int threads = team_size(half * terms * weight.outputs / products_grain);
    const int64_t panel_size = (terms + Vec<T>::lanes + terms_ahead) * tile_width<T>;
    const Scratch<T> packed_panels(threads * panel_size);
    Tickets tickets;
    parallel_team(threads, [&](int rank, int team) {
        T *const panel = packed_panels.get() + rank * panel_size, *const radius = pairs.get() + 2 * half * terms;
        for (int64_t box = half * rank / team; box < half * (rank + 1) / team; ++box)
            Packing<T>::interleave(terms, mid + box * terms, mid + (second + box) * terms,
                                   pairs.get() + 2 * box * terms);
        if (rank == 0) Packing<T>::interleave(terms, rad, rad, radius);
        team_barrier(team);
        for (int64_t p = tickets.next(); p < panels; p = tickets.next())
            (weight.outputs - p * tile_width<T> > Vec<T>::lanes ? panel_of_one_radius<tile_vectors, T>
                                                                : panel_of_one_radius<1, T>)(weight, p * tile_width<T>,
                                                                                             half, second, pairs.get(),
                                                                                             radius, results, panel);
    });
    return true;
}

template <class T>
bool linear_many(int64_t batch, int64_t n, int64_t m, const Outward<T>* outward, const T* mid, const T* rad,
                 const T* weight, int64_t row_stride, int64_t column_stride, const T* bias, T* out_mid, T* out_rad,
                 std::uint8_t* state) {
    if (!mid) return products_of_radii<T>(batch, rad, {m, n, row_stride, column_stride, weight, true}, out_rad);
    const auto widening = widening_of(outward);
    const Factors<T> factors{m, n, row_stride, column_stride, weight, false};
    const Results<T> results{m,
                             bias,
                             outward ? outward->bias : nullptr,
                             out_mid,
                             out_rad,
                             relu_into(state),
                             (batch * m + 7) / 8,
                             outward != nullptr};
    if (!outward && batch > tile_pixels && n <= panel_terms && has_one_radius(batch, n, rad))
        return products_of_one_radius<T>(batch, mid, rad, factors, results);
    return products<T>(batch, mid, rad, {nullptr, 0, outward ? &widening : nullptr}, factors, results);
}

template <class T>
bool linear_backward_many(int64_t batch, int64_t m, int64_t n, const Outward<T>* outward, const T* mid, const T* rad,
                          const std::uint8_t* state, const T* weight, int64_t row_stride, int64_t column_stride,
                          T* out_mid, T* out_rad) {
    if (!mid) return products_of_radii<T>(batch, rad, {n, m, column_stride, row_stride, weight, true}, out_rad);
    const auto widening = widening_of(outward);
    return products<T>(batch, mid, rad, {state, (batch * m + 7) / 8, outward ? &widening : nullptr},
                       {n, m, column_stride, row_stride, weight, false},
                       {n, nullptr, nullptr, out_mid, out_rad, {}, 0, outward != nullptr});
}

}  // namespace

template <class T>
void set_interval_linear(Stages<T>& stages) {
    stages.linear = linear<T>;
    stages.linear_backward = linear_backward<T>;
    stages.linear_many = linear_many<T>;
    stages.linear_backward_many = linear_backward_many<T>;
}

template void set_interval_linear(Stages<float>&);
template void set_interval_linear(Stages<double>&);

}  // namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL
