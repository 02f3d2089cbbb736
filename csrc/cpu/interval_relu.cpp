// ReLU on a box, ReLU′ on a gradient box, and the gate that is the derivative of both: one pass over memory.
// The specification is pyxai_bounds/ops/reference.py; the results agree with it to the last bit.
#include <limits>

#include "pyxai_bounds/parallel.h"
#include "pyxai_bounds/stages.h"
#include "pyxai_bounds/vec.h"

namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL {
namespace {

using std::int64_t;
using std::uint8_t;

// The least number of elements that fills both whole bytes of packed bits and whole registers.
template <class T>
inline constexpr int group = Vec<T>::lanes > 8 ? Vec<T>::lanes : 8;

// Which end points of a vector of boxes are kept; a ReLU state and a gate both have this form.
template <class V>
struct Keep {
    typename V::Mask lower, upper;
};

// The packed bits of one group.
struct Bits {
    unsigned lower, upper;

    static Bits load(const uint8_t* packed, int64_t plane, int64_t byte, int bytes) {
        Bits bits{0, 0};
        for (int k = 0; k < bytes; ++k) {
            bits.lower |= static_cast<unsigned>(packed[byte + k]) << (8 * k);
            bits.upper |= static_cast<unsigned>(packed[plane + byte + k]) << (8 * k);
        }
        return bits;
    }
    void store(uint8_t* packed, int64_t plane, int64_t byte, int bytes) const {
        for (int k = 0; k < bytes; ++k) {
            packed[byte + k] = static_cast<uint8_t>(lower >> (8 * k));
            packed[plane + byte + k] = static_cast<uint8_t>(upper >> (8 * k));
        }
    }
};

// Keeps or zeroes each end point, as rule(mid, rad, keep_in) says, and returns to midpoint and radius; a box
// that keeps both ends is left as it is, unrounded. `in` and `out` are packed bits; either may be null.
// Rounded outward, a radius that was computed (where one end alone is kept) is stepped up: by 4u of itself for the
// rounding of the end, and by the least normal number for the underflow of its half.
template <bool outward, class T, class Rule>
void keep_ends(int64_t n, const T* mid, const T* rad, const uint8_t* in, T* out_mid, T* out_rad, uint8_t* out,
               Rule rule) {
    const int64_t plane = (n + 7) / 8;

    // One vector of lanes `V` at element i, which is element `shift` of its group.
    const auto step = [=](auto lanes, int64_t i, int shift, Bits in_bits, Bits& out_bits) {
        using V = decltype(lanes);
        const V zero = V::fill(T(0)), half = V::fill(T(0.5));
        const V m = mid ? V::load(mid + i) : zero, r = V::load(rad + i);
        const Keep<V> in_keep{V::from_bits(in_bits.lower >> shift), V::from_bits(in_bits.upper >> shift)};
        const Keep<V> keep = rule(m, r, in_keep);
        const V lower = V::select(keep.lower, m - r, zero);
        const V upper = V::select(keep.upper, m + r, zero);
        const auto both = V::both(keep.lower, keep.upper);
        V::select(both, m, (lower + upper) * half).store(out_mid + i);
        V radius = (upper - lower) * half;
        if constexpr (outward) {
            const V step = radius * V::fill(2 * std::numeric_limits<T>::epsilon());
            const V up = radius + (step + V::fill(std::numeric_limits<T>::min()));
            radius = V::select(V::either(keep.lower, keep.upper), up, radius);
        }
        V::select(both, r, radius).store(out_rad + i);
        out_bits.lower |= V::bits(keep.lower) << shift;
        out_bits.upper |= V::bits(keep.upper) << shift;
    };

    parallel_ranges(n, [=](int64_t begin, int64_t end) {
        int64_t i = begin;
        for (; i + group<T> <= end; i += group<T>) {
            const Bits in_bits = in ? Bits::load(in, plane, i / 8, group<T> / 8) : Bits{0, 0};
            Bits out_bits{0, 0};
            for (int j = 0; j < group<T>; j += Vec<T>::lanes) step(Vec<T>{}, i + j, j, in_bits, out_bits);
            if (out) out_bits.store(out, plane, i / 8, group<T> / 8);
        }
        if (i < end) {
            const int count = static_cast<int>(end - i), bytes = (count + 7) / 8;
            const Bits in_bits = in ? Bits::load(in, plane, i / 8, bytes) : Bits{0, 0};
            Bits out_bits{0, 0};
            for (int j = 0; j < count; ++j) step(Scalar<T>{}, i + j, j, in_bits, out_bits);
            if (out) out_bits.store(out, plane, i / 8, bytes);
        }
    });
}

// The upper end is kept unless it is at most 0, so that a NaN counts as unstable and stays a NaN.
template <class T>
void relu(int64_t n, const T* mid, const T* rad, T* out_mid, T* out_rad, uint8_t* state, bool outward) {
    const auto rule = [](auto m, auto r, auto) {
        using V = decltype(m);
        const V zero = V::fill(T(0));
        return Keep<V>{V::less(zero, m - r), V::exceeds(m + r, zero)};
    };
    (outward ? keep_ends<true, T, decltype(rule)> : keep_ends<false, T, decltype(rule)>)(n, mid, rad, nullptr, out_mid,
                                                                                         out_rad, state, rule);
}

// dead keeps nothing, active keeps both ends; unstable is the hull with 0, which keeps an end on its own side of 0.
template <class T>
void relu_backward(int64_t n, const T* mid, const T* rad, const uint8_t* state, T* out_mid, T* out_rad, uint8_t* gate,
                   bool outward) {
    const auto rule = [](auto m, auto r, auto in) {
        using V = decltype(m);
        const V zero = V::fill(T(0));
        const auto active = in.lower, alive = in.upper;
        return Keep<V>{V::either(active, V::both(alive, V::exceeds(zero, m - r))),
                       V::either(active, V::both(alive, V::exceeds(m + r, zero)))};
    };
    (outward ? keep_ends<true, T, decltype(rule)> : keep_ends<false, T, decltype(rule)>)(n, mid, rad, state, out_mid,
                                                                                         out_rad, gate, rule);
}

template <class T>
void gate(int64_t n, const T* mid, const T* rad, const uint8_t* bits, T* out_mid, T* out_rad) {
    keep_ends<false>(n, mid, rad, bits, out_mid, out_rad, nullptr, [](auto, auto, auto in) { return in; });
}

}  // namespace

template <class T>
void set_interval_relu(Stages<T>& stages) {
    stages.relu = relu<T>;
    stages.relu_backward = relu_backward<T>;
    stages.gate = gate<T>;
}

template void set_interval_relu(Stages<float>&);
template void set_interval_relu(Stages<double>&);

}  // namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL
