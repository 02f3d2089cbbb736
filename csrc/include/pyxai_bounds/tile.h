// The inner loop of linear and convolution layers on boxes: a tile of sums in registers, fed by one walk over packed
// weights. A weight is loaded once for midpoints and radii, and |W| exists in registers alone.
//
// Sources are packed in pairs (mid, rad), pixel by pixel, so that one address serves both; weights in panels of a few
// vectors of outputs, term by term. A sum is taken in the order of its terms, whatever the tile: results depend
// neither on the number of threads nor on the batch that a sample comes in.
#pragma once

#include <cstdint>
#include <cstring>

#include "pyxai_bounds/keep.h"
#include "pyxai_bounds/outward.h"
#include "pyxai_bounds/scratch.h"
#include "pyxai_bounds/stages.h"
#include "pyxai_bounds/vec.h"

namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL {

// Pixels and vectors of outputs of a tile: as many sums as leave registers for the factors. (Pixels are samples in a
// linear layer.) A smaller tile serves what is left over. Of 16 registers 12 hold sums, two a term's weights, one a
// midpoint or radius, and one the mask that makes |W|: 106 to 115 GFLOP/s of 125 (AVX2, one core), where a tile of 2
// pixels reaches 96.
#if defined(__AVX512F__)
inline constexpr int tile_pixels = 6, tile_rest = 4, tile_vectors = 2;
#else
inline constexpr int tile_pixels = 3, tile_rest = 1, tile_vectors = 2;
#endif
template <class T>
inline constexpr int tile_width = tile_vectors * Vec<T>::lanes;
// Terms of the panel that are fetched ahead, by whole cache lines: 193 became 199 GFLOP/s of 235 (AVX-512, one core).
inline constexpr int terms_ahead = 16, line_bytes = 64;

// Repeated runs of `length` neighbours in a packed source; `pitch` terms lie between the beginnings of two.
struct Runs {
    std::int64_t count, pitch;
};

// Terms whose sum is rounded by itself before it is added to others: a sum of n terms loses γ of n / block + block
// roundings and not of n. Blocks of 128 take 5 % longer, which proofs are worth.
inline constexpr std::int64_t block_nearest = 1024, block_outward = 128;

// The terms of a sum: runs of runs.
struct Terms {
    Runs outer, inner;
    std::int64_t length, block;
    std::int64_t count() const { return outer.count * inner.count * length; }
    bool is_one_block() const { return count() <= block; }
    bool has_short_rows() const { return inner.count * length <= block; }
    // Roundings in a row in a sum by `add_blocks`: of one product (where multiply_add rounds twice), of the sum of a
    // block, and of the sum of blocks.
    std::int64_t roundings() const {
        if (is_one_block()) return 1 + count() + 1;
        if (has_short_rows()) return 1 + inner.count * length + outer.count;
        return 1 + smaller(block, length) + outer.count * inner.count * ceil_div(length, block);
    }
    // The same of `add_few`: of one product, of a lane's sum or that of what is left over, and of the sum of lanes.
    std::int64_t roundings_of_few(std::int64_t lanes) const {
        const std::int64_t steps = 2 * length / lanes, left = length - steps * lanes / 2;
        return 1 + outer.count * inner.count * greater(steps, left) + lanes / 2;
    }
};

template <class T, int pixels, int vectors>
struct Sums {
    Vec<T> mid[pixels][vectors], rad[pixels][vectors];

    void clear() {
#pragma GCC unroll 8
        for (int p = 0; p < pixels; ++p)
#pragma GCC unroll 2
            for (int v = 0; v < vectors; ++v) mid[p][v] = rad[p][v] = Vec<T>::fill(T(0));
    }
};

// Which terms of a packed source are not (0, 0): a bit for each, from its beginning. After ReLU and ReLU' many are
// dead, and a padded image has zeros around it. A tile leaves out what all of its pixels have dead, which changes no
// sum if every weight is finite. Runs begin at multiples of 8 terms.
template <class T>
struct Alive {
    const T* source;
    const std::uint8_t* bits;  // or null: nothing is left out; followed by `bits_slack` bytes

    std::uint64_t at(const T* term) const {
        std::uint64_t word;
        std::memcpy(&word, bits + static_cast<std::uint64_t>(term - source) / 16, sizeof(word));
        return word;
    }
};
inline constexpr std::int64_t bits_slack = 8;

// Adds the terms of `pixels` pixels times `vectors` vectors of outputs, as one sum that is rounded by itself. A
// function of its own, with sums of its own: those of the caller have an address, and would be stored at each term.
// `two_mids`: what stands in the radii's place are midpoints, too, of other boxes.
template <bool some, bool two_mids = false, class T, int pixels, int vectors>
__attribute__((noinline)) void add_block(Terms terms, const T* const* sources, Alive<T> alive, std::int64_t offset,
                                         const T* panel, Sums<T, pixels, vectors>& into) {
    using V = Vec<T>;
    constexpr int width = vectors * V::lanes;
    Sums<T, pixels, vectors> sums;
    sums.clear();
    for (std::int64_t o = 0; o < terms.outer.count; ++o)
        for (std::int64_t i = 0; i < terms.inner.count; ++i) {
            const T* source[pixels];
#pragma GCC unroll 8
            for (int p = 0; p < pixels; ++p)
                source[p] = sources[p] + 2 * (offset + o * terms.outer.pitch + i * terms.inner.pitch);
            const auto add = [&](std::int64_t k) __attribute__((always_inline)) {
                const T* const at = panel + k * width;
                V weight[vectors];  // and, once the midpoints have met them, their magnitudes
#pragma GCC unroll 2
                for (int i = 0; i < width; i += line_bytes / int{sizeof(T)})
                    __builtin_prefetch(at + terms_ahead * width + i);
#pragma GCC unroll 2
                for (int v = 0; v < vectors; ++v) weight[v] = in_register(V::load(at + v * V::lanes));
#pragma GCC unroll 8
                for (int p = 0; p < pixels; ++p) {
                    const V mid = V::fill(source[p][2 * k]);
#pragma GCC unroll 2
                    for (int v = 0; v < vectors; ++v) sums.mid[p][v] = V::multiply_add(weight[v], mid, sums.mid[p][v]);
                }
#pragma GCC unroll 2
                for (int v = 0; v < vectors && !two_mids; ++v) weight[v] = in_register(V::absolute(weight[v]));
#pragma GCC unroll 8
                for (int p = 0; p < pixels; ++p) {
                    const V rad = V::fill(source[p][2 * k + 1]);
#pragma GCC unroll 2
                    for (int v = 0; v < vectors; ++v) sums.rad[p][v] = V::multiply_add(weight[v], rad, sums.rad[p][v]);
                }
            };
            if constexpr (some) {
                for (std::int64_t k = 0; k < terms.length; k += 64) {
                    std::uint64_t word = 0;
                    for (int p = 0; p < pixels; ++p) word |= alive.at(source[p] + 2 * k);
                    const std::int64_t left = terms.length - k;
                    if (left >= 64 && word == ~std::uint64_t{0}) {
#pragma GCC unroll 4
                        for (int j = 0; j < 64; ++j) add(k + j);
                        continue;
                    }
                    if (left < 64) word &= (std::uint64_t{1} << left) - 1;
                    for (; word; word &= word - 1) add(k + __builtin_ctzll(word));
                }
            } else {
#pragma GCC unroll 2
                for (std::int64_t k = 0; k < terms.length; ++k) add(k);
            }
            panel += terms.length * width;
        }
#pragma GCC unroll 8
    for (int p = 0; p < pixels; ++p)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) {
            into.mid[p][v] = into.mid[p][v] + sums.mid[p][v];
            into.rad[p][v] = into.rad[p][v] + sums.rad[p][v];
        }
}

// Adds all terms, block by block.
template <class T, int pixels, int vectors>
void add_blocks(Terms terms, const T* const* sources, Alive<T> alive, const T* panel, Sums<T, pixels, vectors>& sums) {
    const auto add = [&](Terms some, std::int64_t offset) {
        if (alive.bits)
            add_block<true>(some, sources, alive, offset, panel, sums);
        else
            add_block<false>(some, sources, alive, offset, panel, sums);
    };
    if (terms.is_one_block()) return add(terms, 0);
    constexpr std::int64_t width = vectors * Vec<T>::lanes;
    for (std::int64_t o = 0; o < terms.outer.count; ++o) {
        const std::int64_t row = o * terms.outer.pitch;
        if (terms.has_short_rows()) {
            add({{1, 0}, terms.inner, terms.length, terms.block}, row);
            panel += terms.inner.count * terms.length * width;
            continue;
        }
        for (std::int64_t i = 0; i < terms.inner.count; ++i)
            for (std::int64_t k = 0; k < terms.length; k += terms.block) {
                const std::int64_t some = smaller(terms.block, terms.length - k);
                add({{1, 0}, {1, 0}, some, some}, row + i * terms.inner.pitch + k);
                panel += some * width;
            }
    }
}

// The same for few outputs, where lanes would be idle: lanes run along the terms, midpoints and radii by turns, and a
// weight comes as the pair (w, |w|), `outputs` rows of them. One sum holds both halves until the end.
template <class T, int pixels, int outputs>
__attribute__((noinline)) void add_few(Terms terms, const T* const* sources, const T* weights,
                                       T (&mid)[pixels][outputs], T (&rad)[pixels][outputs]) {
    using V = Vec<T>;
    const std::int64_t row = 2 * terms.count(), length = 2 * terms.length, whole = length / V::lanes * V::lanes;
    V sums[pixels][outputs];
    for (auto& sum : sums)
        for (V& x : sum) x = V::fill(T(0));
    for (int p = 0; p < pixels; ++p)
        for (int o = 0; o < outputs; ++o) mid[p][o] = rad[p][o] = T(0);
    for (std::int64_t outer = 0; outer < terms.outer.count; ++outer)
        for (std::int64_t inner = 0; inner < terms.inner.count; ++inner, weights += length) {
            const T* source[pixels];
#pragma GCC unroll 8
            for (int p = 0; p < pixels; ++p)
                source[p] = sources[p] + 2 * (outer * terms.outer.pitch + inner * terms.inner.pitch);
            for (std::int64_t k = 0; k < whole; k += V::lanes) {
                V weight[outputs];
#pragma GCC unroll 4
                for (int o = 0; o < outputs; ++o) weight[o] = V::load(weights + o * row + k);
#pragma GCC unroll 8
                for (int p = 0; p < pixels; ++p) {
                    const V boxes = V::load(source[p] + k);
#pragma GCC unroll 4
                    for (int o = 0; o < outputs; ++o) sums[p][o] = V::multiply_add(weight[o], boxes, sums[p][o]);
                }
            }
            for (std::int64_t k = whole; k < length; k += 2)
                for (int p = 0; p < pixels; ++p)
                    for (int o = 0; o < outputs; ++o) {
                        mid[p][o] += weights[o * row + k] * source[p][k];
                        rad[p][o] += weights[o * row + k + 1] * source[p][k + 1];
                    }
        }
    for (int p = 0; p < pixels; ++p)
        for (int o = 0; o < outputs; ++o) {
            T both[2];
            V::sum_by_parity(sums[p][o], both);
            mid[p][o] += both[0];
            rad[p][o] += both[1];
        }
}

// Calls f(first, count, Constant<tile>) for tiles that cover [0, n); the last may reach past n.
template <class F>
void in_tiles(std::int64_t n, F f) {
    std::int64_t i = 0;
    while (n - i >= tile_pixels || (tile_rest < n - i && n - i < tile_pixels)) {
        f(i, smaller(tile_pixels, n - i), Constant<tile_pixels>{});
        i += tile_pixels;
    }
    for (; i < n; i += tile_rest) f(i, smaller(tile_rest, n - i), Constant<tile_rest>{});
}

// Packed bits are read and written by whole bytes: boxes whose bits begin at a multiple of this.
template <class T>
inline constexpr int bits_together = Vec<T>::lanes > 8 ? Vec<T>::lanes : 8;

// How boxes become pairs: after ReLU', if there is a state of it, and rounded outward, if there is a widening.
template <class T>
struct Packing {
    const std::uint8_t* state;
    std::int64_t plane;  // bytes of the state in each plane
    const Widening<T>* widening;

    // `first` is the number of the first box in the state; it and `count` are then multiples of `bits_together`. Which
    // pairs are not (0, 0) goes to `alive`, if that is wanted; `count` is then a multiple of 8.
    void pack(std::int64_t count, std::int64_t first, const T* mid, const T* rad, T* __restrict out,
              std::uint8_t* alive) const {
        if (!state && !widening && !alive) return interleave(count, mid, rad, out);
        constexpr int group = bits_together<T>, L = Vec<T>::lanes;
        std::int64_t i = 0;
        for (; i + group <= count; i += group) {
            const Bits bits = state ? Bits::load(state, plane, (first + i) / 8, group / 8) : Bits{0, 0};
            T mids[group], rads[group];
            unsigned some = 0;
            for (int j = 0; j < group; j += L)
                some |= prepare<Vec<T>>(mid + i + j, rad + i + j, bits, j, mids + j, rads + j) << j;
            interleave(group, mids, rads, out + 2 * i);
            if (alive)
                for (int j = 0; j < group; j += 8) alive[(i + j) / 8] = static_cast<std::uint8_t>(some >> j);
        }
        for (unsigned some = 0; i < count; ++i) {
            T mids[1], rads[1];
            some |= prepare<Scalar<T>>(mid + i, rad + i, {0, 0}, 0, mids, rads) << i % 8;
            interleave(1, mids, rads, out + 2 * i);
            if (alive && i % 8 == 7) alive[i / 8] = static_cast<std::uint8_t>(some), some = 0;
        }
    }

    // Returns the bits of what is not (0, 0).
    template <class V>
    unsigned prepare(const T* mid, const T* rad, Bits bits, int shift, T* mids, T* rads) const {
        V m = V::load(mid), r = V::load(rad);
        if (state) {
            const Keep<V> in{V::from_bits(bits.lower >> shift), V::from_bits(bits.upper >> shift)};
            const Keep<V> keep = relu_backward_keeps(m, r, in);
            widening ? keep_ends<true, T>(m, r, keep) : keep_ends<false, T>(m, r, keep);
        }
        if (widening) r = widened(m, r, *widening);
        m.store(mids);
        r.store(rads);
        const V zero = V::fill(T(0));
        return V::bits(V::either(V::exceeds(V::absolute(m), zero), V::exceeds(V::absolute(r), zero)));
    }

    static void interleave(std::int64_t count, const T* mid, const T* rad, T* __restrict out) {
        for (std::int64_t i = 0; i < count; ++i) {
            out[2 * i] = mid[i];
            out[2 * i + 1] = rad[i];
        }
    }
};

// Is every number 0, or in magnitude no less than `least`?
template <class T>
bool no_less(std::int64_t count, const T* numbers, T least) {
    unsigned less = 0;
    const auto look = [&](auto lanes, std::int64_t i) {
        using V = decltype(lanes);
        const V size = V::absolute(V::load(numbers + i));
        less |= V::bits(V::both(V::exceeds(size, V::fill(T(0))), V::less(size, V::fill(least))));
    };
    std::int64_t i = 0;
    for (; i + Vec<T>::lanes <= count; i += Vec<T>::lanes) look(Vec<T>{}, i);
    for (; i < count; ++i) look(Scalar<T>{}, i);
    return less == 0;
}

template <class T>
bool all_finite(std::int64_t count, const T* numbers) {
    T sum = T(0);  // of zeros, or NaN
    std::int64_t i = 0;
    Vec<T> sums = Vec<T>::fill(T(0));
    for (; i + Vec<T>::lanes <= count; i += Vec<T>::lanes) sums = sums + Vec<T>::load(numbers + i) * Vec<T>::fill(T(0));
    for (; i < count; ++i) sum += numbers[i] * T(0);
    return sum + Vec<T>::sum(sums) == T(0);
}

// ReLU, if there is somewhere to write its state.
inline Epilogue relu_into(std::uint8_t* state) {
    return {state ? Epilogue::relu : Epilogue::none, nullptr, state};
}

// Where sums go: `outputs` neighbours for each pixel, with a bias first, if there is one, and an epilogue. Rounded
// outward, a radius is NaN where the midpoint is not finite: there a partial sum has overflowed and says nothing of the
// real number, so that ReLU must not call it active or dead.
template <class T>
struct Results {
    std::int64_t outputs;
    const T *bias, *rad_bias;
    T *mid, *rad;
    Epilogue after;
    std::int64_t plane;  // bytes of its bits in each plane
    bool outward;

    // `at`: where the outputs of each of `count` pixels begin; `output` is the first of the sums.
    template <int pixels, int vectors>
    void write(std::int64_t count, const std::int64_t* at, std::int64_t output,
               const Sums<T, pixels, vectors>& sums) const {
        constexpr int L = Vec<T>::lanes;
        for (int p = 0; p < count; ++p)
            for (int v = 0; v < vectors; ++v) {
                const std::int64_t first = output + v * L, left = outputs - first, i = at[p] + first;
                if (left >= L) {
                    write_vector(i, first, sums.mid[p][v], sums.rad[p][v]);
                } else {
                    T mids[L], rads[L];
                    sums.mid[p][v].store(mids);
                    sums.rad[p][v].store(rads);
                    for (std::int64_t j = 0; j < left; ++j)
                        write_vector(i + j, first + j, Scalar<T>::load(mids + j), Scalar<T>::load(rads + j));
                }
            }
    }

    // Adds the sums that were written before, where these are of more terms.
    template <int pixels, int vectors>
    void add_to(std::int64_t count, const std::int64_t* at, std::int64_t output, Sums<T, pixels, vectors>& sums) const {
        constexpr int L = Vec<T>::lanes;
        for (int p = 0; p < count; ++p)
            for (int v = 0; v < vectors; ++v) {
                const std::int64_t first = output + v * L, left = smaller(outputs - first, L), i = at[p] + first;
                T mids[L] = {}, rads[L] = {};
                for (std::int64_t j = 0; j < left; ++j) mids[j] = mid[i + j], rads[j] = rad[i + j];
                sums.mid[p][v] = Vec<T>::load(mids) + sums.mid[p][v];
                sums.rad[p][v] = Vec<T>::load(rads) + sums.rad[p][v];
            }
    }
    Results without_bias() const { return {outputs, nullptr, rad_bias, mid, rad, after, plane, outward}; }
    Results partial() const { return {outputs, nullptr, nullptr, mid, rad, {}, 0, false}; }

    template <class V>
    void write_vector(std::int64_t i, std::int64_t output, V m, V r) const {
        if (bias) m = m + V::load(bias + output);
        if (rad_bias) r = r + V::load(rad_bias + output);
        if (outward) r = r + m * V::fill(T(0));
        if constexpr (V::lanes > 1)
            if (after.kind != Epilogue::none) {
                const Keep<V> keep = keeps(m, r, i);
                outward ? keep_ends<true, T>(m, r, keep) : keep_ends<false, T>(m, r, keep);
                if (after.made)
                    Bits{V::bits(keep.lower), V::bits(keep.upper)}.store(after.made, plane, i / 8, V::lanes / 8);
            }
        m.store(mid + i);
        r.store(rad + i);
    }

    template <class V>
    Keep<V> keeps(V m, V r, std::int64_t i) const {
        if (after.kind == Epilogue::relu) return relu_keeps(m, r);
        const Bits bits = Bits::load(after.given, plane, i / 8, V::lanes / 8);
        const Keep<V> given{V::from_bits(bits.lower), V::from_bits(bits.upper)};
        return after.kind == Epilogue::gate ? given : relu_backward_keeps(m, r, given);
    }

    template <int pixels, int few>
    void write(std::int64_t count, const std::int64_t* at, const T (&mids)[pixels][few],
               const T (&rads)[pixels][few]) const {
        for (int p = 0; p < count; ++p)
            for (int o = 0; o < few; ++o) {
                write_vector(at[p] + o, o, Scalar<T>::load(&mids[p][o]), Scalar<T>::load(&rads[p][o]));
            }
    }
};

}  // namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL
