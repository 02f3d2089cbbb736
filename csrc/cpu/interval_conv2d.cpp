// A two-dimensional convolution on boxes and its backward-data pass, on channels-last tensors, as direct convolutions:
// the pixels that a band of the output reads are packed once, with ReLU' on the way, and the tiles of tile.h walk over
// them with the packed weight; ReLU is applied to the sums before they leave the registers. Sums are taken in another
// order than in the specification, pyxai_bounds/ops/reference.py.
//
// Both passes are one: the backward-data pass of stride s is s*s convolutions of stride 1, one for each remainder of the
// pixels that it writes, with those taps that reach them.
#include "pyxai_bounds/parallel.h"
#include "pyxai_bounds/scratch.h"
#include "pyxai_bounds/stages.h"
#include "pyxai_bounds/tile.h"
#include "pyxai_bounds/vec.h"

namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL {
namespace {

using std::int64_t;
using std::uint8_t;

// Pairs (weight, box) per thread, at least: about ten microseconds.
inline constexpr int64_t conv2d_grain = 1 << 19;
// Bytes of a packed band, which should stay in the second-level cache beside a panel of the weight.
inline constexpr int64_t band_bytes = 1 << 19;

// One dimension of a convolution: output q, q < count, is written at out_first + q·out_step, and sums the source at
// first + q·in_step + t·dilation, t < taps, times the kernel at kernel_first + t·kernel_step.
struct Axis {
    int64_t count, out_first, out_step, first, in_step, dilation, taps, kernel_first, kernel_step;
    int64_t begin(int64_t q) const { return first + q * in_step; }
    int64_t end(int64_t q) const { return begin(q - 1) + (taps - 1) * dilation + 1; }  // of all before q
};

int64_t greatest_common_divisor(int64_t a, int64_t b) {
    return b == 0 ? a : greatest_common_divisor(b, a % b);
}

Axis forward_axis(int64_t outputs, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
    return {outputs, 0, 1, -padding, stride, dilation, kernel, 0, 1};
}

// Tap k takes pixel i to (i + padding − k·dilation) / stride, where that is a whole number: for one remainder of i every
// stride / gcd-th tap, the last of which reaches the least pixel.
Axis backward_axis(int64_t remainder, int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
    const int64_t common = greatest_common_divisor(stride, dilation), step = stride / common;
    Axis axis{remainder < size ? ceil_div(size - remainder, stride) : 0, remainder, stride, 0, 1, dilation / common, 0,
              0, -step};
    for (int64_t k = 0; k < kernel; ++k) {
        const int64_t offset = remainder + padding - k * dilation;
        if (offset % stride == 0) {
            ++axis.taps;
            axis.kernel_first = k;
            axis.first = offset / stride;  // the greatest tap comes last, and stays
        }
    }
    return axis;
}

// The source pixels [top, bottom) × [left, right) that a band reads.
struct Window {
    int64_t top, bottom, left, right;
    int64_t rows() const { return bottom - top; }
    int64_t columns() const { return right - left; }
};

// A source of boxes, of which `state`, if there is one, is ReLU's at what it is the gradient of.
template <class T>
struct Source {
    int64_t batch, height, width, channels;
    const T *mid, *rad;
    const uint8_t* state;

    // One image's pixels in a window as pairs, zeros where the window reaches past the image.
    void pack(int64_t image, Window window, T* out) const {
        const int64_t plane = (batch * height * width * channels + 7) / 8;
        const int64_t left = greater(window.left, 0), right = greater(smaller(window.right, width), left);
        const int64_t row = 2 * window.columns() * channels;
        for (int64_t y = window.top; y < window.bottom; ++y, out += row) {
            if (y < 0 || y >= height || right == left) {
                zero(out, row);
                continue;
            }
            T *const from = out + 2 * (left - window.left) * channels, *const to = from + 2 * (right - left) * channels;
            zero(out, from - out);
            const int64_t first = ((image * height + y) * width + left) * channels, count = (right - left) * channels;
            if (state)
                pack_gated_pairs(count, mid + first, rad + first, state, plane, first, from);
            else
                pack_pairs(count, mid + first, rad + first, from);
            zero(to, out + row - to);
        }
    }

    static void zero(T* out, int64_t count) {
        for (int64_t i = 0; i < count; ++i) out[i] = T(0);
    }
};

// Where the sums of a convolution go.
template <class T>
struct Target {
    int64_t height, width, outputs;
    const T* bias;
    T *mid, *rad;
    uint8_t* state;
    int64_t plane;

    template <int pixels, int vectors>
    void write(int count, const int64_t* at, int64_t output, const Sums<T, pixels, vectors>& sums) const {
        constexpr int L = Vec<T>::lanes;
        for (int p = 0; p < count; ++p)
            for (int v = 0; v < vectors; ++v) {
                const int64_t first = output + v * L, left = outputs - first, i = at[p] + first;
                if (left >= L) {
                    const Vec<T> sum = sums.mid[p][v];
                    write_one(i, bias ? sum + Vec<T>::load(bias + first) : sum, sums.rad[p][v]);
                } else {
                    T mids[L], rads[L];
                    sums.mid[p][v].store(mids);
                    sums.rad[p][v].store(rads);
                    for (int64_t j = 0; j < left; ++j) {
                        mid[i + j] = bias ? mids[j] + bias[first + j] : mids[j];
                        rad[i + j] = rads[j];
                    }
                }
            }
    }

    void write_one(int64_t i, Vec<T> m, Vec<T> r) const {
        if (state) {
            const Keep<Vec<T>> keep = relu_keeps(m, r);
            keep_ends<false, T>(m, r, keep);
            Bits{Vec<T>::bits(keep.lower), Vec<T>::bits(keep.upper)}.store(state, plane, i / 8, Vec<T>::lanes / 8);
        }
        m.store(mid + i);
        r.store(rad + i);
    }
};

// The weight as the convolution uses it: outputs and channels change places in the backward-data pass.
template <class T>
struct Weight {
    const T* data;
    int64_t outputs, channels, output_stride, channel_stride, row_stride, column_stride;

    // Outputs from `output` on, `vectors` vectors of them, term by term; outputs past the last are zeros.
    void pack(Axis rows, Axis columns, int64_t output, int vectors, T* out) const {
        const int64_t width = vectors * Vec<T>::lanes, count = smaller(width, outputs - output);
        const T* const from = data + output * output_stride;
        for (int64_t i = 0; i < rows.taps; ++i)
            for (int64_t j = 0; j < columns.taps; ++j) {
                const T* const tap = from + (rows.kernel_first + i * rows.kernel_step) * row_stride +
                                     (columns.kernel_first + j * columns.kernel_step) * column_stride;
                for (int64_t c = 0; c < channels; ++c, out += width) {
                    int64_t o = 0;
                    for (; o < count; ++o) out[o] = tap[c * channel_stride + o * output_stride];
                    for (; o < width; ++o) out[o] = T(0);
                }
            }
    }
};

inline constexpr int most_remainders = 64;

// One of the convolutions that make up a pass: its axes, and where its packed panels begin.
struct Part {
    Axis rows, columns;
    int64_t packed;
};

template <class T>
struct Pass {
    Source<T> source;
    Weight<T> weight;
    Target<T> target;
    int parts;
    Part part[most_remainders];

    int64_t panels() const { return ceil_div(weight.outputs, tile_width<T>); }
    int vectors(int64_t panel) const {
        return static_cast<int>(smaller(tile_vectors, ceil_div(weight.outputs - panel * tile_width<T>, Vec<T>::lanes)));
    }
    int64_t terms(const Part& p) const { return p.rows.taps * p.columns.taps * weight.channels; }

    int64_t rows() const {
        int64_t most = 0;
        for (int i = 0; i < parts; ++i) most = greater(most, part[i].rows.count);
        return most;
    }

    // What outputs [begin, end) of every part read together.
    Window window(int64_t begin, int64_t end) const {
        Window all{0, 0, 0, 0};
        bool some = false;
        for (int i = 0; i < parts; ++i) {
            const Axis &r = part[i].rows, &c = part[i].columns;
            const int64_t last = smaller(end, r.count);
            if (last <= begin || c.count == 0 || r.taps * c.taps == 0) continue;
            const Window one{r.begin(begin), r.end(last), c.begin(0), c.end(c.count)};
            all = some ? Window{smaller(all.top, one.top), greater(all.bottom, one.bottom),
                                smaller(all.left, one.left), greater(all.right, one.right)}
                       : one;
            some = true;
        }
        return all;
    }

    int64_t band_size(int64_t rows) const { return 2 * window(0, rows).rows() * window(0, rows).columns() * source.channels; }

    void run() {
        const int64_t total = rows(), images = source.batch;
        int64_t packed = 0, pairs = 0;
        for (int i = 0; i < parts; ++i) {
            part[i].packed = packed;
            packed += terms(part[i]) * panels() * tile_width<T>;
            pairs += terms(part[i]) * part[i].rows.count * part[i].columns.count * images * weight.outputs;
        }
        const int team_most = team_size(pairs / conv2d_grain);
        // As few bands as keep one in the cache and leave no thread idle for long.
        int64_t bands = 1, height = total;
        const auto idle = [&](int64_t units) { return 10 * ceil_div(units, team_most) * team_most > 11 * units; };
        while (height > 1 && (band_size(height) * int64_t{sizeof(T)} > band_bytes || idle(images * bands))) {
            ++bands;
            height = ceil_div(total, bands);
        }
        bands = ceil_div(total, greater(height, 1));
        const Scratch<T> weights(packed + terms_ahead * tile_width<T>);
        const int64_t units = images * bands, size = band_size(height);
        parallel_team(team_most, [&](int rank, int team) {
            for (int64_t panel = 0, next = 0; panel < panels(); ++panel)
                for (int i = 0; i < parts; ++i)
                    if (next++ % team == rank) {
                        T* const to = weights.get() + part[i].packed + terms(part[i]) * panel * tile_width<T>;
                        weight.pack(part[i].rows, part[i].columns, panel * tile_width<T>, vectors(panel), to);
                    }
            const Scratch<T> band(size);
            team_barrier(team);
            for (int64_t unit = units * rank / team; unit < units * (rank + 1) / team; ++unit) {
                const int64_t image = unit / bands, begin = unit % bands * height;
                const int64_t end = smaller(begin + height, total);
                const Window w = window(begin, end);
                source.pack(image, w, band.get());
                for (int i = 0; i < parts; ++i)
                    for (int64_t panel = 0; panel < panels(); ++panel) {
                        const T* const at = weights.get() + part[i].packed + terms(part[i]) * panel * tile_width<T>;
                        const int64_t last = smaller(end, part[i].rows.count);
                        if (vectors(panel) == tile_vectors)
                            tiles<tile_vectors>(part[i], image, begin, last, w, band.get(), panel, at);
                        else
                            tiles<1>(part[i], image, begin, last, w, band.get(), panel, at);
                    }
            }
        });
    }

    // Output rows [begin, end) of one part, one image and one panel of outputs.
    template <int vectors>
    void tiles(const Part& p, int64_t image, int64_t begin, int64_t end, Window w, const T* band, int64_t panel,
               const T* weights) const {
        const Axis &r = p.rows, &c = p.columns;
        const int64_t channels = source.channels, row = w.columns() * channels;
        const bool joined = c.dilation == 1;  // neighbouring taps read neighbouring pixels
        const Terms terms{{r.taps, r.dilation * row},
                          {joined ? 1 : c.taps, c.dilation * channels},
                          joined ? c.taps * channels : channels};
        int64_t q = begin, x = 0;
        in_tiles((end - begin) * c.count, [&](int64_t, int64_t count, auto pixels) {
            const T* sources[pixels];
            int64_t at[pixels];
            for (int i = 0; i < pixels; ++i) {
                if (i < count) {
                    sources[i] = band + 2 * ((r.begin(q) - w.top) * row + (c.begin(x) - w.left) * channels);
                    at[i] = ((image * target.height + r.out_first + q * r.out_step) * target.width + c.out_first +
                             x * c.out_step) *
                            target.outputs;
                    if (++x == c.count) x = 0, ++q;
                } else {
                    sources[i] = sources[0];  // computed and dropped
                }
            }
            Sums<T, pixels, vectors> sums;
            for (auto& vector : sums.mid)
                for (Vec<T>& sum : vector) sum = Vec<T>::fill(T(0));
            for (auto& vector : sums.rad)
                for (Vec<T>& sum : vector) sum = Vec<T>::fill(T(0));
            if (terms.count() > 0) add_terms(terms, sources, weights, sums);
            target.write(static_cast<int>(count), at, panel * tile_width<T>, sums);
        });
    }
};

template <class T>
void conv2d(const Conv2d& s, const T* mid, const T* rad, const T* weight, const T* bias, T* out_mid, T* out_rad,
            uint8_t* state) {
    const int64_t* w = s.weight_strides;
    Pass<T> pass{{s.batch, s.height, s.width, s.channels, mid, rad, nullptr},
                 {weight, s.outputs, s.channels, w[0], w[1], w[2], w[3]},
                 {s.out_height, s.out_width, s.outputs, bias, out_mid, out_rad, state,
                  (s.batch * s.out_height * s.out_width * s.outputs + 7) / 8},
                 1,
                 {}};
    pass.part[0] = {forward_axis(s.out_height, s.kernel[0], s.stride[0], s.padding[0], s.dilation[0]),
                    forward_axis(s.out_width, s.kernel[1], s.stride[1], s.padding[1], s.dilation[1]), 0};
    pass.run();
}

template <class T>
void conv2d_backward(const Conv2d& s, const T* mid, const T* rad, const uint8_t* state, const T* weight, T* out_mid,
                     T* out_rad) {
    const int64_t* w = s.weight_strides;
    Pass<T> pass{{s.batch, s.out_height, s.out_width, s.outputs, mid, rad, state},
                 {weight, s.channels, s.outputs, w[1], w[0], w[2], w[3]},
                 {s.height, s.width, s.channels, nullptr, out_mid, out_rad, nullptr, 0},
                 static_cast<int>(s.stride[0] * s.stride[1]),
                 {}};
    for (int64_t i = 0; i < s.stride[0]; ++i)
        for (int64_t j = 0; j < s.stride[1]; ++j)
            pass.part[i * s.stride[1] + j] = {
                backward_axis(i, s.height, s.kernel[0], s.stride[0], s.padding[0], s.dilation[0]),
                backward_axis(j, s.width, s.kernel[1], s.stride[1], s.padding[1], s.dilation[1]), 0};
    pass.run();
}

}  // namespace

template <class T>
void set_interval_conv2d(Stages<T>& stages) {
    stages.conv2d = conv2d<T>;
    stages.conv2d_backward = conv2d_backward<T>;
}

template void set_interval_conv2d(Stages<float>&);
template void set_interval_conv2d(Stages<double>&);

}  // namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL
