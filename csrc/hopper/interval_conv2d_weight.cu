// The gradient of a convolution's weight on Hopper's tensor cores, for boxes of 16-bit numbers: sums in float32 over
// pixels of g_mid·mid, and of g_rad·rad times the weight's sign.
//
// A block owns 64 or 128 channels of the gradients, 64 of the source, a column of taps and a part of the pixels. Two
// groups of warps multiply, one midpoints, the other radii; each result is of both, so that they meet once, at the end.
// As in interval_conv2d.cu the pixels that the taps reach are brought once, as a panel; taps lie side by side in the
// product, because the copy engine and the tensor cores agree that the next tap's begin a few rows further down.
//
// Parts are summed by others, in a fixed order. Where the image or the batch ends, gradients are zeros; what the source
// has there is multiplied by them, so that numbers that are not finite may spread to taps that do not reach them.
#include "pyxai_bounds/hopper.h"
#include "pyxai_bounds/hopper_plan.cuh"

namespace pyxai_bounds::hopper {
namespace {

// Small, so that many stages are under way. Four at least: either group keeps one until its next is queued.
constexpr int grad_bytes = group_pixels * row_bytes, least_stages = 4;
constexpr int product_pixels = 16, products = group_pixels / product_pixels;
constexpr int sums_of_tap = tile_channels * depth / group_threads;
constexpr int most_parts = 256;

// Stages hold midpoints and radii by turns. There is an even number of them, so that each always holds the same kind,
// and the group that reads it waits for each of its uses: of every second one it would not know whether a barrier's
// parity is that of this use or of the one after the next.
template <class T, int columns, int taps>
__device__ inline void sum_tiles(const Plan& plan, const Panel& panel, Ring ring, int tiles, int kind, bool speaks,
                                 float (&sums)[columns][taps * sums_of_tap]) {
    const int line = plan.tile_images * plan.tile_width;
    const int next_tap = (taps > 1 ? panel.rows_down[1] * line : 1) * row_bytes;
    int used = -1;  // the stage whose products may be unfinished
    if (kind == 1) ring.next();
    for (int step = 0; step < tiles; ++step, ring.next(), ring.next()) {
        wait(ring.full + ring.stage, ring.parity);
        const uint8_t* const from = ring.memory + ring.stage * plan.stage_bytes;
        const Tile grads = tile_at(from + plan.panel_bytes), pixels = tile_at(from, next_tap);
        products_begin();
#pragma unroll
        for (int k = 0; k < products; ++k) {
            const int at = k * product_pixels * row_bytes;
#pragma unroll
            for (int i = 0; i < columns; ++i)
                multiply_columns<T>(sums[i], moved(grads, i * grad_bytes + at), moved(pixels, at), step > 0 || k > 0);
        }
        products_are_queued();
        products_wait<1>();
        if (used >= 0 && speaks) arrive(ring.empty + used);
        used = ring.stage;
    }
    products_wait<0>();
}

// `weight` and `out` begin at the block's first channels; `row` is what a channel of the gradients has.
template <class T, int columns, int taps>
__device__ inline void weight_gradient(const Plan& plan, const Order& order, const Panel& panel, const Ring& ring,
                                       int tiles, int64_t row, const T* weight, float* out) {
    const int kind = of_warp(threadIdx.x / group_threads), turn = threadIdx.x % group_threads, lane = threadIdx.x % 32;
    float sums[columns][taps * sums_of_tap];
    sum_tiles<T, columns, taps>(plan, panel, ring, tiles, kind, turn == 0, sums);
    // Both have waited for all of their stages: after this nothing is under way, and nothing is read.
    group_barrier<multipliers>(1);
    float* const others = reinterpret_cast<float*>(ring.memory) + turn;
    if (kind == 1) {
#pragma unroll
        for (int i = 0; i < columns * taps * sums_of_tap; ++i)
            others[i * group_threads] = sums[i / (taps * sums_of_tap)][i % (taps * sums_of_tap)];
    }
    group_barrier<multipliers>(1);
    if (kind == 1) return;
#pragma unroll
    for (int t = 0; t < taps; ++t) {
        const int64_t first = (turn / 32 * 16 + lane / 4) * row + order.tap[panel.first_tap + t] * plan.chunks * depth;
#pragma unroll
        for (int half = 0; half < 2 * columns; ++half) {
            const int64_t from = first + (half / 2 * tile_channels + half % 2 * 8) * row + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < depth / 8; ++j) {
                const int i = t * sums_of_tap + j * 4 + half % 2 * 2;
                const uint32_t w = *reinterpret_cast<const uint32_t*>(weight + from + j * 8);
                const uint32_t positive = is_positive<T>(w), negative = is_positive<T>(w ^ 0x80008000u);
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const float sign = static_cast<float>(positive >> 16 * c & 1) -  //
                                       static_cast<float>(negative >> 16 * c & 1);
                    const float other = others[(half / 2 * taps * sums_of_tap + i + c) * group_threads];
                    out[from + j * 8 + c] = sums[half / 2][i + c] + sign * other;
                }
            }
        }
    }
}

// Blocks of one part, which read the same pixels, have neighbouring numbers.
template <class T, int columns>
__global__ void __launch_bounds__(threads, 1)
    interval_conv2d_weight_kernel(const __grid_constant__ Plan plan, const __grid_constant__ Order order,
                                  const __grid_constant__ Map grad_mid_map, const __grid_constant__ Map grad_rad_map,
                                  const __grid_constant__ Map mid_map, const __grid_constant__ Map rad_map, int tiles,
                                  int parts, const T* weight, float* out) {
    uint8_t* const memory = dynamic_memory();
    Ring ring = make_ring(memory, memory + plan.stages * plan.stage_bytes, plan.stages, 1);

    int unit = blockIdx.x;
    const int n = unit % plan.tiles_n;
    unit /= plan.tiles_n;
    const int chunk = unit % plan.chunks;
    unit /= plan.chunks;
    const Panel& panel = plan.panel[unit % plan.phase[0].panels];
    const int64_t part = unit / plan.phase[0].panels;
    const int first = static_cast<int>(part * tiles / parts), last = static_cast<int>((part + 1) * tiles / parts);

    if (threadIdx.x >= multipliers) {
        give_registers<few_registers>();
        if (threadIdx.x != multipliers) return;
        for (int tile = first; tile < last; ++tile) {
            const Work work = work_of(plan, tile * plan.tiles_n);
            for (int kind = 0; kind < 2; ++kind, ring.next()) {
                wait(ring.empty + ring.stage, ring.parity ^ 1);
                Barrier* const full = ring.full + ring.stage;
                uint8_t* const to = ring.memory + ring.stage * plan.stage_bytes;
                arrive_and_expect(full, plan.panel_bytes + columns * grad_bytes);
                copy_box(to, kind == 0 ? &mid_map : &rad_map, full, (panel.x_phase * plan.chunks + chunk) * depth,
                         work.x + panel.x, work.b, work.y + panel.y, panel.y_phase);
                for (int i = 0; i < columns; ++i)
                    copy_box(to + plan.panel_bytes + i * grad_bytes, kind == 0 ? &grad_mid_map : &grad_rad_map, full,
                             (n * columns + i) * tile_channels, work.x, work.b, work.y, 0);
            }
        }
        return;
    }

    take_registers<many_registers>();
    const int64_t row = static_cast<int64_t>(plan.taps) * plan.chunks * depth;
    const int64_t first_sum = n * columns * tile_channels * row + chunk * depth;
    weight += first_sum, out += part * plan.channels * row + first_sum;
    const auto run = [&](auto taps) {
        weight_gradient<T, columns, taps.value>(plan, order, panel, ring, last - first, row, weight, out);
    };
    if (panel.taps == 3)
        run(Constant<3>{});
    else if (panel.taps == 2)
        run(Constant<2>{});
    else
        run(Constant<1>{});
}

// Into how many parts pixels are divided, so that all blocks are done soonest, of which `there` run at a time.
int parts_of(int64_t units, int tiles, int there) {
    constexpr int64_t overhead = 6;  // of a block, in tiles: until the first has come, and to write and sum its results
    int best = 1;
    int64_t least = INT64_MAX;
    for (int parts = 1; parts <= tiles && parts <= most_parts; ++parts) {
        const int64_t rounds = (units * parts + there - 1) / there;
        const int64_t time = rounds * ((tiles + parts - 1) / parts + overhead);
        if (time < least) best = parts, least = time;
    }
    return best;
}

struct Arrays {
    std::uintptr_t grad_mid, grad_rad, mid, rad, weight, out, parts;
};

template <class T>
const char* convolve_weight(int device, std::uintptr_t stream, const Convolution& c, const Arrays& a) {
    Plan plan;
    Order order;
    // Of 128 channels at a time the source is read half as often.
    int columns = c.target_channels % (2 * tile_channels) == 0 ? 2 : 1;
    const auto plan_for = [&] { return make_plan(c, {1, columns * grad_bytes, 0, 0, least_stages, 2}, plan, order); };
    const char* wrong = plan_for();
    if (wrong != nullptr && columns == 2) columns = 1, wrong = plan_for();
    if (wrong != nullptr) return wrong;
    plan.tiles_n /= columns;
    const int64_t units = static_cast<int64_t>(plan.tiles_n) * plan.chunks * plan.phase[0].panels;
    const int tiles = plan.tiles_x * plan.tiles_y * plan.tiles_b, parts = parts_of(units, tiles, processors(device));
    if (units > 0x7fffffff / most_parts) return "the weight has more tiles than one launch can have";
    if (a.out == 0) {
        *reinterpret_cast<int64_t*>(a.parts) = parts;
        return nullptr;
    }
    Map grad_mid, grad_rad, mid, rad;
    if (const char* wrong = make_source_map<T>(&mid, a.mid, plan, c)) return wrong;
    if (const char* wrong = make_source_map<T>(&rad, a.rad, plan, c)) return wrong;
    const auto make_grad_map = [&](Map* map, std::uintptr_t grad) {
        return make_image_map<T>(map, grad, plan, c.batch, c.target_height, c.target_width, c.target_channels, 1, 1,
                                 1 << plan.tile_rows_log);
    };
    if (const char* wrong = make_grad_map(&grad_mid, a.grad_mid)) return wrong;
    if (const char* wrong = make_grad_map(&grad_rad, a.grad_rad)) return wrong;
    const auto start = [&](auto kernel) {
        return launch(kernel, device, stream, units * parts, threads, plan.stages * plan.stage_bytes + barrier_bytes,
                      plan, order, grad_mid, grad_rad, mid, rad, tiles, parts, at<T>(a.weight),
                      const_cast<float*>(at<float>(a.out)));
    };
    return columns == 2 ? start(interval_conv2d_weight_kernel<T, 2>) : start(interval_conv2d_weight_kernel<T, 1>);
}

}  // namespace
}  // namespace pyxai_bounds::hopper

extern "C" const char* hopper_convolve_weight(
    std::int64_t device, std::uintptr_t stream, std::int64_t is_half, std::int64_t batch, std::int64_t source_height,
    std::int64_t source_width, std::int64_t source_channels, std::int64_t target_height, std::int64_t target_width,
    std::int64_t target_channels, std::int64_t kernel_height, std::int64_t kernel_width, std::int64_t stride_height,
    std::int64_t stride_width, std::int64_t padding_height, std::int64_t padding_width, std::int64_t dilation_height,
    std::int64_t dilation_width, std::uintptr_t grad_mid, std::uintptr_t grad_rad, std::uintptr_t mid,
    std::uintptr_t rad, std::uintptr_t weight, std::uintptr_t out, std::uintptr_t parts) {
    using namespace pyxai_bounds::hopper;
    Convolution c;
    const char* wrong = make_convolution({0, batch, source_height, source_width, source_channels, target_height,
                                          target_width, target_channels, kernel_height, kernel_width, stride_height,
                                          stride_width, padding_height, padding_width, dilation_height, dilation_width},
                                         c);
    if (wrong != nullptr) return wrong;
    const Arrays a{grad_mid, grad_rad, mid, rad, weight, out, parts};
    const int gpu = static_cast<int>(device);
    return is_half ? convolve_weight<Half>(gpu, stream, c, a) : convolve_weight<BFloat16>(gpu, stream, c, a);
}
