// ReLU and ReLU′ of a box, rounded outward, and the packed bits that say what was kept: one pass over memory. The
// states are those of pyxai_bounds/ops/reference.py to the last bit: a difference of two floating-point numbers has the
// sign of the real one, whichever way it is rounded.
#include "pyxai_bounds/device.cuh"

namespace pyxai_bounds::cuda {
namespace {

constexpr int threads = 256, lanes = 32;

template <class T>
struct Box {
    T mid, rad;
};

// The set of 0 and one end e, rounded away from 0. Half of it may underflow, so the radius is the distance to the
// farther of the two, rounded up. A NaN stays one.
template <class T>
__device__ Box<T> from_zero_to(T end) {
    const T half = end * T(0.5), size = magnitude(end), middle = magnitude(half);
    return {half, greater(middle, sub_up(size, middle))};
}

// Thread i of a warp brings bit i of both planes; four threads write a byte of either. Every thread of the warp comes
// here.
__device__ inline void write_bits(bool lower, bool upper, int64_t element, int64_t bytes, uint8_t* packed) {
    const unsigned all = 0xffffffffu, lowers = __ballot_sync(all, lower), uppers = __ballot_sync(all, upper);
    const int lane = threadIdx.x % lanes;
    const int64_t byte = (element - lane) / 8 + lane;
    if (lane < lanes / 8 && byte < bytes) {
        packed[byte] = static_cast<uint8_t>(lowers >> 8 * lane);
        packed[bytes + byte] = static_cast<uint8_t>(uppers >> 8 * lane);
    }
}

template <class T>
__global__ void __launch_bounds__(threads)
    interval_relu_kernel(int64_t n, const T* mid, const T* rad, T* out_mid, T* out_rad, uint8_t* state) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
    bool keep_lower = false, keep_upper = false;
    if (i < n) {
        const T m = mid[i], r = rad[i], upper = add_up(m, r);
        keep_lower = sub_down(m, r) > 0, keep_upper = !(upper <= 0);
        const Box<T> out = keep_lower && keep_upper ? Box<T>{m, r} : keep_upper ? from_zero_to(upper) : Box<T>{0, 0};
        out_mid[i] = out.mid, out_rad[i] = out.rad;
    }
    write_bits(keep_lower, keep_upper, i, (n + 7) / 8, state);
}

template <class T>
__global__ void __launch_bounds__(threads)
    interval_relu_backward_kernel(int64_t n, const T* mid, const T* rad, const uint8_t* state, T* out_mid, T* out_rad,
                                  uint8_t* gate) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x, bytes = (n + 7) / 8;
    bool keep_lower = false, keep_upper = false;
    if (i < n) {
        const T m = mid[i], r = rad[i], lower = sub_down(m, r), upper = add_up(m, r);
        const bool active = state[i / 8] >> i % 8 & 1, alive = state[bytes + i / 8] >> i % 8 & 1;
        keep_lower = active || (alive && !(lower >= 0)), keep_upper = active || (alive && !(upper <= 0));
        Box<T> out = {0, 0};
        if (keep_lower && keep_upper)
            out = {m, r};
        else if (keep_upper)
            out = from_zero_to(upper);
        else if (keep_lower)
            out = from_zero_to(lower);
        out_mid[i] = out.mid, out_rad[i] = out.rad;
    }
    if (gate != nullptr) write_bits(keep_lower, keep_upper, i, bytes, gate);
}

}  // namespace
}  // namespace pyxai_bounds::cuda

extern "C" const char* cuda_relu(std::int64_t device, std::uintptr_t stream, std::int64_t element_size, std::int64_t n,
                                 std::uintptr_t mid, std::uintptr_t rad, std::uintptr_t out_mid, std::uintptr_t out_rad,
                                 std::uintptr_t state) {
    using namespace pyxai_bounds::cuda;
    return typed(element_size, [&](auto element) {
        using T = decltype(element);
        return launch(interval_relu_kernel<T>, device, stream, ceil_div(n, threads), threads, n, at<const T>(mid),
                      at<const T>(rad), at<T>(out_mid), at<T>(out_rad), at<uint8_t>(state));
    });
}

extern "C" const char* cuda_relu_backward(std::int64_t device, std::uintptr_t stream, std::int64_t element_size,
                                          std::int64_t n, std::uintptr_t mid, std::uintptr_t rad, std::uintptr_t state,
                                          std::uintptr_t out_mid, std::uintptr_t out_rad, std::uintptr_t gate) {
    using namespace pyxai_bounds::cuda;
    return typed(element_size, [&](auto element) {
        using T = decltype(element);
        return launch(interval_relu_backward_kernel<T>, device, stream, ceil_div(n, threads), threads, n,
                      at<const T>(mid), at<const T>(rad), at<const uint8_t>(state), at<T>(out_mid), at<T>(out_rad),
                      at<uint8_t>(gate));
    });
}
