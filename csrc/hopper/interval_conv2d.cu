// The convolution of a box and its backward-data pass on Hopper's tensor cores: 16-bit numbers, sums in float32, with
// what follows them (bias, ReLU, ReLU′, a gate) done before anything is written.
//
// A box needs two sums, of mid·W and of rad·|W|, and so twice the accumulators of an ordinary product: tiles are half
// as large, and cuDNN's way of reading each pixel once for each tap would ask for more of L2 than it gives. Here the
// pixels that a column of taps reaches are brought into shared memory once, a panel of rows on top of one another, in
// which the next tap of the column begins a row further down. Where the image's edge is, the copy engine writes zeros.
// Small images lie side by side there, a row of each, then the next of each: so they are one tall image, with edges.
//
// One warp brings panels and weights, eight multiply; a block walks over tiles, so that the next tile's panels arrive
// while this one's results are written. Training only: sums are in any order, and nothing is rounded outward.
#include "pyxai_bounds/hopper.h"
#include "pyxai_bounds/hopper_plan.cuh"

namespace pyxai_bounds::hopper {
namespace {

constexpr int weight_bytes = tile_channels * row_bytes;
constexpr int slice_pixels = 32,
              slices = group_pixels / slice_pixels;                // of a group's results, that are written together
constexpr int slice_bytes = 2 * slice_pixels * tile_channels * 2;  // mid and rad
constexpr int parts = slice_pixels * tile_channels / 8 / group_threads;  // of eight channels, that a thread writes
constexpr int staging_bytes = 2 * 2 * slice_bytes;                       // two buffers for either group

enum Epilogue { bias_only, relu, relu_backward, gate };

struct alignas(16) Words {
    uint32_t word[4];
};

// All bits of the lower half of a word by one bit of the byte, of the upper half by the next.
__device__ inline uint32_t spread(unsigned byte, int bit) {
    const uint32_t two = byte >> bit & 3;
    return ((two | two << 15) & 0x10001) * 0xffff;
}

// What a word of eight channels says of them, gathered by `gather`, as a byte.
__device__ inline uint32_t gather(uint32_t gathered, uint32_t mask, int bit) {
    return gathered | (mask & 0x10001u << bit);
}
__device__ inline uint8_t byte_of(uint32_t gathered) {
    return static_cast<uint8_t>((gathered & 0x55) | (gathered >> 15 & 0xaa));
}

// Eight channels of one pixel, side by side, number `octet` of all: the epilogue, and the results. Ends are kept or
// zeroed as in kernels/ends.py; where one alone is kept the box is half of it wide, which rounds like its sum with
// zero.
template <class T, int epilogue>
__device__ inline void finish(uint32_t octet, uint32_t octets, Words mid, Words rad, unsigned lowers, unsigned uppers,
                              T* out_mid, T* out_rad, uint8_t* out_bits) {
    if constexpr (epilogue != bias_only) {
        uint32_t kept_lower = 0, kept_upper = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t m = mid.word[i], r = rad.word[i], lower = minus<T>(m, r), upper = plus<T>(m, r);
            uint32_t keep_lower, keep_upper;
            if constexpr (epilogue == relu) {
                keep_lower = is_positive<T>(lower), keep_upper = ~is_not_above<T>(upper);
            } else {
                keep_lower = spread(lowers, 2 * i), keep_upper = spread(uppers, 2 * i);
            }
            if constexpr (epilogue == relu_backward) {
                const uint32_t active = keep_lower, alive = keep_upper;
                keep_lower = active | (alive & ~is_not_below<T>(lower));
                keep_upper = active | (alive & ~is_not_above<T>(upper));
            }
            const uint32_t both = keep_lower & keep_upper;
            const uint32_t half = halved<T>((lower & keep_lower) | (upper & keep_upper & ~keep_lower));
            mid.word[i] = (m & both) | (half & ~both);
            rad.word[i] = (r & both) | ((half ^ (keep_lower & 0x80008000u)) & ~both);
            kept_lower = gather(kept_lower, keep_lower, 2 * i), kept_upper = gather(kept_upper, keep_upper, 2 * i);
        }
        if constexpr (epilogue != gate) {
            out_bits[octet] = byte_of(kept_lower);
            out_bits[octets + static_cast<int64_t>(octet)] = byte_of(kept_upper);
        }
    }
    reinterpret_cast<Words*>(out_mid)[octet] = mid;
    reinterpret_cast<Words*>(out_rad)[octet] = rad;
}

// Products of a panel's taps, one after the other, nowhere with a loop at run time: the compiler would wait at the end
// of each round. The last tap leaves out the last pixels where it is of the next row and panels end with the image. (To
// leave out the first ones, too, would be right for a tap of the row above, but sums that begin elsewhere than others
// make the compiler wait after each product.)
template <class T>
__device__ inline void multiply_taps(const Plan& plan, const Panel& panel, float (&sums)[64], Tile weights, Tile pixels,
                                     bool add) {
    const auto multiply_all = [&](auto taps, auto skipped) {
        products_begin();
#pragma unroll
        for (int t = 0; t < taps.value; ++t) {
            const int down = panel.rows_down[t] * plan.tile_images << plan.tile_width_log;
            const Tile a = moved(weights, t * weight_bytes), b = moved(pixels, down * row_bytes);
            constexpr int pixels_left = group_pixels - skipped.value;
            if (skipped.value > 0 && t == taps.value - 1) products_begin();  // of another shape, on the same sums
#pragma unroll
            for (int k = 0; k < depth / 16; ++k) {
                const Tile a_k = moved(a, k * 32), b_k = moved(b, k * 32);
                if (t < taps.value - 1)
                    multiply<T>(sums, a_k, b_k, add || t > 0 || k > 0);
                else
                    multiply<T, pixels_left>(sums, a_k, b_k, add || t > 0 || k > 0);
            }
        }
        products_are_queued();
    };
    const auto multiply_most = [&](auto taps) {
        if (panel.skipped == 0)
            multiply_all(taps, Constant<0>{});
        else if (panel.skipped == 16)
            multiply_all(taps, Constant<16>{});
        else if (panel.skipped == 32)
            multiply_all(taps, Constant<32>{});
        else
            multiply_all(taps, Constant<64>{});
    };
    if (panel.taps == 3)
        multiply_most(Constant<3>{});
    else if (panel.taps == 2)
        multiply_most(Constant<2>{});
    else
        multiply_all(Constant<1>{}, Constant<0>{});
}

// A tile is 64 channels of the result and 256 pixels, 128 for either group of warps. Its sums are rounded as soon as
// they are complete, which frees their registers for the next tile's; what is left to do with them is done while the
// tensor cores are busy with that.
template <class T, int epilogue>
__global__ void __launch_bounds__(threads, 1)
    interval_conv2d_kernel(const __grid_constant__ Plan plan, const __grid_constant__ Map mid_map,
                           const __grid_constant__ Map rad_map, const __grid_constant__ Map weight_map, int tiles,
                           const T* bias, const uint8_t* bits, T* out_mid, T* out_rad, uint8_t* out_bits) {
    uint8_t* const memory = dynamic_memory();
    Ring ring = make_ring(memory, memory + plan.stages * plan.stage_bytes + staging_bytes, plan.stages, 2);

    if (threadIdx.x >= multipliers) {
        give_registers<few_registers>();
        if (threadIdx.x != multipliers) return;
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            const Work work = work_of(plan, tile);
            const Phase& phase = plan.phase[work.phase];
            for (int p = phase.first_panel; p < phase.first_panel + phase.panels; ++p) {
                const Panel& panel = plan.panel[p];
                for (int chunk = 0; chunk < plan.chunks; ++chunk) {
                    for (int kind = 0; kind < 2; ++kind) {
                        wait(ring.empty + ring.stage, ring.parity ^ 1);
                        Barrier* const full = ring.full + ring.stage;
                        uint8_t* const to = ring.memory + ring.stage * plan.stage_bytes;
                        arrive_and_expect(full, plan.panel_bytes + panel.taps * weight_bytes);
                        for (int i = 0; i < plan.boxes; ++i)
                            copy_box(to + i * plan.group_bytes, kind == 0 ? &mid_map : &rad_map, full,
                                     (panel.x_phase * plan.chunks + chunk) * depth, work.x + panel.x,
                                     work.b + i * plan.tile_images, work.y + panel.y, panel.y_phase);
                        for (int t = 0; t < panel.taps; ++t)
                            copy_box(to + plan.panel_bytes + t * weight_bytes, &weight_map, full, chunk * depth,
                                     work.n * tile_channels, kind * plan.taps + panel.first_tap + t, 0, 0);
                        ring.next();
                    }
                }
            }
        }
        return;
    }

    take_registers<many_registers>();
    const int group = of_warp(threadIdx.x / group_threads), lane = threadIdx.x % 32;
    const int channel = threadIdx.x % group_threads / 32 * 16;  // of this warp's rows, the first
    const int turn = threadIdx.x % group_threads;
    const bool speaks = turn == 0;
    float sums[2][64];
    uint32_t done[2][2][16];  // of the last tile, rounded: mid and rad, channels and those eight further on, pixels
    Work last = {};
    int progress = slices + 1;
    uint8_t* const staging = memory + plan.stages * plan.stage_bytes + group * 2 * slice_bytes;
    // Which octet of the results' channels a thread has of its i-th pixel of a slice; none past the image or the batch.
    const auto octet_of = [&](int slice, int i) -> uint32_t {
        const int place = slice * slice_pixels + i * (slice_pixels / parts) + turn / 8;
        const int x = last.x + (place & (plan.tile_width - 1)), line = place >> plan.tile_width_log;
        const int y = last.y + (line >> plan.tile_images_log), b = last.b + (line & (plan.tile_images - 1));
        if (b >= plan.batch || y >= plan.rows) return none;
        const Phase& phase = plan.phase[last.phase];
        const uint32_t pixel = (b * plan.height + phase.y + y * plan.step_y) * plan.width + phase.x + x * plan.step_x;
        return pixel * (plan.channels / 8) + last.n * (tile_channels / 8) + turn % 8;
    };
    uint32_t octets[parts];                           // of the slice that is staged,
    unsigned lowers[parts] = {}, uppers[parts] = {};  // and its bits
    // First slice n is staged, and its bits are asked for; later, when they have come, it is written and the next one
    // staged. `turns` of these are left to do: none before the first tile.
    const auto advance = [&](int most) {
        for (int n = 0; n < most && progress <= slices; ++n, ++progress) {
            if (progress > 0) {
                const int slice = progress - 1;
                const uint8_t* const buffer = staging + slice % 2 * slice_bytes;
                group_barrier(1 + group);
#pragma unroll
                for (int i = 0; i < parts; ++i) {
                    const int pixel = i * (slice_pixels / parts) + turn / 8;
                    const uint8_t* const from = buffer + pixel * row_bytes + (turn % 8 ^ pixel % 8) * 16;
                    if (octets[i] != none)
                        finish<T, epilogue>(octets[i], plan.octets, *reinterpret_cast<const Words*>(from),
                                            *reinterpret_cast<const Words*>(from + slice_bytes / 2), lowers[i],
                                            uppers[i], out_mid, out_rad, out_bits);
                }
            }
            if (progress == slices) continue;
            // Rows of the sums are channels; results lie in memory by pixels. Two buffers, so that one barrier does.
            uint8_t* const row = staging + progress % 2 * slice_bytes + lane * row_bytes;
            const auto stage = [&](auto slice) {
#pragma unroll
                for (int kind = 0; kind < 2; ++kind) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        uint32_t words[4];
#pragma unroll
                        for (int i = 0; i < 4; ++i) words[i] = done[kind][half][slice.value * 4 + i];
                        store_transposed(row + kind * slice_bytes / 2 + (lane % 8 ^ channel / 8 ^ half) * 16, words);
                    }
                }
            };
            if (progress == 0)
                stage(Constant<0>{});
            else if (progress == 1)
                stage(Constant<1>{});
            else if (progress == 2)
                stage(Constant<2>{});
            else
                stage(Constant<3>{});
#pragma unroll
            for (int i = 0; i < parts; ++i) {
                octets[i] = octet_of(progress, i);
                if (epilogue >= relu_backward && octets[i] != none)
                    lowers[i] = bits[octets[i]], uppers[i] = bits[plan.octets + static_cast<int64_t>(octets[i])];
            }
        }
    };
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const Work work = work_of(plan, tile);
        const Phase& phase = plan.phase[work.phase];
        const int steps = phase.panels * plan.chunks, most = (slices + 1 + 2 * steps - 1) / (2 * steps);
        int used = -1;  // the stage whose products may be unfinished
        for (int step = 0, p = phase.first_panel, chunk = 0; step < steps; ++step) {
            const Panel& panel = plan.panel[p];
#pragma unroll
            for (int kind = 0; kind < 2; ++kind) {
                wait(ring.full + ring.stage, ring.parity);
                const uint8_t* const from = ring.memory + ring.stage * plan.stage_bytes;
                const Tile pixels = tile_at(from + group * plan.group_bytes);
                const Tile weights = tile_at(from + plan.panel_bytes);
                multiply_taps<T>(plan, panel, sums[kind], weights, pixels, step > 0);
                products_wait<1>();
                if (used >= 0 && speaks) arrive(ring.empty + used);
                used = ring.stage;
                ring.next();
                advance(most);
            }
            if (++chunk == plan.chunks) chunk = 0, ++p;
        }
        products_wait<0>();
        if (speaks) arrive(ring.empty + used);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float b = 0;
            if (epilogue <= relu && bias != nullptr)
                b = widened(bias[work.n * tile_channels + channel + half * 8 + lane / 4]);
#pragma unroll
            for (int j = 0; j < 16; ++j) {
                const int at = 4 * j + 2 * half;
                done[0][half][j] = packed<T>(sums[0][at] + b, sums[0][at + 1] + b);
                done[1][half][j] = packed<T>(sums[1][at], sums[1][at + 1]);
            }
        }
        last = work, progress = 0;
        last.y += group * plan.group_rows, last.b += group * plan.group_images;
    }
    advance(slices + 1);
}

// W and |W| as [2, taps, channels of the result, channels of the source].
template <class T>
__global__ void __launch_bounds__(group_threads)
    pack_weight_kernel(const T* weight, T* to, Order order, unsigned taps, unsigned targets, unsigned sources,
                       int64_t at_target, int64_t at_source, int64_t at_tap) {
    const unsigned i = blockIdx.x * group_threads + threadIdx.x, size = taps * targets * sources;
    if (i >= size) return;
    const unsigned source = i % sources, target = i / sources % targets, tap = i / sources / targets;
    const T w = weight[target * at_target + source * at_source + order.tap[tap] * at_tap];
    to[i] = w, to[static_cast<int64_t>(size) + i] = magnitude(w);
}

struct Arrays {
    std::uintptr_t mid, rad, weight;
    int64_t at_target, at_source, at_tap;
    std::uintptr_t packed, bias, bits, out_mid, out_rad, out_bits;
};

template <class T>
const char* convolve(int device, std::uintptr_t stream, int epilogue, const Convolution& c, const Arrays& a) {
    Plan plan;
    Order order;
    const Needs needs{2, 0, weight_bytes, staging_bytes, 2, 1};
    if (const char* wrong = make_plan(c, needs, plan, order)) return wrong;
    if (a.out_mid == 0) return nullptr;  // only asked whether it can be done
    Map mid, rad, weight;
    if (const char* wrong = make_source_map<T>(&mid, a.mid, plan, c)) return wrong;
    if (const char* wrong = make_source_map<T>(&rad, a.rad, plan, c)) return wrong;
    {
        const uint64_t C = c.source_channels, N = c.target_channels, taps = 2 * static_cast<uint64_t>(plan.taps);
        const uint64_t sizes[5] = {C, N, taps, 1, 1};
        const uint64_t pitches[4] = {2 * C, 2 * C * N, 2 * C * N * taps, 2 * C * N * taps};
        const uint32_t box[5] = {depth, tile_channels, 1, 1, 1};
        if (const char* wrong = make_map<T>(&weight, at<T>(a.packed), sizes, pitches, box)) return wrong;
    }
    const int64_t elements = static_cast<int64_t>(plan.taps) * c.target_channels * c.source_channels;
    const char* wrong = launch(pack_weight_kernel<T>, device, stream, (elements + group_threads - 1) / group_threads,
                               group_threads, 0, at<T>(a.weight), const_cast<T*>(at<T>(a.packed)), order,
                               static_cast<unsigned>(plan.taps), static_cast<unsigned>(c.target_channels),
                               static_cast<unsigned>(c.source_channels), a.at_target, a.at_source, a.at_tap);
    if (wrong != nullptr) return wrong;
    const int tiles = plan.tiles_x * plan.tiles_y * plan.tiles_b * plan.tiles_n * plan.phases;
    const int there = processors(device), shared = plan.stages * plan.stage_bytes + staging_bytes + barrier_bytes;
    const auto start = [&](auto kernel) {
        return launch(kernel, device, stream, tiles < there ? tiles : there, threads, shared, plan, mid, rad, weight,
                      tiles, at<T>(a.bias), at<uint8_t>(a.bits), const_cast<T*>(at<T>(a.out_mid)),
                      const_cast<T*>(at<T>(a.out_rad)), const_cast<uint8_t*>(at<uint8_t>(a.out_bits)));
    };
    switch (epilogue) {
        case bias_only:
            return start(interval_conv2d_kernel<T, bias_only>);
        case relu:
            return start(interval_conv2d_kernel<T, relu>);
        case relu_backward:
            return start(interval_conv2d_kernel<T, relu_backward>);
        case gate:
            return start(interval_conv2d_kernel<T, gate>);
    }
    return "there are four epilogues, 0 to 3";
}

}  // namespace
}  // namespace pyxai_bounds::hopper

extern "C" const char* hopper_check(std::int64_t device) {
    using namespace pyxai_bounds::hopper;
    if (!is_hopper(static_cast<int>(device))) return "its compute capability is not 9.0";
    return can_make_maps() ? nullptr : "its driver has no cuTensorMapEncodeTiled";
}

extern "C" const char* hopper_convolve(
    std::int64_t device, std::uintptr_t stream, std::int64_t is_half, std::int64_t epilogue, std::int64_t transposed,
    std::int64_t batch, std::int64_t source_height, std::int64_t source_width, std::int64_t source_channels,
    std::int64_t target_height, std::int64_t target_width, std::int64_t target_channels, std::int64_t kernel_height,
    std::int64_t kernel_width, std::int64_t stride_height, std::int64_t stride_width, std::int64_t padding_height,
    std::int64_t padding_width, std::int64_t dilation_height, std::int64_t dilation_width, std::int64_t at_target,
    std::int64_t at_source, std::int64_t at_tap, std::uintptr_t mid, std::uintptr_t rad, std::uintptr_t weight,
    std::uintptr_t packed, std::uintptr_t bias, std::uintptr_t bits, std::uintptr_t out_mid, std::uintptr_t out_rad,
    std::uintptr_t out_bits) {
    using namespace pyxai_bounds::hopper;
    Convolution c;
    const char* wrong =
        make_convolution({transposed, batch, source_height, source_width, source_channels, target_height, target_width,
                          target_channels, kernel_height, kernel_width, stride_height, stride_width, padding_height,
                          padding_width, dilation_height, dilation_width},
                         c);
    if (wrong != nullptr) return wrong;
    const Arrays a{mid, rad, weight, at_target, at_source, at_tap, packed, bias, bits, out_mid, out_rad, out_bits};
    const auto run = [&](auto element) -> const char* {
        using T = decltype(element);
        const int gpu = static_cast<int>(device), what = static_cast<int>(epilogue);
        return convolve<T>(gpu, stream, what, c, a);
    };
    return is_half ? run(Half{}) : run(BFloat16{});
}
