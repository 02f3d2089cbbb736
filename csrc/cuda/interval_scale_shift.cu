// x ↦ x·scale + shift per channel, where scale and shift may be boxes, rounded outward: one pass over memory.
//
// With x = m ± r, scale = c ± c_r and shift = t ± t_r, x·scale + shift lies within |c|r + c_r(|m| + r) + t_r of m·c +
// t. That number lies between fma(m, c, t) rounded down and rounded up, of which mid, rounded to nearest, is the nearer
// one: it is off by half their distance at most. All sums of the radius are rounded up.
#include "pyxai_bounds/device.cuh"

namespace pyxai_bounds::cuda {
namespace {

constexpr int threads = 256;

template <class T>
__global__ void __launch_bounds__(threads)
    interval_scale_shift_kernel(int64_t n, int64_t channels, int64_t inner, const T* mid, const T* rad, const T* scale,
                                const T* shift, const T* scale_rad, const T* shift_rad, T* out_mid, T* out_rad) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
    if (i >= n) return;
    const int64_t channel = i / inner % channels;
    const T m = mid[i], r = rad[i], c = scale[channel], t = shift != nullptr ? shift[channel] : T(0);
    const T out = fma(m, c, t);
    const T off = mul_up(T(0.5), sub_up(fma_up(m, c, t), fma_down(m, c, t)));
    T spread = fma_up(r, magnitude(c), off);
    if (scale_rad != nullptr) spread = fma_up(scale_rad[channel], add_up(magnitude(m), r), spread);
    if (shift_rad != nullptr) spread = add_up(spread, shift_rad[channel]);
    out_mid[i] = out;
    out_rad[i] = spread + zero_or_nan(out);
}

}  // namespace
}  // namespace pyxai_bounds::cuda

extern "C" const char* cuda_scale_shift(std::int64_t device, std::uintptr_t stream, std::int64_t element_size,
                                        std::int64_t n, std::int64_t channels, std::int64_t inner, std::uintptr_t mid,
                                        std::uintptr_t rad, std::uintptr_t scale, std::uintptr_t shift,
                                        std::uintptr_t scale_rad, std::uintptr_t shift_rad, std::uintptr_t out_mid,
                                        std::uintptr_t out_rad) {
    using namespace pyxai_bounds::cuda;
    return typed(element_size, [&](auto element) {
        using T = decltype(element);
        return launch(interval_scale_shift_kernel<T>, device, stream, ceil_div(n, threads), threads, n, channels, inner,
                      at<const T>(mid), at<const T>(rad), at<const T>(scale), at<const T>(shift),
                      at<const T>(scale_rad), at<const T>(shift_rad), at<T>(out_mid), at<T>(out_rad));
    });
}
