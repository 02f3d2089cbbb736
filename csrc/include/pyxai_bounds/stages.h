// The kernels, as a table of functions per floating-point type. calls.cpp picks the table of one
// instruction-set level; cpu/<op>.cpp, compiled once per level, fills in its own entries.
#pragma once

#include <cstdint>

namespace pyxai_bounds {

// The largest product of the two strides of a backward-data pass.
inline constexpr int most_remainders = 64;
inline constexpr int most_conv2d_steps = 64;  // of one call of `conv2d_steps`

// A convolution of channels-last tensors: [batch, height, width, channels] to [batch, out_height, out_width, outputs].
// Pairs are (vertical, horizontal). The weight's element [o, c, i, j] lies at the sum of indices times strides.
struct Conv2d {
    std::int64_t batch, channels, height, width, outputs, out_height, out_width;
    std::int64_t kernel[2], stride[2], padding[2], dilation[2], weight_strides[4];
};

// How a product rounds outward: the factors by which `widen` in pyxai_bounds/rounding.py widens radii, and a bias of
// the radii, which may be null.
template <class T>
struct Outward {
    T on_mid, on_rad, least;
    const T* bias;
};

// One number for each channel; all but `scale` may be null. Results round outward if `least` is not 0: a radius grows
// by `least` where anything is not 0, and, to cover float32 evaluations, by `evaluated` times the magnitude they may
// reach.
template <class T>
struct ScaleShift {
    const T *scale, *shift, *scale_rad, *shift_rad;
    T evaluated, least;
};

// What is applied to results before they are written: nothing; ReLU, which writes its state to `made`; ReLU' at the
// state `given`, which writes its gate to `made` unless that is null; or the gate `given`. All but nothing needs a
// multiple of 16 outputs, and registers of at least 8 elements.
struct Epilogue {
    enum Kind { none, relu, relu_backward, gate } kind;
    const std::uint8_t* given;
    std::uint8_t* made;
};

// One of several convolutions and backward-data passes that an image goes through. If `out_mid` and `out_rad` are null,
// the results go to the next step alone, whose `mid` and `rad` are null.
template <class T>
struct Conv2dStep {
    bool backward;
    Conv2d shape;
    const T *mid, *rad, *weight, *bias;
    const std::uint8_t* state;  // of ReLU' before a backward-data pass
    T *out_mid, *out_rad;
    Epilogue after;
};

// Elementwise stages: all arrays are dense and in one memory order. Packed bits are two planes of ceil(n / 8) bytes,
// "keep the lower end" before "keep the upper end"; element i is bit i % 8 of byte i / 8, bits past n are zero.
// `outward` asks for radii that cover what rounding loses; else every operation rounds to nearest. An output may be
// the input it is computed from, element for element; other overlaps are not allowed.
template <class T>
struct Stages {
    int lanes;  // elements of a register
    void (*relu)(std::int64_t n, const T* mid, const T* rad, T* out_mid, T* out_rad, std::uint8_t* state, bool outward);
    // `gate` may be null: the gate that was applied is then not written.
    void (*relu_backward)(std::int64_t n, const T* mid, const T* rad, const std::uint8_t* state, T* out_mid, T* out_rad,
                          std::uint8_t* gate, bool outward);
    // `mid` may be null, for zeros.
    void (*gate)(std::int64_t n, const T* mid, const T* rad, const std::uint8_t* gate, T* out_mid, T* out_rad);
    // `batch` matrices [rows, columns], one after the other; this changes the memory order of images, for example.
    void (*transpose)(std::int64_t batch, std::int64_t rows, std::int64_t columns, const T* from, T* to);
    // Element i belongs to channel (i / inner) % channels.
    void (*scale_shift)(std::int64_t n, std::int64_t channels, std::int64_t inner, const ScaleShift<T>& by,
                        const T* mid, const T* rad, T* out_mid, T* out_rad);
    // Rounds outward if `least` is not 0: by `lost` times the greatest product, and by `least` where no product is 0.
    void (*mul)(std::int64_t n, const T* a_mid, const T* a_rad, const T* b_mid, const T* b_rad, T* out_mid, T* out_rad,
                T lost, T least);
    // The factors of an outward-rounded affine operator; the constants are those of pyxai_bounds/rounding.py.
    void (*widen)(std::int64_t n, const T* mid, const T* rad, T on_mid, T on_rad, T least, T* out);
    void (*magnitude)(std::int64_t n, const T* weight, T least, T* out);
    // a + sign(weight)·b, the two parts of a weight's gradient. `a` may be null, for zeros.
    void (*signed_sum)(std::int64_t n, const T* a, const T* b, const T* weight, T* out);
    // The gradient of a weight [m, n], gradᵀ·mid + sign(weight) ⊙ (grad_radᵀ·rad), from gradients [batch, m] and boxes
    // [batch, n]; all contiguous, `out` apart from the rest. A product with a null factor is left out. `add`: add to
    // what `out` holds.
    void (*linear_weight)(std::int64_t batch, std::int64_t m, std::int64_t n, const T* grad_mid, const T* grad_rad,
                          const T* mid, const T* rad, const T* weight, T* out, bool add);
    // A few boxes through x ↦ x·Wᵀ + bias and g ↦ g·W; weight is [m, n]. All contiguous, outputs apart from inputs.
    // `bias` may be null. `mid` and `out_mid` may both be null, where all midpoints are 0.
    void (*linear)(std::int64_t batch, std::int64_t n, std::int64_t m, const T* mid, const T* rad, const T* weight,
                   const T* bias, T* out_mid, T* out_rad);
    void (*linear_backward)(std::int64_t batch, std::int64_t m, std::int64_t n, const T* mid, const T* rad,
                            const T* weight, T* out_mid, T* out_rad);
    // Any number of boxes, and a weight with any strides. If `state` is not null, ReLU follows the bias and writes its
    // state there, or ReLU' at that state comes first; both need a multiple of 16 outputs, m, and registers of 8
    // elements. `outward` is as in the convolutions. Without it, and without a state, `mid` and `out_mid` may both be
    // null.
    bool (*linear_many)(std::int64_t batch, std::int64_t n, std::int64_t m, const Outward<T>* outward, const T* mid,
                        const T* rad, const T* weight, std::int64_t row_stride, std::int64_t column_stride,
                        const T* bias, T* out_mid, T* out_rad, std::uint8_t* state);
    bool (*linear_backward_many)(std::int64_t batch, std::int64_t m, std::int64_t n, const Outward<T>* outward,
                                 const T* mid, const T* rad, const std::uint8_t* state, const T* weight,
                                 std::int64_t row_stride, std::int64_t column_stride, T* out_mid, T* out_rad);
    // Convolutions, and their backward-data pass, whose `mid` and `rad` are [batch, out_height, out_width, outputs]. If
    // `state` is not null, ReLU' comes first, which needs a multiple of 16 outputs and registers of 8 elements.
    // `outward` is null for rounding to nearest. Otherwise every weight must be 0 or at least the square root of the
    // least normal number; if one is not, they return false and have written nothing.
    bool (*conv2d)(const Conv2d& shape, const Outward<T>* outward, const T* mid, const T* rad, const T* weight,
                   const T* bias, T* out_mid, T* out_rad, Epilogue after);
    bool (*conv2d_backward)(const Conv2d& shape, const Outward<T>* outward, const T* mid, const T* rad,
                            const std::uint8_t* state, const T* weight, T* out_mid, T* out_rad, Epilogue after);
    // Up to `most_conv2d_steps` of them in a row on the same images, rounded to nearest. A thread takes an image
    // through all steps, so that the values in between stay in its cache.
    void (*conv2d_steps)(std::int64_t count, const Conv2dStep<T>* steps);
    // The gradient of their weight. grad_mid, grad_rad have the shape of outputs, mid, rad that of inputs; both
    // midpoints or both radii may be null, for zeros. The number of outputs is a multiple of the lanes of a register.
    // `out` is [outputs, channels, kernel's rows, kernel's columns], contiguous.
    void (*conv2d_weight)(const Conv2d& shape, const T* grad_mid, const T* grad_rad, const T* mid, const T* rad,
                          const T* weight, T* out);
    // The most roundings in a row in a sum of theirs, where they round outward.
    std::int64_t (*conv2d_roundings)(const Conv2d& shape, bool backward);
    // The matrix products: `batch` of [m, k] × [k, n], all contiguous, outputs apart from inputs, k > 0.
    void (*matmul)(std::int64_t batch, std::int64_t m, std::int64_t k, std::int64_t n, const T* a_mid, const T* a_rad,
                   const T* b_mid, const T* b_rad, T* out_mid, T* out_rad);
    // Here b and its gradients are transposed, [n, k].
    void (*matmul_backward)(std::int64_t batch, std::int64_t m, std::int64_t k, std::int64_t n, const T* mid_grad,
                            const T* rad_grad, const T* a_mid, const T* a_rad, const T* b_mid, const T* b_rad,
                            T* a_mid_grad, T* a_rad_grad, T* b_mid_grad, T* b_rad_grad);
};

// Every level defines these functions in a namespace of its own, for float and for double.
#define PYXAI_BOUNDS_DECLARE_LEVEL(level)               \
    namespace level {                                   \
    template <class T>                                  \
    void set_interval_relu(Stages<T>& stages);          \
    template <class T>                                  \
    void set_interval_linear(Stages<T>& stages);        \
    template <class T>                                  \
    void set_interval_linear_weight(Stages<T>& stages); \
    template <class T>                                  \
    void set_interval_conv2d(Stages<T>& stages);        \
    template <class T>                                  \
    void set_interval_conv2d_weight(Stages<T>& stages); \
    template <class T>                                  \
    void set_interval_scale_shift(Stages<T>& stages);   \
    template <class T>                                  \
    void set_interval_mul(Stages<T>& stages);           \
    template <class T>                                  \
    void set_outward(Stages<T>& stages);                \
    template <class T>                                  \
    void set_interval_matmul(Stages<T>& stages);        \
    template <class T>                                  \
    void set_transpose(Stages<T>& stages);              \
    template <class T>                                  \
    Stages<T> stages() {                                \
        Stages<T> table{};                              \
        set_interval_relu(table);                       \
        set_interval_linear(table);                     \
        set_interval_linear_weight(table);              \
        set_interval_conv2d(table);                     \
        set_interval_conv2d_weight(table);              \
        set_interval_scale_shift(table);                \
        set_interval_mul(table);                        \
        set_outward(table);                             \
        set_interval_matmul(table);                     \
        set_transpose(table);                           \
        return table;                                   \
    }                                                   \
    }

PYXAI_BOUNDS_DECLARE_LEVEL(portable)
#ifdef PYXAI_BOUNDS_X86
PYXAI_BOUNDS_DECLARE_LEVEL(avx2)
PYXAI_BOUNDS_DECLARE_LEVEL(avx512)
#endif

}  // namespace pyxai_bounds
