// The CUDA kernels as functions that bindings.cpp hands to Python: integers, addresses on the device, a stream. Each
// queues its work on the stream and returns null, or what CUDA says is wrong. No CUDA header is needed to call them.
#pragma once

#include <cstdint>

extern "C" {

// Null if this device can run the kernels of this build.
const char* cuda_check(std::int64_t device);

// A linear map of a box, (mid, rad) to (W·mid + b, |W|·rad), rounded outward: a convolution of channels-last images,
// or, with `transposed`, its backward-data pass. A linear layer is a convolution of images of one pixel. "Source" is
// the image that is read, "target" the one that is written; channels are those of one group. The weight is
//     weight[group·at_group + tap·at_tap + source channel·at_source + target channel·at_target].
// Everything else is contiguous; `bias` may be 0. `lost` is γ of the number of terms, in the arithmetic of the midpoint
// (float64), rounded up to the element type; `underflow` what a sum may lose where products underflow.
const char* cuda_convolve(std::int64_t device, std::uintptr_t stream, std::int64_t element_size,
                          std::int64_t transposed, std::int64_t batch, std::int64_t groups, std::int64_t source_height,
                          std::int64_t source_width, std::int64_t source_channels, std::int64_t target_height,
                          std::int64_t target_width, std::int64_t target_channels, std::int64_t kernel_height,
                          std::int64_t kernel_width, std::int64_t stride_height, std::int64_t stride_width,
                          std::int64_t padding_height, std::int64_t padding_width, std::int64_t dilation_height,
                          std::int64_t dilation_width, std::int64_t at_group, std::int64_t at_tap,
                          std::int64_t at_source, std::int64_t at_target, double lost, double underflow,
                          std::uintptr_t mid, std::uintptr_t rad, std::uintptr_t weight, std::uintptr_t bias,
                          std::uintptr_t out_mid, std::uintptr_t out_rad);

// The exact product of boxes [batch, m, k] and [batch, k, n], rounded to nearest, and its gradient.
const char* cuda_matmul(std::int64_t device, std::uintptr_t stream, std::int64_t element_size, std::int64_t batch,
                        std::int64_t m, std::int64_t k, std::int64_t n, std::uintptr_t a_mid, std::uintptr_t a_rad,
                        std::uintptr_t b_mid, std::uintptr_t b_rad, std::uintptr_t out_mid, std::uintptr_t out_rad);
const char* cuda_matmul_backward(std::int64_t device, std::uintptr_t stream, std::int64_t element_size,
                                 std::int64_t batch, std::int64_t m, std::int64_t k, std::int64_t n,
                                 std::uintptr_t mid_grad, std::uintptr_t rad_grad, std::uintptr_t a_mid,
                                 std::uintptr_t a_rad, std::uintptr_t b_mid, std::uintptr_t b_rad,
                                 std::uintptr_t a_mid_grad, std::uintptr_t a_rad_grad, std::uintptr_t b_mid_grad,
                                 std::uintptr_t b_rad_grad);

// Elementwise stages rounded outward, on n dense elements. Packed bits and channels are as in stages.h; `gate`,
// `shift`, `scale_rad` and `shift_rad` may be 0.
const char* cuda_relu(std::int64_t device, std::uintptr_t stream, std::int64_t element_size, std::int64_t n,
                      std::uintptr_t mid, std::uintptr_t rad, std::uintptr_t out_mid, std::uintptr_t out_rad,
                      std::uintptr_t state);
const char* cuda_relu_backward(std::int64_t device, std::uintptr_t stream, std::int64_t element_size, std::int64_t n,
                               std::uintptr_t mid, std::uintptr_t rad, std::uintptr_t state, std::uintptr_t out_mid,
                               std::uintptr_t out_rad, std::uintptr_t gate);
const char* cuda_scale_shift(std::int64_t device, std::uintptr_t stream, std::int64_t element_size, std::int64_t n,
                             std::int64_t channels, std::int64_t inner, std::uintptr_t mid, std::uintptr_t rad,
                             std::uintptr_t scale, std::uintptr_t shift, std::uintptr_t scale_rad,
                             std::uintptr_t shift_rad, std::uintptr_t out_mid, std::uintptr_t out_rad);
const char* cuda_mul(std::int64_t device, std::uintptr_t stream, std::int64_t element_size, std::int64_t n,
                     std::uintptr_t a_mid, std::uintptr_t a_rad, std::uintptr_t b_mid, std::uintptr_t b_rad,
                     std::uintptr_t out_mid, std::uintptr_t out_rad);

}  // extern "C"
