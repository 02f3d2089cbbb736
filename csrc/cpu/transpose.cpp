// Matrices transposed: between the two memory orders of images, where a linear layer meets a convolution.
#include "pyxai_bounds/transpose.h"
#include "pyxai_bounds/parallel.h"
#include "pyxai_bounds/scratch.h"
#include "pyxai_bounds/stages.h"

namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL {
namespace {

using std::int64_t;

template <class T>
void transpose_each(int64_t batch, int64_t rows, int64_t columns, const T* from, T* to) {
    constexpr int64_t L = Vec<T>::lanes;
    const int64_t strips = ceil_div(rows, L), units = batch * strips;  // of L rows, the last of an image of fewer
    parallel_team(team_size(batch * rows * columns / grain), [=](int rank, int team) {
        for (int64_t unit = units * rank / team; unit < units * (rank + 1) / team; ++unit) {
            const int64_t first = unit % strips * L, some = smaller(L, rows - first);
            const T* const source = from + (unit / strips * rows + first) * columns;
            T* const target = to + unit / strips * rows * columns + first;
            for (int64_t j = 0; j < columns; j += L) {
                const int64_t wide = smaller(L, columns - j);
                if (some == L) {
                    T* at[L];
                    for (int64_t k = 0; k < wide; ++k) at[k] = target + (j + k) * rows;
                    transpose(source + j, columns, static_cast<int>(L), static_cast<int>(wide), at);
                } else {
                    for (int64_t i = 0; i < some; ++i)
                        for (int64_t k = 0; k < wide; ++k) target[(j + k) * rows + i] = source[i * columns + j + k];
                }
            }
        }
    });
}

}  // namespace

template <class T>
void set_transpose(Stages<T>& stages) {
    stages.transpose = transpose_each<T>;
}

template void set_transpose(Stages<float>&);
template void set_transpose(Stages<double>&);

}  // namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL
