// What an outward-rounded affine operator does to its factors before they are multiplied: one pass over memory each.
// The specification is pyxai_bounds/rounding.py (widen, magnitude); the results agree with it to the last bit.
#include "pyxai_bounds/outward.h"
#include "pyxai_bounds/parallel.h"
#include "pyxai_bounds/stages.h"
#include "pyxai_bounds/vec.h"

namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL {
namespace {

using std::int64_t;

template <class T, class At>
void each(int64_t n, At at) {
    parallel_ranges(n, [=](int64_t begin, int64_t end) {
        int64_t i = begin;
        for (; i + Vec<T>::lanes <= end; i += Vec<T>::lanes) at(Vec<T>{}, i);
        for (; i < end; ++i) at(Scalar<T>{}, i);
    });
}

template <class T>
void widen(int64_t n, const T* mid, const T* rad, T on_mid, T on_rad, T least, T* out) {
    each<T>(n, [=](auto lanes, int64_t i) {
        using V = decltype(lanes);
        widened(V::load(mid + i), V::load(rad + i), Widening<T>{on_mid, on_rad, least}).store(out + i);
    });
}

// |weight|, but no less than `least` where it is not 0.
template <class T>
void magnitude(int64_t n, const T* weight, T least, T* out) {
    each<T>(n, [=](auto lanes, int64_t i) {
        using V = decltype(lanes);
        const V zero = V::fill(T(0));
        const V size = V::absolute(V::load(weight + i));
        V::select(V::exceeds(size, zero), maximum(size, V::fill(least)), size).store(out + i);
    });
}

}  // namespace

template <class T>
void set_outward(Stages<T>& stages) {
    stages.widen = widen<T>;
    stages.magnitude = magnitude<T>;
}

template void set_outward(Stages<float>&);
template void set_outward(Stages<double>&);

}  // namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL
