// Linear layers and convolutions of a box, forward and backward, rounded outward: one implicit matrix product, tiled
// through shared memory, of which midpoint and radius share the tile of the weight.
//
// Theorem. Let s = b + Σ w_i x_i over n terms with |x_i − m_i| ≤ r_i. If the results are finite, |s − mid| ≤ rad.
//
// Let F be the arithmetic of the midpoint: float64 for both element types, u = 2⁻⁵³. The midpoint's sum is the chain
// c_0 = b, c_i = fma(w_i, m_i, c_{i−1}) in F, rounded to nearest. Its n roundings are the only ones (terms that a tile
// is padded with are 0·0, which changes nothing, and so are those of pixels outside of the image), so that (Higham,
// section 3)
//     |c_n − (b + Σ w_i m_i)| ≤ γ_n (|b| + Σ |w_i||m_i|) + U,
// where U is what is lost where an fma underflows: at most η/2 each, η = 2⁻¹⁰⁷⁴, and at most twice that after the
// roundings that follow: U ≤ n·η. For float32 elements U = 0: every c_i is a multiple of 2⁻²⁹⁸.
// The radius' sum is a chain of fma rounded up, d_0 = lost·|b|, d_i = fma(|w_i|, ρ_i, d_{i−1}) with ρ_i = fma(lost,
// |m_i|, r_i) and lost ≥ γ_n, so that each d_i is no less than the same expression in real arithmetic:
//     d_n ≥ Σ |w_i| r_i + γ_n (|b| + Σ |w_i||m_i|).
// U is added where d_n > 0; d_n = 0 says that b and all products are 0, rounding up being unable to lose one, and that
// c_n is exact: zeros stay exact, without a floor for small factors. At last mid is c_n rounded to the element type,
// and the difference |c_n − mid| is added, rounded up. Together, |s − mid| ≤ Σ |w_i| r_i + |Σ w_i m_i + b − c_n| + |c_n
// − mid| ≤ rad. If c_n or mid is not finite, the radius is made NaN: then nothing is claimed.
//
// Rounding up, d_n exceeds its real value by at most a factor of (1 + 2ε)^{n+2}, ε the unit roundoff of the element
// type.
#include "pyxai_bounds/device.cuh"

namespace pyxai_bounds::cuda {
namespace {

// A block of threads computes tile_rows pixels × tile_columns channels, a thread row_count × column_count of them.
constexpr int depth = 8;  // terms that are in shared memory at a time; with 16 the float64 kernel ran out of registers
constexpr int threads = 128;
constexpr int row_count = 8, column_count = 4;
constexpr int row_threads = 8, column_threads = 16;
constexpr int tile_rows = row_threads * row_count, tile_columns = column_threads * column_count;
static_assert(row_threads * column_threads == threads && tile_rows == tile_columns);
constexpr int loads = depth * tile_rows / threads;  // elements of either factor that a thread brings
constexpr int pitch = tile_rows + 4;                // 4 more, so that the threads of a warp store to different banks

// One dimension of the images. Target pixel `phase + spacing·j` reads, for tap `first_tap + tap_step·t`, the source
// pixel scale·j + shift + slope·t, if it exists. Forward every target pixel is in one phase. Backward, target pixels
// with one remainder modulo the stride are reached by the same taps, so each remainder is a phase of its own and no
// other tap is visited.
struct Axis {
    int source, target, kernel, stride, padding, dilation;
};

struct Phase {
    int first, spacing, count;  // target pixels
    int first_tap, tap_step, taps;
    int scale, shift, slope;
};

__device__ Phase phase_of(const Axis& axis, int phase, bool transposed) {
    if (!transposed) return {0, 1, axis.target, 0, 1, axis.kernel, axis.stride, -axis.padding, axis.dilation};
    Phase p;
    p.first = phase;
    p.spacing = axis.stride;
    p.count = phase < axis.target ? (axis.target - phase - 1) / axis.stride + 1 : 0;
    // Source pixel y and tap k meet target pixel stride·y − padding + dilation·k.
    const int wanted = phase + axis.padding;
    p.tap_step = 1;
    while (axis.dilation * p.tap_step % axis.stride != 0) ++p.tap_step;
    p.first_tap = 0;
    while (p.first_tap < p.tap_step && (wanted - axis.dilation * p.first_tap) % axis.stride != 0) ++p.first_tap;
    const bool reached = p.first_tap < p.tap_step && p.first_tap < axis.kernel;
    p.taps = reached ? (axis.kernel - p.first_tap - 1) / p.tap_step + 1 : 0;
    p.scale = 1;
    p.shift = reached ? (wanted - axis.dilation * p.first_tap) / axis.stride : 0;
    p.slope = -(axis.dilation * p.tap_step / axis.stride);
    return p;
}

struct Shape {
    Axis y, x;
    int64_t batch;
    int groups, sources, targets;  // channels of one group
    int64_t at_group, at_tap, at_source, at_target;
    int row_tiles, column_tiles;  // of one group and phase
    bool transposed;
};

// The factors of the midpoint are float64. |w| is stored as a float beside it; for float64 it is an operand's sign bit.
template <class T>
struct Tiles {
    double mid[depth][pitch];
    T rad[depth][pitch];
    double weight[depth][pitch];
    T size[sizeof(T) == sizeof(float) ? depth : 1][pitch];
};

template <class T>
__global__ void __launch_bounds__(threads)
    interval_conv2d_kernel(Shape shape, T lost, T underflow, const T* __restrict__ mid, const T* __restrict__ rad,
                           const T* __restrict__ weight, const T* __restrict__ bias, T* __restrict__ out_mid,
                           T* __restrict__ out_rad) {
    __shared__ Tiles<T> tiles;
    __shared__ int64_t row_base[tile_rows], row_target[tile_rows];
    __shared__ int row_y[tile_rows], row_x[tile_rows];

    // Blocks with the same pixels stand side by side: what the first brings from memory, the others find in the cache.
    int64_t block = blockIdx.x;
    const int column0 = static_cast<int>(block % shape.column_tiles) * tile_columns;
    block /= shape.column_tiles;
    const int64_t row0 = block % shape.row_tiles * tile_rows;
    block /= shape.row_tiles;
    const int group = static_cast<int>(block % shape.groups);
    block /= shape.groups;
    const int phases_x = shape.transposed ? shape.x.stride : 1;
    const Phase y = phase_of(shape.y, static_cast<int>(block) / phases_x, shape.transposed);
    const Phase x = phase_of(shape.x, static_cast<int>(block) % phases_x, shape.transposed);

    const int64_t pixels = static_cast<int64_t>(y.count) * x.count, rows = shape.batch * pixels;
    if (row0 >= rows) return;  // phases differ in their number of pixels
    const int thread = threadIdx.x;
    if (thread < tile_rows) {
        const int64_t row = row0 + thread < rows ? row0 + thread : rows - 1;
        const int64_t image = row / pixels;
        const int pixel = static_cast<int>(row - image * pixels), j = pixel / x.count, i = pixel - j * x.count;
        row_base[thread] = image * shape.y.source * shape.x.source;
        row_y[thread] = j * y.scale + y.shift;
        row_x[thread] = row0 + thread < rows ? i * x.scale + x.shift : -(1 << 30);  // outside of every image
        row_target[thread] =
            (image * shape.y.target + y.first + y.spacing * j) * shape.x.target + x.first + x.spacing * i;
    }
    __syncthreads();

    const int64_t source_pitch = static_cast<int64_t>(shape.groups) * shape.sources;
    const int64_t target_pitch = static_cast<int64_t>(shape.groups) * shape.targets;
    const int terms = y.taps * x.taps * shape.sources;
    const bool along_terms = shape.at_source == 1 && shape.at_target != 1;  // which way the weight is contiguous
    T next_mid[loads], next_rad[loads], next_weight[loads];

    // Brings `depth` terms, from term0 on, into registers. Eight threads read eight neighbouring channels, a sector of
    // memory.
    const auto fetch = [&](int term0) {
        const int term = term0 + thread % depth, tap = term / shape.sources, channel = term - tap * shape.sources;
        const int tap_y = tap / (x.taps > 0 ? x.taps : 1), tap_x = tap - tap_y * x.taps;
#pragma unroll
        for (int l = 0; l < loads; ++l) {
            const int row = thread / depth + l * (threads / depth);
            const int at_y = row_y[row] + y.slope * tap_y, at_x = row_x[row] + x.slope * tap_x;
            const bool inside =
                term < terms && at_y >= 0 && at_y < shape.y.source && at_x >= 0 && at_x < shape.x.source;
            const int64_t pixel = row_base[row] + static_cast<int64_t>(at_y) * shape.x.source + at_x;
            const int64_t from = pixel * source_pitch + static_cast<int64_t>(group) * shape.sources + channel;
            next_mid[l] = inside ? mid[from] : T(0);
            next_rad[l] = inside ? rad[from] : T(0);
        }
#pragma unroll
        for (int l = 0; l < loads; ++l) {
            const int k = along_terms ? thread % depth : thread / tile_columns + l * (threads / tile_columns);
            const int j = along_terms ? thread / depth + l * (threads / depth) : thread % tile_columns;
            const int one = term0 + k, column = column0 + j;
            const int of_tap = one / shape.sources, of_channel = one - of_tap * shape.sources;
            const int of_y = of_tap / (x.taps > 0 ? x.taps : 1), of_x = of_tap - of_y * x.taps;
            const int64_t in_kernel = static_cast<int64_t>(y.first_tap + y.tap_step * of_y) * shape.x.kernel +
                                      x.first_tap + x.tap_step * of_x;
            const int64_t from = group * shape.at_group + in_kernel * shape.at_tap + of_channel * shape.at_source +
                                 column * shape.at_target;
            next_weight[l] = one < terms && column < shape.targets ? weight[from] : T(0);
        }
    };
    const auto store = [&] {
#pragma unroll
        for (int l = 0; l < loads; ++l) {
            const int k = thread % depth, row = thread / depth + l * (threads / depth);
            tiles.mid[k][row] = next_mid[l];
            tiles.rad[k][row] = fma_up(lost, magnitude(next_mid[l]), next_rad[l]);
        }
#pragma unroll
        for (int l = 0; l < loads; ++l) {
            const int k = along_terms ? thread % depth : thread / tile_columns + l * (threads / tile_columns);
            const int j = along_terms ? thread / depth + l * (threads / depth) : thread % tile_columns;
            tiles.weight[k][j] = next_weight[l];
            if constexpr (sizeof(T) == sizeof(float)) tiles.size[k][j] = magnitude(next_weight[l]);
        }
    };

    const int my_row = thread / column_threads * row_count, my_column = thread % column_threads * column_count;
    double sum[row_count][column_count];
    T spread[row_count][column_count];
#pragma unroll
    for (int j = 0; j < column_count; ++j) {
        const int column = column0 + my_column + j;
        const bool has_bias = bias != nullptr && column < shape.targets;
        const T b = has_bias ? bias[static_cast<int64_t>(group) * shape.targets + column] : T(0);
#pragma unroll
        for (int i = 0; i < row_count; ++i) {
            sum[i][j] = b;
            spread[i][j] = mul_up(lost, magnitude(b));
        }
    }

    if (terms > 0) fetch(0);
    for (int term0 = 0; term0 < terms; term0 += depth) {
        store();
        __syncthreads();
        if (term0 + depth < terms) fetch(term0 + depth);  // under way while this tile is worked on
#pragma unroll
        for (int k = 0; k < depth; ++k) {
            double m[row_count], w[column_count];
            T r[row_count], size[column_count];
#pragma unroll
            for (int i = 0; i < row_count; ++i) m[i] = tiles.mid[k][my_row + i], r[i] = tiles.rad[k][my_row + i];
#pragma unroll
            for (int j = 0; j < column_count; ++j) {
                w[j] = tiles.weight[k][my_column + j];
                if constexpr (sizeof(T) == sizeof(float))
                    size[j] = tiles.size[k][my_column + j];
                else
                    size[j] = magnitude(w[j]);
            }
#pragma unroll
            for (int i = 0; i < row_count; ++i) {
#pragma unroll
                for (int j = 0; j < column_count; ++j) {
                    sum[i][j] = fma(m[i], w[j], sum[i][j]);
                    spread[i][j] = fma_up(r[i], size[j], spread[i][j]);
                }
            }
        }
        __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < row_count; ++i) {
        if (row0 + my_row + i >= rows) continue;
        const int64_t to =
            row_target[my_row + i] * target_pitch + static_cast<int64_t>(group) * shape.targets + column0;
#pragma unroll
        for (int j = 0; j < column_count; ++j) {
            if (column0 + my_column + j >= shape.targets) continue;
            const T rounded = nearest<T>(sum[i][j]);
            const double moved = magnitude(sum[i][j] - static_cast<double>(rounded));  // exact: both have 53 digits
            T out = spread[i][j];
            if (out > 0) out = add_up(out, underflow);
            out = add_up(out, narrow_up<T>(moved));
            out_mid[to + my_column + j] = rounded;
            out_rad[to + my_column + j] = out + zero_or_nan(rounded);
        }
    }
}

}  // namespace
}  // namespace pyxai_bounds::cuda

extern "C" const char* cuda_check(std::int64_t device) {
    cudaError_t status = cudaSetDevice(static_cast<int>(device));
    cudaFuncAttributes attributes;
    if (status == cudaSuccess)
        status = cudaFuncGetAttributes(&attributes, pyxai_bounds::cuda::interval_conv2d_kernel<float>);
    (void)cudaGetLastError();
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

extern "C" const char* cuda_convolve(std::int64_t device, std::uintptr_t stream, std::int64_t element_size,
                                     std::int64_t transposed, std::int64_t batch, std::int64_t groups,
                                     std::int64_t source_height, std::int64_t source_width,
                                     std::int64_t source_channels, std::int64_t target_height,
                                     std::int64_t target_width, std::int64_t target_channels,
                                     std::int64_t kernel_height, std::int64_t kernel_width, std::int64_t stride_height,
                                     std::int64_t stride_width, std::int64_t padding_height, std::int64_t padding_width,
                                     std::int64_t dilation_height, std::int64_t dilation_width, std::int64_t at_group,
                                     std::int64_t at_tap, std::int64_t at_source, std::int64_t at_target, double lost,
                                     double underflow, std::uintptr_t mid, std::uintptr_t rad, std::uintptr_t weight,
                                     std::uintptr_t bias, std::uintptr_t out_mid, std::uintptr_t out_rad) {
    using namespace pyxai_bounds::cuda;
    if (batch == 0 || target_height == 0 || target_width == 0 || target_channels == 0) return nullptr;
    const auto axis = [](int64_t source, int64_t target, int64_t kernel, int64_t stride, int64_t padding,
                         int64_t dilation) {
        return Axis{static_cast<int>(source), static_cast<int>(target),  static_cast<int>(kernel),
                    static_cast<int>(stride), static_cast<int>(padding), static_cast<int>(dilation)};
    };
    Shape shape;
    shape.y = axis(source_height, target_height, kernel_height, stride_height, padding_height, dilation_height);
    shape.x = axis(source_width, target_width, kernel_width, stride_width, padding_width, dilation_width);
    shape.batch = batch;
    shape.groups = static_cast<int>(groups);
    shape.sources = static_cast<int>(source_channels), shape.targets = static_cast<int>(target_channels);
    shape.at_group = at_group, shape.at_tap = at_tap, shape.at_source = at_source, shape.at_target = at_target;
    shape.transposed = transposed != 0;
    const int64_t phases_y = transposed ? stride_height : 1, phases_x = transposed ? stride_width : 1;
    const int64_t most_rows = batch * ceil_div(target_height, phases_y) * ceil_div(target_width, phases_x);
    const int64_t row_tiles = ceil_div(most_rows, tile_rows);
    constexpr int64_t most = 0x7fffffff - depth;
    if (kernel_height * kernel_width * source_channels > most) return "a sum of so many terms has no index of 32 bits";
    if (row_tiles > most) return "the result has more tiles than one launch can have";
    shape.row_tiles = static_cast<int>(row_tiles);
    shape.column_tiles = static_cast<int>(ceil_div(target_channels, tile_columns));
    const int64_t blocks = row_tiles * shape.column_tiles * groups * phases_y * phases_x;
    return typed(element_size, [&](auto element) {
        using T = decltype(element);
        return launch(interval_conv2d_kernel<T>, device, stream, blocks, threads, shape, static_cast<T>(lost),
                      static_cast<T>(underflow), at<const T>(mid), at<const T>(rad), at<const T>(weight),
                      at<const T>(bias), at<T>(out_mid), at<T>(out_rad));
    });
}
