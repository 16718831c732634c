// Vectors of floats, their products and exp, for attention on a CPU.
//
// Written once, in the vector extensions of GCC and Clang, for any number of lanes. Machine code for a width comes from
// the function with a target attribute that all this is inlined into; hence nothing between takes a vector but what is
// always inlined, and no lambda.
#pragma once

#include <cstdint>
#include <cstring>

#define TROCR_FAST_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__)
#define TROCR_FAST_TARGET(names) __attribute__((target(names)))
#else
#define TROCR_FAST_TARGET(names)
#endif

namespace trocr_fast::simd {

// Floats in a vector: 16 (AVX-512), 8 (AVX2 with FMA) or 4 (any CPU).
inline int most_lanes() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("fma")) return 16;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
  return 4;
}

template <int kLanes>
struct Vector {
  typedef float Floats __attribute__((vector_size(kLanes * 4)));
  typedef std::int32_t Integers __attribute__((vector_size(kLanes * 4)));
};
template <int kLanes>
using Floats = typename Vector<kLanes>::Floats;

template <int kLanes>
TROCR_FAST_INLINE Floats<kLanes> load(const float* from) {
  Floats<kLanes> x;
  std::memcpy(&x, from, sizeof(x));  // from any address
  return x;
}

template <int kLanes>
TROCR_FAST_INLINE void store(float* to, Floats<kLanes> x) {
  std::memcpy(to, &x, sizeof(x));
}

// b where a is no number.
template <int kLanes>
TROCR_FAST_INLINE Floats<kLanes> greatest(Floats<kLanes> a, Floats<kLanes> b) {
  return a > b ? a : b;
}

template <int kLanes>
TROCR_FAST_INLINE float sum(Floats<kLanes> x) {
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += x[lane];
  return total;
}

// exp(x) for x <= 0, to 2e-7 of it; below -87, where fp32 ends, exp(-87). NaN stays NaN.
//
// x = n ln 2 + r with |r| <= ln 2 / 2 (Cody and Waite: ln 2 in two parts, n times the first is exact); exp(r) by its
// Taylor polynomial of degree 7, whose remainder is below 1e-8; 2^n by its exponent bits.
template <int kLanes>
TROCR_FAST_INLINE Floats<kLanes> exp(Floats<kLanes> x) {
  const Floats<kLanes> lowest = Floats<kLanes>{} - 87.0F;
  x = x < lowest ? lowest : x;
  const float rounder = 12582912.0F;  // 1.5 * 2^23: adding it rounds, and leaves n in the low bits
  const Floats<kLanes> shifted = x * 1.44269504F + rounder;
  const Floats<kLanes> n = shifted - rounder;
  const Floats<kLanes> r = (x - n * 0.693359375F) + n * 2.12194440e-4F;
  Floats<kLanes> power = r * (1.0F / 5040) + 1.0F / 720;
  power = power * r + 1.0F / 120;
  power = power * r + 1.0F / 24;
  power = power * r + 1.0F / 6;
  power = power * r + 0.5F;
  power = power * r + 1.0F;
  power = power * r + 1.0F;
  typename Vector<kLanes>::Integers bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits - 0x4B400000 + 127) << 23;
  Floats<kLanes> scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return power * scale;
}

// A matrix for `multiply` to read: value (i, j) at data[i * stride_row + j * stride_column].
struct Matrix {
  const float* data;
  std::int64_t stride_row;
  std::int64_t stride_column;
};

// c = a b, or c += a b: kRows rows of `depth` values by `depth` rows of kVectors vectors side by side.
//
// All of a b is kept in registers, so kRows * kVectors should be near what a CPU has of them: 32 with AVX-512, else 16.
//
// Strides are floats from row to row.
template <int kLanes, int kVectors, int kRows>
TROCR_FAST_INLINE void multiply(Matrix a, const float* b, std::int64_t stride_b, std::int64_t depth, float* c,
                                std::int64_t stride_c, bool add) {
  Floats<kLanes> sums[kRows][kVectors] = {};
  for (std::int64_t k = 0; k < depth; ++k) {
    Floats<kLanes> right[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) right[j] = load<kLanes>(b + k * stride_b + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const float left = a.data[i * a.stride_row + k * a.stride_column];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      float* const at = c + i * stride_c + j * kLanes;
      store<kLanes>(at, add ? load<kLanes>(at) + sums[i][j] : sums[i][j]);
    }
  }
}

}  // namespace trocr_fast::simd
