// Calls of the stages by address. Compiled once, unlike the kernels.
#include "pyxai_bounds/calls.h"

#include <algorithm>
#include <memory>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace pyxai_bounds {

const std::vector<Level>& levels() {
    static const std::vector<Level> runnable = [] {
        std::vector<Level> best_first;
#ifdef PYXAI_BOUNDS_X86
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            best_first.push_back({"avx512", avx512::stages<float>(), avx512::stages<double>()});
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
            best_first.push_back({"avx2", avx2::stages<float>(), avx2::stages<double>()});
#endif
        best_first.push_back({"portable", portable::stages<float>(), portable::stages<double>()});
        return best_first;
    }();
    return runnable;
}

std::atomic<const Level*> active{&levels().front()};

void set_level(const std::string& name) {
    std::string names;
    for (const Level& level : levels()) {
        if (name == level.name) {
            active = &level;
            return;
        }
        names += std::string(names.empty() ? "" : ", ") + level.name;
    }
    throw std::invalid_argument("This processor does not run level '" + name + "'; choose one of " + names + ".");
}

int threads() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

namespace {

template <class T>
std::optional<Outward<T>> outward_of(const Widening& widening) {
    if (!widening) return std::nullopt;
    const auto [on_mid, on_rad, least, bias] = *widening;
    return Outward<T>{static_cast<T>(on_mid), static_cast<T>(on_rad), static_cast<T>(least), at<T>(bias)};
}

// A linear layer's products, or those of its backward pass, by the kernel for few boxes or by the one for many.
template <class T>
void linear_product(const Stages<T>& stages, bool many, int64_t batch, int64_t n, int64_t m, const T* mid, const T* rad,
                    const T* weight, T* out_mid, T* out_rad) {
    if (many)
        stages.linear_many(batch, n, m, nullptr, mid, rad, weight, n, 1, nullptr, out_mid, out_rad, nullptr);
    else
        stages.linear(batch, n, m, mid, rad, weight, nullptr, out_mid, out_rad);
}

template <class T>
void linear_backward_product(const Stages<T>& stages, bool many, int64_t batch, int64_t m, int64_t n, const T* mid,
                             const T* rad, const T* weight, T* out_mid, T* out_rad) {
    if (many)
        stages.linear_backward_many(batch, m, n, nullptr, mid, rad, nullptr, weight, n, 1, out_mid, out_rad);
    else
        stages.linear_backward(batch, m, n, mid, rad, weight, out_mid, out_rad);
}

}  // namespace

bool packs(int element_size, int64_t outputs) {
    int lanes = 0;
    typed(element_size, [&](const auto& stages) { lanes = stages.lanes; });
    return lanes >= 8 && outputs % 16 == 0;
}

void relu(int element_size, int64_t n, Address mid, Address rad, Address out_mid, Address out_rad, Address state,
          bool outward) {
    typed(element_size, [=](const auto& stages) {
        using T = decltype(element_type(stages));
        stages.relu(n, at<T>(mid), at<T>(rad), at<T>(out_mid), at<T>(out_rad), at<uint8_t>(state), outward);
    });
}

void relu_backward(int element_size, int64_t n, Address mid, Address rad, Address state, Address out_mid,
                   Address out_rad, Address gate, bool outward) {
    typed(element_size, [=](const auto& stages) {
        using T = decltype(element_type(stages));
        stages.relu_backward(n, at<T>(mid), at<T>(rad), at<uint8_t>(state), at<T>(out_mid), at<T>(out_rad),
                             at<uint8_t>(gate), outward);
    });
}

void gate(int element_size, int64_t n, Address mid, Address rad, Address bits, Address out_mid, Address out_rad) {
    typed(element_size, [=](const auto& stages) {
        using T = decltype(element_type(stages));
        stages.gate(n, at<T>(mid), at<T>(rad), at<uint8_t>(bits), at<T>(out_mid), at<T>(out_rad));
    });
}

void scale_shift(int element_size, int64_t n, int64_t channels, int64_t inner, Address mid, Address rad, Address scale,
                 Address shift, Address scale_rad, Address shift_rad, double evaluated, double least, Address out_mid,
                 Address out_rad) {
    typed(element_size, [=](const auto& stages) {
        using T = decltype(element_type(stages));
        const ScaleShift<T> by{
            at<T>(scale),         at<T>(shift), at<T>(scale_rad), at<T>(shift_rad), static_cast<T>(evaluated),
            static_cast<T>(least)};
        stages.scale_shift(n, channels, inner, by, at<T>(mid), at<T>(rad), at<T>(out_mid), at<T>(out_rad));
    });
}

void mul(int element_size, int64_t n, Address a_mid, Address a_rad, Address b_mid, Address b_rad, Address out_mid,
         Address out_rad, double lost, double least) {
    typed(element_size, [=](const auto& stages) {
        using T = decltype(element_type(stages));
        stages.mul(n, at<T>(a_mid), at<T>(a_rad), at<T>(b_mid), at<T>(b_rad), at<T>(out_mid), at<T>(out_rad),
                   static_cast<T>(lost), static_cast<T>(least));
    });
}

void widen(int element_size, int64_t n, Address mid, Address rad, double on_mid, double on_rad, double least,
           Address out) {
    typed(element_size, [=](const auto& stages) {
        using T = decltype(element_type(stages));
        stages.widen(n, at<T>(mid), at<T>(rad), static_cast<T>(on_mid), static_cast<T>(on_rad), static_cast<T>(least),
                     at<T>(out));
    });
}

void magnitude(int element_size, int64_t n, Address weight, double least, Address out) {
    typed(element_size, [=](const auto& stages) {
        using T = decltype(element_type(stages));
        stages.magnitude(n, at<T>(weight), static_cast<T>(least), at<T>(out));
    });
}

void signed_sum(int element_size, int64_t n, Address a, Address b, Address weight, Address out) {
    typed(element_size, [=](const auto& stages) {
        using T = decltype(element_type(stages));
        stages.signed_sum(n, at<T>(a), at<T>(b), at<T>(weight), at<T>(out));
    });
}

void linear(int element_size, int64_t batch, int64_t n, int64_t m, Address mid, Address rad, Address weight,
            Address bias, Address out_mid, Address out_rad, Address state) {
    typed(element_size, [=](const auto& stages) {
        using T = decltype(element_type(stages));
        T *const to_mid = at<T>(out_mid), *const to_rad = at<T>(out_rad);
        stages.linear(batch, n, m, at<T>(mid), at<T>(rad), at<T>(weight), at<T>(bias), to_mid, to_rad);
        if (state) stages.relu(batch * m, to_mid, to_rad, to_mid, to_rad, at<uint8_t>(state), false);
    });
}

void linear_backward(int element_size, int64_t batch, int64_t m, int64_t n, Address mid, Address rad, Address state,
                     Address weight, Address out_mid, Address out_rad) {
    typed(element_size, [=](const auto& stages) {
        using T = decltype(element_type(stages));
        const T *from_mid = at<T>(mid), *from_rad = at<T>(rad);
        const std::unique_ptr<T[]> gated(state ? new T[2 * batch * m] : nullptr);
        if (state) {
            T *const to_mid = gated.get(), *const to_rad = to_mid + batch * m;
            stages.relu_backward(batch * m, from_mid, from_rad, at<uint8_t>(state), to_mid, to_rad, nullptr, false);
            from_mid = to_mid, from_rad = to_rad;
        }
        stages.linear_backward(batch, m, n, from_mid, from_rad, at<T>(weight), at<T>(out_mid), at<T>(out_rad));
    });
}

bool linear_many(int element_size, int64_t batch, int64_t n, int64_t m, const Widening& widening, Address mid,
                 Address rad, Address weight, int64_t row_stride, int64_t column_stride, Address bias, Address out_mid,
                 Address out_rad, Address state) {
    bool done = false;
    typed(element_size, [&](const auto& stages) {
        using T = decltype(element_type(stages));
        const auto outward = outward_of<T>(widening);
        done = stages.linear_many(batch, n, m, outward ? &*outward : nullptr, at<T>(mid), at<T>(rad), at<T>(weight),
                                  row_stride, column_stride, at<T>(bias), at<T>(out_mid), at<T>(out_rad),
                                  at<uint8_t>(state));
    });
    return done;
}

bool linear_backward_many(int element_size, int64_t batch, int64_t m, int64_t n, const Widening& widening, Address mid,
                          Address rad, Address state, Address weight, int64_t row_stride, int64_t column_stride,
                          Address out_mid, Address out_rad) {
    bool done = false;
    typed(element_size, [&](const auto& stages) {
        using T = decltype(element_type(stages));
        const auto outward = outward_of<T>(widening);
        done = stages.linear_backward_many(batch, m, n, outward ? &*outward : nullptr, at<T>(mid), at<T>(rad),
                                           at<uint8_t>(state), at<T>(weight), row_stride, column_stride, at<T>(out_mid),
                                           at<T>(out_rad));
    });
    return done;
}

void linear_adjoint(int element_size, bool many, int64_t batch, int64_t n, int64_t m, Address mid, Address rad,
                    Address weight, Address state, Address mid_grad, Address rad_grad, Address out_mid, Address out_rad,
                    Address out_weight, bool add_weight, Address out_bias, bool add_bias) {
    typed(element_size, [=](const auto& stages) {
        using T = decltype(element_type(stages));
        const T *of_mid = at<T>(mid_grad), *of_rad = at<T>(rad_grad);
        const std::unique_ptr<T[]> gated(state ? new T[2 * batch * m] : nullptr);
        if (state) {
            T *const to_mid = gated.get(), *const to_rad = to_mid + batch * m;
            stages.gate(batch * m, of_mid, of_rad, at<uint8_t>(state), to_mid, to_rad);
            of_mid = to_mid, of_rad = to_rad;
        }
        if (out_weight)
            stages.linear_weight(batch, m, n, of_mid, of_rad, at<T>(mid), at<T>(rad), at<T>(weight), at<T>(out_weight),
                                 add_weight);
        if (T* const bias = at<T>(out_bias)) {
            for (int64_t i = 0; i < m && !add_bias; ++i) bias[i] = T(0);
            for (int64_t s = 0; s < batch && of_mid; ++s)
                for (int64_t i = 0; i < m; ++i) bias[i] += of_mid[s * m + i];
        }
        if (out_rad)
            linear_backward_product(stages, many, batch, m, n, of_mid, of_rad, at<T>(weight), at<T>(out_mid),
                                    at<T>(out_rad));
    });
}

void linear_backward_adjoint(int element_size, bool many, int64_t batch, int64_t m, int64_t n, Address mid, Address rad,
                             Address weight, Address state, Address mid_grad, Address rad_grad, Address out_mid,
                             Address out_rad, Address out_weight, bool add) {
    typed(element_size, [=](const auto& stages) {
        using T = decltype(element_type(stages));
        const int64_t size = batch * m;
        const T *box_mid = at<T>(mid), *box_rad = at<T>(rad), *of_mid = at<T>(mid_grad), *of_rad = at<T>(rad_grad);
        const std::unique_ptr<T[]> gated(state ? new T[2 * size] : nullptr);
        const std::unique_ptr<uint8_t[]> gate(state ? new uint8_t[2 * ((size + 7) / 8)] : nullptr);
        if (state) {
            T *const to_mid = gated.get(), *const to_rad = to_mid + size;
            stages.relu_backward(size, box_mid, box_rad, at<uint8_t>(state), to_mid, to_rad, gate.get(), false);
            box_mid = to_mid, box_rad = to_rad;
        }
        if (out_weight)  // the roles of input and output gradient are exchanged
            stages.linear_weight(batch, m, n, box_mid, box_rad, of_mid, of_rad, at<T>(weight), at<T>(out_weight), add);
        if (!out_rad) return;
        T *const to_mid = at<T>(out_mid), *const to_rad = at<T>(out_rad);
        linear_product(stages, many, batch, n, m, of_mid, of_rad, at<T>(weight), to_mid, to_rad);
        if (state) stages.gate(size, of_mid ? to_mid : nullptr, to_rad, gate.get(), to_mid, to_rad);
    });
}

Conv2d conv2d_of(const Geometry& g) {
    Conv2d shape{g[0], g[1], g[2], g[3], g[4], g[5], g[6], {}, {}, {}, {}, {}};
    const auto copy = [&g](int first, int count, int64_t* to) { std::copy_n(g.begin() + first, count, to); };
    copy(7, 2, shape.kernel);
    copy(9, 2, shape.stride);
    copy(11, 2, shape.padding);
    copy(13, 2, shape.dilation);
    copy(15, 4, shape.weight_strides);
    return shape;
}

bool conv2d_then(int element_size, const Geometry& geometry, const Widening& widening, Address mid, Address rad,
                 Address weight, Address bias, Address out_mid, Address out_rad, Epilogue after) {
    bool done = false;
    typed(element_size, [&](const auto& stages) {
        using T = decltype(element_type(stages));
        const auto outward = outward_of<T>(widening);
        done = stages.conv2d(conv2d_of(geometry), outward ? &*outward : nullptr, at<T>(mid), at<T>(rad), at<T>(weight),
                             at<T>(bias), at<T>(out_mid), at<T>(out_rad), after);
    });
    return done;
}

bool conv2d_backward_then(int element_size, const Geometry& geometry, const Widening& widening, Address mid,
                          Address rad, Address state, Address weight, Address out_mid, Address out_rad,
                          Epilogue after) {
    bool done = false;
    typed(element_size, [&](const auto& stages) {
        using T = decltype(element_type(stages));
        const auto outward = outward_of<T>(widening);
        done = stages.conv2d_backward(conv2d_of(geometry), outward ? &*outward : nullptr, at<T>(mid), at<T>(rad),
                                      at<uint8_t>(state), at<T>(weight), at<T>(out_mid), at<T>(out_rad), after);
    });
    return done;
}

Epilogue relu_into(Address state) {
    return {state ? Epilogue::relu : Epilogue::none, nullptr, at<uint8_t>(state)};
}

Epilogue relu_backward_at(Address state, Address gate) {
    if (!state) return {};
    return {Epilogue::relu_backward, at<uint8_t>(state), at<uint8_t>(gate)};
}

bool conv2d(int element_size, const Geometry& geometry, const Widening& widening, Address mid, Address rad,
            Address weight, Address bias, Address out_mid, Address out_rad, Address state) {
    return conv2d_then(element_size, geometry, widening, mid, rad, weight, bias, out_mid, out_rad, relu_into(state));
}

bool conv2d_backward(int element_size, const Geometry& geometry, const Widening& widening, Address mid, Address rad,
                     Address state, Address weight, Address out_mid, Address out_rad) {
    return conv2d_backward_then(element_size, geometry, widening, mid, rad, state, weight, out_mid, out_rad, {});
}

void conv2d_weight(int element_size, const Geometry& geometry, Address grad_mid, Address grad_rad, Address mid,
                   Address rad, Address weight, Address out) {
    typed(element_size, [&](const auto& stages) {
        using T = decltype(element_type(stages));
        stages.conv2d_weight(conv2d_of(geometry), at<T>(grad_mid), at<T>(grad_rad), at<T>(mid), at<T>(rad),
                             at<T>(weight), at<T>(out));
    });
}

int64_t conv2d_roundings(int element_size, const Geometry& geometry, bool backward) {
    int64_t most = 0;
    typed(element_size, [&](const auto& stages) { most = stages.conv2d_roundings(conv2d_of(geometry), backward); });
    return most;
}

void matmul(int element_size, int64_t batch, int64_t m, int64_t k, int64_t n, Address a_mid, Address a_rad,
            Address b_mid, Address b_rad, Address out_mid, Address out_rad) {
    typed(element_size, [=](const auto& stages) {
        using T = decltype(element_type(stages));
        stages.matmul(batch, m, k, n, at<T>(a_mid), at<T>(a_rad), at<T>(b_mid), at<T>(b_rad), at<T>(out_mid),
                      at<T>(out_rad));
    });
}

void matmul_backward(int element_size, int64_t batch, int64_t m, int64_t k, int64_t n, Address mid_grad,
                     Address rad_grad, Address a_mid, Address a_rad, Address b_mid, Address b_rad, Address a_mid_grad,
                     Address a_rad_grad, Address b_mid_grad, Address b_rad_grad) {
    typed(element_size, [=](const auto& stages) {
        using T = decltype(element_type(stages));
        stages.matmul_backward(batch, m, k, n, at<T>(mid_grad), at<T>(rad_grad), at<T>(a_mid), at<T>(a_rad),
                               at<T>(b_mid), at<T>(b_rad), at<T>(a_mid_grad), at<T>(a_rad_grad), at<T>(b_mid_grad),
                               at<T>(b_rad_grad));
    });
}

void transpose(int element_size, int64_t batch, int64_t rows, int64_t columns, Address from, Address to) {
    typed(element_size, [=](const auto& stages) {
        using T = decltype(element_type(stages));
        stages.transpose(batch, rows, columns, at<T>(from), at<T>(to));
    });
}

}  // namespace pyxai_bounds
