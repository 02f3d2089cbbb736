// Elementwise product of two boxes, the least and the greatest of four end-point products: one pass over memory.
// The specification is pyxai_bounds/ops/reference.py. The results agree with it to the last bit, but for the
// sign of a zero: which of −0 and +0 is the lesser, torch.minimum itself decides differently in its tails.
#include "pyxai_bounds/parallel.h"
#include "pyxai_bounds/stages.h"
#include "pyxai_bounds/vec.h"

namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL {
namespace {

using std::int64_t;

template <class T>
void mul(int64_t n, const T* a_mid, const T* a_rad, const T* b_mid, const T* b_rad, T* out_mid, T* out_rad) {
    const auto at = [=](auto lanes, int64_t i) {
        using V = decltype(lanes);
        const V am = V::load(a_mid + i), ar = V::load(a_rad + i), bm = V::load(b_mid + i), br = V::load(b_rad + i);
        const V a_lower = am - ar, a_upper = am + ar, b_lower = bm - br, b_upper = bm + br;
        const V ll = a_lower * b_lower, lu = a_lower * b_upper, ul = a_upper * b_lower, uu = a_upper * b_upper;
        const V lower = minimum(minimum(ll, lu), minimum(ul, uu));
        const V upper = maximum(maximum(ll, lu), maximum(ul, uu));
        const V half = V::fill(T(0.5));
        ((lower + upper) * half).store(out_mid + i);
        ((upper - lower) * half).store(out_rad + i);
    };
    parallel_ranges(n, [=](int64_t begin, int64_t end) {
        int64_t i = begin;
        for (; i + Vec<T>::lanes <= end; i += Vec<T>::lanes) at(Vec<T>{}, i);
        for (; i < end; ++i) at(Scalar<T>{}, i);
    });
}

}  // namespace

template <class T>
void set_interval_mul(Stages<T>& stages) {
    stages.mul = mul<T>;
}

template void set_interval_mul(Stages<float>&);
template void set_interval_mul(Stages<double>&);

}  // namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL
