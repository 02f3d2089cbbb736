// What the kernels of csrc/hopper share: how a convolution is cut into tiles and panels, the ring of stages in shared
// memory, and the copy engine's view of an image.
#pragma once

#include "pyxai_bounds/hopper.cuh"

namespace pyxai_bounds::hopper {

// A block: two groups of four warps multiply, and one warp of a third brings what they need.
constexpr int group_threads = 128, multipliers = 2 * group_threads, threads = 3 * group_threads;
// Registers that the third group keeps, and that the others take: of 168 for each thread, no more in all.
constexpr int few_registers = 24, many_registers = 240;
static_assert(group_threads * few_registers + multipliers * many_registers <= threads * 168);

constexpr int tile_channels = 64;  // of the result
constexpr int group_pixels = 128;  // that a group of warps, or two, multiply with
constexpr int depth = 64;          // channels of a panel: 128 bytes, the longest row that is swizzled
constexpr int row_bytes = 128;     // of one pixel in a panel, or of one channel of the result in the weights
constexpr int most_stages = 6, barrier_bytes = 2 * most_stages * 8;
constexpr int most_taps = 3;           // of one panel
constexpr int most_panels = 25;        // in all
constexpr int most_packed = 49;        // taps
constexpr uint32_t none = 0xffffffff;  // no octet of channels

// What is known to the compiler.
template <int n>
using Constant = std::integral_constant<int, n>;

// A column of taps that read one panel: where it begins in the source, and which row of it each tap begins at.
struct Panel {
    signed char y, x;              // of the first row and column, from the tile's, in steps of the stride,
    signed char y_phase, x_phase;  // and between two steps
    signed char first_tap, taps;   // in the order of the packed weights
    signed char rows_down[most_taps];
    signed char skipped;  // pixels that the last tap leaves out, all of a row that the panel does not have
};

// Pixels of the result that the same taps reach: all, or those of one remainder modulo the stride.
struct Phase {
    int y, x;  // of the first such pixel
    int first_panel, panels;
};

struct Plan {
    int batch, height, width;  // of the result
    int rows, columns;         // of a phase
    int step_y, step_x;        // between pixels of a phase
    int phases, chunks;        // of the source's channels
    int channels;              // of the result
    uint32_t octets;           // of channels, in all the result
    int taps;
    // Pixels of a box: [rows, images, width], so that the next tap of a column begins a line further on in all images
    // at once. A tile has one box, or each group one of its own, as whole images; which begins so much later.
    int boxes, tile_width, tile_width_log, tile_images, tile_images_log, tile_rows_log;
    int group_rows, group_images, group_bytes;
    int tiles_x, tiles_y, tiles_b, tiles_n;
    int panel_rows, panel_bytes, stage_bytes, stages;
    Phase phase[4];
    Panel panel[most_panels];
};

struct Work {
    int phase, b, y, x, n;
};

__device__ inline Work work_of(const Plan& plan, int tile) {
    Work work;
    work.n = tile % plan.tiles_n, tile /= plan.tiles_n;
    work.phase = tile % plan.phases, tile /= plan.phases;
    work.x = (tile % plan.tiles_x) << plan.tile_width_log, tile /= plan.tiles_x;
    work.y = (tile % plan.tiles_y) << plan.tile_rows_log;
    work.b = tile / plan.tiles_y * plan.boxes * plan.tile_images;
    return work;
}

// Where stages lie: `full` says that a stage's bytes have come, `empty` that the warps that multiply have used them.
struct Ring {
    uint8_t* memory;
    Barrier *full, *empty;
    int stages, stage = 0;
    uint32_t parity = 0;

    __device__ void next() {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

// Stages from the beginning of the block's memory on, and their barriers; a stage is empty when so many have said so.
__device__ inline Ring make_ring(uint8_t* memory, void* barriers, int stages, int users) {
    Barrier* const full = static_cast<Barrier*>(barriers);
    const Ring ring{memory, full, full + most_stages, stages};
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; ++i) barrier_init(ring.full + i, 1), barrier_init(ring.empty + i, users);
        barriers_are_made();
    }
    __syncthreads();
    return ring;
}

// Which tap of the weight is which of the plan's.
struct Order {
    signed char tap[most_packed];
};

inline int floor_div(int a, int b) {
    return a / b - (a % b != 0 && (a < 0) != (b < 0));
}

inline int log2_of(int n) {
    int log = 0;
    while (1 << log < n) ++log;
    return log;
}

struct Tap {
    int y, x, y_phase, x_phase, index;
};

// Appends the phase's panels; false if there are too many.
inline bool add_phase(Plan& plan, Order& order, Tap (&taps)[most_packed], int count, int& panels, int& packed_taps,
                      int share) {
    // Taps that read the same columns, one row after the other.
    for (int i = 1; i < count; ++i) {
        const auto before = [](const Tap& a, const Tap& b) {
            if (a.x != b.x) return a.x < b.x;
            if (a.x_phase != b.x_phase) return a.x_phase < b.x_phase;
            if (a.y_phase != b.y_phase) return a.y_phase < b.y_phase;
            return a.y < b.y;
        };
        for (int j = i; j > 0 && before(taps[j], taps[j - 1]); --j) {
            const Tap other = taps[j];
            taps[j] = taps[j - 1], taps[j - 1] = other;
        }
    }
    for (int i = 0; i < count; ++i) {
        const Tap& tap = taps[i];
        Panel* last = panels > plan.phase[plan.phases].first_panel ? &plan.panel[panels - 1] : nullptr;
        const bool fits = last != nullptr && last->x == tap.x && last->x_phase == tap.x_phase &&
                          last->y_phase == tap.y_phase && tap.y - last->y < share && last->taps < most_taps;
        if (!fits) {
            if (panels == most_panels) return false;
            last = &plan.panel[panels++];
            *last = {};
            last->y = static_cast<signed char>(tap.y), last->x = static_cast<signed char>(tap.x);
            last->y_phase = static_cast<signed char>(tap.y_phase);
            last->x_phase = static_cast<signed char>(tap.x_phase);
            last->first_tap = static_cast<signed char>(packed_taps);
        }
        last->rows_down[last->taps++] = static_cast<signed char>(tap.y - last->y);
        order.tap[packed_taps++] = static_cast<signed char>(tap.index);
    }
    plan.phase[plan.phases].panels = panels - plan.phase[plan.phases].first_panel;
    ++plan.phases;
    return true;
}

struct Convolution {
    bool transposed;
    int batch, source_height, source_width, source_channels, target_height, target_width, target_channels;
    int kernel_y, kernel_x, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
};

// Pixels of a tile for so many groups: narrow and tall, so that few rows are brought twice; of small images, several
// for each. False if none fits.
inline bool shape_tile(Plan& plan, int groups) {
    const int pixels = groups * group_pixels;
    int best = 0, width = 0;
    for (int w = 8; w <= 128 && w <= pixels; w *= 2) {
        const int rows = pixels / w, tiles = (plan.rows + rows - 1) / rows;
        const int used = plan.rows * 1024 / (tiles * rows);  // how much of the tiles is no waste
        if (plan.columns % w == 0 && used > best) best = used, width = w;
    }
    const int image = plan.rows * plan.columns;
    const bool small = group_pixels % image == 0 && (plan.columns & (plan.columns - 1)) == 0;
    if (small) best = 1024, width = plan.columns;
    if (best < 512) return false;
    plan.boxes = small ? groups : 1, plan.tile_width = width, plan.tile_images = small ? group_pixels / image : 1;
    const int rows = small ? plan.rows : pixels / width, images = plan.boxes * plan.tile_images;
    plan.tile_width_log = log2_of(width), plan.tile_images_log = log2_of(plan.tile_images);
    plan.tile_rows_log = log2_of(rows);
    plan.group_rows = small ? 0 : group_pixels / width, plan.group_images = small ? plan.tile_images : 0;
    plan.tiles_x = plan.columns / width, plan.tiles_y = (plan.rows + rows - 1) / rows;
    plan.tiles_b = (plan.batch + images - 1) / images;
    return true;
}

// Whether panels may end with the image, because taps of the next row can leave out the last row's pixels: of whole
// images for each group, where such a tap follows another one of its column. `line`: the pixels between two rows.
inline bool can_skip(const Plan& plan, int panels, int source_rows, int line) {
    if (plan.boxes == 1 || source_rows != plan.rows || (line != 16 && line != 32 && line != 64)) return false;
    for (int p = 0; p < panels; ++p) {
        const Panel& panel = plan.panel[p];
        const int last = panel.y + panel.rows_down[panel.taps - 1];
        if (last > 1 || (last == 1 && panel.taps == 1)) return false;
    }
    return true;
}

// What a kernel makes of a plan: groups that multiply with pixels of their own, bytes of a stage besides the panel's,
// and for each tap, bytes that it keeps of a block's, the least number of stages and what their number is a multiple
// of.
struct Needs {
    int groups, stage_bytes, tap_bytes, other_bytes, stages, multiple;
};

// Null, or why these kernels do not take it.
inline const char* make_plan(const Convolution& c, const Needs& needs, Plan& plan, Order& order) {
    const int phases_y = c.transposed ? c.stride_y : 1, phases_x = c.transposed ? c.stride_x : 1;
    const int steps_y = c.transposed ? 1 : c.stride_y, steps_x = c.transposed ? 1 : c.stride_x;
    if (c.source_channels % depth != 0 || c.target_channels % tile_channels != 0)
        return "channels are no multiples of 64";
    if (c.target_height % phases_y != 0 || c.target_width % phases_x != 0 || c.source_height % steps_y != 0 ||
        c.source_width % steps_x != 0)
        return "the image is no multiple of the stride";
    if (steps_y > 127 || steps_x > 127) return "the stride is above 127";
    if (phases_y * phases_x > 4 || c.kernel_y * c.kernel_x > most_packed) return "too many taps or a stride above 2";
    plan = {}, order = {};
    plan.batch = c.batch, plan.height = c.target_height, plan.width = c.target_width;
    plan.channels = c.target_channels;
    const int64_t elements = static_cast<int64_t>(c.batch) * c.target_height * c.target_width * c.target_channels;
    if (elements / 8 >= none) return "the result has more elements than 32 bits count in eights";
    if (static_cast<int64_t>(c.source_channels) * c.target_channels * c.kernel_y * c.kernel_x > 0x7fffffff)
        return "the weight has more elements than 31 bits count";
    plan.octets = static_cast<uint32_t>(elements / 8);
    plan.rows = c.target_height / phases_y, plan.columns = c.target_width / phases_x;
    plan.step_y = phases_y, plan.step_x = phases_x;
    plan.chunks = c.source_channels / depth, plan.taps = c.kernel_y * c.kernel_x;
    plan.tiles_n = c.target_channels / tile_channels;
    if (!shape_tile(plan, needs.groups)) return "the image does not divide into tiles";
    // A panel is swizzled by eight pixels; of one row, no two taps read the same.
    const int line = plan.tile_images * plan.tile_width;
    const int share = line >= 8 && plan.rows > 1 ? most_taps : 1;
    int panels = 0, packed_taps = 0;
    for (int y = 0; y < phases_y; ++y) {
        for (int x = 0; x < phases_x; ++x) {
            Tap taps[most_packed];
            int count = 0;
            for (int ky = 0; ky < c.kernel_y; ++ky) {
                for (int kx = 0; kx < c.kernel_x; ++kx) {
                    Tap tap{ky * c.dilation_y - c.padding_y, kx * c.dilation_x - c.padding_x, 0, 0,
                            ky * c.kernel_x + kx};
                    if (c.transposed) {
                        tap.y = y - tap.y, tap.x = x - tap.x;
                        if (tap.y % phases_y != 0 || tap.x % phases_x != 0) continue;
                        tap.y /= phases_y, tap.x /= phases_x;
                    } else {
                        tap.y_phase = tap.y - floor_div(tap.y, steps_y) * steps_y, tap.y = floor_div(tap.y, steps_y);
                        tap.x_phase = tap.x - floor_div(tap.x, steps_x) * steps_x, tap.x = floor_div(tap.x, steps_x);
                    }
                    if (tap.y < -127 || tap.y > 127 || tap.x < -127 || tap.x > 127) return "a tap is too far away";
                    taps[count++] = tap;
                }
            }
            if (count == 0) return "no tap reaches some pixels";
            plan.phase[plan.phases] = {y, x, panels, 0};
            if (!add_phase(plan, order, taps, count, panels, packed_taps, share)) return "too many columns of taps";
        }
    }
    const bool skips = can_skip(plan, panels, c.source_height / steps_y, line);
    int down = 0, taps = 0;
    for (int p = 0; p < panels; ++p) {
        Panel& panel = plan.panel[p];
        int rows = panel.rows_down[panel.taps - 1];
        if (skips && panel.y + rows == 1) panel.skipped = static_cast<signed char>(line), --rows;
        if (rows > down) down = rows;
        if (panel.taps > taps) taps = panel.taps;
    }
    plan.panel_rows = (1 << plan.tile_rows_log) + down;
    if (plan.panel_rows > 256) return "a panel has too many rows";
    plan.panel_bytes = plan.boxes * plan.panel_rows * line * row_bytes;
    plan.group_bytes = plan.boxes == 1 ? group_pixels * row_bytes : plan.panel_bytes / plan.boxes;
    plan.stage_bytes = plan.panel_bytes + needs.stage_bytes + taps * needs.tap_bytes;
    plan.stages = (most_memory - needs.other_bytes - barrier_bytes) / plan.stage_bytes;
    if (plan.stages > most_stages) plan.stages = most_stages;
    plan.stages -= plan.stages % needs.multiple;
    if (plan.stages < needs.stages) return "its stages are more than shared memory holds";
    const int64_t tiles = static_cast<int64_t>(plan.tiles_x) * plan.tiles_y * plan.tiles_b * plan.tiles_n * plan.phases;
    return tiles > 0x7fffffff ? "the result has more tiles than one launch can have" : nullptr;
}

template <class T>
const T* at(std::uintptr_t address) {
    return reinterpret_cast<const T*>(address);
}

// An image, dense and channels-last, read a box of [rows, images, width] pixels and 64 channels at a time; in steps of
// a stride, between which its pixels are phases: [phase, height, batch, width, phase and channels].
template <class T>
const char* make_image_map(Map* map, std::uintptr_t image, const Plan& plan, int batch, int height, int width,
                           int channels, int step_y, int step_x, int rows) {
    const uint64_t B = batch, H = height, W = width, C = channels, sy = step_y, sx = step_x;
    const uint64_t sizes[5] = {sx * C, W / sx, B, H / sy, sy};
    const uint64_t pitches[4] = {2 * sx * C, 2 * H * W * C, 2 * sy * W * C, 2 * W * C};
    const uint32_t box[5] = {depth, static_cast<uint32_t>(plan.tile_width), static_cast<uint32_t>(plan.tile_images),
                             static_cast<uint32_t>(rows), 1};
    return make_map<T>(map, at<T>(image), sizes, pitches, box);
}
template <class T>
const char* make_source_map(Map* map, std::uintptr_t image, const Plan& plan, const Convolution& c) {
    return make_image_map<T>(map, image, plan, c.batch, c.source_height, c.source_width, c.source_channels,
                             c.transposed ? 1 : c.stride_y, c.transposed ? 1 : c.stride_x, plan.panel_rows);
}

// The sizes that Python gives, in the order of the members; null, or what is wrong.
inline const char* make_convolution(const int64_t (&sizes)[16], Convolution& c) {
    constexpr int64_t most = 1 << 24;
    int number[16];
    for (int i = 0; i < 16; ++i) {
        if (sizes[i] < (i >= 1 && i < 12) || sizes[i] > most) return "a size is out of range";
        number[i] = static_cast<int>(sizes[i]);
    }
    c = {number[0] != 0, number[1], number[2],  number[3],  number[4],  number[5],  number[6],  number[7],
         number[8],      number[9], number[10], number[11], number[12], number[13], number[14], number[15]};
    return nullptr;
}

}  // namespace pyxai_bounds::hopper
