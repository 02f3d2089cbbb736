// Memory for large results and for scratch, kept for the next call. What a C library frees above a few MiB goes back to
// the system, which hands it out again page by page, zeroed: 2,000 to 4,000 page faults, or 2 to 4 of 28 ms, in a
// gradient's bounds of a small convnet on 32 images.
#pragma once

#include <cstddef>

namespace pyxai_bounds {

// Blocks of fewer bytes than `least_kept` are not kept, nor those of more than `most_kept`, nor more than `kept_bytes`
// in all.
inline constexpr std::size_t least_kept = std::size_t{1} << 18, most_kept = std::size_t{1} << 25,
                             kept_bytes = std::size_t{1} << 26;

// Cache-line aligned, and not initialised; throws std::bad_alloc. From any thread, to any thread.
void* take_memory(std::size_t bytes);
void give_memory(void* block, std::size_t bytes) noexcept;
std::size_t memory_kept();

}  // namespace pyxai_bounds
