// The kernels for Hopper GPUs (compute capability 9.0) as functions that bindings.cpp hands to Python; see cuda.h.
#pragma once

#include <cstdint>

extern "C" {

// Null if this device can run them.
const char* hopper_check(std::int64_t device);

// A convolution of a box, (mid, rad) to (W·mid, |W|·rad), or with `transposed` its backward-data pass, to nearest, on
// dense channels-last images of float16 or bfloat16: "source" is read, "target" written. The weight is
//     weight[target channel·at_target + source channel·at_source + tap·at_tap],
// and is packed into 2·taps·target channels·source channels elements at `packed`. What follows the product:
//     0  + bias, if there is one
//     1  + bias, ReLU, whose state is written to out_bits
//     2  ReLU′ by the state in bits; the gate that it applied is written to out_bits
//     3  the gate in bits
// With out_mid 0 nothing is done: the answer says whether these kernels take such a convolution, or why not.
const char* hopper_convolve(std::int64_t device, std::uintptr_t stream, std::int64_t is_half, std::int64_t epilogue,
                            std::int64_t transposed, std::int64_t batch, std::int64_t source_height,
                            std::int64_t source_width, std::int64_t source_channels, std::int64_t target_height,
                            std::int64_t target_width, std::int64_t target_channels, std::int64_t kernel_height,
                            std::int64_t kernel_width, std::int64_t stride_height, std::int64_t stride_width,
                            std::int64_t padding_height, std::int64_t padding_width, std::int64_t dilation_height,
                            std::int64_t dilation_width, std::int64_t at_target, std::int64_t at_source,
                            std::int64_t at_tap, std::uintptr_t mid, std::uintptr_t rad, std::uintptr_t weight,
                            std::uintptr_t packed, std::uintptr_t bias, std::uintptr_t bits, std::uintptr_t out_mid,
                            std::uintptr_t out_rad, std::uintptr_t out_bits);

// The gradient of that convolution's weight, (g_mid·mid) + sign(W)·(g_rad·rad) summed over pixels and the batch, from
// the box of gradients of its target and the box that was its source, both dense and channels-last. The weight is dense
// and channels-last, [target channels, taps, source channels]; `out` are as many such arrays of float32, whose sum, in
// their order, is the gradient, as an answer to out 0 wrote to the int64 at `parts`. With that nothing else is done.
const char* hopper_convolve_weight(std::int64_t device, std::uintptr_t stream, std::int64_t is_half, std::int64_t batch,
                                   std::int64_t source_height, std::int64_t source_width, std::int64_t source_channels,
                                   std::int64_t target_height, std::int64_t target_width, std::int64_t target_channels,
                                   std::int64_t kernel_height, std::int64_t kernel_width, std::int64_t stride_height,
                                   std::int64_t stride_width, std::int64_t padding_height, std::int64_t padding_width,
                                   std::int64_t dilation_height, std::int64_t dilation_width, std::uintptr_t grad_mid,
                                   std::uintptr_t grad_rad, std::uintptr_t mid, std::uintptr_t rad,
                                   std::uintptr_t weight, std::uintptr_t out, std::uintptr_t parts);

}  // extern "C"
