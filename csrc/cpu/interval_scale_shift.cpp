// One scale and shift per channel on a box (a folded batch norm, a fixed affine map): one pass over memory.
// The specification is pyxai_bounds/ops/reference.py; the results agree with it to the last bit.
#include <limits>

#include "pyxai_bounds/parallel.h"
#include "pyxai_bounds/stages.h"
#include "pyxai_bounds/vec.h"

namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL {
namespace {

using std::int64_t;

// One channel's numbers, or those of as many channels as a vector has lanes.
template <class V>
struct Channel {
    V scale, shift, scale_rad, shift_rad;
};

// x·scale + shift, rounded after each of the two steps as in the reference.
template <bool outward, class T, class V>
void step(const ScaleShift<T>& by, const Channel<V>& c, const T* mid, const T* rad, T* out_mid, T* out_rad) {
    const V m = V::load(mid), r = V::load(rad), product = m * c.scale;
    const V out = by.shift ? product + c.shift : product;
    V radius = r * V::absolute(c.scale);
    if (by.scale_rad) radius = radius + c.scale_rad * (V::absolute(m) + r);
    if (by.shift_rad) radius = radius + c.shift_rad;
    if constexpr (outward) {
        const V zero = V::fill(T(0)), size = V::absolute(product);
        constexpr T u = std::numeric_limits<T>::epsilon() / 2;
        V lost = V::fill(u) * (by.shift ? size + V::absolute(out) : size);
        if (by.evaluated > T(0)) {
            const V reach = (size + radius) * V::fill(T(2));
            lost = lost + V::fill(by.evaluated) * (by.shift ? reach + V::absolute(c.shift) : reach);
        }
        const auto not_zero = [=](V x) { return V::exceeds(V::absolute(x), zero); };
        auto some = V::either(not_zero(m), not_zero(r));
        if (by.shift) some = V::either(some, not_zero(out));
        radius = (radius + lost) * V::fill(1 + 16 * u) + V::select(some, V::fill(by.least), zero);
        radius = radius + out * zero;  // NaN where the midpoint is not finite
    }
    out.store(out_mid);
    radius.store(out_rad);
}

// The numbers of the channels from `c` on, or of `c` for every lane.
template <class V, bool same, class T>
Channel<V> channel_of(const ScaleShift<T>& by, int64_t c) {
    const auto at = [c](const T* numbers) {
        if constexpr (same) return V::fill(numbers ? numbers[c] : T(0));
        return numbers ? V::load(numbers + c) : V::fill(T(0));
    };
    return {at(by.scale), at(by.shift), at(by.scale_rad), at(by.shift_rad)};
}

// Elements [begin, end), all of channel c.
template <bool outward, class T>
void one_channel(int64_t begin, int64_t end, int64_t c, const ScaleShift<T>& by, const T* mid, const T* rad, T* out_mid,
                 T* out_rad) {
    using V = Vec<T>;
    using S = Scalar<T>;
    const auto channel = channel_of<V, true>(by, c);
    int64_t i = begin;
    for (; i + V::lanes <= end; i += V::lanes) step<outward>(by, channel, mid + i, rad + i, out_mid + i, out_rad + i);
    for (; i < end; ++i) step<outward>(by, channel_of<S, true>(by, c), mid + i, rad + i, out_mid + i, out_rad + i);
}

// Elements [begin, end), of which the first belongs to channel c and each next to the next.
template <bool outward, class T>
void each_channel(int64_t begin, int64_t end, int64_t c, const ScaleShift<T>& by, const T* mid, const T* rad,
                  T* out_mid, T* out_rad) {
    const auto at = [&](auto lanes, int64_t i) {
        const auto channels = channel_of<decltype(lanes), false>(by, c + i - begin);
        step<outward>(by, channels, mid + i, rad + i, out_mid + i, out_rad + i);
    };
    int64_t i = begin;
    for (; i + Vec<T>::lanes <= end; i += Vec<T>::lanes) at(Vec<T>{}, i);
    for (; i < end; ++i) at(Scalar<T>{}, i);
}

template <bool outward, class T>
void all_channels(int64_t n, int64_t channels, int64_t inner, const ScaleShift<T>& by, const T* mid, const T* rad,
                  T* out_mid, T* out_rad) {
    // A run is as far as one inner loop goes: one channel's elements, or all channels of one place.
    const int64_t run = inner == 1 ? channels : inner;
    parallel_ranges(n, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin, next; i < end; i = next) {
            next = i - i % run + run;
            if (next > end) next = end;
            if (inner == 1)
                each_channel<outward>(i, next, i % run, by, mid, rad, out_mid, out_rad);
            else
                one_channel<outward>(i, next, i / run % channels, by, mid, rad, out_mid, out_rad);
        }
    });
}

template <class T>
void scale_shift(int64_t n, int64_t channels, int64_t inner, const ScaleShift<T>& by, const T* mid, const T* rad,
                 T* out_mid, T* out_rad) {
    (by.least > T(0) ? all_channels<true, T> : all_channels<false, T>)(n, channels, inner, by, mid, rad, out_mid,
                                                                       out_rad);
}

}  // namespace

template <class T>
void set_interval_scale_shift(Stages<T>& stages) {
    stages.scale_shift = scale_shift<T>;
}

template void set_interval_scale_shift(Stages<float>&);
template void set_interval_scale_shift(Stages<double>&);

}  // namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL
