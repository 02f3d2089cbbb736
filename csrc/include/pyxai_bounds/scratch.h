// What blocked kernels share: memory to pack into, and small integer arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

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
        : data_(static_cast<T*>(::operator new(static_cast<std::size_t>(count) * sizeof(T), std::align_val_t{64}))) {}
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
    T* get() const { return data_; }

  private:
    T* data_;
};

}  // namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL
