// What gradients in a weight share, whether of a linear layer or of a convolution.
#pragma once

#include "pyxai_bounds/vec.h"

namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL {

// Adds the products of a column of `rows` numbers and a row of `vectors` vectors to sums in registers.
template <int rows, int vectors, class V, class T>
inline __attribute__((always_inline)) void add_outer_product(const T* column, const T* row, V (&sums)[rows][vectors]) {
    V at[vectors];
#pragma GCC unroll 4
    for (int k = 0; k < vectors; ++k) at[k] = V::load(row + k * V::lanes);
#pragma GCC unroll 24
    for (int i = 0; i < rows; ++i) {
        const V factor = V::fill(column[i]);
#pragma GCC unroll 4
        for (int k = 0; k < vectors; ++k) sums[i][k] = V::multiply_add(factor, at[k], sums[i][k]);
    }
}

// sign(weight)·x; the sign of 0 and of NaN is 0, as PyTorch has it.
template <class V>
V with_sign(V weight, V x) {
    const V zero = V::fill(0);
    return V::select(V::less(zero, weight), V::fill(1), V::select(V::less(weight, zero), V::fill(-1), zero)) * x;
}

}  // namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL
