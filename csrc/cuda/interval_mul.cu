// Elementwise product of two boxes, rounded outward: one pass over memory.
//
// Ends are rounded away from their boxes, the least of the four end-point products down and the greatest up. Whatever
// mid then is, the greater of its two distances, rounded up, covers both ends.
#include "pyxai_bounds/device.cuh"

namespace pyxai_bounds::cuda {
namespace {

constexpr int threads = 256;

template <class T>
__global__ void __launch_bounds__(threads) interval_mul_kernel(int64_t n, const T* a_mid, const T* a_rad,
                                                               const T* b_mid, const T* b_rad, T* out_mid, T* out_rad) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
    if (i >= n) return;
    const T a_lower = sub_down(a_mid[i], a_rad[i]), a_upper = add_up(a_mid[i], a_rad[i]);
    const T b_lower = sub_down(b_mid[i], b_rad[i]), b_upper = add_up(b_mid[i], b_rad[i]);
    const T lower = lesser(lesser(mul_down(a_lower, b_lower), mul_down(a_lower, b_upper)),
                           lesser(mul_down(a_upper, b_lower), mul_down(a_upper, b_upper)));
    const T upper = greater(greater(mul_up(a_lower, b_lower), mul_up(a_lower, b_upper)),
                            greater(mul_up(a_upper, b_lower), mul_up(a_upper, b_upper)));
    // Half of each, not half of the sum: that may overflow where the ends do not.
    const T mid = lower == upper ? lower : lower * T(0.5) + upper * T(0.5);
    out_mid[i] = mid;
    out_rad[i] = magnitude(greater(sub_up(upper, mid), sub_up(mid, lower)));  // of −0, +0
}

}  // namespace
}  // namespace pyxai_bounds::cuda

extern "C" const char* cuda_mul(std::int64_t device, std::uintptr_t stream, std::int64_t element_size, std::int64_t n,
                                std::uintptr_t a_mid, std::uintptr_t a_rad, std::uintptr_t b_mid, std::uintptr_t b_rad,
                                std::uintptr_t out_mid, std::uintptr_t out_rad) {
    using namespace pyxai_bounds::cuda;
    return typed(element_size, [&](auto element) {
        using T = decltype(element);
        return launch(interval_mul_kernel<T>, device, stream, ceil_div(n, threads), threads, n, at<const T>(a_mid),
                      at<const T>(a_rad), at<const T>(b_mid), at<const T>(b_rad), at<T>(out_mid), at<T>(out_rad));
    });
}
