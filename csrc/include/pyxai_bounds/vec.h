// Short vectors, so that a stage is written once as arithmetic and compiled at every instruction-set level.
//
// Vec<T> is as wide as a register of the level, Scalar<T> has one lane and serves tails. Both offer
//     load store fill, + - *, multiply_add, less exceeds both either select, minimum maximum absolute,
//     sum (of the lanes, in any order), copysign flip (which takes vectors of signed zeros), bits from_bits
// with the meaning that PyTorch gives them: a comparison with NaN is false (and so `exceeds`, its negation, is
// true), minimum and maximum return NaN if either argument is NaN. Every operation rounds once (the build sets
// -ffp-contract=off), but for multiply_add, which rounds once or twice as the level has it.
//
// Vec alone has sum_by_parity, of the even and of the odd lanes, each rounded no more often than there are lanes to
// add.
//
// Everything here lives in the level's namespace. A function shared between levels would be one weak
// symbol, of which the linker might keep the AVX-512 copy for a machine that has no AVX-512.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL {

template <class T>
struct Scalar {
    static constexpr int lanes = 1;
    using Mask = bool;
    T value;

    static Scalar load(const T* p) { return {*p}; }
    static Scalar fill(T x) { return {x}; }
    void store(T* p) const { *p = value; }
    static Mask from_bits(unsigned bits) { return bits & 1u; }
    static unsigned bits(Mask m) { return m; }
    friend Scalar operator+(Scalar a, Scalar b) { return {a.value + b.value}; }
    friend Scalar operator-(Scalar a, Scalar b) { return {a.value - b.value}; }
    friend Scalar operator*(Scalar a, Scalar b) { return {a.value * b.value}; }
    static Mask less(Scalar a, Scalar b) { return a.value < b.value; }
    static Mask exceeds(Scalar a, Scalar b) { return !(a.value <= b.value); }
    static Mask is_nan(Scalar a) { return a.value != a.value; }
    static Mask both(Mask a, Mask b) { return a && b; }
    static Mask either(Mask a, Mask b) { return a || b; }
    static Scalar select(Mask m, Scalar a, Scalar b) { return m ? a : b; }
    static Scalar absolute(Scalar a) { return {static_cast<T>(__builtin_fabs(a.value))}; }
    static Scalar multiply_add(Scalar a, Scalar b, Scalar c) { return a * b + c; }
    static Scalar copysign(Scalar magnitude, Scalar sign) {
        return {static_cast<T>(__builtin_copysign(magnitude.value, sign.value))};
    }
};

#if defined(__AVX512F__)

template <class T>
struct Vec;

template <>
struct Vec<float> {
    static constexpr int lanes = 16;
    using Mask = __mmask16;
    __m512 value;

    static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Vec fill(float x) { return {_mm512_set1_ps(x)}; }
    void store(float* p) const { _mm512_storeu_ps(p, value); }
    static Mask from_bits(unsigned bits) { return static_cast<Mask>(bits); }
    static unsigned bits(Mask m) { return m; }
    friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.value, b.value)}; }
    friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.value, b.value)}; }
    friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.value, b.value)}; }
    static Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.value, b.value, _CMP_LT_OQ); }
    static Mask exceeds(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.value, b.value, _CMP_NLE_UQ); }
    static Mask is_nan(Vec a) { return _mm512_cmp_ps_mask(a.value, a.value, _CMP_UNORD_Q); }
    static Mask both(Mask a, Mask b) { return _kand_mask16(a, b); }
    static Mask either(Mask a, Mask b) { return _kor_mask16(a, b); }
    static Vec select(Mask m, Vec a, Vec b) { return {_mm512_mask_blend_ps(m, b.value, a.value)}; }
    static Vec absolute(Vec a) { return {_mm512_abs_ps(a.value)}; }
    static Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.value, b.value, c.value)}; }
    static float sum(Vec a) { return _mm512_reduce_add_ps(a.value); }
    static void sum_by_parity(Vec a, float* sums) {
        const __m256 by_8 = _mm256_add_ps(_mm512_castps512_ps256(a.value), _mm512_extractf32x8_ps(a.value, 1));
        const __m128 by_4 = _mm_add_ps(_mm256_castps256_ps128(by_8), _mm256_extractf128_ps(by_8, 1));
        _mm_storel_pi(reinterpret_cast<__m64*>(sums), _mm_add_ps(by_4, _mm_movehl_ps(by_4, by_4)));
    }
    static Vec copysign(Vec magnitude, Vec sign) {
        const __m512 bit = _mm512_set1_ps(-0.0f);
        return {_mm512_or_ps(_mm512_andnot_ps(bit, magnitude.value), _mm512_and_ps(bit, sign.value))};
    }
    static Vec flip(Vec a, Vec signs) { return {_mm512_xor_ps(a.value, signs.value)}; }
};

template <>
struct Vec<double> {
    static constexpr int lanes = 8;
    using Mask = __mmask8;
    __m512d value;

    static Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
    static Vec fill(double x) { return {_mm512_set1_pd(x)}; }
    void store(double* p) const { _mm512_storeu_pd(p, value); }
    static Mask from_bits(unsigned bits) { return static_cast<Mask>(bits); }
    static unsigned bits(Mask m) { return m; }
    friend Vec operator+(Vec a, Vec b) { return {_mm512_add_pd(a.value, b.value)}; }
    friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_pd(a.value, b.value)}; }
    friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_pd(a.value, b.value)}; }
    static Mask less(Vec a, Vec b) { return _mm512_cmp_pd_mask(a.value, b.value, _CMP_LT_OQ); }
    static Mask exceeds(Vec a, Vec b) { return _mm512_cmp_pd_mask(a.value, b.value, _CMP_NLE_UQ); }
    static Mask is_nan(Vec a) { return _mm512_cmp_pd_mask(a.value, a.value, _CMP_UNORD_Q); }
    static Mask both(Mask a, Mask b) { return _kand_mask8(a, b); }
    static Mask either(Mask a, Mask b) { return _kor_mask8(a, b); }
    static Vec select(Mask m, Vec a, Vec b) { return {_mm512_mask_blend_pd(m, b.value, a.value)}; }
    static Vec absolute(Vec a) { return {_mm512_abs_pd(a.value)}; }
    static Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_pd(a.value, b.value, c.value)}; }
    static double sum(Vec a) { return _mm512_reduce_add_pd(a.value); }
    static void sum_by_parity(Vec a, double* sums) {
        const __m256d by_4 = _mm256_add_pd(_mm512_castpd512_pd256(a.value), _mm512_extractf64x4_pd(a.value, 1));
        _mm_storeu_pd(sums, _mm_add_pd(_mm256_castpd256_pd128(by_4), _mm256_extractf128_pd(by_4, 1)));
    }
    static Vec copysign(Vec magnitude, Vec sign) {
        const __m512d bit = _mm512_set1_pd(-0.0);
        return {_mm512_or_pd(_mm512_andnot_pd(bit, magnitude.value), _mm512_and_pd(bit, sign.value))};
    }
    static Vec flip(Vec a, Vec signs) { return {_mm512_xor_pd(a.value, signs.value)}; }
};

#else

#if defined(__AVX2__)
inline constexpr int register_bytes = 32;
#else
inline constexpr int register_bytes = 16;  // SSE2, NEON; the compiler finds its own way elsewhere
#endif

// The compiler's own vectors (GCC and Clang): a mask is a vector of integers, 0 or −1 per lane.
template <class T>
struct Vec {
    static constexpr int lanes = register_bytes / static_cast<int>(sizeof(T));
    typedef T Values __attribute__((vector_size(register_bytes)));
    using Mask = decltype(Values{} < Values{});
    Values value;

    static Vec load(const T* p) {
        Vec v;
        std::memcpy(&v.value, p, sizeof(Values));
        return v;
    }
    static Vec fill(T x) { return {x - Values{}}; }  // x − 0 is x, also for −0
    void store(T* p) const { std::memcpy(p, &value, sizeof(Values)); }
    static Mask lane_bits() {
        Mask m{};
        for (int i = 0; i < lanes; ++i) m[i] = 1 << i;
        return m;
    }
    static Mask from_bits(unsigned bits) { return (lane_bits() & static_cast<int>(bits)) != 0; }
    static unsigned bits(Mask m) {
#if defined(__AVX2__)
        if constexpr (sizeof(T) == 4) return _mm256_movemask_ps((__m256)m);
        if constexpr (sizeof(T) == 8) return _mm256_movemask_pd((__m256d)m);
#elif defined(__SSE2__)
        if constexpr (sizeof(T) == 4) return _mm_movemask_ps((__m128)m);
        if constexpr (sizeof(T) == 8) return _mm_movemask_pd((__m128d)m);
#else
        unsigned packed = 0;
        for (int i = 0; i < lanes; ++i) packed |= static_cast<unsigned>(m[i] & 1) << i;
        return packed;
#endif
    }
    friend Vec operator+(Vec a, Vec b) { return {a.value + b.value}; }
    friend Vec operator-(Vec a, Vec b) { return {a.value - b.value}; }
    friend Vec operator*(Vec a, Vec b) { return {a.value * b.value}; }
    static Mask less(Vec a, Vec b) { return a.value < b.value; }
    static Mask exceeds(Vec a, Vec b) { return ~(a.value <= b.value); }
    static Mask is_nan(Vec a) { return a.value != a.value; }
    static Mask both(Mask a, Mask b) { return a & b; }
    static Mask either(Mask a, Mask b) { return a | b; }
    static Vec select(Mask m, Vec a, Vec b) { return {m ? a.value : b.value}; }
    static Vec absolute(Vec a) { return {(Values)((Mask)a.value & ~(Mask)fill(T(-0.0)).value)}; }
    static Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__FMA__)
        if constexpr (sizeof(T) == 4)
            return {(Values)_mm256_fmadd_ps((__m256)a.value, (__m256)b.value, (__m256)c.value)};
        if constexpr (sizeof(T) == 8)
            return {(Values)_mm256_fmadd_pd((__m256d)a.value, (__m256d)b.value, (__m256d)c.value)};
#else
        return a * b + c;
#endif
    }
    // By halves: one after the other, additions would wait for one another.
    static void sum_by_parity(Vec a, T* sums) {
        sums[0] = a.value[0], sums[1] = a.value[1];
        for (int i = 2; i < lanes; ++i) sums[i % 2] += a.value[i];
    }
    static T sum(Vec a) {
        for (int half = lanes / 2; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) a.value[i] += a.value[i + half];
        return a.value[0];
    }
    static Vec copysign(Vec magnitude, Vec sign) {
        const Mask bit = (Mask)fill(T(-0.0)).value;
        return {(Values)(((Mask)magnitude.value & ~bit) | ((Mask)sign.value & bit))};
    }
    static Vec flip(Vec a, Vec signs) { return {(Values)((Mask)a.value ^ (Mask)signs.value)}; }
};

#endif

// The same, held in a register from here on: the compiler would read a factor from memory at every use instead.
template <class V>
inline __attribute__((always_inline)) V in_register(V a) {
#if defined(__x86_64__)
    asm("" : "+v"(a.value));
#endif
    return a;
}

template <class V>
V minimum(V a, V b) {
    return V::select(V::either(V::less(a, b), V::is_nan(a)), a, b);  // a NaN in b fails a < b, so b is returned
}

template <class V>
V maximum(V a, V b) {
    return V::select(V::either(V::less(b, a), V::is_nan(a)), a, b);
}

}  // namespace pyxai_bounds::PYXAI_BOUNDS_LEVEL
