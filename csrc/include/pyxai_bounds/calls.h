// The stages of the instruction set in use, on arrays given by address and by the size of their elements: what Python
// and chains call. Addresses come from Python as integers; 0 where a stage allows an array to be absent.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "pyxai_bounds/stages.h"

namespace pyxai_bounds {

using std::int64_t;
using std::uint8_t;
using Address = std::uintptr_t;

// The stages compiled for one instruction set.
struct Level {
    const char* name;
    Stages<float> float32;
    Stages<double> float64;
};

// Those that this processor runs, best first.
const std::vector<Level>& levels();
extern std::atomic<const Level*> active;
void set_level(const std::string& name);

// How many threads a large stage uses.
int threads();

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// Calls `run` with the stages of the element type that has this size.
template <class Run>
void typed(int element_size, Run run) {
    const Level& level = *active.load(std::memory_order_relaxed);
    if (element_size == sizeof(float))
        run(level.float32);
    else if (element_size == sizeof(double))
        run(level.float64);
    else
        throw std::invalid_argument("Elements must be float32 or float64.");
}

template <class T>
T element_type(const Stages<T>&);

// The numbers of a Conv2d in order.
using Geometry = std::array<int64_t, 19>;
Conv2d conv2d_of(const Geometry& numbers);

// How results round outward: the factors of `widen` in pyxai_bounds/rounding.py and the address of the radii's bias.
// Absent where results round to nearest.
using Widening = std::optional<std::tuple<double, double, double, Address>>;

// Do the tiles read and write packed bits of so many outputs? They do so in whole bytes for each register of outputs.
bool packs(int element_size, int64_t outputs);

void relu(int element_size, int64_t n, Address mid, Address rad, Address out_mid, Address out_rad, Address state,
          bool outward);
void relu_backward(int element_size, int64_t n, Address mid, Address rad, Address state, Address out_mid,
                   Address out_rad, Address gate, bool outward);
void gate(int element_size, int64_t n, Address mid, Address rad, Address bits, Address out_mid, Address out_rad);
void scale_shift(int element_size, int64_t n, int64_t channels, int64_t inner, Address mid, Address rad, Address scale,
                 Address shift, Address scale_rad, Address shift_rad, double evaluated, double least, Address out_mid,
                 Address out_rad);
void mul(int element_size, int64_t n, Address a_mid, Address a_rad, Address b_mid, Address b_rad, Address out_mid,
         Address out_rad, double lost, double least);
void widen(int element_size, int64_t n, Address mid, Address rad, double on_mid, double on_rad, double least,
           Address out);
void magnitude(int element_size, int64_t n, Address weight, double least, Address out);
void signed_sum(int element_size, int64_t n, Address a, Address b, Address weight, Address out);

// With `state`, ReLU follows in place and writes its state there.
void linear(int element_size, int64_t batch, int64_t n, int64_t m, Address mid, Address rad, Address weight,
            Address bias, Address out_mid, Address out_rad, Address state);

// With `state`, ReLU' is applied to the box first.
void linear_backward(int element_size, int64_t batch, int64_t m, int64_t n, Address mid, Address rad, Address state,
                     Address weight, Address out_mid, Address out_rad);

bool linear_many(int element_size, int64_t batch, int64_t n, int64_t m, const Widening& widening, Address mid,
                 Address rad, Address weight, int64_t row_stride, int64_t column_stride, Address bias, Address out_mid,
                 Address out_rad, Address state);
bool linear_backward_many(int element_size, int64_t batch, int64_t m, int64_t n, const Widening& widening, Address mid,
                          Address rad, Address state, Address weight, int64_t row_stride, int64_t column_stride,
                          Address out_mid, Address out_rad);

// The derivative of `linear`, for a layer [m, n]; `state` is that of the ReLU after it, if there is one. An absent
// `mid_grad` stands for zeros, an absent output is not computed, and `out_mid` is written only where there is
// `mid_grad` or a state. `add_weight`, `add_bias`: add to what the outputs hold.
void linear_adjoint(int element_size, bool many, int64_t batch, int64_t n, int64_t m, Address mid, Address rad,
                    Address weight, Address state, Address mid_grad, Address rad_grad, Address out_mid, Address out_rad,
                    Address out_weight, bool add_weight, Address out_bias, bool add_bias);

// The derivative of `linear_backward`, for a layer [m, n]; absent arrays as in `linear_adjoint`.
void linear_backward_adjoint(int element_size, bool many, int64_t batch, int64_t m, int64_t n, Address mid, Address rad,
                             Address weight, Address state, Address mid_grad, Address rad_grad, Address out_mid,
                             Address out_rad, Address out_weight, bool add);

bool conv2d_then(int element_size, const Geometry& geometry, const Widening& widening, Address mid, Address rad,
                 Address weight, Address bias, Address out_mid, Address out_rad, Epilogue after);
bool conv2d_backward_then(int element_size, const Geometry& geometry, const Widening& widening, Address mid,
                          Address rad, Address state, Address weight, Address out_mid, Address out_rad, Epilogue after);
Epilogue relu_into(Address state);
Epilogue relu_backward_at(Address state, Address gate);
bool conv2d(int element_size, const Geometry& geometry, const Widening& widening, Address mid, Address rad,
            Address weight, Address bias, Address out_mid, Address out_rad, Address state);
bool conv2d_backward(int element_size, const Geometry& geometry, const Widening& widening, Address mid, Address rad,
                     Address state, Address weight, Address out_mid, Address out_rad);
void conv2d_weight(int element_size, const Geometry& geometry, Address grad_mid, Address grad_rad, Address mid,
                   Address rad, Address weight, Address out);
int64_t conv2d_roundings(int element_size, const Geometry& geometry, bool backward);
void matmul(int element_size, int64_t batch, int64_t m, int64_t k, int64_t n, Address a_mid, Address a_rad,
            Address b_mid, Address b_rad, Address out_mid, Address out_rad);
void matmul_backward(int element_size, int64_t batch, int64_t m, int64_t k, int64_t n, Address mid_grad,
                     Address rad_grad, Address a_mid, Address a_rad, Address b_mid, Address b_rad, Address a_mid_grad,
                     Address a_rad_grad, Address b_mid_grad, Address b_rad_grad);

// `batch` matrices [rows, columns], one after the other.
void transpose(int element_size, int64_t batch, int64_t rows, int64_t columns, Address from, Address to);

}  // namespace pyxai_bounds
