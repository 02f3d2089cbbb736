// The blocks that wait for the next call. Compiled once, unlike the kernels: all levels share them.
#include "pyxai_bounds/memory.h"

#include <deque>
#include <iterator>
#include <mutex>
#include <new>

namespace pyxai_bounds {
namespace {

constexpr std::align_val_t line{64};

struct Block {
    void* data;
    std::size_t bytes;
};

// No thread waits for the mutex: if it is taken, the caller does without kept blocks. So does a process that was forked
// while it was taken.
struct Kept {
    std::mutex mutex;
    std::deque<Block> blocks;  // the oldest first
    std::size_t bytes = 0;
};

// Never destroyed: the interpreter may drop tensors after static objects are gone.
Kept& kept() {
    static Kept* const all = new Kept;
    return *all;
}

bool keeps(std::size_t bytes) {
    return least_kept <= bytes && bytes <= most_kept;
}

// Similar sizes may share a block, so both sides count in steps of an eighth of the size or less.
std::size_t rounded(std::size_t bytes) {
    const std::size_t step = least_kept / 8;
    return keeps(bytes) ? (bytes + step - 1) / step * step : bytes;
}

}  // namespace

void* take_memory(std::size_t bytes) {
    const std::size_t wanted = rounded(bytes);
    if (keeps(bytes)) {
        Kept& all = kept();
        const std::unique_lock<std::mutex> lock(all.mutex, std::try_to_lock);
        // The newest of this size: most of it may still be in a cache.
        if (lock)
            for (auto block = all.blocks.rbegin(); block != all.blocks.rend(); ++block)
                if (block->bytes == wanted) {
                    void* const data = block->data;
                    all.bytes -= wanted;
                    all.blocks.erase(std::next(block).base());
                    return data;
                }
    }
    return ::operator new(wanted, line);
}

void give_memory(void* data, std::size_t bytes) noexcept {
    if (!keeps(bytes)) return ::operator delete(data, line);
    std::size_t unwanted = 0;
    const Block block{data, rounded(bytes)};
    Kept& all = kept();
    const std::unique_lock<std::mutex> lock(all.mutex, std::try_to_lock);
    if (!lock) return ::operator delete(data, line);
    try {
        all.blocks.push_back(block);
    } catch (...) {
        return ::operator delete(data, line);
    }
    all.bytes += block.bytes;
    for (; all.bytes > kept_bytes; all.bytes -= all.blocks[unwanted++].bytes)
        ::operator delete(all.blocks[unwanted].data, line);
    all.blocks.erase(all.blocks.begin(), all.blocks.begin() + static_cast<std::ptrdiff_t>(unwanted));
}

std::size_t memory_kept() {
    Kept& all = kept();
    const std::lock_guard<std::mutex> lock(all.mutex);
    return all.bytes;
}

}  // namespace pyxai_bounds
