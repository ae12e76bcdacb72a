// PTX's number types and the operations on them that C++ does not have. NaN results are canonical.
#pragma once

#include <cmath>
#include <limits>

#include "gpusim/machine.h"

namespace gpusim {

struct f16 {
  u16 bits;
};
struct bf16 {
  u16 bits;
};
struct f16x2 {
  u32 bits;
};
struct bf16x2 {
  u32 bits;
};

constexpr u32 kNan32 = 0x7fffffff;
inline float canonical(float x) { return x != x ? bits_as<float>(kNan32) : x; }
inline double canonical(double x) { return x != x ? bits_as<double>(0x7fffffffffffffffull) : x; }

inline float to_float(bf16 v) { return bits_as<float>(static_cast<u32>(v.bits) << 16); }
inline float to_float(f16 v) { return static_cast<float>(bits_as<_Float16>(v.bits)); }
inline float to_float(float v) { return v; }

enum class Round : u8 { kNearest, kZero, kDown, kUp, kAway };

inline double integral(double x, Round mode) {
  switch (mode) {
    case Round::kNearest: return std::nearbyint(x);
    case Round::kZero: return std::trunc(x);
    case Round::kDown: return std::floor(x);
    case Round::kUp: return std::ceil(x);
    default: return std::round(x);
  }
}

// double -> a binary format with `mantissa` stored bits and exponents from `min_exponent` (of the smallest normal) up:
// one rounding, any mode. Returns the rounded value as a double (infinite where it overflows to infinity).
inline double round_to(double x, int mantissa, int min_exponent, double largest, Round mode) {
  if (x == 0 || !std::isfinite(x)) return x;
  int exponent;
  std::frexp(x, &exponent);  // |x| in [2^(e-1), 2^e)
  const int scale = std::max(exponent - 1, min_exponent) - mantissa;
  const double scaled = std::ldexp(x, -scale);  // exact
  double r = integral(scaled, mode);
  r = std::ldexp(r, scale);
  if (std::fabs(r) > largest) {
    const bool clamps = mode == Round::kZero || (mode == Round::kDown && r > 0) || (mode == Round::kUp && r < 0);
    return clamps ? std::copysign(largest, x) : std::copysign(std::numeric_limits<double>::infinity(), x);
  }
  return r == 0 ? std::copysign(0.0, x) : r;
}

inline u16 f16_bits(double x, Round mode = Round::kNearest) {
  if (x != x) return 0x7fff;
  x = round_to(x, 10, -14, 65504, mode);
  return bits_as<u16>(static_cast<_Float16>(static_cast<float>(x)));
}
inline u16 f16_bits_of_float(float x) {
  if (x != x) return 0x7fff;
  return bits_as<u16>(static_cast<_Float16>(x));
}
inline u16 bf16_bits_of_float(float x) {
  if (x != x) return 0x7fff;
  u32 u = bits_as<u32>(x);
  u += 0x7fff + (u >> 16 & 1);
  return static_cast<u16>(u >> 16);
}
inline u16 bf16_bits(double x, Round mode = Round::kNearest) {
  if (x != x) return 0x7fff;
  const double r = round_to(x, 7, -126, 0x1.fep127, mode);
  return static_cast<u16>(bits_as<u32>(static_cast<float>(r)) >> 16);
}
inline float f32_of(double x, Round mode) {
  if (mode == Round::kNearest || x != x) return canonical(static_cast<float>(x));
  return static_cast<float>(round_to(x, 23, -126, std::numeric_limits<float>::max(), mode));
}

inline float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x; }

// PTX min and max: a NaN operand is ignored unless .NaN, and -0 < +0.
template <class T>
T ptx_min(T a, T b, bool nan) {
  if (a != a || b != b) {
    if (nan || (a != a && b != b)) return canonical(static_cast<T>(NAN));
    return a != a ? b : a;
  }
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
template <class T>
T ptx_max(T a, T b, bool nan) {
  if (a != a || b != b) {
    if (nan || (a != a && b != b)) return canonical(static_cast<T>(NAN));
    return a != a ? b : a;
  }
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}

// float -> integer with saturation; not for NaN, whose result depends on the types.
template <class To>
To saturate(double x, Round mode) {
  const double r = integral(x, mode);
  constexpr double low = static_cast<double>(std::numeric_limits<To>::min());
  constexpr double high = static_cast<double>(std::numeric_limits<To>::max());  // 2^63, 2^64 for the 64-bit ones
  if (r <= low) return std::numeric_limits<To>::min();
  if (r >= high) return std::numeric_limits<To>::max();
  return static_cast<To>(r);
}

}  // namespace gpusim
