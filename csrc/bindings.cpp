// The module pyxai_bounds._native, and the only place where Python meets C++. Arrays come in as addresses;
// pyxai_bounds/ops/native.py and cuda.py allocate them, check them, and keep them alive during the call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "pyxai_bounds/calls.h"
#include "pyxai_bounds/chain.h"
#include "pyxai_bounds/memory.h"
#ifdef PYXAI_BOUNDS_CUDA
#include "pyxai_bounds/cuda.h"
#include "pyxai_bounds/hopper.h"
#endif

namespace py = pybind11;

namespace pyxai_bounds {
namespace {

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
        .def_buffer([](const Memory& memory) {
            return py::buffer_info(static_cast<uint8_t*>(memory.data()), static_cast<py::ssize_t>(memory.bytes()));
        });
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
