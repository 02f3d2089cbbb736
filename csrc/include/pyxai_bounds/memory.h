// Memory for large results and for scratch, kept for the next call. A C library returns freed blocks above a few MiB to
// the system, which zeroes them page by page: 2,000 to 4,000 page faults, or 2 to 4 of 28 ms, for the bounds of the
// gradient of a small convnet on 32 images.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyxai_bounds {

// Blocks from `least_kept` to `most_kept` bytes are kept, up to `kept_bytes` in all.
inline constexpr std::size_t least_kept = std::size_t{1} << 18, most_kept = std::size_t{1} << 25,
                             kept_bytes = std::size_t{1} << 26;

// Aligned to a cache line and not initialised; throws std::bad_alloc. Any thread may give back what another took.
void* take_memory(std::size_t bytes);
void give_memory(void* block, std::size_t bytes) noexcept;
std::size_t memory_kept();

// Owns a block.
class Memory {
  public:
    explicit Memory(std::int64_t bytes) : bytes_(static_cast<std::size_t>(bytes)), data_(take_memory(bytes_)) {}
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory() { give_memory(data_, bytes_); }
    void* data() const { return data_; }
    std::uintptr_t start() const { return reinterpret_cast<std::uintptr_t>(data_); }
    std::size_t bytes() const { return bytes_; }

  private:
    std::size_t bytes_;
    void* data_;
};

}  // namespace pyxai_bounds
