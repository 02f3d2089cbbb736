// Splits work over OpenMP threads: a range of elements, or what a team shares out itself.
//
// The runtime is the one that PyTorch runs on, not a second pool: torch is imported first, its libgomp.so.1
// then satisfies this module's own dependency of that name, and GOMP_parallel binds to torch's copy (seen
// with LD_DEBUG=bindings and in /proc/self/maps, torch 2.13 for the CPU). Should a wheel of torch rename its
// libgomp, its global symbols still come first in the search. tests/ops/test_backend.py checks what must
// follow on every installation: torch.set_num_threads governs these kernels.
#pragma once

#include <atomic>
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL {

// Elements per thread, at least. ReLU in cache, one thread against two (2-core AVX-512): 16,384 float32
// elements 2.2 against 3.9 us, 32,768 4.0 against 4.8 us, 131,072 21 against 13 us.
inline constexpr std::int64_t grain = 32768;
// Ranges start at multiples of this: 64 bytes of packed bits, so that no two threads write one cache line.
inline constexpr std::int64_t block = 512;

// Calls f(begin, end) on ranges that cover [0, n); every begin is a multiple of `block`.
template <class F>
void parallel_ranges(std::int64_t n, F f) {
#ifdef _OPENMP
    const std::int64_t wanted = n / grain;
    const std::int64_t most = wanted > 1 ? omp_get_max_threads() : 1;
    const int threads = static_cast<int>(wanted < most ? wanted : most);
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            const std::int64_t blocks = (n + block - 1) / block;
            const std::int64_t team = omp_get_num_threads();
            const std::int64_t rank = omp_get_thread_num();
            const std::int64_t begin = blocks * rank / team * block;
            const std::int64_t end = blocks * (rank + 1) / team * block;
            if (begin < end) f(begin, end < n ? end : n);
        }
        return;
    }
#endif
    if (n > 0) f(0, n);
}

// The number of threads for work that could occupy `wanted` of them; at least one.
inline int team_size([[maybe_unused]] std::int64_t wanted) {
#ifdef _OPENMP
    if (wanted > 1) {
        const std::int64_t most = omp_get_max_threads();
        return static_cast<int>(wanted < most ? wanted : most);
    }
#endif
    return 1;
}

// Calls f(rank, team) once for each rank of a team of at most `threads`.
template <class F>
void parallel_team([[maybe_unused]] int threads, F f) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        f(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    f(0, 1);
}

// Hands out 0, 1, 2, … to a team, the next to whoever is free first: equal shares do not take equal times where others
// run on the same cores. Who computes a unit must not matter to its result.
class Tickets {
  public:
    std::int64_t next() { return next_.fetch_add(1, std::memory_order_relaxed); }

  private:
    std::atomic<std::int64_t> next_{0};
};

// Waits for the whole team of the parallel_team that the caller runs in.
inline void team_barrier([[maybe_unused]] int team) {
#ifdef _OPENMP
    if (team > 1) {
#pragma omp barrier
    }
#endif
}

}  // namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL
