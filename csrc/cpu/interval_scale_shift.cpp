// One scale and shift per channel on a box (a folded batch norm, a fixed affine map): one pass over memory.
// The specification is pyxai_bounds/ops/reference.py; the results agree with it to the last bit.
#include "pyxai_bounds/parallel.h"
#include "pyxai_bounds/stages.h"
#include "pyxai_bounds/vec.h"

namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL {
namespace {

using std::int64_t;

// x·scale + shift, rounded after each of the two steps as in the reference.
template <class V, class T>
void step(V scale, V shift, bool shifts, const T* mid, const T* rad, T* out_mid, T* out_rad) {
    const V scaled = V::load(mid) * scale;
    (shifts ? scaled + shift : scaled).store(out_mid);
    (V::load(rad) * V::absolute(scale)).store(out_rad);
}

// Elements [begin, end) of one channel.
template <class T>
void one_channel(int64_t begin, int64_t end, T scale, T shift, bool shifts, const T* mid, const T* rad, T* out_mid,
                 T* out_rad) {
    using V = Vec<T>;
    using S = Scalar<T>;
    const V scales = V::fill(scale), shifts_by = V::fill(shift);
    int64_t i = begin;
    for (; i + V::lanes <= end; i += V::lanes)
        step(scales, shifts_by, shifts, mid + i, rad + i, out_mid + i, out_rad + i);
    for (; i < end; ++i) step(S::fill(scale), S::fill(shift), shifts, mid + i, rad + i, out_mid + i, out_rad + i);
}

// Elements [begin, end), of which the first belongs to the first of the given scales and each next to the next.
template <class T>
void each_channel(int64_t begin, int64_t end, const T* scale, const T* shift, const T* mid, const T* rad, T* out_mid,
                  T* out_rad) {
    const auto at = [=](auto lanes, int64_t i) {
        using V = decltype(lanes);
        const V shifts_by = shift ? V::load(shift + i - begin) : V::fill(T(0));
        step(V::load(scale + i - begin), shifts_by, shift != nullptr, mid + i, rad + i, out_mid + i, out_rad + i);
    };
    int64_t i = begin;
    for (; i + Vec<T>::lanes <= end; i += Vec<T>::lanes) at(Vec<T>{}, i);
    for (; i < end; ++i) at(Scalar<T>{}, i);
}

template <class T>
void scale_shift(int64_t n, int64_t channels, int64_t inner, const T* mid, const T* rad, const T* scale, const T* shift,
                 T* out_mid, T* out_rad) {
    // A run is as far as one inner loop goes: one channel's elements, or all channels of one place.
    const int64_t run = inner == 1 ? channels : inner;
    parallel_ranges(n, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin, next; i < end; i = next) {
            next = i - i % run + run;
            if (next > end) next = end;
            if (inner == 1) {
                const int64_t c = i % run;
                each_channel(i, next, scale + c, shift ? shift + c : nullptr, mid, rad, out_mid, out_rad);
            } else {
                const int64_t c = i / run % channels;
                one_channel(i, next, scale[c], shift ? shift[c] : T(0), shift != nullptr, mid, rad, out_mid, out_rad);
            }
        }
    });
}

}  // namespace

template <class T>
void set_interval_scale_shift(Stages<T>& stages) {
    stages.scale_shift = scale_shift<T>;
}

template void set_interval_scale_shift(Stages<float>&);
template void set_interval_scale_shift(Stages<double>&);

}  // namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL
