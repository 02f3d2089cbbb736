// What ReLU and ReLU' do to the ends of a box, on vectors. The specification is pyxai_bounds/ops/reference.py; the
// results agree with it to the last bit.
#pragma once

#include <cstdint>
#include <limits>

#include "pyxai_bounds/vec.h"

namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL {

// Which end points of a vector of boxes are kept; a ReLU state and a gate both have this form.
template <class V>
struct Keep {
    typename V::Mask lower, upper;
};

// ReLU keeps the upper end unless it is at most 0, so that a NaN counts as unstable and stays a NaN.
template <class V>
Keep<V> relu_keeps(V mid, V rad) {
    const V zero = V::fill(0);
    return {V::less(zero, mid - rad), V::exceeds(mid + rad, zero)};
}

// dead keeps nothing, active keeps both ends; unstable is the hull with 0, which keeps an end on its own side of 0.
template <class V>
Keep<V> relu_backward_keeps(V mid, V rad, Keep<V> state) {
    const V zero = V::fill(0);
    const auto active = state.lower, alive = state.upper;
    return {V::either(active, V::both(alive, V::exceeds(zero, mid - rad))),
            V::either(active, V::both(alive, V::exceeds(mid + rad, zero)))};
}

// Zeroes the ends that are not kept, and returns to midpoint and radius; a box that keeps both ends is left as it is,
// unrounded. Rounded outward, a radius that was computed (where one end alone is kept) is stepped up: by 4u of itself
// for the rounding of the end, and by the least normal number for the underflow of its half.
template <bool outward, class T, template <class> class V>
void keep_ends(V<T>& mid, V<T>& rad, Keep<V<T>> keep) {
    using W = V<T>;
    const W zero = W::fill(T(0)), half = W::fill(T(0.5));
    const W lower = W::select(keep.lower, mid - rad, zero);
    const W upper = W::select(keep.upper, mid + rad, zero);
    const auto both = W::both(keep.lower, keep.upper);
    W radius = (upper - lower) * half;
    if constexpr (outward) {
        const W step = radius * W::fill(2 * std::numeric_limits<T>::epsilon());
        const W up = radius + (step + W::fill(std::numeric_limits<T>::min()));
        radius = W::select(W::either(keep.lower, keep.upper), up, radius);
    }
    mid = W::select(both, mid, (lower + upper) * half);
    rad = W::select(both, rad, radius);
}

// The packed bits of up to 32 neighbours, from bit 0 of a byte on.
struct Bits {
    unsigned lower, upper;

    static Bits load(const std::uint8_t* packed, std::int64_t plane, std::int64_t byte, int bytes) {
        Bits bits{0, 0};
        for (int k = 0; k < bytes; ++k) {
            bits.lower |= static_cast<unsigned>(packed[byte + k]) << (8 * k);
            bits.upper |= static_cast<unsigned>(packed[plane + byte + k]) << (8 * k);
        }
        return bits;
    }
    void store(std::uint8_t* packed, std::int64_t plane, std::int64_t byte, int bytes) const {
        for (int k = 0; k < bytes; ++k) {
            packed[byte + k] = static_cast<std::uint8_t>(lower >> (8 * k));
            packed[plane + byte + k] = static_cast<std::uint8_t>(upper >> (8 * k));
        }
    }
};

}  // namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL
