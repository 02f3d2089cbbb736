// ReLU on a box, ReLU′ on a gradient box, and the gate that is the derivative of both: one pass over memory.
// The specification is pyxai_bounds/ops/reference.py; the results agree with it to the last bit.
#include "pyxai_bounds/keep.h"
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

// Keeps or zeroes each end point, as rule(mid, rad, keep_in) says. `in` and `out` are packed bits; either may be null.
template <bool outward, class T, class Rule>
void keep_all(int64_t n, const T* mid, const T* rad, const uint8_t* in, T* out_mid, T* out_rad, uint8_t* out,
              Rule rule) {
    const int64_t plane = (n + 7) / 8;

    // One vector of lanes `V` at element i, which is element `shift` of its group.
    const auto step = [=](auto lanes, int64_t i, int shift, Bits in_bits, Bits& out_bits) {
        using V = decltype(lanes);
        V m = mid ? V::load(mid + i) : V::fill(T(0)), r = V::load(rad + i);
        const Keep<V> in_keep{V::from_bits(in_bits.lower >> shift), V::from_bits(in_bits.upper >> shift)};
        const Keep<V> keep = rule(m, r, in_keep);
        keep_ends<outward, T>(m, r, keep);
        m.store(out_mid + i);
        r.store(out_rad + i);
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

template <class T>
void relu(int64_t n, const T* mid, const T* rad, T* out_mid, T* out_rad, uint8_t* state, bool outward) {
    const auto rule = [](auto m, auto r, auto) { return relu_keeps(m, r); };
    (outward ? keep_all<true, T, decltype(rule)> : keep_all<false, T, decltype(rule)>)(n, mid, rad, nullptr, out_mid,
                                                                                       out_rad, state, rule);
}

template <class T>
void relu_backward(int64_t n, const T* mid, const T* rad, const uint8_t* state, T* out_mid, T* out_rad, uint8_t* gate,
                   bool outward) {
    const auto rule = [](auto m, auto r, auto in) { return relu_backward_keeps(m, r, in); };
    (outward ? keep_all<true, T, decltype(rule)> : keep_all<false, T, decltype(rule)>)(n, mid, rad, state, out_mid,
                                                                                       out_rad, gate, rule);
}

template <class T>
void gate(int64_t n, const T* mid, const T* rad, const uint8_t* bits, T* out_mid, T* out_rad) {
    keep_all<false>(n, mid, rad, bits, out_mid, out_rad, nullptr, [](auto, auto, auto in) { return in; });
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
