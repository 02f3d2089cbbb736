// The inner loop of linear and convolution layers on boxes: a tile of sums in registers, fed by one walk over packed
// weights. A weight is loaded once for midpoints and radii, and |W| exists in registers alone.
//
// Sources are packed in pairs (mid, rad), pixel by pixel, so that one address serves both; weights in panels of a few
// vectors of outputs, term by term. A sum is taken in the order of its terms, whatever the tile: results depend
// neither on the number of threads nor on the batch that a sample comes in.
#pragma once

#include <cstdint>

#include "pyxai_bounds/keep.h"
#include "pyxai_bounds/scratch.h"
#include "pyxai_bounds/vec.h"

namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL {

// Pixels and vectors of outputs of a tile: as many sums as leave registers for the factors. (Pixels are samples in a
// linear layer.) A smaller tile serves what is left over.
#if defined(__AVX512F__)
inline constexpr int tile_pixels = 6, tile_rest = 4, tile_vectors = 2;
#else
inline constexpr int tile_pixels = 2, tile_rest = 1, tile_vectors = 2;
#endif
template <class T>
inline constexpr int tile_width = tile_vectors * Vec<T>::lanes;
// Terms of the panel that are fetched ahead: 193 became 199 GFLOP/s of 235 (AVX-512, one core).
inline constexpr int terms_ahead = 16;

// Repeated runs of `length` neighbours in a packed source; `pitch` terms lie between the beginnings of two.
struct Runs {
    std::int64_t count, pitch;
};

// The terms of a sum: runs of runs.
struct Terms {
    Runs outer, inner;
    std::int64_t length;
    std::int64_t count() const { return outer.count * inner.count * length; }
};

template <class T, int pixels, int vectors>
struct Sums {
    Vec<T> mid[pixels][vectors], rad[pixels][vectors];
};

// Adds the terms of `pixels` pixels times `vectors` vectors of outputs. A function of its own, with sums of its own:
// those of the caller have an address, and would be stored at each term.
template <class T, int pixels, int vectors>
__attribute__((noinline)) void add_terms(Terms terms, const T* const* sources, const T* panel,
                                         Sums<T, pixels, vectors>& into) {
    using V = Vec<T>;
    Sums<T, pixels, vectors> sums = into;
    for (std::int64_t o = 0; o < terms.outer.count; ++o)
        for (std::int64_t i = 0; i < terms.inner.count; ++i) {
            const T* source[pixels];
#pragma GCC unroll 8
            for (int p = 0; p < pixels; ++p)
                source[p] = sources[p] + 2 * (o * terms.outer.pitch + i * terms.inner.pitch);
            for (std::int64_t k = 0; k < terms.length; ++k, panel += vectors * V::lanes) {
                V weight[vectors], size[vectors];
#pragma GCC unroll 2
                for (int v = 0; v < vectors; ++v) {
                    __builtin_prefetch(panel + (terms_ahead * vectors + v) * V::lanes);
                    weight[v] = V::load(panel + v * V::lanes);
                    size[v] = V::absolute(weight[v]);
                }
#pragma GCC unroll 8
                for (int p = 0; p < pixels; ++p) {
                    const V mid = V::fill(source[p][2 * k]), rad = V::fill(source[p][2 * k + 1]);
#pragma GCC unroll 2
                    for (int v = 0; v < vectors; ++v) {
                        sums.mid[p][v] = V::multiply_add(weight[v], mid, sums.mid[p][v]);
                        sums.rad[p][v] = V::multiply_add(size[v], rad, sums.rad[p][v]);
                    }
                }
            }
        }
    into = sums;
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

// `count` boxes as pairs.
template <class T>
void pack_pairs(std::int64_t count, const T* mid, const T* rad, T* __restrict out) {
    for (std::int64_t i = 0; i < count; ++i) {
        out[2 * i] = mid[i];
        out[2 * i + 1] = rad[i];
    }
}

// Packed bits are read and written by whole bytes: boxes whose bits begin at a multiple of this.
template <class T>
inline constexpr int bits_together = Vec<T>::lanes > 8 ? Vec<T>::lanes : 8;

// The same after ReLU', whose packed state has `plane` bytes in each plane; `first` is the element that comes first.
// `first` and `count` are multiples of `bits_together`.
template <class T>
void pack_gated_pairs(std::int64_t count, const T* mid, const T* rad, const std::uint8_t* state, std::int64_t plane,
                      std::int64_t first, T* __restrict out) {
    using V = Vec<T>;
    constexpr int group = bits_together<T>;
    for (std::int64_t i = 0; i < count; i += group) {
        const Bits bits = Bits::load(state, plane, (first + i) / 8, group / 8);
        T mids[group], rads[group];
        for (int j = 0; j < group; j += V::lanes) {
            V m = V::load(mid + i + j), r = V::load(rad + i + j);
            const Keep<V> in{V::from_bits(bits.lower >> j), V::from_bits(bits.upper >> j)};
            keep_ends<false, T>(m, r, relu_backward_keeps(m, r, in));
            m.store(mids + j);
            r.store(rads + j);
        }
        pack_pairs(group, mids, rads, out + 2 * i);
    }
}

}  // namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL
