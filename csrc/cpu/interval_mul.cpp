// Elementwise product of two boxes, the least and the greatest of four end-point products: one pass over memory.
// The specification is pyxai_bounds/ops/reference.py. The results agree with it to the last bit, but for the
// sign of a zero: which of −0 and +0 is the lesser, torch.minimum itself decides differently in its tails.
#include <limits>

#include "pyxai_bounds/parallel.h"
#include "pyxai_bounds/stages.h"
#include "pyxai_bounds/vec.h"

namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL {
namespace {

using std::int64_t;

template <bool outward, class T>
void products(int64_t n, const T* a_mid, const T* a_rad, const T* b_mid, const T* b_rad, T* out_mid, T* out_rad, T lost,
              T least) {
    const auto at = [=](auto lanes, int64_t i) {
        using V = decltype(lanes);
        const V am = V::load(a_mid + i), ar = V::load(a_rad + i), bm = V::load(b_mid + i), br = V::load(b_rad + i);
        const V a_lower = am - ar, a_upper = am + ar, b_lower = bm - br, b_upper = bm + br;
        const V ll = a_lower * b_lower, lu = a_lower * b_upper, ul = a_upper * b_lower, uu = a_upper * b_upper;
        const V lower = minimum(minimum(ll, lu), minimum(ul, uu));
        const V upper = maximum(maximum(ll, lu), maximum(ul, uu));
        const V half = V::fill(T(0.5));
        ((lower + upper) * half).store(out_mid + i);
        V radius = (upper - lower) * half;
        if constexpr (outward) {
            const V zero = V::fill(T(0)), slack = V::fill(1 + 8 * std::numeric_limits<T>::epsilon());
            const auto some = [=](V m, V r) {
                return V::either(V::exceeds(V::absolute(m), zero), V::exceeds(V::absolute(r), zero));
            };
            const V reach = (V::absolute(am) + ar) * (V::absolute(bm) + br);
            const V tiny = V::select(V::both(some(am, ar), some(bm, br)), V::fill(least), zero);
            radius = (radius + V::fill(lost) * reach) * slack + tiny;
        }
        radius.store(out_rad + i);
    };
    parallel_ranges(n, [=](int64_t begin, int64_t end) {
        int64_t i = begin;
        for (; i + Vec<T>::lanes <= end; i += Vec<T>::lanes) at(Vec<T>{}, i);
        for (; i < end; ++i) at(Scalar<T>{}, i);
    });
}

template <class T>
void mul(int64_t n, const T* a_mid, const T* a_rad, const T* b_mid, const T* b_rad, T* out_mid, T* out_rad, T lost,
         T least) {
    (least > T(0) ? products<true, T> : products<false, T>)(n, a_mid, a_rad, b_mid, b_rad, out_mid, out_rad, lost,
                                                            least);
}

}  // namespace

template <class T>
void set_interval_mul(Stages<T>& stages) {
    stages.mul = mul<T>;
}

template void set_interval_mul(Stages<float>&);
template void set_interval_mul(Stages<double>&);

}  // namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL
