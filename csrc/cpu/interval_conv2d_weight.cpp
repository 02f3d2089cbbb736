// The gradient of a convolution of boxes in its weight, on channels-last tensors: the convolution's at midpoints plus
// sign(W) times its at radii, in one pass. A weight meets pixels of the output's gradient (vectors of outputs) and of
// the input (numbers, one for each channel); a block of pixels stays in the first-level cache while all weights of a
// thread pass over it. No output and no input is copied, and the sums of a weight are taken in one order, whatever the
// number of threads.
#include "pyxai_bounds/parallel.h"
#include "pyxai_bounds/scratch.h"
#include "pyxai_bounds/stages.h"
#include "pyxai_bounds/transpose.h"
#include "pyxai_bounds/vec.h"
#include "pyxai_bounds/weight_gradient.h"

namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL {
namespace {

using std::int64_t;

// Vectors of outputs, and with one of them channels, whose sums stay in registers while a block of pixels passes.
#if defined(__AVX512F__)
inline constexpr int most_vectors = 4, most_sums = 24;
#else
inline constexpr int most_vectors = 2, most_sums = 12;
#endif
// Pixels of a block, at most.
inline constexpr int64_t block_pixels = 128;
// Products of a weight and a pixel per thread, at least.
inline constexpr int64_t weight_grain = 1 << 19;

int64_t floor_div(int64_t a, int64_t b) {
    return a >= 0 ? a / b : -ceil_div(-a, b);
}

// One dimension: output q meets input q·stride + t·dilation − padding under tap t.
struct Side {
    int64_t inputs, stride, dilation, padding;
    int64_t shift(int64_t tap) const { return tap * dilation - padding; }
    // The first output of [begin, ...), and the end of those in [..., end), that meet an input.
    int64_t first(int64_t tap, int64_t begin) const { return greater(begin, -floor_div(shift(tap), stride)); }
    int64_t last(int64_t tap, int64_t end) const {
        return smaller(end, floor_div(inputs - 1 - shift(tap), stride) + 1);
    }
};

// The pixels that pass: their number, and how far two neighbours lie apart in the two tensors.
struct Pixels {
    int64_t rows, columns, grad_row, grad_column, source_row, source_column;
};

// Adds the products of one half: `grad` and `source` are midpoints or radii, and sums those of one tap. A function of
// its own, with sums of its own, so that they stay in registers.
template <class T, int vectors, int channels>
__attribute__((noinline)) void add_pixels(Pixels p, const T* grad, const T* source, T* sums, int64_t sums_stride) {
    using V = Vec<T>;
    V sum[channels][vectors];
    for (auto& of_channel : sum)
        for (V& v : of_channel) v = V::fill(T(0));
    for (int64_t y = 0; y < p.rows; ++y) {
        const T *g = grad + y * p.grad_row, *s = source + y * p.source_row;
        for (int64_t x = 0; x < p.columns; ++x, g += p.grad_column, s += p.source_column) add_outer_product(s, g, sum);
    }
    for (int c = 0; c < channels; ++c)
        for (int v = 0; v < vectors; ++v) {
            T* const to = sums + c * sums_stride + v * V::lanes;
            (V::load(to) + sum[c][v]).store(to);
        }
}

template <class T>
using AddPixels = void (*)(Pixels, const T*, const T*, T*, int64_t);

// How many of `left` channels are added at a time, and by what.
template <class T>
struct Together {
    int channels;
    AddPixels<T> add;
};

template <class T, int vectors, int channels, int... fewer>
Together<T> together(int64_t left) {
    if constexpr (channels * vectors <= most_sums)
        if (channels <= left) return {channels, add_pixels<T, vectors, channels>};
    if constexpr (sizeof...(fewer) > 0) return together<T, vectors, fewer...>(left);
    return {1, add_pixels<T, vectors, 1>};
}

template <class T>
Together<T> together(int64_t vectors, int64_t left) {
    switch (vectors) {
        case 4:
            return together<T, most_vectors, 6, 4, 3, 2, 1>(left);
        case 2:
            return together<T, 2, 12, 8, 6, 4, 3, 2, 1>(left);
        default:
            return together<T, 1, 12, 8, 6, 4, 3, 2, 1>(left);
    }
}

// Weights that share their outputs and channels, in every tap.
template <class T>
struct Group {
    int64_t output, vectors, channel;
    Together<T> by;
    int64_t weights() const { return vectors * Vec<T>::lanes * by.channels; }
};

template <class T>
struct WeightGradient {
    const Conv2d& shape;
    // Of midpoints and of radii; both of a half, or neither.
    const T *grad[2], *source[2];
    const T* weight;
    T* out;

    int64_t taps() const { return shape.kernel[0] * shape.kernel[1]; }
    int64_t row() const { return shape.channels * taps(); }
    int64_t weights() const { return shape.outputs * row(); }

    // Calls f(first vector, vectors) for groups of vectors of outputs.
    template <class F>
    void for_panels(F f) const {
        const int64_t all = shape.outputs / Vec<T>::lanes;
        for (int64_t v = 0, vectors = 0; v < all; v += vectors) {
            vectors = all - v >= most_vectors ? most_vectors : all - v >= 2 ? 2 : 1;
            f(v, vectors);
        }
    }

    // Calls f(group) for groups that cover all weights, in groups of channels that are as even as there are kernels
    // for.
    template <class F>
    void for_groups(F f) const {
        for_panels([&](int64_t v, int64_t vectors) {
            const int64_t most = together<T>(vectors, shape.channels).channels, all = shape.channels;
            const int64_t even = ceil_div(all, ceil_div(all, most));
            for (int64_t channel = 0; channel < all;) {
                Together<T> by = together<T>(vectors, smaller(most, all - channel));
                if (const auto fewer = together<T>(vectors, smaller(by.channels - 1, all)); fewer.channels >= even)
                    by = fewer;
                f(Group<T>{v * Vec<T>::lanes, vectors, channel, by});
                channel += by.channels;
            }
        });
    }

    void run() const {
        int64_t groups = 0;
        for_groups([&](const Group<T>&) { ++groups; });
        const Scratch<Group<T>> group(groups);
        groups = 0;
        for_groups([&](const Group<T>& g) { group.get()[groups++] = g; });
        // Of each half: outputs by vectors, then channels, then taps.
        const Scratch<T> sums(2 * weights());
        const int64_t pixels = shape.batch * shape.out_height * shape.out_width;
        parallel_team(team_size(weights() * pixels / weight_grain), [&](int rank, int team) {
            for (int64_t i = 2 * weights() * rank / team; i < 2 * weights() * (rank + 1) / team; ++i)
                sums.get()[i] = T(0);
            // Each takes whole groups at a tap, as many as make its share of the products: with two, one takes the
            // midpoints and the other the radii, and neither reads what only the other needs.
            const int64_t each = groups * taps(), first_half = grad[0] ? 0 : 1, halves = grad[0] && grad[1] ? 2 : 1;
            const auto first = [&](int64_t of) {
                int64_t before = 0, unit = 0;
                for (; unit < halves * each && before < halves * weights() * of / team; ++unit)
                    before += group.get()[unit % each / taps()].weights();
                return unit;
            };
            const int64_t begin = first(rank), end = first(rank + 1);
            team_barrier(team);
            for (int64_t image = 0; image < shape.batch; ++image)
                in_blocks([&](int64_t top, int64_t bottom, int64_t left, int64_t right) {
                    for (int64_t unit = begin; unit < end; ++unit)
                        add(first_half + unit / each, image, top, bottom, left, right,
                            group.get()[unit % each / taps()], unit % taps(), sums.get());
                });
            team_barrier(team);
            int64_t next = 0;
            for_panels([&](int64_t v, int64_t vectors) {
                for (int64_t i = 0; i < vectors; ++i)
                    if (next++ % team == rank)
                        write(v + i, vectors, sums.get() + v * Vec<T>::lanes * row() + i * Vec<T>::lanes);
            });
        });
    }

    // Blocks of pixels of an output's image.
    template <class F>
    void in_blocks(F f) const {
        const int64_t columns = smaller(shape.out_width, block_pixels);
        const int64_t rows = greater(block_pixels / greater(columns, 1), 1);
        for (int64_t y = 0; y < shape.out_height; y += rows)
            for (int64_t x = 0; x < shape.out_width; x += columns)
                f(y, smaller(y + rows, shape.out_height), x, smaller(x + columns, shape.out_width));
    }

    void add(int64_t half, int64_t image, int64_t top, int64_t bottom, int64_t left, int64_t right,
             const Group<T>& group, int64_t tap, T* sums) const {
        const Conv2d& s = shape;
        const Side vertical{s.height, s.stride[0], s.dilation[0], s.padding[0]};
        const Side horizontal{s.width, s.stride[1], s.dilation[1], s.padding[1]};
        const int64_t i = tap / s.kernel[1], j = tap % s.kernel[1];
        top = vertical.first(i, top), bottom = vertical.last(i, bottom);
        left = horizontal.first(j, left), right = horizontal.last(j, right);
        if (top >= bottom || left >= right) return;
        const int64_t width = group.vectors * Vec<T>::lanes, row = s.width * s.channels;
        const T* const from =
            grad[half] + ((image * s.out_height + top) * s.out_width + left) * s.outputs + group.output;
        const T* const with = source[half] + (image * s.height + top * s.stride[0] + vertical.shift(i)) * row +
                              (left * s.stride[1] + horizontal.shift(j)) * s.channels + group.channel;
        group.by.add({bottom - top, right - left, s.out_width * s.outputs, s.outputs, s.stride[0] * row,
                      s.stride[1] * s.channels},
                     from, with,
                     sums + half * weights() + group.output * this->row() + (group.channel * taps() + tap) * width,
                     taps() * width);
    }

    // Vector number `vector` of outputs, one of `vectors` whose sums lie together, in the memory order of the indices.
    void write(int64_t vector, int64_t vectors, const T* sums) const {
        constexpr int64_t L = Vec<T>::lanes;
        const int64_t* w = shape.weight_strides;
        const bool dense = w[3] == 1 && w[2] == shape.kernel[1] && w[1] == taps() && w[0] == row();
        T mids[L * L] = {}, rads[L * L] = {}, *to_mid[L], *to_rad[L];
        for (int64_t j = 0; j < L; ++j) to_mid[j] = mids + j * L, to_rad[j] = rads + j * L;
        for (int64_t n = 0; n < row(); n += L) {
            const int some = static_cast<int>(smaller(L, row() - n));
            const T* const from = sums + n * vectors * L;
            if (grad[0]) transpose(from, vectors * L, some, L, to_mid);
            if (grad[1]) transpose(from + weights(), vectors * L, some, L, to_rad);
            for (int64_t j = 0; j < L; ++j)
                for (int i = 0; i < some; ++i) {
                    const int64_t at = (vector * L + j) * row() + n + i;
                    const Scalar<T> of{weight[dense ? at : place(at)]}, rad{to_rad[j][i]};
                    out[at] = grad[1] ? to_mid[j][i] + with_sign(of, rad).value : to_mid[j][i];
                }
        }
    }

    // The place in memory of weight number `at`.
    int64_t place(int64_t at) const {
        const int64_t* w = shape.weight_strides;
        const int64_t tap = at % taps(), channel = at / taps() % shape.channels, output = at / taps() / shape.channels;
        return output * w[0] + channel * w[1] + tap / shape.kernel[1] * w[2] + tap % shape.kernel[1] * w[3];
    }
};

template <class T>
void conv2d_weight(const Conv2d& shape, const T* grad_mid, const T* grad_rad, const T* mid, const T* rad,
                   const T* weight, T* out) {
    WeightGradient<T>{shape, {grad_mid, grad_rad}, {mid, rad}, weight, out}.run();
}

}  // namespace

template <class T>
void set_interval_conv2d_weight(Stages<T>& stages) {
    stages.conv2d_weight = conv2d_weight<T>;
}

template void set_interval_conv2d_weight(Stages<float>&);
template void set_interval_conv2d_weight(Stages<double>&);

}  // namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL
