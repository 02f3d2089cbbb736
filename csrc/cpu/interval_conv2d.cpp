// A two-dimensional convolution on boxes and its backward-data pass, on channels-last tensors, as direct convolutions:
// the pixels that a band of the output reads are packed once, with ReLU' on the way, and the tiles of tile.h walk over
// them with the packed weight; ReLU, or what else comes next, is applied to the sums before they leave the registers.
// Sums are taken in another order than in the specification, pyxai_bounds/ops/reference.py.
//
// Both passes are one: the backward-data pass of stride s is s*s convolutions of stride 1, one for each remainder of
// the pixels that it writes, with those taps that reach them.
#include <atomic>
#include <cstdint>
#include <new>

#include "pyxai_bounds/parallel.h"
#include "pyxai_bounds/scratch.h"
#include "pyxai_bounds/stages.h"
#include "pyxai_bounds/tile.h"
#include "pyxai_bounds/transpose.h"
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
    int64_t tap(int64_t t) const { return kernel_first + t * kernel_step; }
    int64_t begin(int64_t q) const { return first + q * in_step; }
    int64_t end(int64_t q) const { return begin(q - 1) + (taps - 1) * dilation + 1; }  // of all before q
};

int64_t greatest_common_divisor(int64_t a, int64_t b) {
    return b == 0 ? a : greatest_common_divisor(b, a % b);
}

Axis forward_axis(int64_t outputs, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
    return {outputs, 0, 1, -padding, stride, dilation, kernel, 0, 1};
}

// Tap k takes pixel i to (i + padding − k·dilation) / stride, where that is a whole number: for one remainder of i
// every stride / gcd-th tap, the last of which reaches the least pixel.
Axis backward_axis(int64_t remainder, int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
    const int64_t common = greatest_common_divisor(stride, dilation), step = stride / common;
    Axis axis{remainder < size ? ceil_div(size - remainder, stride) : 0,
              remainder,
              stride,
              0,
              1,
              dilation / common,
              0,
              0,
              -step};
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

// The boxes that a pass reads, and how they become pairs.
template <class T>
struct Source {
    int64_t batch, height, width, channels;
    const T *mid, *rad;
    Packing<T> packing;

    // One image's pixels in a window as pairs, zeros where the window reaches past the image. `alive`, if it is wanted,
    // is told which are not zeros.
    void pack(int64_t image, Window window, T* out, uint8_t* alive) const {
        const int64_t left = greater(window.left, 0), right = greater(smaller(window.right, width), left);
        const auto zero = [&](int64_t pixels) {
            for (int64_t i = 0; i < 2 * pixels * channels; ++i) *out++ = T(0);
            if (alive)
                for (int64_t i = 0; i < pixels * channels / 8; ++i) *alive++ = 0;
        };
        for (int64_t y = window.top; y < window.bottom; ++y) {
            if (y < 0 || y >= height || right == left) {
                zero(window.columns());
                continue;
            }
            zero(left - window.left);
            const int64_t first = ((image * height + y) * width + left) * channels, count = (right - left) * channels;
            packing.pack(count, first, mid + first, rad + first, out, alive);
            out += 2 * count;
            if (alive) alive += count / 8;
            zero(window.right - right);
        }
    }
};

// The weight as the convolution uses it: outputs and channels change places in the backward-data pass.
template <class T>
struct Weight {
    const T* data;
    int64_t outputs, channels, kernel_rows, kernel_columns, output_stride, channel_stride, row_stride, column_stride;
    int64_t taps() const { return kernel_rows * kernel_columns; }

    // Up to a vector of outputs from `output` on, of channels [begin, end): a vector goes to to[tap] + channel·pitch
    // for each tap of the kernel, unless to[tap] is null. Lanes past the last output are zeros.
    void pack(int64_t output, int64_t begin, int64_t end, int64_t pitch, T* const* to) const {
        constexpr int64_t L = Vec<T>::lanes;
        const int rows = static_cast<int>(smaller(L, outputs - output));
        const T* const from = data + output * output_stride;
        // Neighbours in memory are the taps of a channel, or the channels at a tap; if neither, one by one.
        const bool by_taps = column_stride == 1 && row_stride == kernel_columns;
        const bool by_runs = by_taps && channel_stride == taps();  // of all taps of all channels
        T unwanted[L], *at[L];
        const auto square = [&](const T* source, int64_t count, auto place) {
            for (int64_t n = 0; n < count; n += L) {
                const int some = static_cast<int>(smaller(L, count - n));
                for (int i = 0; i < some; ++i) at[i] = place(n + i);
                transpose(source + n, output_stride, rows, some, at);
            }
        };
        const auto place = [&](int64_t channel, int64_t tap) { return to[tap] ? to[tap] + channel * pitch : unwanted; };
        if (by_runs) {
            int64_t channel = begin, tap = 0;
            square(from + begin * taps(), (end - begin) * taps(), [&](int64_t) {
                T* const there = place(channel, tap);
                if (++tap == taps()) tap = 0, ++channel;
                return there;
            });
        } else if (by_taps) {
            for (int64_t c = begin; c < end; ++c)
                square(from + c * channel_stride, taps(), [&](int64_t tap) { return place(c, tap); });
        } else {
            for (int64_t tap = 0; tap < taps(); ++tap) {
                const T* const source = from + tap / kernel_columns * row_stride + tap % kernel_columns * column_stride;
                if (channel_stride == 1)
                    square(source + begin, end - begin, [&](int64_t c) { return place(begin + c, tap); });
                else
                    for (int64_t c = begin; c < end; ++c)
                        square(source + c * channel_stride, 1, [&](int64_t) { return place(c, tap); });
            }
        }
    }

    // Output by output, term by term, pairs (w, |w|).
    void pack_few(Axis rows, Axis columns, T* out) const {
        for (int64_t o = 0; o < outputs; ++o)
            for (int64_t i = 0; i < rows.taps; ++i)
                for (int64_t j = 0; j < columns.taps; ++j) {
                    const T* const tap =
                        data + o * output_stride + rows.tap(i) * row_stride + columns.tap(j) * column_stride;
                    for (int64_t c = 0; c < channels; ++c, out += 2) {
                        out[0] = tap[c * channel_stride];
                        out[1] = static_cast<T>(__builtin_fabs(out[0]));
                    }
                }
    }
};

// Up to so many outputs are summed along the terms: the gradient of an image, as a rule.
inline constexpr int64_t few_outputs = 4;

// One of the convolutions that make up a pass: its axes, and where its packed panels begin.
struct Part {
    Axis rows, columns;
    int64_t packed;
};

struct Parts {
    int count;
    Part part[most_remainders];
};

Parts forward_parts(const Conv2d& s) {
    Parts parts{1, {}};
    parts.part[0] = {forward_axis(s.out_height, s.kernel[0], s.stride[0], s.padding[0], s.dilation[0]),
                     forward_axis(s.out_width, s.kernel[1], s.stride[1], s.padding[1], s.dilation[1]), 0};
    return parts;
}

Parts backward_parts(const Conv2d& s) {
    Parts parts{0, {}};
    for (int64_t i = 0; i < s.stride[0]; ++i)
        for (int64_t j = 0; j < s.stride[1]; ++j)
            parts.part[parts.count++] = {
                backward_axis(i, s.height, s.kernel[0], s.stride[0], s.padding[0], s.dilation[0]),
                backward_axis(j, s.width, s.kernel[1], s.stride[1], s.padding[1], s.dilation[1]), 0};
    return parts;
}

// What one output of a part sums, in a packed source whose rows are `row` terms long.
Terms terms_of(const Part& p, int64_t channels, int64_t row, bool outward) {
    const bool joined = p.columns.dilation == 1;  // neighbouring taps read neighbouring pixels
    return {{p.rows.taps, p.rows.dilation * row},
            {joined ? 1 : p.columns.taps, p.columns.dilation * channels},
            joined ? p.columns.taps * channels : channels,
            outward ? block_outward : block_nearest};
}

// How the rows of an image's results are cut into bands, and what packing one takes.
struct Bands {
    int64_t height, count, elements, bit_bytes;
};

template <class T>
struct Pass {
    Source<T> source;
    Weight<T> weight;
    Results<T> results;
    int64_t height, width;  // of the results
    Parts parts;
    int64_t packed = 0;  // elements of the packed weight

    // Gives the parts their places. Returns the pairs of a weight and a box that are multiplied.
    int64_t place_parts() {
        int64_t pairs = 0;
        for (int i = 0; i < parts.count; ++i) {
            parts.part[i].packed = packed;
            packed += terms(parts.part[i]) * packed_outputs();
            pairs += terms(parts.part[i]) * parts.part[i].rows.count * parts.part[i].columns.count * source.batch *
                     weight.outputs;
        }
        return pairs;
    }
    int64_t elements() const { return height * width * weight.outputs; }  // of one image's results
    int64_t room() const { return packed + terms_ahead * tile_width<T>; }

    bool few() const { return weight.outputs <= few_outputs; }
    bool knows_dead() const { return !few() && source.channels % 8 == 0; }
    int64_t panels() const { return ceil_div(weight.outputs, tile_width<T>); }
    int vectors(int64_t panel) const {
        return static_cast<int>(smaller(tile_vectors, ceil_div(weight.outputs - panel * tile_width<T>, Vec<T>::lanes)));
    }
    int64_t packed_outputs() const {
        return few() ? 2 * weight.outputs : ceil_div(weight.outputs, Vec<T>::lanes) * Vec<T>::lanes;
    }
    int64_t terms(const Part& p) const { return p.rows.taps * p.columns.taps * weight.channels; }

    int64_t rows() const {
        int64_t most = 0;
        for (int i = 0; i < parts.count; ++i) most = greater(most, parts.part[i].rows.count);
        return most;
    }

    // What outputs [begin, end) of every part read together.
    Window window(int64_t begin, int64_t end) const {
        Window all{0, 0, 0, 0};
        bool some = false;
        for (int i = 0; i < parts.count; ++i) {
            const Axis &r = parts.part[i].rows, &c = parts.part[i].columns;
            const int64_t last = smaller(end, r.count);
            if (last <= begin || c.count == 0 || r.taps * c.taps == 0) continue;
            const Window one{r.begin(begin), r.end(last), c.begin(0), c.end(c.count)};
            all = some ? Window{smaller(all.top, one.top), greater(all.bottom, one.bottom), smaller(all.left, one.left),
                                greater(all.right, one.right)}
                       : one;
            some = true;
        }
        return all;
    }

    // Elements of the packed source of a band of so many rows.
    int64_t band_size(int64_t rows) const {
        const Window w = window(0, rows);
        return 2 * w.rows() * w.columns() * source.channels;
    }

    // As few as keep one in the cache and leave no thread idle for long; in cache lines of their own.
    Bands bands(int threads) const {
        const int64_t total = rows();
        int64_t count = 1, height = total;
        const auto idle = [&](int64_t units) { return threads > 1 && units < 8 * threads; };
        while (height > 1 && (band_size(height) * int64_t{sizeof(T)} > band_bytes || idle(source.batch * count)))
            height = ceil_div(total, ++count);
        const int64_t elements = ceil_div(band_size(height), 16) * 16;
        return {height, height > 0 ? ceil_div(total, height) : 0, elements,
                ceil_div(elements / 16 + bits_slack, 64) * 64};
    }

    // Is every weight 0 or at least `least`? If not, nothing is written.
    bool run(T least) {
        const int threads = team_size(place_parts() / conv2d_grain);
        const Bands bands = this->bands(threads);
        const Scratch<T> weights(room());
        // A band for each thread. Made here: no exception may leave a parallel region.
        const Scratch<T> packed_bands(threads * bands.elements);
        const Scratch<uint8_t> packed_bits(threads * bands.bit_bytes);
        const Scratch<T*> places(threads * weight.taps());
        std::atomic<bool> fits{true}, finite{true};
        Tickets tickets;
        parallel_team(threads, [&](int rank, int team) {
            pack_weights(weights.get(), places.get() + rank * weight.taps(), rank, team);
            team_barrier(team);
            const int64_t first = packed * rank / team, count = packed * (rank + 1) / team - first;
            if (least > T(0) && !no_less(count, weights.get() + first, least)) fits = false;
            if (!share_is_finite(weights.get(), rank, team)) finite = false;
            team_barrier(team);
            if (!fits) return;
            const Alive<T> band{packed_bands.get() + rank * bands.elements,
                                finite ? packed_bits.get() + rank * bands.bit_bytes : nullptr};
            for (int64_t unit = tickets.next(); unit < source.batch * bands.count; unit = tickets.next())
                convolve_band(unit / bands.count, unit % bands.count * bands.height, bands.height, source, results,
                              band, weights.get());
        });
        return fits;
    }

    // Of one of a team. 0 times infinity is NaN: of weights that are not finite nothing is left out.
    bool share_is_finite(const T* weights, int rank, int team) const {
        const int64_t first = packed * rank / team, count = packed * (rank + 1) / team - first;
        return knows_dead() && all_finite(count, weights + first);
    }

    // Some rows of an image's results. `band` is room to pack their source in, and for bits, if those are finite
    // weights.
    void convolve_band(int64_t image, int64_t begin, int64_t height, const Source<T>& from, const Results<T>& to,
                       Alive<T> band, const T* weights) const {
        const int64_t end = smaller(begin + height, rows());
        const Window w = window(begin, end);
        from.pack(image, w, const_cast<T*>(band.source), const_cast<uint8_t*>(band.bits));
        for (int i = 0; i < parts.count; ++i)
            convolve(parts.part[i], image, begin, smaller(end, parts.part[i].rows.count), w, to, band,
                     weights + parts.part[i].packed);
    }

    // The share of one of a team. `places` has room for one per tap of the kernel.
    void pack_weights(T* out, T** places, int rank, int team) const {
        if (few()) {
            for (int i = rank; i < parts.count; i += team)
                weight.pack_few(parts.part[i].rows, parts.part[i].columns, out + parts.part[i].packed);
            return;
        }
        const int64_t channels = source.channels;
        for (int64_t output = 0; output < weight.outputs; output += Vec<T>::lanes) {
            const int64_t panel = output / tile_width<T>, width = vectors(panel) * int64_t{Vec<T>::lanes};
            for (int64_t tap = 0; tap < weight.taps(); ++tap) places[tap] = nullptr;
            for (int i = 0; i < parts.count; ++i) {
                const Part& p = parts.part[i];
                T* to = out + p.packed + terms(p) * panel * tile_width<T> + output % tile_width<T>;
                for (int64_t r = 0; r < p.rows.taps; ++r)
                    for (int64_t c = 0; c < p.columns.taps; ++c, to += channels * width)
                        places[p.rows.tap(r) * weight.kernel_columns + p.columns.tap(c)] = to;
            }
            weight.pack(output, channels * rank / team, channels * (rank + 1) / team, width, places);
        }
    }

    // Output rows [begin, end) of one part and one image.
    void convolve(const Part& p, int64_t image, int64_t begin, int64_t end, Window w, const Results<T>& results,
                  Alive<T> band, const T* weights) const {
        const int64_t channels = source.channels, row = w.columns() * channels;
        const Terms terms = terms_of(p, channels, row, results.outward);
        const auto over_tiles = [&](auto sum) {
            int64_t q = begin, x = 0;
            in_tiles((end - begin) * p.columns.count, [&](int64_t, int64_t count, auto pixels) {
                const T* sources[pixels];
                int64_t at[pixels];
                for (int i = 0; i < count; ++i) {
                    sources[i] =
                        band.source + 2 * ((p.rows.begin(q) - w.top) * row + (p.columns.begin(x) - w.left) * channels);
                    at[i] = ((image * height + p.rows.out_first + q * p.rows.out_step) * width + p.columns.out_first +
                             x * p.columns.out_step) *
                            weight.outputs;
                    if (++x == p.columns.count) x = 0, ++q;
                }
                for (int64_t i = count; i < pixels; ++i) sources[i] = sources[0];  // computed and dropped
                sum(pixels, count, sources, at);
            });
        };
        const auto by_few = [&](auto outputs) {
            constexpr int few = decltype(outputs)::number;
            over_tiles([&](auto pixels, int64_t count, const T* const* sources, const int64_t* at) {
                T mids[pixels][few], rads[pixels][few];
                add_few(terms, sources, weights, mids, rads);
                results.write(count, at, mids, rads);
            });
        };
        const auto by_panel = [&](auto vectors, int64_t panel) {
            over_tiles([&](auto pixels, int64_t count, const T* const* sources, const int64_t* at) {
                Sums<T, pixels, vectors> sums;
                sums.clear();
                if (terms.count() > 0)
                    add_blocks(terms, sources, band, weights + panel * terms.count() * tile_width<T>, sums);
                results.write(count, at, panel * tile_width<T>, sums);
            });
        };
        static_assert(few_outputs == 4);
        switch (few() ? weight.outputs : 0) {
            case 1:
                return by_few(Constant<1>{});
            case 2:
                return by_few(Constant<2>{});
            case 3:
                return by_few(Constant<3>{});
            case 4:
                return by_few(Constant<4>{});
        }
        for (int64_t panel = 0; panel < panels(); ++panel)
            if (vectors(panel) == tile_vectors)
                by_panel(Constant<tile_vectors>{}, panel);
            else
                by_panel(Constant<1>{}, panel);
    }
};

int64_t packed_bytes(int64_t elements) {
    return (elements + 7) / 8;
}

template <class T>
Pass<T> forward_pass(const Conv2d& s, const Widening<T>* widening, const T* rad_bias, const T* mid, const T* rad,
                     const T* weight, const T* bias, T* out_mid, T* out_rad, Epilogue after) {
    const int64_t* w = s.weight_strides;
    return {{s.batch, s.height, s.width, s.channels, mid, rad, {nullptr, 0, widening}},
            {weight, s.outputs, s.channels, s.kernel[0], s.kernel[1], w[0], w[1], w[2], w[3]},
            {s.outputs, bias, rad_bias, out_mid, out_rad, after,
             packed_bytes(s.batch * s.out_height * s.out_width * s.outputs), widening != nullptr},
            s.out_height,
            s.out_width,
            forward_parts(s)};
}

template <class T>
Pass<T> backward_pass(const Conv2d& s, const Widening<T>* widening, const T* mid, const T* rad, const uint8_t* state,
                      const T* weight, T* out_mid, T* out_rad, Epilogue after) {
    const int64_t* w = s.weight_strides;
    const Packing<T> packing{state, packed_bytes(s.batch * s.out_height * s.out_width * s.outputs), widening};
    return {{s.batch, s.out_height, s.out_width, s.outputs, mid, rad, packing},
            {weight, s.channels, s.outputs, s.kernel[0], s.kernel[1], w[1], w[0], w[2], w[3]},
            {s.channels, nullptr, nullptr, out_mid, out_rad, after,
             packed_bytes(s.batch * s.height * s.width * s.channels), widening != nullptr},
            s.height,
            s.width,
            backward_parts(s)};
}

template <class T>
bool conv2d(const Conv2d& s, const Outward<T>* outward, const T* mid, const T* rad, const T* weight, const T* bias,
            T* out_mid, T* out_rad, Epilogue after) {
    const auto widening = widening_of(outward);
    return forward_pass(s, outward ? &widening : nullptr, outward ? outward->bias : nullptr, mid, rad, weight, bias,
                        out_mid, out_rad, after)
        .run(widening.least / 2);
}

template <class T>
bool conv2d_backward(const Conv2d& s, const Outward<T>* outward, const T* mid, const T* rad, const uint8_t* state,
                     const T* weight, T* out_mid, T* out_rad, Epilogue after) {
    const auto widening = widening_of(outward);
    return backward_pass(s, outward ? &widening : nullptr, mid, rad, state, weight, out_mid, out_rad, after)
        .run(widening.least / 2);
}

// What a thread of `conv2d_steps` keeps of an image between two steps: midpoints and radii, of two steps by turns.
template <class T>
struct Between {
    T* memory;
    int64_t elements;  // of the largest midpoint

    // Where those of a step lie, as if image `image` of `size` elements were one of a batch.
    T* mid(int64_t step, int64_t image, int64_t size) const { return of(2 * (step % 2), image, size); }
    T* rad(int64_t step, int64_t image, int64_t size) const { return of(2 * (step % 2) + 1, image, size); }
    T* of(int64_t place, int64_t image, int64_t size) const {
        return reinterpret_cast<T*>(reinterpret_cast<std::uintptr_t>(memory + place * elements) -
                                    static_cast<std::uintptr_t>(image * size) * sizeof(T));
    }
};

template <class T>
void conv2d_steps(int64_t count, const Conv2dStep<T>* steps) {
    const Scratch<Pass<T>> room_of_passes(count);
    Pass<T>* const passes = room_of_passes.get();
    Bands bands[most_conv2d_steps];
    int64_t weights_at[most_conv2d_steps], room = 0, pairs = 0, taps = 0;
    Between<T> between{nullptr, 0};
    Bands most{};
    for (int64_t i = 0; i < count; ++i) {
        const Conv2dStep<T>& s = steps[i];
        Pass<T>& pass =
            *new (passes + i) Pass<T>(s.backward ? backward_pass<T>(s.shape, nullptr, s.mid, s.rad, s.state, s.weight,
                                                                    s.out_mid, s.out_rad, s.after)
                                                 : forward_pass<T>(s.shape, nullptr, nullptr, s.mid, s.rad, s.weight,
                                                                   s.bias, s.out_mid, s.out_rad, s.after));
        pairs += pass.place_parts();
        weights_at[i] = room;
        room += ceil_div(pass.room(), 16) * 16;
        taps = greater(taps, pass.weight.taps());
        bands[i] = pass.bands(1);
        most.elements = greater(most.elements, bands[i].elements);
        most.bit_bytes = greater(most.bit_bytes, bands[i].bit_bytes);
        if (!s.out_mid) between.elements = greater(between.elements, ceil_div(pass.elements(), 16) * 16);
    }
    const int threads = team_size(pairs / conv2d_grain);
    const Scratch<T> weights(room), packed_bands(threads * most.elements), kept(threads * 4 * between.elements);
    const Scratch<uint8_t> packed_bits(threads * most.bit_bytes);
    const Scratch<T*> places(threads * taps);
    std::atomic<std::uint64_t> infinite{0};
    Tickets tickets;
    parallel_team(threads, [&](int rank, int team) {
        for (int64_t i = 0; i < count; ++i)
            passes[i].pack_weights(weights.get() + weights_at[i], places.get() + rank * taps, rank, team);
        team_barrier(team);
        for (int64_t i = 0; i < count; ++i)
            if (!passes[i].share_is_finite(weights.get() + weights_at[i], rank, team))
                infinite |= std::uint64_t{1} << i;
        team_barrier(team);
        T* const band = packed_bands.get() + rank * most.elements;
        uint8_t* const bits = packed_bits.get() + rank * most.bit_bytes;
        const Between<T> own{kept.get() + rank * 4 * between.elements, between.elements};
        for (int64_t image = tickets.next(); image < steps[0].shape.batch; image = tickets.next())
            for (int64_t i = 0; i < count; ++i) {
                const Pass<T>& pass = passes[i];
                Source<T> from = pass.source;
                Results<T> to = pass.results;
                if (!from.mid) {
                    from.mid = own.mid(i - 1, image, passes[i - 1].elements());
                    from.rad = own.rad(i - 1, image, passes[i - 1].elements());
                }
                if (!to.mid) to.mid = own.mid(i, image, pass.elements()), to.rad = own.rad(i, image, pass.elements());
                const Alive<T> room{band, infinite >> i & 1 ? nullptr : bits};
                for (int64_t b = 0; b < bands[i].count; ++b)
                    pass.convolve_band(image, b * bands[i].height, bands[i].height, from, to, room,
                                       weights.get() + weights_at[i]);
            }
    });
}

template <class T>
int64_t conv2d_roundings(const Conv2d& s, bool backward) {
    const Parts parts = backward ? backward_parts(s) : forward_parts(s);
    const int64_t channels = backward ? s.outputs : s.channels, outputs = backward ? s.channels : s.outputs;
    int64_t most = 0;
    for (int i = 0; i < parts.count; ++i) {
        const Terms terms = terms_of(parts.part[i], channels, 0, true);
        most = greater(most, outputs <= few_outputs ? terms.roundings_of_few(Vec<T>::lanes) : terms.roundings());
    }
    return most;
}

}  // namespace

template <class T>
void set_interval_conv2d(Stages<T>& stages) {
    stages.lanes = Vec<T>::lanes;
    stages.conv2d = conv2d<T>;
    stages.conv2d_backward = conv2d_backward<T>;
    stages.conv2d_steps = conv2d_steps<T>;
    stages.conv2d_roundings = conv2d_roundings<T>;
}

template void set_interval_conv2d(Stages<float>&);
template void set_interval_conv2d(Stages<double>&);

}  // namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL
