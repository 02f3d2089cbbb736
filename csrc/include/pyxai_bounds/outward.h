// What rounding outward adds to a box before a product, on vectors. The specification is pyxai_bounds/rounding.py.
#pragma once

#include <limits>

#include "pyxai_bounds/stages.h"
#include "pyxai_bounds/vec.h"

namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL {

// The constants of pyxai_bounds/rounding.py's `widen`.
template <class T>
struct Widening {
    T on_mid, on_rad, least;
};

template <class T>
Widening<T> widening_of(const Outward<T>* outward) {
    return outward ? Widening<T>{outward->on_mid, outward->on_rad, outward->least} : Widening<T>{};
}

// (rad·on_rad + |mid|·on_mid)(1 + 16u), and `least` more where midpoint or radius is not 0.
template <class V, class T>
V widened(V mid, V rad, Widening<T> by) {
    const V zero = V::fill(T(0)), size = V::absolute(mid);
    const V spread = rad * V::fill(by.on_rad) + size * V::fill(by.on_mid);
    const V wide = spread * V::fill(1 + 8 * std::numeric_limits<T>::epsilon());
    const auto some = V::either(V::exceeds(size, zero), V::exceeds(rad, zero));
    return wide + V::select(some, V::fill(by.least), zero);
}

}  // namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL
