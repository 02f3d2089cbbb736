// What csrc/hopper uses of Hopper GPUs, on the CPU; see cuda_runtime.h. Products run when they are waited for, so that
// a stage that is given back too early shows in the results; copies arrive late, and groups of warps are not in step.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <type_traits>

#include "cuda_runtime.h"

#define __grid_constant__

inline dim3 gridDim;

namespace pyxai_bounds::hopper {

using std::int64_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

inline float widened(BFloat16 x) {
    const uint32_t word = static_cast<uint32_t>(x.bits) << 16;
    float out;
    std::memcpy(&out, &word, 4);
    return out;
}
inline float widened(Half x) {
    _Float16 out;
    std::memcpy(&out, &x, 2);
    return out;
}
template <class T>
T magnitude(T x) {
    return {static_cast<uint16_t>(x.bits & 0x7fff)};
}
template <class T>
uint32_t rounded(float x) {
    if constexpr (std::is_same_v<T, Half>) {
        const _Float16 y = static_cast<_Float16>(x);
        uint16_t bits;
        std::memcpy(&bits, &y, 2);
        return bits;
    } else {
        uint32_t word;
        std::memcpy(&word, &x, 4);
        if (x != x) return 0x7fff;
        return (word + 0x7fff + (word >> 16 & 1)) >> 16;
    }
}
template <class T>
uint32_t packed(float first, float second) {
    return rounded<T>(first) | rounded<T>(second) << 16;
}

template <class T, class Operation>
uint32_t each(uint32_t word, Operation operation) {
    const auto number = [&](int c) { return widened(T{static_cast<uint16_t>(word >> 16 * c)}); };
    return operation(number(0), 0) | operation(number(1), 1) << 16;
}
template <class T>
uint32_t plus(uint32_t a, uint32_t b) {
    return each<T>(a, [&](float x, int c) { return rounded<T>(x + widened(T{static_cast<uint16_t>(b >> 16 * c)})); });
}
template <class T>
uint32_t minus(uint32_t a, uint32_t b) {
    return each<T>(a, [&](float x, int c) { return rounded<T>(x - widened(T{static_cast<uint16_t>(b >> 16 * c)})); });
}
template <class T>
uint32_t halved(uint32_t a) {
    return each<T>(a, [](float x, int) { return rounded<T>(0.5f * x); });
}
template <class T>
uint32_t is_positive(uint32_t a) {
    return each<T>(a, [](float x, int) -> uint32_t { return x > 0 ? 0xffff : 0; });
}
template <class T>
uint32_t is_not_below(uint32_t a) {
    return each<T>(a, [](float x, int) -> uint32_t { return x >= 0 ? 0xffff : 0; });
}
template <class T>
uint32_t is_not_above(uint32_t a) {
    return each<T>(a, [](float x, int) -> uint32_t { return x <= 0 ? 0xffff : 0; });
}

inline void yield() {
    __syncthreads();
}

constexpr int most_memory = 232448;
alignas(1024) inline uint8_t shared[most_memory];
inline uint8_t* dynamic_memory() {
    return shared;
}

// --- barriers ---------------------------------------------------------------------------------------------------

struct Barrier {
    uint32_t wanted, left, phase;
    int64_t bytes;

    void settle() {
        if (left == 0 && bytes == 0) left = wanted, phase ^= 1;
    }
};
inline void barrier_init(Barrier* barrier, uint32_t arrivals) {
    *barrier = {arrivals, arrivals, 0, 0};
}
inline void barriers_are_made() {}
inline void arrive(Barrier* barrier) {
    --barrier->left;
    barrier->settle();
}
inline void arrive_and_expect(Barrier* barrier, uint32_t bytes) {
    barrier->bytes += bytes;
    arrive(barrier);
}

// What happens some rounds later. Who waits, lets it happen; all in a round see the same.
struct Later {
    unsigned round;
    std::function<void()> happen;
};
inline std::deque<Later> to_come;
inline void let_happen() {
    for (; !to_come.empty() && to_come.front().round <= emulation::block.round; to_come.pop_front())
        to_come.front().happen();
}
inline void wait(Barrier* barrier, uint32_t parity) {
    for (let_happen(); barrier->phase == parity; let_happen()) yield();
}
// Some number below `most`, always the same for the same two.
inline unsigned some(unsigned a, unsigned b, unsigned most) {
    return (a * 2654435761u + b * 40503u >> 7) % most;
}

// --- copies -----------------------------------------------------------------------------------------------------

struct Map {
    const uint8_t* tensor;
    uint64_t sizes[5], pitches[4];
    uint32_t box[5];
};
// Bytes that copies took from tensors, and multiplications.
inline int64_t counts[2];
extern "C" __attribute__((used)) inline const char* hopper_counts(std::uintptr_t to) {
    std::memcpy(reinterpret_cast<void*>(to), counts, sizeof(counts));
    std::memset(counts, 0, sizeof(counts));
    return nullptr;
}

inline int64_t swizzled(int64_t address) {
    return address ^ (address >> 7 & 7) << 4;
}
inline void copy(int64_t start, const Map* map, const int64_t (&at)[5]) {
    int64_t n = 0, i[5];
    for (i[4] = 0; i[4] < map->box[4]; ++i[4])
        for (i[3] = 0; i[3] < map->box[3]; ++i[3])
            for (i[2] = 0; i[2] < map->box[2]; ++i[2])
                for (i[1] = 0; i[1] < map->box[1]; ++i[1])
                    for (i[0] = 0; i[0] < map->box[0]; ++i[0], ++n) {
                        int64_t from = 0;
                        bool inside = true;
                        for (int d = 0; d < 5; ++d) {
                            const int64_t place = at[d] + i[d];
                            inside = inside && place >= 0 && place < static_cast<int64_t>(map->sizes[d]);
                            from += place * static_cast<int64_t>(d == 0 ? 2 : map->pitches[d - 1]);
                        }
                        uint16_t value = 0;
                        if (inside) std::memcpy(&value, map->tensor + from, 2), counts[0] += 2;
                        std::memcpy(shared + swizzled(start + n * 2), &value, 2);
                    }
}
// They arrive in the order in which they were asked for.
inline void copy_box(void* to, const Map* map, Barrier* barrier, int at0, int at1, int at2, int at3, int at4) {
    const int64_t start = static_cast<uint8_t*>(to) - shared;
    if (start % 128 != 0) __builtin_trap();
    int64_t bytes = 2;
    for (const uint32_t size : map->box) bytes *= size;
    std::memset(to, 0xff, bytes);  // not a number, until then
    static unsigned count = 0;
    to_come.push_back({emulation::block.round + some(++count, 0, 8), [=] {
                           copy(start, map, {at0, at1, at2, at3, at4});
                           barrier->bytes -= bytes;
                           barrier->settle();
                       }});
}
template <class T>
const char* make_map(Map* map, const void* tensor, const uint64_t (&sizes)[5], const uint64_t (&pitches)[4],
                     const uint32_t (&box)[5]) {
    map->tensor = static_cast<const uint8_t*>(tensor);
    for (int d = 0; d < 5; ++d) {
        map->sizes[d] = sizes[d], map->box[d] = box[d];
        if (box[d] > 256 || box[d] == 0 || sizes[d] == 0) return "refused";
        if (d < 4) {
            map->pitches[d] = pitches[d];
            if (pitches[d] % 16 != 0) return "refused";
        }
    }
    return box[0] == 64 ? nullptr : "refused";
}

// --- products ---------------------------------------------------------------------------------------------------

struct Tile {
    int64_t start, next_numbers;
};
inline Tile tile_at(const void* p, int next_numbers = 16) {
    return {static_cast<const uint8_t*>(p) - shared, next_numbers};
}
inline Tile moved(Tile tile, int bytes) {
    return {tile.start + bytes, tile.next_numbers};
}

struct Queue {
    std::deque<std::function<void()>> products;
    std::deque<size_t> groups;
    size_t open = 0;
    unsigned waits = 0;
    const float* sums = nullptr;  // of the last product since products_begin, and its shape
    int shape = 0;
};
inline Queue queues[1024];
inline Queue& queue() {
    return queues[emulation::block.current];
}

inline void products_begin() {
    queue().sums = nullptr;
}
inline void products_are_queued() {
    queue().groups.push_back(queue().open), queue().open = 0;
}
template <int unfinished>
void products_wait() {
    Queue& mine = queue();
    // Others may run first.
    for (unsigned rounds = 1 + some(threadIdx.x / 128, ++mine.waits, 4); rounds > 0; --rounds) yield();
    for (; mine.groups.size() > unfinished; mine.groups.pop_front()) {
        for (size_t i = 0; i < mine.groups.front(); ++i) mine.products.front()(), mine.products.pop_front();
    }
}
// `at` says where a number is: which tile, which row of the product's factor, which term.
template <class T, int size, class At>
void queue_product(float* sums, Tile a, Tile b, int add, At at) {
    const int thread = threadIdx.x % 128, lane = thread % 32;
    Queue& mine = queue();
    if (mine.sums == sums && mine.shape != size) __builtin_trap();  // they might run in any order
    mine.sums = sums, mine.shape = size;
    ++mine.open, counts[1] += size * 16;
    mine.products.push_back([=] {
        const auto value = [&](Tile tile, int row, int term) {
            T x;
            std::memcpy(&x, shared + swizzled(at(tile, row, term)), 2);
            return widened(x);
        };
        float rows[2][16];
        for (int half = 0; half < 2; ++half)
            for (int k = 0; k < 16; ++k) rows[half][k] = value(a, thread / 32 * 16 + lane / 4 + half * 8, k);
        for (int j = 0; j < size / 4; ++j) {
            for (int c = 0; c < 2; ++c) {
                float column[16];
                for (int k = 0; k < 16; ++k) column[k] = value(b, j * 8 + lane % 4 * 2 + c, k);
                for (int half = 0; half < 2; ++half) {
                    float& sum = sums[j * 4 + half * 2 + c];
                    if (!add) sum = 0;
                    for (int k = 0; k < 16; ++k) sum += rows[half][k] * column[k];
                }
            }
        }
    });
}
template <class T, int columns = 128>
void multiply(float (&d)[64], Tile a, Tile b, int add) {
    queue_product<T, columns / 2>(d, a, b, add, [](Tile tile, int row, int term) {
        return tile.start + row / 8 * 1024 + row % 8 * 128 + term * 2;
    });
}
template <class T, int sums>
void multiply_columns(float (&d)[sums], Tile a, Tile b, int add) {
    queue_product<T, sums>(d, a, b, add, [](Tile tile, int row, int term) {
        return tile.start + row / 64 * tile.next_numbers + row % 64 * 2 + term / 8 * 1024 + term % 8 * 128;
    });
}

template <int registers>
void give_registers() {}
template <int registers>
void take_registers() {}

inline int of_warp(int x) {
    return x;  // each thread has its warp's
}
// All leave in one round, so that the threads of a warp stay together.
struct GroupBarrier {
    int arrived = 0;
    unsigned generation = 0, left_in = 0;
};
inline GroupBarrier group_barriers[16];
template <int threads = 128>
void group_barrier(int number) {
    GroupBarrier& barrier = group_barriers[number];
    const unsigned mine = barrier.generation;
    if (++barrier.arrived == threads)
        barrier.arrived = 0, ++barrier.generation, barrier.left_in = emulation::block.round + 1;
    while (barrier.generation == mine || emulation::block.round < barrier.left_in) yield();
}
inline uint32_t exchanged[1024][4];
inline void store_transposed(void* row, const uint32_t (&words)[4]) {
    std::memcpy(exchanged[threadIdx.x], words, sizeof(words));
    yield();
    const int lane = threadIdx.x % 32, warp = threadIdx.x - lane, tile = lane / 8, place = lane % 8;
    for (int column = 0; column < 8; ++column) {
        const uint16_t number = exchanged[warp + column * 4 + place / 2][tile] >> 16 * (place % 2);
        std::memcpy(static_cast<uint8_t*>(row) + 2 * column, &number, 2);
    }
    yield();
}

// --- the host ---------------------------------------------------------------------------------------------------

inline int processors(int) {
    return 3;  // fewer than there are tiles, or a block would do one at most
}
inline bool is_hopper(int) {
    return true;
}
inline bool can_make_maps() {
    return true;
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int device, std::uintptr_t, int64_t blocks, int threads,
                   int shared_bytes, const Arguments&... arguments) {
    if (device != 0) return "invalid device ordinal";
    if (shared_bytes > static_cast<int>(sizeof(shared))) return "invalid argument";
    gridDim.x = static_cast<unsigned>(blocks);
    for (int64_t i = 0; i < blocks; ++i) {
        blockIdx.x = static_cast<unsigned>(i);
        for (GroupBarrier& barrier : group_barriers) barrier = {};
        std::memset(shared, 0xff, sizeof(shared));  // not a number
        emulation::run(static_cast<unsigned>(threads), [&] { kernel(arguments...); });
        if (!to_come.empty()) __builtin_trap();  // it would arrive in the memory of another block
    }
    return nullptr;
}

}  // namespace pyxai_bounds::hopper
