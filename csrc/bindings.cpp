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
        if (__builtin_cpu_supports("avx2"))
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

bool conv2d(int element_size, const Geometry& geometry, const Widening& widening, Address mid, Address rad,
            Address weight, Address bias, Address out_mid, Address out_rad, Address state) {
    bool done = false;
    typed(element_size, [&](const auto& stages) {
        using T = decltype(element_type(stages));
        const auto outward = outward_of<T>(widening);
        done = stages.conv2d(conv2d_of(geometry), outward ? &*outward : nullptr, at<T>(mid), at<T>(rad), at<T>(weight),
                             at<T>(bias), at<T>(out_mid), at<T>(out_rad), at<uint8_t>(state));
    });
    return done;
}

bool conv2d_backward(int element_size, const Geometry& geometry, const Widening& widening, Address mid, Address rad,
                     Address state, Address weight, Address out_mid, Address out_rad) {
    bool done = false;
    typed(element_size, [&](const auto& stages) {
        using T = decltype(element_type(stages));
        const auto outward = outward_of<T>(widening);
        done = stages.conv2d_backward(conv2d_of(geometry), outward ? &*outward : nullptr, at<T>(mid), at<T>(rad),
                                      at<uint8_t>(state), at<T>(weight), at<T>(out_mid), at<T>(out_rad));
    });
    return done;
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

// Linear layers and their backward passes on a few boxes, one after the other. Values are numbered: those that Python
// gives or takes come with an address at each run, all others lie in memory that is gone afterwards.
class Chain {
  public:
    // {is it a backward pass, batch, features in, features out, mid, rad, weight, bias or state, out mid, out rad,
    // state}: of values their numbers, -1 for what is absent.
    using Step = std::array<int64_t, 11>;

    Chain(int element_size, std::vector<Step> steps, const std::vector<int64_t>& bytes)
        : element_size_(element_size), steps_(std::move(steps)) {
        for (const int64_t size : bytes) {
            at_.push_back(size_);
            size_ += (size + 63) / 64 * 64;
        }
    }

    // One address per value, 0 for what stays here.
    void run(std::vector<Address> values) const {
        const std::unique_ptr<char[]> own(new char[size_ + 64]);
        const Address start = (reinterpret_cast<Address>(own.get()) + 63) / 64 * 64;
        for (std::size_t i = 0; i < values.size(); ++i)
            if (values[i] == 0) values[i] = start + at_[i];
        const auto value = [&](int64_t number) { return number < 0 ? Address(0) : values[number]; };
        for (const auto& [backward, batch, n, m, mid, rad, weight, third, out_mid, out_rad, state] : steps_) {
            if (backward)
                linear_backward(element_size_, batch, n, m, value(mid), value(rad), value(third), value(weight),
                                value(out_mid), value(out_rad));
            else
                linear(element_size_, batch, n, m, value(mid), value(rad), value(weight), value(third), value(out_mid),
                       value(out_rad), value(state));
        }
    }

  private:
    int element_size_;
    std::vector<Step> steps_;
    std::vector<int64_t> at_;
    int64_t size_ = 0;
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

// Memory of a result, as a buffer; its owner gives it back.
class Memory {
  public:
    explicit Memory(int64_t bytes) : bytes_(static_cast<std::size_t>(bytes)), data_(take_memory(bytes_)) {}
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory() { give_memory(data_, bytes_); }
    py::buffer_info buffer() { return {static_cast<uint8_t*>(data_), static_cast<py::ssize_t>(bytes_)}; }

  private:
    std::size_t bytes_;
    void* data_;
};

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
    m.def("linear_many", &linear_many, no_gil);
    m.def("linear_backward_many", &linear_backward_many, no_gil);
    m.attr("most_remainders") = most_remainders;
    m.def("conv2d", &conv2d, no_gil);
    m.def("conv2d_backward", &conv2d_backward, no_gil);
    m.def("conv2d_weight", &conv2d_weight, no_gil);
    m.def("conv2d_roundings", &conv2d_roundings,
          "How often in a row a sum of these kernels is rounded, at most, outward.");
    m.def("matmul", &matmul, no_gil);
    m.def("matmul_backward", &matmul_backward, no_gil);
    py::class_<Chain>(m, "Chain")
        .def(py::init<int, std::vector<Chain::Step>, const std::vector<int64_t>&>())
        .def("run", &Chain::run, no_gil);
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
