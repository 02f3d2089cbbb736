// What blocked kernels share: memory to pack into, and small integer arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pyxai_bounds/memory.h"

namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL {

constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) {
    return a < b ? a : b;
}
constexpr std::int64_t greater(std::int64_t a, std::int64_t b) {
    return a > b ? a : b;
}
constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
    return (a + b - 1) / b;
}

template <int value>
struct Constant {
    static constexpr int number = value;
    constexpr operator int() const { return value; }
};

// Cache-line aligned memory that nobody has written yet. Not std::vector: an instance of it here would be one
// symbol for all levels, see vec.h.
template <class T>
class Scratch {
  public:
    explicit Scratch(std::int64_t count)
        : bytes_(static_cast<std::size_t>(count) * sizeof(T)), data_(static_cast<T*>(take_memory(bytes_))) {}
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { give_memory(data_, bytes_); }
    T* get() const { return data_; }

  private:
    std::size_t bytes_;
    T* data_;
};

}  // namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL
