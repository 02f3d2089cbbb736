// Squares of a matrix, transposed in registers: how weights are packed.
#pragma once

#include <cstdint>

#include "pyxai_bounds/vec.h"

namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL {

// Writes column j < columns of a matrix of `rows` rows to to[j], a vector long, with zeros past the last row; there are
// no more rows and columns than a vector has lanes.
template <class T>
void transpose(const T* from, std::int64_t row_stride, int rows, int columns, T* const* to) {
    for (int j = 0; j < columns; ++j)
        for (int i = 0; i < Vec<T>::lanes; ++i) to[j][i] = i < rows ? from[i * row_stride + j] : T(0);
}

#if defined(__AVX512F__)
template <>
inline void transpose(const float* from, std::int64_t row_stride, int rows, int columns, float* const* to) {
    const auto wanted = static_cast<__mmask16>((1u << columns) - 1);
    __m512 a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
        a[i] = i < rows ? _mm512_maskz_loadu_ps(wanted, from + i * row_stride) : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            const __m512d x = _mm512_castps_pd(b[i + j]), y = _mm512_castps_pd(b[i + 2 + j]);
            a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
            a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
        }
    // a[4g + c] holds, in its quarter q, column 4q + c of rows 4g to 4g + 3.
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m512 low = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x44),
                     high = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xee);
        const __m512 low2 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x44),
                     high2 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xee);
        b[c] = _mm512_shuffle_f32x4(low, low2, 0x88);
        b[4 + c] = _mm512_shuffle_f32x4(low, low2, 0xdd);
        b[8 + c] = _mm512_shuffle_f32x4(high, high2, 0x88);
        b[12 + c] = _mm512_shuffle_f32x4(high, high2, 0xdd);
    }
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j)
        if (j < columns) _mm512_storeu_ps(to[j], b[j]);
}
#elif defined(__AVX2__)
template <>
inline void transpose(const float* from, std::int64_t row_stride, int rows, int columns, float* const* to) {
    if (columns < 8) {
        for (int j = 0; j < columns; ++j)
            for (int i = 0; i < 8; ++i) to[j][i] = i < rows ? from[i * row_stride + j] : 0.0f;
        return;
    }
    __m256 a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) a[i] = i < rows ? _mm256_loadu_ps(from + i * row_stride) : _mm256_setzero_ps();
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            const __m256d x = _mm256_castps_pd(b[i + j]), y = _mm256_castps_pd(b[i + 2 + j]);
            a[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(x, y));
            a[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(x, y));
        }
    // a[4g + c] holds, in its half h, column 4h + c of rows 4g to 4g + 3.
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        _mm256_storeu_ps(to[c], _mm256_permute2f128_ps(a[c], a[4 + c], 0x20));
        _mm256_storeu_ps(to[4 + c], _mm256_permute2f128_ps(a[c], a[4 + c], 0x31));
    }
}
#endif

}  // namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL
