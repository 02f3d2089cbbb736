// The module pyxai_bounds._native, and the only place where Python meets C++. Arrays come in as addresses;
// pyxai_bounds/ops/native.py and cuda.py allocate them, check them, and keep them alive during the call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "pyxai_bounds/memory.h"
#include "pyxai_bounds/stages.h"
#ifdef PYXAI_BOUNDS_CUDA
#include "pyxai_bounds/cuda.h"
#include "pyxai_bounds/hopper.h"
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

namespace pyxai_bounds {
namespace {

using std::int64_t;
using std::uint8_t;
using Address = std::uintptr_t;  // 0 where the stage allows an array to be absent

// The stages compiled for one instruction set.
struct Level {
    const char* name;
    Stages<float> single;
    Stages<double> twice;
};

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

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// Calls `run` with the stages of the element type that has this size.
template <class Run>
void typed(int element_size, Run run) {
    const Level& level = *active.load(std::memory_order_relaxed);
    if (element_size == sizeof(float))
        run(level.single);
    else if (element_size == sizeof(double))
        run(level.twice);
    else
        throw std::invalid_argument("Elements must be float32 or float64.");
}

template <class T>
T element_type(const Stages<T>&);

// Do the tiles read and write packed bits? By whole bytes for each register of outputs.
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

// Then ReLU in place, if there is somewhere to write its state.
void linear(int element_size, int64_t batch, int64_t n, int64_t m, Address mid, Address rad, Address weight,
            Address bias, Address out_mid, Address out_rad, Address state) {
    typed(element_size, [=](const auto& stages) {
        using T = decltype(element_type(stages));
        T *const to_mid = at<T>(out_mid), *const to_rad = at<T>(out_rad);
        stages.linear(batch, n, m, at<T>(mid), at<T>(rad), at<T>(weight), at<T>(bias), to_mid, to_rad);
        if (state) stages.relu(batch * m, to_mid, to_rad, to_mid, to_rad, at<uint8_t>(state), false);
    });
}

// ReLU' first, if there is a state of it.
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

// The factors of pyxai_bounds/rounding.py's `widen`, and the radii's bias; nothing where results round to nearest.
using Widening = std::optional<std::tuple<double, double, double, Address>>;

template <class T>
std::optional<Outward<T>> outward_of(const Widening& widening) {
    if (!widening) return std::nullopt;
    const auto [on_mid, on_rad, least, bias] = *widening;
    return Outward<T>{static_cast<T>(on_mid), static_cast<T>(on_rad), static_cast<T>(least), at<T>(bias)};
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

// The derivative of `linear`, of a layer [m, n]: `state` is that of the ReLU after it, if there is one. `mid_grad` may
// be absent, for zeros; outputs may be, where nobody wants them, and `out_mid` is only written where there is
// `mid_grad` or a state. `add_…`: to what is there.
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

// The derivative of `linear_backward`, of a layer [m, n]. `mid_grad` may be absent, for zeros; outputs may be, where
// nobody wants them, and `out_mid` is only written where there is `mid_grad` or a state.
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

// The numbers of a Conv2d in order.
using Geometry = std::array<int64_t, 19>;

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

// Matrices [rows, columns], `batch` of them.
void transpose(int element_size, int64_t batch, int64_t rows, int64_t columns, Address from, Address to) {
    typed(element_size, [=](const auto& stages) {
        using T = decltype(element_type(stages));
        stages.transpose(batch, rows, columns, at<T>(from), at<T>(to));
    });
}

// Memory, as a buffer for Python; its owner gives it back.
class Memory {
  public:
    explicit Memory(int64_t bytes) : bytes_(static_cast<std::size_t>(bytes)), data_(take_memory(bytes_)) {}
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory() { give_memory(data_, bytes_); }
    Address start() const { return reinterpret_cast<Address>(data_); }
    py::buffer_info buffer() { return {static_cast<uint8_t*>(data_), static_cast<py::ssize_t>(bytes_)}; }

  private:
    std::size_t bytes_;
    void* data_;
};

// Layers and their backward passes, one after the other, and the derivative of them all. Values are numbered, first
// those that are given.
class Chain {
  public:
    enum class Kernel : int64_t { linear, linear_many, conv2d, transpose };
    // Of values their numbers, -1 for what is absent. `third` is a bias, or the state of ReLU'. What is not
    // differentiable lets no gradient through. `shape` is a Conv2d's; else batch, and features in and out, or rows and
    // columns of what is transposed.
    struct Step {
        Kernel kernel;
        bool backward, differentiable;
        int64_t mid, rad, weight, third, out_mid, out_rad, state, batch, n, m;
        Geometry shape;
        // Of ReLU' in the one step that reads the results, where this one applies it, and of ReLU' before this step,
        // where another has applied it: the state, and for a derivative the gate.
        int64_t next_state = -1, next_gate = -1, gate = -1;
        bool is_gated = false;
        bool hands_on = false;        // are the results read by the next step alone, a convolution like this one?
        std::size_t together = 1;     // as many steps from here on are convolutions of the same images
        int64_t weights = 0;          // their weights' elements
        std::vector<int64_t> last{};  // values that no later step reads

        std::array<int64_t, 4> reads() const { return {mid, rad, weight, third}; }
        std::array<int64_t, 3> makes() const { return {out_mid, out_rad, state}; }
        // Elements of a midpoint that is read, and of one that is made.
        int64_t elements_read() const { return elements(true); }
        int64_t elements_made() const { return elements(false); }
        int64_t elements(bool read) const {
            if (kernel == Kernel::transpose) return batch * n * m;
            if (kernel != Kernel::conv2d) return batch * (read ? n : m);
            return shape[0] * (read == backward ? shape[4] * shape[5] * shape[6] : shape[1] * shape[2] * shape[3]);
        }
    };

    using Steps = std::vector<Step>;

    // `steps`: the members of each in order, the shape without what does not belong to it. `sizes`: bytes of each
    // value. `taken` are returned; `kept` are read by the derivative, besides those that are given or taken.
    Chain(int element_size, const std::vector<std::vector<int64_t>>& steps, std::vector<int64_t> sizes, int64_t given,
          const std::vector<int64_t>& taken, const std::vector<int64_t>& kept)
        : element_size_(element_size), sizes_(std::move(sizes)), given_(given) {
        for (const std::vector<int64_t>& s : steps) {
            const auto kernel = static_cast<Kernel>(s.at(0));
            Step step{kernel,  s.at(1) != 0, s.at(2) != 0, s.at(3),  s.at(4),  s.at(5),  s.at(6),
                      s.at(7), s.at(8),      s.at(9),      s.at(10), s.at(11), s.at(12), {}};
            if (kernel == Kernel::conv2d)
                for (std::size_t i = 0; i < step.shape.size(); ++i) step.shape[i] = s.at(10 + i);
            steps_.push_back(std::move(step));
        }
        is_kept_.resize(sizes_.size());
        for (const int64_t value : kept) is_kept_[value] = true;
        for (auto step = steps_.begin(); step != steps_.end(); ++step) apply_next_relu(step, taken);
        for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) join_next(step.base() - 1, taken);
        places_.resize(sizes_.size());
        for (const bool are_kept : {true, false}) {
            for (std::size_t i = given_; i < sizes_.size(); ++i)
                if (is_kept_[i] == are_kept) places_[i] = size_, size_ += (sizes_[i] + 63) / 64 * 64;
            if (are_kept) kept_size_ = size_;
        }
        readers_.resize(sizes_.size());
        for (const Step& step : steps_)
            if (const auto reads = step.reads(); step.differentiable)
                for (auto value = reads.begin(); value != reads.end(); ++value)
                    if (*value >= 0 && std::find(reads.begin(), value, *value) == value) ++readers_[*value];
        std::vector<bool> read(sizes_.size());
        const auto note = [&](Step& step, int64_t value) {
            if (value >= given_ && !read[value]) read[value] = true, step.last.push_back(value);
        };
        for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) {
            for (const int64_t value : step->reads()) note(*step, value);
            for (const int64_t value : step->makes()) note(*step, value);
        }
    }

    // The places of values in a block that keeps them, and its size.
    const std::vector<int64_t>& places() const { return places_; }
    int64_t size() const { return is_small() ? size_ : kept_size_; }

    // One address per value, 0 for what stays in the block at `kept`, or nowhere, if that is 0 or has no place for it.
    void run(std::vector<Address> values, Address kept) const {
        const Memory block(!kept && is_small() ? size_ : 0);
        values.resize(sizes_.size());
        if (kept || is_small()) place(values, kept ? kept : block.start());
        std::vector<std::unique_ptr<Memory>> own(values.size());
        const auto make = [&](int64_t value) {
            if (value < 0 || values[value] != 0) return;
            own[value] = std::make_unique<Memory>(sizes_[value]);
            values[value] = own[value]->start();
        };
        for (auto step = steps_.begin(), next = step; step != steps_.end(); step = next) {
            next = step + (go_together(*step) ? step->together : 1);
            for (auto s = step; s != next; ++s) {
                const bool is_between = s->hands_on && s + 1 != next && !values[s->out_mid] && !values[s->out_rad];
                for (const int64_t made : s->makes())
                    if (!is_between || made == s->state) make(made);
            }
            next - step > 1 ? take_together(step, next, values) : take(*step, values);
            for (auto s = step; s != next; ++s)
                for (const int64_t value : s->last) own[value].reset();
        }
    }

    // After a `run` that kept its block: from the gradients of results, one address per value, 0 where there is none,
    // to those of the given values for which `wanted` has an address. Returns which of these have been written; the
    // others are zeros. `overwrite`: nobody will read the block again, so that gradients may take its values' places.
    std::vector<bool> adjoint(std::vector<Address> values, Address kept, bool overwrite, std::vector<Address> grads,
                              const std::vector<Address>& wanted) const {
        values.resize(sizes_.size());
        grads.resize(sizes_.size());
        place(values, kept);
        std::vector<bool> needed(values.size());
        const auto is_needed = [&needed](int64_t value) { return value >= 0 && needed[value]; };
        for (int64_t i = 0; i < given_; ++i) needed[i] = wanted[i] != 0;
        for (const Step& s : steps_)
            if (s.differentiable &&
                (is_needed(s.mid) || is_needed(s.rad) || is_needed(s.weight) || (!s.backward && is_needed(s.third))))
                for (const int64_t made : {s.out_mid, s.out_rad})
                    if (made >= 0) needed[made] = true;
        Gradients gradients{*this, overwrite ? &values : nullptr, wanted, grads};
        for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) {
            if (step->differentiable && needed[step->out_mid]) differentiate(*step, values, needed, gradients);
            for (const int64_t made : {step->out_mid, step->out_rad})
                if (made >= 0) gradients.own[made].reset();
        }
        std::vector<bool> written;
        for (int64_t i = 0; i < given_; ++i) written.push_back(grads[i] != 0);
        return written;
    }

  private:
    // The gradients so far; those of the given values are summed up where Python wants them.
    struct Gradients {
        const Chain& chain;
        const std::vector<Address>* overwritten;  // the values, if they may be
        const std::vector<Address>& wanted;
        std::vector<Address>& of;
        const Memory block{chain.is_small() ? chain.size_ : 0};
        std::vector<std::unique_ptr<Memory>> own = std::vector<std::unique_ptr<Memory>>(of.size());

        Address target(int64_t value) {
            if (value < chain.given_) return wanted[value];
            if (chain.is_small()) return block.start() + chain.places_[value];
            if (overwritten && chain.is_kept_[value] && chain.readers_[value] == 1) return (*overwritten)[value];
            if (!own[value]) own[value] = std::make_unique<Memory>(chain.sizes_[value]);
            return own[value]->start();
        }
    };

    // A part of a value's gradient, of `count` elements. It is computed where the gradient belongs if it is the first
    // and may be, else apart.
    class Part {
      public:
        Part(Gradients& gradients, int64_t value, int64_t count, bool may_be_first)
            : gradients_(gradients), value_(value), count_(count), may_be_first_(may_be_first) {}
        Address start() {
            if (start_) return start_;
            if (may_be_first_ && !gradients_.of[value_]) return start_ = gradients_.target(value_);
            return start_ = apart_.emplace(count_ * gradients_.chain.element_size_).start();
        }
        // Brings it where it belongs: to what came before, if anything did.
        void add() {
            const Address to = gradients_.target(value_);
            if (start_ != to)
                typed(gradients_.chain.element_size_, [&, before = gradients_.of[value_]](const auto& stages) {
                    using T = decltype(element_type(stages));
                    const T *const sum = at<T>(before), *const more = at<T>(start_);
                    for (int64_t i = 0; i < count_; ++i) at<T>(to)[i] = sum ? sum[i] + more[i] : more[i];
                });
            gradients_.of[value_] = to;
        }

      private:
        Gradients& gradients_;
        int64_t value_, count_;
        bool may_be_first_;
        std::optional<Memory> apart_;
        Address start_ = 0;
    };

    // Boxes apart from the others.
    struct Boxes {
        Memory memory;
        Address mid, rad;
        Boxes(int64_t count, int element_size)
            : memory(2 * count * element_size), mid(memory.start()), rad(mid + count * element_size) {}
    };

    // What is small has one block: a block for each value would take longer than their memory is worth.
    bool is_small() const { return size_ <= static_cast<int64_t>(least_kept); }

    // The convolution that alone reads a convolution's results, as its box, or the end.
    Steps::iterator only_reader(Steps::iterator step, const std::vector<int64_t>& taken) {
        const auto is_made = [step](int64_t value) { return value == step->out_mid || value == step->out_rad; };
        const auto reads_it = [&](const Step& other) {
            const auto reads = other.reads();
            return std::any_of(reads.begin(), reads.end(), is_made);
        };
        const auto reader = std::find_if(step + 1, steps_.end(), reads_it);
        const bool is_one = step->kernel == Kernel::conv2d && reader != steps_.end() &&
                            reader->kernel == Kernel::conv2d && reader->mid == step->out_mid &&
                            reader->rad == step->out_rad && std::none_of(reader + 1, steps_.end(), reads_it) &&
                            std::none_of(taken.begin(), taken.end(), is_made);
        return is_one ? reader : steps_.end();
    }

    // How convolutions in a row go together; the steps after this one know already. Each image passes all of their
    // weights, so that these must stay in a second-level cache, and so must what an image leaves there between two
    // steps.
    void join_next(Steps::iterator step, const std::vector<int64_t>& taken) {
        const Geometry& shape = step->shape;
        const auto next = step + 1;
        if (step->kernel != Kernel::conv2d) return;
        step->weights = shape[1] * shape[4] * shape[7] * shape[8];
        if (next == steps_.end() || next->kernel != Kernel::conv2d || next->shape[0] != shape[0] ||
            next->together == most_conv2d_steps || (step->weights + next->weights) * element_size_ > in_cache ||
            2 * next->elements_read() / shape[0] * element_size_ > in_cache / 2)
            return;
        step->together = next->together + 1;
        step->weights += next->weights;
        step->hands_on = only_reader(step, taken) == next;
    }

    static constexpr int64_t in_cache = 1 << 20;

    // Does each thread take images through the convolutions from here on? There must be as many for each, or nearly,
    // and bits are then read and written by the tiles alone.
    bool go_together(const Step& first) const {
        const auto suits = [this](const Step& s) {
            const bool has_bits = s.backward ? s.third >= 0 && !s.is_gated : s.state >= 0;
            return (!has_bits || packs(element_size_, s.shape[4])) &&
                   (s.next_state < 0 || packs(element_size_, s.shape[1]));
        };
        const int64_t images = first.shape[0], team = threads(), idle = (team - images % team) % team;
        return first.together > 1 && images >= (team > 1 ? 8 * team : 2) && 25 * idle <= images &&
               std::all_of(&first, &first + first.together, suits);
    }

    void take_together(Steps::const_iterator begin, Steps::const_iterator end,
                       const std::vector<Address>& values) const {
        const auto value = [&](int64_t number) { return number < 0 ? Address(0) : values[number]; };
        typed(element_size_, [&](const auto& stages) {
            using T = decltype(element_type(stages));
            std::vector<Conv2dStep<T>> steps;
            for (auto s = begin; s != end; ++s) {
                const Address third = value(s->third);
                const Epilogue after = s->backward ? relu_backward_at(value(s->next_state), value(s->next_gate))
                                                   : relu_into(value(s->state));
                steps.push_back({s->backward, conv2d_of(s->shape), at<T>(value(s->mid)), at<T>(value(s->rad)),
                                 at<T>(value(s->weight)), at<T>(s->backward ? 0 : third),
                                 at<uint8_t>(s->backward && !s->is_gated ? third : 0), at<T>(value(s->out_mid)),
                                 at<T>(value(s->out_rad)), after});
            }
            stages.conv2d_steps(static_cast<int64_t>(steps.size()), steps.data());
        });
    }

    // ReLU' between two backward passes of convolutions is applied before the first one's results leave the registers,
    // if nobody else reads them. A derivative then finds the gated box, and the gate beside it.
    void apply_next_relu(Steps::iterator step, const std::vector<int64_t>& taken) {
        const auto reader = only_reader(step, taken);
        if (!step->backward || reader == steps_.end() || !reader->backward || reader->third < 0 ||
            std::any_of(step, reader, [&](const Step& other) { return other.state == reader->third; }))
            return;
        step->next_state = reader->third;
        reader->is_gated = true;
        if (!reader->differentiable) return;
        step->next_gate = reader->gate = static_cast<int64_t>(sizes_.size());
        sizes_.push_back(sizes_[reader->third]);
        is_kept_.push_back(true);
    }

    // Calls run(state), and ReLU after it where the kernel has none.
    template <class F>
    void rectified(int64_t size, int64_t outputs, Address out_mid, Address out_rad, Address state, F run) const {
        const bool fused = packs(element_size_, outputs);
        run(fused ? state : 0);
        if (state && !fused) relu(element_size_, size, out_mid, out_rad, out_mid, out_rad, state, false);
    }

    // Calls run(mid, rad, state), and ReLU' before it where the kernel has none.
    template <class F>
    void gated(int64_t size, int64_t outputs, Address mid, Address rad, Address state, F run) const {
        if (!state || packs(element_size_, outputs)) return run(mid, rad, state);
        const Boxes boxes(size, element_size_);
        relu_backward(element_size_, size, mid, rad, state, boxes.mid, boxes.rad, 0, false);
        run(boxes.mid, boxes.rad, Address(0));
    }

    // Calls run(epilogue), and ReLU' after it where the kernel has none.
    template <class F>
    void gated_after(int64_t size, int64_t outputs, Address out_mid, Address out_rad, Address state, Address made,
                     F run) const {
        const bool fused = state && packs(element_size_, outputs);
        run(relu_backward_at(fused ? state : 0, made));
        if (state && !fused) relu_backward(element_size_, size, out_mid, out_rad, state, out_mid, out_rad, made, false);
    }

    void take(const Step& s, const std::vector<Address>& values) const {
        const auto value = [&](int64_t number) { return number < 0 ? Address(0) : values[number]; };
        const Address mid = value(s.mid), rad = value(s.rad), weight = value(s.weight), third = value(s.third);
        const Address out_mid = value(s.out_mid), out_rad = value(s.out_rad), state = value(s.state);
        switch (s.kernel) {
            case Kernel::linear:
                if (s.backward)
                    return linear_backward(element_size_, s.batch, s.n, s.m, mid, rad, third, weight, out_mid, out_rad);
                return linear(element_size_, s.batch, s.n, s.m, mid, rad, weight, third, out_mid, out_rad, state);
            case Kernel::linear_many:
                if (s.backward)
                    return gated(s.elements_read(), s.n, mid, rad, third,
                                 [&](Address of_mid, Address of_rad, Address bits) {
                                     linear_backward_many(element_size_, s.batch, s.n, s.m, {}, of_mid, of_rad, bits,
                                                          weight, s.m, 1, out_mid, out_rad);
                                 });
                return rectified(s.elements_made(), s.m, out_mid, out_rad, state, [&](Address bits) {
                    linear_many(element_size_, s.batch, s.n, s.m, {}, mid, rad, weight, s.n, 1, third, out_mid, out_rad,
                                bits);
                });
            case Kernel::conv2d:
                if (s.backward)
                    return gated(s.elements_read(), s.shape[4], mid, rad, s.is_gated ? 0 : third,
                                 [&](Address of_mid, Address of_rad, Address bits) {
                                     gated_after(s.elements_made(), s.shape[1], out_mid, out_rad, value(s.next_state),
                                                 value(s.next_gate), [&](Epilogue after) {
                                                     conv2d_backward_then(element_size_, s.shape, {}, of_mid, of_rad,
                                                                          bits, weight, out_mid, out_rad, after);
                                                 });
                                 });
                return rectified(s.elements_made(), s.shape[4], out_mid, out_rad, state, [&](Address bits) {
                    conv2d(element_size_, s.shape, {}, mid, rad, weight, third, out_mid, out_rad, bits);
                });
            case Kernel::transpose:
                transpose(element_size_, s.batch, s.n, s.m, mid, out_mid);
        }
    }

    // What has a place in the block lies there. Of a block that keeps few values the others have none.
    void place(std::vector<Address>& values, Address block) const {
        for (std::size_t i = given_; i < values.size(); ++i)
            if (values[i] == 0 && (is_small() || is_kept_[i])) values[i] = block + places_[i];
    }

    void differentiate(const Step& s, const std::vector<Address>& values, const std::vector<bool>& needed,
                       Gradients& gradients) const {
        const Address of_mid = gradients.of[s.out_mid], of_rad = s.out_rad < 0 ? 0 : gradients.of[s.out_rad];
        if (!of_mid && !of_rad) return;
        if (s.kernel == Kernel::transpose) {
            Part part(gradients, s.mid, s.elements_read(), true);
            transpose(element_size_, s.batch, s.m, s.n, of_mid, part.start());
            return part.add();
        }
        const int64_t state = s.backward ? s.third : s.state;
        const bool has_mid = of_mid || state >= 0, has_rad = of_rad || state >= 0;
        const bool apart = s.mid == s.weight || s.rad == s.weight;
        Part mid(gradients, s.mid, s.elements_read(), needed[s.mid] && !apart);
        Part rad(gradients, s.rad, s.elements_read(), needed[s.rad] && !apart && s.rad != s.mid);
        const bool box = needed[s.mid] || needed[s.rad];
        const bool convolves = s.kernel == Kernel::conv2d;  // which writes midpoints in any case
        const auto run = !convolves   ? &Chain::differentiate_linear
                         : s.backward ? &Chain::differentiate_conv2d_backward
                                      : &Chain::differentiate_conv2d;
        (this->*run)(s, values, of_mid, of_rad, state < 0 ? 0 : values[state],
                     box && (has_mid || convolves) ? mid.start() : 0, box ? rad.start() : 0, gradients);
        if (needed[s.mid] && has_mid) mid.add();
        if (needed[s.rad] && has_rad) rad.add();
    }

    // A gradient of so many elements, or zeros in its place.
    class Filled {
      public:
        Filled(Address given, int64_t bytes) : zeros_(given ? 0 : bytes), start_(given ? given : zeros_.start()) {
            if (!given) std::fill_n(at<char>(start_), bytes, 0);
        }
        Address start() const { return start_; }

      private:
        const Memory zeros_;
        Address start_;
    };

    void differentiate_linear(const Step& s, const std::vector<Address>& values, Address of_mid, Address of_rad,
                              Address state, Address to_mid, Address to_rad, Gradients& gradients) const {
        const Filled filled(of_rad, s.elements_made() * element_size_);
        const Address to_weight = gradients.wanted[s.weight];
        const bool many = s.kernel == Kernel::linear_many, add = gradients.of[s.weight] != 0;
        if (s.backward) {
            linear_backward_adjoint(element_size_, many, s.batch, s.n, s.m, values[s.mid], values[s.rad],
                                    values[s.weight], state, of_mid, filled.start(), to_mid, to_rad, to_weight, add);
        } else {
            const Address to_bias = s.third >= 0 && (of_mid || state) ? gradients.wanted[s.third] : 0;
            linear_adjoint(element_size_, many, s.batch, s.n, s.m, values[s.mid], values[s.rad], values[s.weight],
                           state, of_mid, filled.start(), to_mid, to_rad, to_weight, add, to_bias,
                           to_bias && gradients.of[s.third]);
            if (to_bias) gradients.of[s.third] = to_bias;
        }
        if (to_weight) gradients.of[s.weight] = to_weight;
    }

    void differentiate_conv2d(const Step& s, const std::vector<Address>& values, Address of_mid, Address of_rad,
                              Address state, Address to_mid, Address to_rad, Gradients& gradients) const {
        const int64_t made = s.elements_made(), bytes = made * element_size_;
        const Boxes gated(state ? made : 0, element_size_);
        if (state) {
            const Filled rad(of_rad, bytes);
            gate(element_size_, made, of_mid, rad.start(), state, gated.mid, gated.rad);
            of_mid = gated.mid, of_rad = gated.rad;
        }
        add_to_weight(s, values, of_mid, of_rad, values[s.mid], values[s.rad], gradients);
        if (s.third >= 0 && of_mid) add_to_bias(s, of_mid, gradients);
        if (!to_rad) return;
        const Filled mid(of_mid, bytes), rad(of_rad, bytes);
        conv2d_backward(element_size_, s.shape, {}, mid.start(), rad.start(), 0, values[s.weight], to_mid, to_rad);
    }

    void differentiate_conv2d_backward(const Step& s, const std::vector<Address>& values, Address of_mid,
                                       Address of_rad, Address state, Address to_mid, Address to_rad,
                                       Gradients& gradients) const {
        const int64_t read = s.elements_read(), bytes = s.elements_made() * element_size_;
        const bool again = state && !s.is_gated;
        Address box_mid = values[s.mid], box_rad = values[s.rad], applied = s.is_gated ? values[s.gate] : 0;
        const Boxes gated(again ? read : 0, element_size_);
        const Memory bits(again ? 2 * ((read + 7) / 8) : 0);
        if (again) {
            relu_backward(element_size_, read, box_mid, box_rad, state, gated.mid, gated.rad, bits.start(), false);
            box_mid = gated.mid, box_rad = gated.rad, applied = bits.start();
        }
        add_to_weight(s, values, box_mid, box_rad, of_mid, of_rad, gradients);  // in exchanged roles
        if (!to_rad) return;
        const Filled mid(of_mid, bytes), rad(of_rad, bytes);
        const bool fused = applied && packs(element_size_, s.shape[4]);
        conv2d_then(element_size_, s.shape, {}, mid.start(), rad.start(), values[s.weight], 0, to_mid, to_rad,
                    fused ? Epilogue{Epilogue::gate, at<uint8_t>(applied), nullptr} : Epilogue{});
        if (applied && !fused) gate(element_size_, read, to_mid, to_rad, applied, to_mid, to_rad);
    }

    // The part of a convolution of `mid`, `rad`, whose results have these gradients.
    void add_to_weight(const Step& s, const std::vector<Address>& values, Address of_mid, Address of_rad, Address mid,
                       Address rad, Gradients& gradients) const {
        if (!gradients.wanted[s.weight]) return;
        const int64_t outputs = s.shape[4], channels = s.shape[1], taps = s.shape[7] * s.shape[8];
        // Written in the order of the indices; a weight may have its channels last.
        const bool turned = s.shape[16] == 1 && channels > 1 && taps > 1;
        Part part(gradients, s.weight, outputs * channels * taps, !turned);
        const bool has_mid = of_mid && mid, has_rad = of_rad && rad;
        conv2d_weight(element_size_, s.shape, has_mid ? of_mid : 0, has_rad ? of_rad : 0, has_mid ? mid : 0,
                      has_rad ? rad : 0, values[s.weight], part.start());
        if (!turned) return part.add();
        Part in_order(gradients, s.weight, outputs * channels * taps, true);
        transpose(element_size_, outputs, channels, taps, part.start(), in_order.start());
        in_order.add();
    }

    void add_to_bias(const Step& s, Address of_mid, Gradients& gradients) const {
        if (!gradients.wanted[s.third]) return;
        const int64_t outputs = s.shape[4], made = s.elements_made();
        Part part(gradients, s.third, outputs, true);
        typed(element_size_, [&](const auto& stages) {
            using T = decltype(element_type(stages));
            T* const sum = at<T>(part.start());
            std::fill_n(sum, outputs, T(0));
            for (int64_t i = 0; i < made; i += outputs)
                for (int64_t j = 0; j < outputs; ++j) sum[j] += at<T>(of_mid)[i + j];
        });
        part.add();
    }

    int element_size_;
    Steps steps_;
    std::vector<int64_t> sizes_, places_;
    std::vector<bool> is_kept_;
    std::vector<int> readers_;  // of each value, the differentiable steps that read it
    int64_t size_ = 0, kept_size_ = 0, given_;
};

// What Python objects look like to somebody who compares by identity alone: their classes, their attributes, and what
// the dictionaries and lists among these hold. No Python code runs and no reference is counted while two are compared,
// so that it takes a small fraction of the time that Python needs. See pyxai_bounds/watch.py.
class Snapshot {
  public:
    explicit Snapshot(const py::list& objects) {
        complete_ = walk(objects, [this](const void* word, PyObject* object) {
            words_.push_back(word);
            // An address proves identity only while its object lives. What cannot refer to others is kept alive here;
            // the rest is watched by the caller, who could not let go of it otherwise.
            if (object && !PyObject_IS_GC(object)) kept_.push_back(py::reinterpret_borrow<py::object>(object));
            return true;
        });
    }

    // Do they still look so?
    bool holds(const py::list& objects) const {
        std::size_t at = 0;
        return complete_ &&
               walk(objects, [&](const void* word, PyObject*) { return at < words_.size() && words_[at++] == word; }) &&
               at == words_.size();
    }

  private:
    // Calls visit(word, object or null) for everything seen; false as soon as a call returns false, or if there is
    // something whose contents cannot be seen this way.
    template <class Visit>
    static bool walk(const py::list& objects, Visit visit) {
        for (const py::handle object : objects) {
            const auto attributes = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(object.ptr(), nullptr));
            if (!attributes || !PyDict_CheckExact(attributes.ptr())) {
                PyErr_Clear();
                return false;
            }
            if (!visit(Py_TYPE(object.ptr()), nullptr) || !entries(attributes.ptr(), visit)) return false;
            Py_ssize_t at = 0;
            PyObject *name, *value;
            while (PyDict_Next(attributes.ptr(), &at, &name, &value)) {
                if (PyDict_Check(value)) {
                    // A dictionary with an order of its own shows it to nobody but Python.
                    if (!PyDict_CheckExact(value) && PyDict_Size(value) > 0) return false;
                    if (!entries(value, visit)) return false;
                } else if (PyList_CheckExact(value) && PyList_GET_SIZE(value) <= many) {
                    const Py_ssize_t size = PyList_GET_SIZE(value);
                    if (!visit(reinterpret_cast<const void*>(size), nullptr)) return false;
                    for (Py_ssize_t i = 0; i < size; ++i)
                        if (!visit(PyList_GET_ITEM(value, i), PyList_GET_ITEM(value, i))) return false;
                }
            }
        }
        return true;
    }

    template <class Visit>
    static bool entries(PyObject* dictionary, Visit visit) {
        if (!visit(reinterpret_cast<const void*>(PyDict_Size(dictionary)), nullptr)) return false;
        Py_ssize_t at = 0;
        PyObject *key, *value;
        while (PyDict_Next(dictionary, &at, &key, &value))
            if (!visit(key, key) || !visit(value, value)) return false;
        return true;
    }

    static constexpr Py_ssize_t many = 1000;  // longer lists are somebody's data; watch.py compares them as a whole
    std::vector<const void*> words_;
    std::vector<py::object> kept_;
    bool complete_ = false;
};

#ifdef PYXAI_BOUNDS_CUDA
// What CUDA says is wrong, as an exception.
template <auto kernel>
struct Checked;
template <class... Arguments, const char* (*kernel)(Arguments...)>
struct Checked<kernel> {
    static void call(Arguments... arguments) {
        if (const char* const wrong = kernel(arguments...)) throw std::runtime_error(wrong);
    }
};
#endif

}  // namespace
}  // namespace pyxai_bounds

PYBIND11_MODULE(_native, m) {
    using namespace pyxai_bounds;
    m.doc() = "Interval kernels on arrays given by address; called by pyxai_bounds.ops.native and .cuda alone.";
    const py::call_guard<py::gil_scoped_release> no_gil;
    m.def("relu", &relu, no_gil);
    m.def("relu_backward", &relu_backward, no_gil);
    m.def("gate", &gate, no_gil);
    m.def("scale_shift", &scale_shift, no_gil);
    m.def("mul", &mul, no_gil);
    m.def("widen", &widen, no_gil);
    m.def("magnitude", &magnitude, no_gil);
    m.def("signed_sum", &signed_sum, no_gil);
    m.def("linear", &linear, no_gil);
    m.def("linear_backward", &linear_backward, no_gil);
    m.def("linear_adjoint", &linear_adjoint, no_gil);
    m.def("linear_backward_adjoint", &linear_backward_adjoint, no_gil);
    m.def("linear_many", &linear_many, no_gil);
    m.def("linear_backward_many", &linear_backward_many, no_gil);
    m.attr("most_remainders") = most_remainders;
    m.def("packs", &packs, "Whether linear layers and convolutions read and write packed bits of so many outputs.");
    m.def("conv2d", &conv2d, no_gil);
    m.def("conv2d_backward", &conv2d_backward, no_gil);
    m.def("conv2d_weight", &conv2d_weight, no_gil);
    m.def("conv2d_roundings", &conv2d_roundings,
          "How often in a row a sum of these kernels is rounded, at most, outward.");
    m.def("matmul", &matmul, no_gil);
    m.def("matmul_backward", &matmul_backward, no_gil);
    py::class_<Chain>(m, "Chain")
        .def(py::init<int, const std::vector<std::vector<int64_t>>&, std::vector<int64_t>, int64_t,
                      const std::vector<int64_t>&, const std::vector<int64_t>&>())
        .def_property_readonly("places", &Chain::places)
        .def_property_readonly("size", &Chain::size)
        .def("run", &Chain::run, no_gil)
        .def("adjoint", &Chain::adjoint, no_gil);
    py::class_<Memory>(m, "Memory", py::buffer_protocol())
        .def(py::init<int64_t>(), py::arg("bytes"))
        .def_buffer(&Memory::buffer);
    m.attr("least_kept") = least_kept;
    m.attr("most_kept") = most_kept;
    m.attr("kept_bytes") = kept_bytes;
    m.def("memory_kept", &memory_kept, "Bytes of memory that wait for the next call.");
    py::class_<Snapshot>(m, "Snapshot")
        .def(py::init<const py::list&>(), py::arg("objects"))
        .def("holds", &Snapshot::holds, py::arg("objects"));

#ifdef PYXAI_BOUNDS_CUDA
    m.def("cuda_check", &Checked<&cuda_check>::call, no_gil);
    m.def("cuda_convolve", &Checked<&cuda_convolve>::call, no_gil);
    m.def("cuda_matmul", &Checked<&cuda_matmul>::call, no_gil);
    m.def("cuda_matmul_backward", &Checked<&cuda_matmul_backward>::call, no_gil);
    m.def("cuda_relu", &Checked<&cuda_relu>::call, no_gil);
    m.def("cuda_relu_backward", &Checked<&cuda_relu_backward>::call, no_gil);
    m.def("cuda_scale_shift", &Checked<&cuda_scale_shift>::call, no_gil);
    m.def("cuda_mul", &Checked<&cuda_mul>::call, no_gil);
#endif
#ifdef PYXAI_BOUNDS_HOPPER
    m.def("hopper_check", &Checked<&hopper_check>::call, no_gil);
    m.def("hopper_convolve", &Checked<&hopper_convolve>::call, no_gil);
    m.def("hopper_convolve_weight", &Checked<&hopper_convolve_weight>::call, no_gil);
#endif
    m.def("threads", &threads, "The number of threads that a large stage would use.");
    m.def("level", [] { return active.load()->name; }, "The instruction-set level in use.");
    m.def("set_level", &set_level, py::arg("name"), "Use one of levels() from now on, in all threads.");
    m.def(
        "levels",
        [] {
            std::vector<std::string> names;
            for (const Level& level : levels()) names.emplace_back(level.name);
            return names;
        },
        "The instruction-set levels that this processor runs, best first.");
}
