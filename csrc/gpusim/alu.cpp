// Arithmetic, logic, comparison, conversion and moves, lane by lane. Source: PTX ISA 8.8, section 9.7.
#include <algorithm>
#include <set>

#include "gpusim/numeric.h"

namespace gpusim {

namespace {

// ---- lanes of a register
template <class T>
constexpr bool kWide = sizeof(T) == 8;
template <class T>
using Cell = std::conditional_t<kWide<T>, u64, u32>;

template <class T>
inline T get(const void* reg, int lane) {
  const Cell<T> v = static_cast<const Cell<T>*>(reg)[lane];
  if constexpr (sizeof(T) == sizeof(Cell<T>))
    return std::bit_cast<T>(v);
  else if constexpr (sizeof(T) == 2)
    return std::bit_cast<T>(static_cast<u16>(v));
  else
    return std::bit_cast<T>(static_cast<u8>(v));
}
template <class T>
inline Cell<T> cell(T v) {
  if constexpr (sizeof(T) == sizeof(Cell<T>))
    return std::bit_cast<Cell<T>>(v);
  else if constexpr (sizeof(T) == 2)
    return std::bit_cast<u16>(v);
  else
    return std::bit_cast<u8>(v);
}

template <class D>
inline void store(Warp& w, const Op& op, u32 mask, const Cell<D>* values) {
  auto* d = w.reg<Cell<D>>(op, 0);
  if (mask == kAllLanes) {
    memcpy(d, values, sizeof(Cell<D>) * kLanes);
  } else {
    for (int l = 0; l < kLanes; ++l) d[l] = mask >> l & 1 ? values[l] : d[l];
  }
}

template <class F, class D, class... S, size_t... I>
void map_lanes(Warp& w, const Op& op, u32 mask, std::index_sequence<I...>) {
  Cell<D> values[kLanes];
  const void* sources[] = {w.reg(op, 1 + static_cast<int>(I))...};
  for (int l = 0; l < kLanes; ++l) values[l] = cell<D>(F{}(get<S>(sources[I], l)...));
  store<D>(w, op, mask, values);
}
template <class F, class D, class... S>
void map(Warp& w, const Op& op, u32 mask) {
  map_lanes<F, D, S...>(w, op, mask, std::index_sequence_for<S...>{});
}
// The function is given as a lambda without captures; its type carries it.
template <class D, class... S, class F>
Exec exec_of(F) {
  return &map<F, D, S...>;
}

template <class T, class F>
void compare(Warp& w, const Op& op, u32 mask) {
  const void *a = w.reg(op, op.num_dst), *b = w.reg(op, op.num_dst + 1);
  u32 bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= static_cast<u32>(F{}(get<T>(a, l), get<T>(b, l))) << l;
  u32 negated = ~bits;
  if (op.imm) {  // combined with a predicate: and, or, xor; bit 2: of its complement
    u32 c = *w.reg<u32>(op, op.num_dst + 2);
    if (op.imm & 4) c = ~c;
    const int how = op.imm & 3;
    auto combine = [&](u32 v) { return how == 1 ? v & c : how == 2 ? v | c : v ^ c; };
    bits = combine(bits), negated = combine(negated);
  }
  u32& p = *w.reg<u32>(op, 0);
  p = (p & ~mask) | (bits & mask);
  if (op.num_dst > 1) {
    u32& q = *w.reg<u32>(op, 1);
    q = (q & ~mask) | (negated & mask);
  }
}

inline float value(f16 v) { return to_float(v); }
inline float value(bf16 v) { return to_float(v); }
inline float value(float v) { return v; }
inline double value(double v) { return v; }

#define EVA02_COMPARE(name, expression)                          \
  if (base == name) {                                            \
    if (unordered)                                               \
      return &compare<T, decltype([](T p, T q) {                 \
                        const auto a = value(p), b = value(q);   \
                        return a != a || b != b || (expression); \
                      })>;                                       \
    return &compare<T, decltype([](T p, T q) {                   \
                      const auto a = value(p), b = value(q);     \
                      return a == a && b == b && (expression);   \
                    })>;                                         \
  }

template <class T>
Exec float_comparison(const std::string& how) {
  const bool unordered = how.size() == 3 && how[2] == 'u';
  const std::string base = unordered ? how.substr(0, 2) : how;
  EVA02_COMPARE("eq", a == b)
  EVA02_COMPARE("ne", a != b)
  EVA02_COMPARE("lt", a < b)
  EVA02_COMPARE("le", a <= b)
  EVA02_COMPARE("gt", a > b)
  EVA02_COMPARE("ge", a >= b)
#undef EVA02_COMPARE
  if (how == "num") return &compare<T, decltype([](T p, T q) { return value(p) == value(p) && value(q) == value(q); })>;
  if (how == "nan") return &compare<T, decltype([](T p, T q) { return value(p) != value(p) || value(q) != value(q); })>;
  return nullptr;
}

template <class T>
Exec integer_comparison(const std::string& how) {
  using U = std::make_unsigned_t<T>;
  if (how == "eq") return &compare<T, decltype([](T a, T b) { return a == b; })>;
  if (how == "ne") return &compare<T, decltype([](T a, T b) { return a != b; })>;
  if (how == "lt") return &compare<T, decltype([](T a, T b) { return a < b; })>;
  if (how == "le") return &compare<T, decltype([](T a, T b) { return a <= b; })>;
  if (how == "gt") return &compare<T, decltype([](T a, T b) { return a > b; })>;
  if (how == "ge") return &compare<T, decltype([](T a, T b) { return a >= b; })>;
  if (how == "lo") return &compare<U, decltype([](U a, U b) { return a < b; })>;
  if (how == "ls") return &compare<U, decltype([](U a, U b) { return a <= b; })>;
  if (how == "hi") return &compare<U, decltype([](U a, U b) { return a > b; })>;
  if (how == "hs") return &compare<U, decltype([](U a, U b) { return a >= b; })>;
  return nullptr;
}

Exec comparison(const std::string& how, const std::string& type) {
  if (type == "f32") return float_comparison<float>(how);
  if (type == "f64") return float_comparison<double>(how);
  if (type == "f16") return float_comparison<f16>(how);
  if (type == "bf16") return float_comparison<bf16>(how);
  if (type == "s16") return integer_comparison<i16>(how);
  if (type == "s32") return integer_comparison<i32>(how);
  if (type == "s64") return integer_comparison<i64>(how);
  if (type == "u16" || type == "b16") return integer_comparison<u16>(how);
  if (type == "u32" || type == "b32") return integer_comparison<u32>(how);
  if (type == "u64" || type == "b64") return integer_comparison<u64>(how);
  return nullptr;
}

struct Flushed {
  float v;
};
inline float value(Flushed f) { return flush(f.v); }
Exec comparison_flushed(const std::string& how, const std::string& type) {
  return type == "f32" ? float_comparison<Flushed>(how) : nullptr;
}

// ---- integers
template <class T>
T shift_left(T a, u32 n) {
  return n >= 8 * sizeof(T) ? T{0} : static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) << n);
}
template <class T>
T shift_right(T a, u32 n) {
  constexpr u32 bits = 8 * sizeof(T);
  if constexpr (std::is_signed_v<T>)
    return static_cast<T>(a >> (n >= bits ? bits - 1 : n));
  else
    return n >= bits ? T{0} : static_cast<T>(a >> n);
}
template <class T>
T divide(T a, T b) {
  if (b == 0) return static_cast<T>(-1);
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(a));
  return a / b;
}
template <class T>
T remainder_of(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return 0;
  return a % b;
}
template <class T>
T high_product(T a, T b) {
  if constexpr (sizeof(T) == 8) {
    using W = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return static_cast<T>((static_cast<W>(a) * static_cast<W>(b)) >> 64);
  } else {
    using W = std::conditional_t<std::is_signed_v<T>, i64, u64>;
    return static_cast<T>((static_cast<W>(a) * static_cast<W>(b)) >> (8 * sizeof(T)));
  }
}
template <class T>
T wrapped_product(T a, T b) {
  return static_cast<T>(static_cast<u64>(a) * static_cast<u64>(b));
}
template <class T>
T wrapped_sum(T a, T b) {
  return static_cast<T>(static_cast<u64>(a) + static_cast<u64>(b));
}
template <class T>
T saturated_sum(T a, T b) {
  const i64 s = static_cast<i64>(a) + static_cast<i64>(b);
  return static_cast<T>(std::clamp<i64>(s, std::numeric_limits<T>::min(), std::numeric_limits<T>::max()));
}

template <class T>
Exec integer_exec(const Instruction& in) {
  using U = std::make_unsigned_t<T>;
  const std::string& o = in.opcode;
  if (o == "add")
    return in.has("sat") ? exec_of<T, T, T>([](T a, T b) { return saturated_sum<T>(a, b); })
                         : exec_of<T, T, T>([](T a, T b) { return wrapped_sum<T>(a, b); });
  if (o == "sub")
    return exec_of<T, T, T>([](T a, T b) { return static_cast<T>(static_cast<U>(a) - static_cast<U>(b)); });
  if (o == "mul" || o == "mad") {
    const bool add = o == "mad";
    if (in.has("wide")) {
      if constexpr (sizeof(T) < 8 && sizeof(T) > 1) {
        using W = std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, i64, u64>,
                                     std::conditional_t<std::is_signed_v<T>, i32, u32>>;
        if (add) return exec_of<W, T, T, W>([](T a, T b, W c) { return wrapped_sum<W>(wrapped_product<W>(a, b), c); });
        return exec_of<W, T, T>([](T a, T b) { return wrapped_product<W>(a, b); });
      }
      return nullptr;
    }
    if (in.has("hi")) {
      if (add) return exec_of<T, T, T, T>([](T a, T b, T c) { return wrapped_sum<T>(high_product<T>(a, b), c); });
      return exec_of<T, T, T>([](T a, T b) { return high_product<T>(a, b); });
    }
    if (!in.has("lo")) return nullptr;
    if (add) return exec_of<T, T, T, T>([](T a, T b, T c) { return wrapped_sum<T>(wrapped_product<T>(a, b), c); });
    return exec_of<T, T, T>([](T a, T b) { return wrapped_product<T>(a, b); });
  }
  if (o == "div") return exec_of<T, T, T>([](T a, T b) { return divide<T>(a, b); });
  if (o == "rem") return exec_of<T, T, T>([](T a, T b) { return remainder_of<T>(a, b); });
  if (o == "min") return exec_of<T, T, T>([](T a, T b) { return std::min(a, b); });
  if (o == "max") return exec_of<T, T, T>([](T a, T b) { return std::max(a, b); });
  if (o == "abs") return exec_of<T, T>([](T a) { return a < 0 ? static_cast<T>(0 - static_cast<U>(a)) : a; });
  if (o == "neg") return exec_of<T, T>([](T a) { return static_cast<T>(0 - static_cast<U>(a)); });
  if (o == "sad")
    return exec_of<T, T, T, T>([](T a, T b, T c) {
      const U d = a < b ? static_cast<U>(b) - static_cast<U>(a) : static_cast<U>(a) - static_cast<U>(b);
      return static_cast<T>(static_cast<U>(c) + d);
    });
  if (o == "shr") return exec_of<T, T, u32>([](T a, u32 n) { return shift_right<T>(a, n); });
  if (o == "bfe") {
    return exec_of<T, T, u32, u32>([](T a, u32 b, u32 c) {
      constexpr u32 bits = 8 * sizeof(T);
      const u32 pos = b & 255, len = c & 255;
      u64 v = 0;
      const bool sign = std::is_signed_v<T> && len > 0 && (static_cast<U>(a) >> std::min(pos + len - 1, bits - 1) & 1);
      for (u32 i = 0; i < bits; ++i) {
        const bool bit = i < len && pos + i < bits ? static_cast<U>(a) >> (pos + i) & 1 : sign;
        v |= static_cast<u64>(bit) << i;
      }
      return static_cast<T>(v);
    });
  }
  return nullptr;
}

Exec integer_exec(const Instruction& in, const std::string& type) {
  if (type == "s16") return integer_exec<i16>(in);
  if (type == "s32") return integer_exec<i32>(in);
  if (type == "s64") return integer_exec<i64>(in);
  if (type == "u16" || type == "b16") return integer_exec<u16>(in);
  if (type == "u32" || type == "b32") return integer_exec<u32>(in);
  if (type == "u64" || type == "b64") return integer_exec<u64>(in);
  return nullptr;
}

// ---- floating point
// a * b + c with c's rounding to come, as a double that rounds to any narrower format as the exact sum would: the sum's
// last bit is made odd where it is inexact.
inline double odd_fma(double a, double b, double c) {
  const double p = a * b;  // exact: both have at most 24 bits
  const double s = p + c;
  if (!std::isfinite(s)) return s;
  const double bb = s - p, error = (p - (s - bb)) + (c - bb);
  if (error == 0) return s;
  const u64 bits = bits_as<u64>(s);
  if (bits & 1) return s;
  const bool away = (error > 0) == (s > 0);
  return bits_as<double>(away ? bits + 1 : bits - 1);
}

template <class T>
struct Half;
template <>
struct Half<f16> {
  static u16 round(double v) { return f16_bits(v); }
};
template <>
struct Half<bf16> {
  static u16 round(double v) { return bf16_bits(v); }
};

template <class F, class T>
u32 packed1(u32 a) {
  const T r0 = F{}(T{static_cast<u16>(a)}), r1 = F{}(T{static_cast<u16>(a >> 16)});
  return r0.bits | static_cast<u32>(r1.bits) << 16;
}
template <class F, class T>
u32 packed2(u32 a, u32 b) {
  const T r0 = F{}(T{static_cast<u16>(a)}, T{static_cast<u16>(b)});
  const T r1 = F{}(T{static_cast<u16>(a >> 16)}, T{static_cast<u16>(b >> 16)});
  return r0.bits | static_cast<u32>(r1.bits) << 16;
}
template <class F, class T>
u32 packed3(u32 a, u32 b, u32 c) {
  const T r0 = F{}(T{static_cast<u16>(a)}, T{static_cast<u16>(b)}, T{static_cast<u16>(c)});
  const T r1 = F{}(T{static_cast<u16>(a >> 16)}, T{static_cast<u16>(b >> 16)}, T{static_cast<u16>(c >> 16)});
  return r0.bits | static_cast<u32>(r1.bits) << 16;
}

template <class T, class F>
Exec half1(bool packed, F) {
  if (packed) return &map<decltype([](u32 a) { return packed1<F, T>(a); }), u32, u32>;
  return &map<F, T, T>;
}
template <class T, class F>
Exec half2(bool packed, F) {
  if (packed) return &map<decltype([](u32 a, u32 b) { return packed2<F, T>(a, b); }), u32, u32, u32>;
  return &map<F, T, T, T>;
}
template <class T, class F>
Exec half3(bool packed, F) {
  if (packed) return &map<decltype([](u32 a, u32 b, u32 c) { return packed3<F, T>(a, b, c); }), u32, u32, u32, u32>;
  return &map<F, T, T, T, T>;
}

template <class T>
Exec half_exec(const Instruction& in, bool packed) {
  const std::string& o = in.opcode;
  if (in.has("sat") && o != "cvt") {
    if (o == "add")
      return half2<T>(packed, [](T a, T b) {
        const double v = static_cast<double>(to_float(a)) + to_float(b);
        return T{v != v ? u16{0} : Half<T>::round(std::clamp(v, 0.0, 1.0))};
      });
    return nullptr;
  }
  if (o == "add")
    return half2<T>(packed, [](T a, T b) { return T{Half<T>::round(static_cast<double>(to_float(a)) + to_float(b))}; });
  if (o == "sub")
    return half2<T>(packed, [](T a, T b) { return T{Half<T>::round(static_cast<double>(to_float(a)) - to_float(b))}; });
  if (o == "mul")
    return half2<T>(packed, [](T a, T b) { return T{Half<T>::round(static_cast<double>(to_float(a)) * to_float(b))}; });
  if (o == "fma") {
    if (in.has("relu"))
      return half3<T>(packed, [](T a, T b, T c) {
        const double v = odd_fma(to_float(a), to_float(b), to_float(c));
        return T{v != v ? u16{0x7fff} : v > 0 ? Half<T>::round(v) : u16{0}};
      });
    return half3<T>(packed,
                    [](T a, T b, T c) { return T{Half<T>::round(odd_fma(to_float(a), to_float(b), to_float(c)))}; });
  }
  if (o == "neg")
    return half1<T>(packed,
                    [](T a) { return T{static_cast<u16>(to_float(a) != to_float(a) ? 0x7fff : a.bits ^ 0x8000)}; });
  if (o == "abs")
    return half1<T>(packed,
                    [](T a) { return T{static_cast<u16>(to_float(a) != to_float(a) ? 0x7fff : a.bits & 0x7fff)}; });
  if (o == "min" && in.has("NaN"))
    return half2<T>(packed, [](T a, T b) { return T{Half<T>::round(ptx_min(to_float(a), to_float(b), true))}; });
  if (o == "min")
    return half2<T>(packed, [](T a, T b) { return T{Half<T>::round(ptx_min(to_float(a), to_float(b), false))}; });
  if (o == "max" && in.has("NaN"))
    return half2<T>(packed, [](T a, T b) { return T{Half<T>::round(ptx_max(to_float(a), to_float(b), true))}; });
  if (o == "max")
    return half2<T>(packed, [](T a, T b) { return T{Half<T>::round(ptx_max(to_float(a), to_float(b), false))}; });
  if (o == "ex2")
    return half1<T>(packed, [](T a) { return T{Half<T>::round(std::exp2(static_cast<double>(to_float(a))))}; });
  if (o == "tanh")
    return half1<T>(packed, [](T a) { return T{Half<T>::round(std::tanh(static_cast<double>(to_float(a))))}; });
  return nullptr;
}

Round rounding(const Instruction& in) {
  if (in.has("rz") || in.has("rzi")) return Round::kZero;
  if (in.has("rm") || in.has("rmi")) return Round::kDown;
  if (in.has("rp") || in.has("rpi")) return Round::kUp;
  if (in.has("rna")) return Round::kAway;
  return Round::kNearest;
}

template <bool kFlush>
inline float in_f(float x) {
  return kFlush ? flush(x) : x;
}
template <bool kFlush>
inline float out_f(float x) {
  return canonical(kFlush ? flush(x) : x);
}

template <bool Z>
Exec float_exec(const Instruction& in) {
  const std::string& o = in.opcode;
  const Round mode = rounding(in);
  const bool nan = in.has("NaN"), sat = in.has("sat");
  using F = float;
  if (sat) {
    if (o == "add")
      return exec_of<F, F, F>([](F a, F b) {
        const F v = in_f<Z>(a) + in_f<Z>(b);
        return v > 0 ? std::min(v, 1.f) : 0.f;
      });
    if (o == "mul")
      return exec_of<F, F, F>([](F a, F b) {
        const F v = in_f<Z>(a) * in_f<Z>(b);
        return v > 0 ? std::min(v, 1.f) : 0.f;
      });
    if (o == "fma")
      return exec_of<F, F, F, F>([](F a, F b, F c) {
        const F v = std::fma(in_f<Z>(a), in_f<Z>(b), in_f<Z>(c));
        return v > 0 ? std::min(v, 1.f) : 0.f;
      });
    return nullptr;
  }
#define EVA02_DIRECTED(R)                                                                                           \
  if (mode == R) {                                                                                                  \
    if (o == "add")                                                                                                 \
      return exec_of<F, F, F>([](F a, F b) { return out_f<Z>(f32_of(odd_fma(in_f<Z>(a), 1.0, in_f<Z>(b)), R)); });  \
    if (o == "sub")                                                                                                 \
      return exec_of<F, F, F>([](F a, F b) { return out_f<Z>(f32_of(odd_fma(in_f<Z>(a), 1.0, -in_f<Z>(b)), R)); }); \
    if (o == "mul")                                                                                                 \
      return exec_of<F, F, F>(                                                                                      \
          [](F a, F b) { return out_f<Z>(f32_of(static_cast<double>(in_f<Z>(a)) * in_f<Z>(b), R)); });              \
    if (o == "fma" || o == "mad")                                                                                   \
      return exec_of<F, F, F, F>(                                                                                   \
          [](F a, F b, F c) { return out_f<Z>(f32_of(odd_fma(in_f<Z>(a), in_f<Z>(b), in_f<Z>(c)), R)); });          \
    if (o == "div")                                                                                                 \
      return exec_of<F, F, F>(                                                                                      \
          [](F a, F b) { return out_f<Z>(f32_of(static_cast<double>(in_f<Z>(a)) / in_f<Z>(b), R)); });              \
    if (o == "rcp") return exec_of<F, F>([](F a) { return out_f<Z>(f32_of(1.0 / in_f<Z>(a), R)); });                \
    if (o == "sqrt")                                                                                                \
      return exec_of<F, F>([](F a) { return out_f<Z>(f32_of(std::sqrt(static_cast<double>(in_f<Z>(a))), R)); });    \
  }
  EVA02_DIRECTED(Round::kZero)
  EVA02_DIRECTED(Round::kDown)
  EVA02_DIRECTED(Round::kUp)
#undef EVA02_DIRECTED
  if (o == "add") return exec_of<F, F, F>([](F a, F b) { return out_f<Z>(in_f<Z>(a) + in_f<Z>(b)); });
  if (o == "sub") return exec_of<F, F, F>([](F a, F b) { return out_f<Z>(in_f<Z>(a) - in_f<Z>(b)); });
  if (o == "mul") return exec_of<F, F, F>([](F a, F b) { return out_f<Z>(in_f<Z>(a) * in_f<Z>(b)); });
  if (o == "fma" || o == "mad")
    return exec_of<F, F, F, F>(
        [](F a, F b, F c) { return out_f<Z>(__builtin_fmaf(in_f<Z>(a), in_f<Z>(b), in_f<Z>(c))); });
  if (o == "div") return exec_of<F, F, F>([](F a, F b) { return out_f<Z>(in_f<Z>(a) / in_f<Z>(b)); });
  if (o == "neg") return exec_of<F, F>([](F a) { return out_f<Z>(-a); });
  if (o == "abs") return exec_of<F, F>([](F a) { return out_f<Z>(std::fabs(a)); });
  if (o == "min")
    return nan ? exec_of<F, F, F>([](F a, F b) { return out_f<Z>(ptx_min(in_f<Z>(a), in_f<Z>(b), true)); })
               : exec_of<F, F, F>([](F a, F b) { return out_f<Z>(ptx_min(in_f<Z>(a), in_f<Z>(b), false)); });
  if (o == "max")
    return nan ? exec_of<F, F, F>([](F a, F b) { return out_f<Z>(ptx_max(in_f<Z>(a), in_f<Z>(b), true)); })
               : exec_of<F, F, F>([](F a, F b) { return out_f<Z>(ptx_max(in_f<Z>(a), in_f<Z>(b), false)); });
  if (o == "rcp") return exec_of<F, F>([](F a) { return out_f<Z>(1.f / in_f<Z>(a)); });
  if (o == "sqrt") return exec_of<F, F>([](F a) { return out_f<Z>(std::sqrt(in_f<Z>(a))); });
  if (o == "rsqrt")
    return exec_of<F, F>(
        [](F a) { return out_f<Z>(static_cast<float>(1.0 / std::sqrt(static_cast<double>(in_f<Z>(a))))); });
  if (o == "ex2")
    return exec_of<F, F>([](F a) { return out_f<Z>(static_cast<float>(std::exp2(static_cast<double>(in_f<Z>(a))))); });
  if (o == "lg2")
    return exec_of<F, F>([](F a) { return out_f<Z>(static_cast<float>(std::log2(static_cast<double>(in_f<Z>(a))))); });
  if (o == "sin")
    return exec_of<F, F>([](F a) { return out_f<Z>(static_cast<float>(std::sin(static_cast<double>(in_f<Z>(a))))); });
  if (o == "cos")
    return exec_of<F, F>([](F a) { return out_f<Z>(static_cast<float>(std::cos(static_cast<double>(in_f<Z>(a))))); });
  if (o == "tanh")
    return exec_of<F, F>([](F a) { return out_f<Z>(static_cast<float>(std::tanh(static_cast<double>(in_f<Z>(a))))); });
  if (o == "copysign") return exec_of<F, F, F>([](F a, F b) { return std::copysign(b, a); });
  return nullptr;
}

Exec double_exec(const Instruction& in) {
  using F = double;
  const std::string& o = in.opcode;
  if (rounding(in) != Round::kNearest) {
    if (o == "div" && in.has("rz"))
      return exec_of<F, F, F>([](F a, F b) {
        const F q = a / b;
        if (!std::isfinite(q) || q == 0) return canonical(q);
        const F r = std::fma(-q, b, a);  // sign tells on which side of the quotient q lies
        const bool too_far = r != 0 && ((q > 0) == ((r < 0) != (b < 0)));
        return too_far ? std::nextafter(q, 0.0) : q;
      });
    return nullptr;
  }
  if (o == "add") return exec_of<F, F, F>([](F a, F b) { return canonical(a + b); });
  if (o == "sub") return exec_of<F, F, F>([](F a, F b) { return canonical(a - b); });
  if (o == "mul") return exec_of<F, F, F>([](F a, F b) { return canonical(a * b); });
  if (o == "fma" || o == "mad")
    return exec_of<F, F, F, F>([](F a, F b, F c) { return canonical(__builtin_fma(a, b, c)); });
  if (o == "div") return exec_of<F, F, F>([](F a, F b) { return canonical(a / b); });
  if (o == "neg") return exec_of<F, F>([](F a) { return canonical(-a); });
  if (o == "abs") return exec_of<F, F>([](F a) { return canonical(std::fabs(a)); });
  if (o == "min") return exec_of<F, F, F>([](F a, F b) { return ptx_min(a, b, false); });
  if (o == "max") return exec_of<F, F, F>([](F a, F b) { return ptx_max(a, b, false); });
  if (o == "rcp") return exec_of<F, F>([](F a) { return canonical(1.0 / a); });
  if (o == "sqrt") return exec_of<F, F>([](F a) { return canonical(std::sqrt(a)); });
  if (o == "rsqrt") return exec_of<F, F>([](F a) { return canonical(1.0 / std::sqrt(a)); });
  if (o == "copysign") return exec_of<F, F, F>([](F a, F b) { return std::copysign(b, a); });
  return nullptr;
}

// ---- conversions
bool is_float(const std::string& t) { return t == "f32" || t == "f64" || t == "f16" || t == "bf16" || t == "tf32"; }

template <class To, class From, bool kSat>
Exec integer_to_integer() {
  return &map<decltype([](From v) {
                if constexpr (kSat) {
                  const __int128 w = v;
                  const __int128 low = std::numeric_limits<To>::min(), high = std::numeric_limits<To>::max();
                  return static_cast<To>(w < low ? low : w > high ? high : w);
                } else {
                  return static_cast<To>(v);
                }
              }),
              To, From>;
}
// Narrow results are sign- or zero-extended in a wider register, by the type of the destination: cells hold 32 bits, so
// signed 8- and 16-bit results keep their low bits only, as PTX registers of their own width do.

template <class To, class From, Round R>
Exec float_to_integer_r() {
  return &map<decltype([](From v) {
                const double x = value(v);
                if (x != x)
                  return sizeof(From) == 8 || sizeof(To) == 8 ? static_cast<To>(1ull << (8 * sizeof(To) - 1)) : To{0};
                return saturate<To>(x, R);
              }),
              To, From>;
}
template <class To, class From>
Exec float_to_integer(Round r) {
  switch (r) {
    case Round::kZero: return float_to_integer_r<To, From, Round::kZero>();
    case Round::kDown: return float_to_integer_r<To, From, Round::kDown>();
    case Round::kUp: return float_to_integer_r<To, From, Round::kUp>();
    default: return float_to_integer_r<To, From, Round::kNearest>();
  }
}

template <class From, Round R>
float integer_as_float(From v) {
  if constexpr (R == Round::kNearest) return static_cast<float>(v);
  // 64-bit integers do not fit a double: round by hand.
  const float nearest = static_cast<float>(v);
  const long double exact = static_cast<long double>(v), got = static_cast<long double>(nearest);
  const bool down = R == Round::kDown || (R == Round::kZero && exact > 0),
             up = R == Round::kUp || (R == Round::kZero && exact < 0);
  if (down && got > exact) return std::nextafter(nearest, -INFINITY);
  if (up && got < exact) return std::nextafter(nearest, INFINITY);
  return nearest;
}

template <class From>
Exec from_integer(const std::string& to, const Instruction& in) {
  const Round r = rounding(in);
  if (to == "f32") {
    switch (r) {
      case Round::kZero: return exec_of<float, From>([](From v) { return integer_as_float<From, Round::kZero>(v); });
      case Round::kDown: return exec_of<float, From>([](From v) { return integer_as_float<From, Round::kDown>(v); });
      case Round::kUp: return exec_of<float, From>([](From v) { return integer_as_float<From, Round::kUp>(v); });
      default: return exec_of<float, From>([](From v) { return static_cast<float>(v); });
    }
  }
  if (to == "f64" && (r == Round::kNearest || sizeof(From) < 8))
    return exec_of<double, From>([](From v) { return static_cast<double>(v); });
  if (r == Round::kNearest && sizeof(From) <= 4) {
    if (to == "f16") return exec_of<f16, From>([](From v) { return f16{f16_bits(static_cast<double>(v))}; });
    if (to == "bf16") return exec_of<bf16, From>([](From v) { return bf16{bf16_bits(static_cast<double>(v))}; });
  }
  return nullptr;
}

template <class To, class From>
Exec integer_pair(bool sat) {
  return sat ? integer_to_integer<To, From, true>() : integer_to_integer<To, From, false>();
}
template <class To>
Exec to_integer(const std::string& from, const Instruction& in) {
  const bool sat = in.has("sat");
  if (from == "s8") return integer_pair<To, i8>(sat);
  if (from == "s16") return integer_pair<To, i16>(sat);
  if (from == "s32") return integer_pair<To, i32>(sat);
  if (from == "s64") return integer_pair<To, i64>(sat);
  if (from == "u8") return integer_pair<To, u8>(sat);
  if (from == "u16") return integer_pair<To, u16>(sat);
  if (from == "u32") return integer_pair<To, u32>(sat);
  if (from == "u64") return integer_pair<To, u64>(sat);
  const Round r = rounding(in);
  if (in.has("ftz") && from == "f32") {
    if (r == Round::kNearest)
      return exec_of<To, float>([](float v) {
        return v != v ? (sizeof(To) == 8 ? static_cast<To>(1ull << 63) : To{0})
                      : saturate<To>(flush(v), Round::kNearest);
      });
    if (r == Round::kZero)
      return exec_of<To, float>([](float v) {
        return v != v ? (sizeof(To) == 8 ? static_cast<To>(1ull << 63) : To{0}) : saturate<To>(flush(v), Round::kZero);
      });
    return nullptr;
  }
  if (from == "f32") return float_to_integer<To, float>(r);
  if (from == "f64") return float_to_integer<To, double>(r);
  if (from == "f16") return float_to_integer<To, f16>(r);
  if (from == "bf16") return float_to_integer<To, bf16>(r);
  return nullptr;
}

template <Round R>
Exec float_to_half(const std::string& to, const std::string& from) {
  if (to == "f16" && from == "f64") return exec_of<f16, double>([](double v) { return f16{f16_bits(v, R)}; });
  if (from != "f32") return nullptr;
  if (to == "f16")
    return exec_of<f16, float>(
        [](float v) { return f16{R == Round::kNearest ? f16_bits_of_float(v) : f16_bits(v, R)}; });
  if (to == "bf16")
    return exec_of<bf16, float>(
        [](float v) { return bf16{R == Round::kNearest ? bf16_bits_of_float(v) : bf16_bits(v, R)}; });
  if (to == "f16x2")
    return exec_of<u32, float, float>([](float a, float b) {
      return static_cast<u32>(R == Round::kNearest ? f16_bits_of_float(a) : f16_bits(a, R)) << 16 |
             (R == Round::kNearest ? f16_bits_of_float(b) : f16_bits(b, R));
    });
  if (to == "bf16x2")
    return exec_of<u32, float, float>([](float a, float b) {
      return static_cast<u32>(R == Round::kNearest ? bf16_bits_of_float(a) : bf16_bits(a, R)) << 16 |
             (R == Round::kNearest ? bf16_bits_of_float(b) : bf16_bits(b, R));
    });
  return nullptr;
}

template <class T, Round R>
T whole(T v) {
  return canonical(static_cast<T>(integral(v, R)));
}

Exec conversion(const Instruction& in, const std::string& to, const std::string& from) {
  const Round r = rounding(in);
  const bool to_integral = in.has("rni") || in.has("rzi") || in.has("rmi") || in.has("rpi");
  if (to == "s8") return to_integer<i8>(from, in);
  if (to == "s16") return to_integer<i16>(from, in);
  if (to == "s32") return to_integer<i32>(from, in);
  if (to == "s64") return to_integer<i64>(from, in);
  if (to == "u8") return to_integer<u8>(from, in);
  if (to == "u16") return to_integer<u16>(from, in);
  if (to == "u32") return to_integer<u32>(from, in);
  if (to == "u64") return to_integer<u64>(from, in);
  if (from == "s8") return from_integer<i8>(to, in);
  if (from == "s16") return from_integer<i16>(to, in);
  if (from == "s32") return from_integer<i32>(to, in);
  if (from == "s64") return from_integer<i64>(to, in);
  if (from == "u8") return from_integer<u8>(to, in);
  if (from == "u16") return from_integer<u16>(to, in);
  if (from == "u32") return from_integer<u32>(to, in);
  if (from == "u64") return from_integer<u64>(to, in);
  if (to == "tf32" && from == "f32") {  // low 13 bits are dropped, after rounding
    if (in.has("rna"))
      return exec_of<u32, float>([](float v) {
        const u32 u = bits_as<u32>(v);
        return v != v ? kNan32 : std::isinf(v) ? u : (u + 0x1000) & ~0x1fffu;
      });
    return nullptr;
  }
  if (to == "f32" && from == "f16") return exec_of<float, f16>([](f16 v) { return canonical(to_float(v)); });
  if (to == "f32" && from == "bf16") return exec_of<float, bf16>([](bf16 v) { return canonical(to_float(v)); });
  if (to == "f64" && from == "f32")
    return in.has("ftz") ? exec_of<double, float>([](float v) { return canonical(static_cast<double>(flush(v))); })
                         : exec_of<double, float>([](float v) { return canonical(static_cast<double>(v)); });
  if (to == "f64" && from == "f16")
    return exec_of<double, f16>([](f16 v) { return canonical(static_cast<double>(to_float(v))); });
  if (to == "f32" && from == "f64") {
    switch (r) {
      case Round::kZero: return exec_of<float, double>([](double v) { return f32_of(v, Round::kZero); });
      case Round::kDown: return exec_of<float, double>([](double v) { return f32_of(v, Round::kDown); });
      case Round::kUp: return exec_of<float, double>([](double v) { return f32_of(v, Round::kUp); });
      default: return exec_of<float, double>([](double v) { return f32_of(v, Round::kNearest); });
    }
  }
  if (to == "f32" && from == "f32") {
    const bool z = in.has("ftz");
    if (in.has("sat") && z) return exec_of<float, float>([](float v) { return flush(v) > 0 ? std::min(v, 1.f) : 0.f; });
    if (in.has("sat")) return exec_of<float, float>([](float v) { return v > 0 ? std::min(v, 1.f) : 0.f; });
    if (to_integral) {
      if (r == Round::kZero)
        return z ? exec_of<float, float>([](float v) { return whole<float, Round::kZero>(flush(v)); })
                 : exec_of<float, float>([](float v) { return whole<float, Round::kZero>(v); });
      if (r == Round::kDown)
        return z ? exec_of<float, float>([](float v) { return whole<float, Round::kDown>(flush(v)); })
                 : exec_of<float, float>([](float v) { return whole<float, Round::kDown>(v); });
      if (r == Round::kUp)
        return z ? exec_of<float, float>([](float v) { return whole<float, Round::kUp>(flush(v)); })
                 : exec_of<float, float>([](float v) { return whole<float, Round::kUp>(v); });
      return z ? exec_of<float, float>([](float v) { return whole<float, Round::kNearest>(flush(v)); })
               : exec_of<float, float>([](float v) { return whole<float, Round::kNearest>(v); });
    }
    return z ? exec_of<float, float>([](float v) { return canonical(flush(v)); })
             : exec_of<float, float>([](float v) { return canonical(v); });
  }
  if (to == "f64" && from == "f64" && to_integral) {
    if (r == Round::kZero) return exec_of<double, double>([](double v) { return whole<double, Round::kZero>(v); });
    if (r == Round::kDown) return exec_of<double, double>([](double v) { return whole<double, Round::kDown>(v); });
    if (r == Round::kUp) return exec_of<double, double>([](double v) { return whole<double, Round::kUp>(v); });
    return exec_of<double, double>([](double v) { return whole<double, Round::kNearest>(v); });
  }
  if (in.has("relu") || in.has("sat") || in.has("satfinite")) return nullptr;
  if (r == Round::kZero) return float_to_half<Round::kZero>(to, from);
  if (r == Round::kNearest) return float_to_half<Round::kNearest>(to, from);
  return nullptr;
}

// ---- bits
template <class T>
Exec bit_exec(const std::string& o) {
  if (o == "and") return exec_of<T, T, T>([](T a, T b) { return static_cast<T>(a & b); });
  if (o == "or") return exec_of<T, T, T>([](T a, T b) { return static_cast<T>(a | b); });
  if (o == "xor") return exec_of<T, T, T>([](T a, T b) { return static_cast<T>(a ^ b); });
  if (o == "not") return exec_of<T, T>([](T a) { return static_cast<T>(~a); });
  if (o == "cnot") return exec_of<T, T>([](T a) { return static_cast<T>(a == 0); });
  if (o == "shl") return exec_of<T, T, u32>([](T a, u32 n) { return shift_left<T>(a, n); });
  if (o == "shr") return exec_of<T, T, u32>([](T a, u32 n) { return shift_right<T>(a, n); });
  if constexpr (sizeof(T) >= 4) {
    if (o == "brev")
      return exec_of<T, T>([](T a) {
        T r = 0;
        for (u32 i = 0; i < 8 * sizeof(T); ++i) r |= (a >> i & 1) << (8 * sizeof(T) - 1 - i);
        return r;
      });
    if (o == "popc") return exec_of<u32, T>([](T a) { return static_cast<u32>(std::popcount(a)); });
    if (o == "clz") return exec_of<u32, T>([](T a) { return static_cast<u32>(std::countl_zero(a)); });
    if (o == "bfi")
      return exec_of<T, T, T, u32, u32>([](T a, T b, u32 c, u32 d) {
        const u32 pos = c & 255, len = d & 255;
        for (u32 i = 0; i < len && pos + i < 8 * sizeof(T); ++i) {
          const T bit = T{1} << (pos + i);
          b = (b & ~bit) | ((a >> i & 1) ? bit : 0);
        }
        return b;
      });
  }
  return nullptr;
}

template <class T>
Exec bfind_exec(bool shift) {
  using U = std::make_unsigned_t<T>;
  if (shift)
    return exec_of<u32, T>([](T a) {
      U u = static_cast<U>(a);
      if (std::is_signed_v<T> && a < 0) u = ~u;
      return u == 0 ? ~0u : static_cast<u32>(std::countl_zero(u));
    });
  return exec_of<u32, T>([](T a) {
    U u = static_cast<U>(a);
    if (std::is_signed_v<T> && a < 0) u = ~u;
    return u == 0 ? ~0u : static_cast<u32>(8 * sizeof(T) - 1 - std::countl_zero(u));
  });
}

void lop3(Warp& w, const Op& op, u32 mask) {
  const u32 *a = w.reg<u32>(op, 1), *b = w.reg<u32>(op, 2), *c = w.reg<u32>(op, 3);
  u32 values[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    u32 r = 0;
    for (int k = 0; k < 8; ++k)
      if (op.imm >> k & 1) r |= (k & 4 ? a[l] : ~a[l]) & (k & 2 ? b[l] : ~b[l]) & (k & 1 ? c[l] : ~c[l]);
    values[l] = r;
  }
  store<u32>(w, op, mask, values);
}

u32 permute(u32 a, u32 b, u32 c) {
  const u64 bytes = static_cast<u64>(b) << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 s = c >> (4 * i) & 15;
    u8 v = static_cast<u8>(bytes >> (8 * (s & 7)));
    if (s & 8) v = v & 0x80 ? 0xff : 0;
    r |= static_cast<u32>(v) << (8 * i);
  }
  return r;
}

// Predicates are masks: logic on them is logic on the mask.
template <class F>
void predicate_logic(Warp& w, const Op& op, u32 mask) {
  const u32 r = F{}(*w.reg<u32>(op, 1), op.num_src > 1 ? *w.reg<u32>(op, 2) : 0u);
  u32& p = *w.reg<u32>(op, 0);
  p = (p & ~mask) | (r & mask);
}

template <class T>
void select(Warp& w, const Op& op, u32 mask) {
  const auto *a = w.reg<Cell<T>>(op, 1), *b = w.reg<Cell<T>>(op, 2);
  const u32 p = *w.reg<u32>(op, 3);
  Cell<T> values[kLanes];
  for (int l = 0; l < kLanes; ++l) values[l] = p >> l & 1 ? a[l] : b[l];
  store<T>(w, op, mask, values);
}

template <class T>
void move(Warp& w, const Op& op, u32 mask) {
  store<T>(w, op, mask, w.reg<Cell<T>>(op, 1));
}

// mov.b32 d, {a, b} and the like; imm: bytes of a piece.
template <class D>
void pack(Warp& w, const Op& op, u32 mask) {
  const int bits = static_cast<int>(8 * op.imm);
  Cell<D> values[kLanes] = {};
  for (int i = 0; i < op.num_src; ++i) {
    const auto* s = w.reg<u32>(op, 1 + i);
    for (int l = 0; l < kLanes; ++l) {
      const u64 piece = bits == 32 ? s[l] : s[l] & ((1u << bits) - 1);
      values[l] |= static_cast<Cell<D>>(piece << (bits * i));
    }
  }
  store<D>(w, op, mask, values);
}
template <class S>
void unpack(Warp& w, const Op& op, u32 mask) {
  const int bits = static_cast<int>(8 * op.imm);
  const auto* s = w.reg<Cell<S>>(op, op.num_dst);
  for (int i = 0; i < op.num_dst; ++i) {
    auto* d = w.reg<u32>(op, i);
    for (int l = 0; l < kLanes; ++l) {
      const u64 piece = static_cast<u64>(s[l]) >> (bits * i);
      if (mask >> l & 1) d[l] = static_cast<u32>(bits == 32 ? piece : piece & ((1u << bits) - 1));
    }
  }
}

bool is_clock(const std::string& name) {
  return name == "%clock" || name == "%clock_hi" || name == "%clock64" || name == "%globaltimer";
}

// A clock counts the instructions that the warps of the CTA have executed: it goes on for each of them, and does not
// depend on the host. imm: bits to leave out
template <class T>
void read_clock(Warp& w, const Op& op, u32 mask) {
  u64 now = 0;
  for (const Warp& other : w.cta->warps) now += other.executed;
  for (int l = 0; l < kLanes; ++l)
    if (mask >> l & 1) w.reg<T>(op, 0)[l] = static_cast<T>(now >> op.imm);
}

bool decode_mov(Decoder& d, const Instruction& in, Op& op) {
  d.expect_operands(in, 2);
  const std::string type = in.last();
  const Operand &to = in.operands[0], &from = in.operands[1];
  if (type == "pred") {
    // A constant predicate is a mask of all lanes or of none.
    const Reg source = from.kind == Operand::kInt ? d.constant(from.bits ? kAllLanes : 0, false) : d.predicate(from);
    d.set(op, {d.predicate(to)}, {source});
    op.exec = &predicate_logic<decltype([](u32 a, u32) { return a; })>;
    op.rule = Rule::kMove;
    return true;
  }
  const int bytes = type_bytes(type);
  if (bytes <= 1) Decoder::fail("mov of type ." + type);
  if (from.kind == Operand::kVector || to.kind == Operand::kVector) {
    const bool packs = from.kind == Operand::kVector;
    const auto& list = packs ? from.list : to.list;
    const int piece = bytes / static_cast<int>(list.size());
    if (piece * static_cast<int>(list.size()) != bytes || piece > 4)
      Decoder::fail("mov of a vector of " + std::to_string(list.size()));
    const std::string piece_type = piece == 4 ? "b32" : piece == 2 ? "b16" : "b8";
    std::vector<Reg> pieces;
    for (const auto& o : list)
      pieces.push_back(packs ? d.source(o, piece_type, Decoder::Wider::kInItsCell)
                             : d.result(o, piece_type, Decoder::Wider::kInItsCell));
    op.imm = piece;
    if (packs) {
      d.set(op, {d.result(to, type)}, pieces);
      op.exec = bytes == 8 ? &pack<u64> : &pack<u32>;
      op.rule = Rule::kPack;
    } else {
      d.set(op, pieces, {d.source(from, type)});
      op.exec = bytes == 8 ? &unpack<u64> : &unpack<u32>;
      op.rule = Rule::kUnpack;
    }
    return true;
  }
  if (from.kind == Operand::kName && is_clock(from.name)) {
    if (bytes != (from.name == "%clock" || from.name == "%clock_hi" ? 4 : 8))
      Decoder::fail("special register " + from.name + " as ." + type);
    d.set(op, {d.result(to, type)}, {});
    op.imm = from.name == "%clock_hi" ? 32 : 0;
    op.exec = bytes == 8 ? &read_clock<u64> : &read_clock<u32>;
    op.rule = Rule::kAll;
    return true;
  }
  d.set(op, {d.result(to, type)}, {d.source(from, type)});
  op.exec = bytes == 8 ? &move<u64> : &move<u32>;
  op.rule = Rule::kMove;
  return true;
}

// ---- sums with a carry: regs: d [, carry out], a, b [, c] [, carry in]
constexpr i64 kCarryOut = 1, kCarryIn = 2, kSubtract = 4, kProduct = 8, kHigh = 16;

template <class T>
void carried(Warp& w, const Op& op, u32 mask) {
  const bool in = op.imm & kCarryIn, out = op.imm & kCarryOut, product = op.imm & kProduct;
  const int first = op.num_dst;
  const T *a = w.reg<T>(op, first), *b = w.reg<T>(op, first + 1), *c = product ? w.reg<T>(op, first + 2) : nullptr;
  const u32 carry = in ? *w.reg<u32>(op, first + (product ? 3 : 2)) : 0;
  Cell<T> values[kLanes];
  u32 carries = 0;
  for (int l = 0; l < kLanes; ++l) {
    T x = a[l], y = b[l];
    if (product) {
      const auto p = static_cast<unsigned __int128>(a[l]) * b[l];
      x = static_cast<T>(op.imm & kHigh ? p >> (8 * sizeof(T)) : p);
      y = c[l];
    }
    const auto extra = static_cast<unsigned __int128>(carry >> l & 1);
    const auto sum = op.imm & kSubtract ? static_cast<unsigned __int128>(x) - y - extra
                                        : static_cast<unsigned __int128>(x) + y + extra;
    values[l] = static_cast<T>(sum);
    carries |= static_cast<u32>(sum >> (8 * sizeof(T)) != 0) << l;
  }
  store<T>(w, op, mask, values);
  if (out) {
    u32& p = *w.reg<u32>(op, 1);
    p = (p & ~mask) | (carries & mask);
  }
}

// add.cc addc[.cc] sub.cc subc[.cc] mad.{lo,hi}.cc madc.{lo,hi}[.cc]
bool decode_carry(Decoder& d, const Instruction& in, Op& op) {
  const std::string& o = in.opcode;
  const std::string type = in.last();
  const int bytes = type_bytes(type);
  const bool product = o == "mad" || o == "madc";
  if ((bytes != 4 && bytes != 8) || type[0] == 'f' || (product && !in.has("lo") && !in.has("hi"))) return false;
  if (product && in.has("hi") && type[0] == 's') return false;
  op.imm = (in.has("cc") ? kCarryOut : 0) | (o.back() == 'c' ? kCarryIn : 0) | (o[0] == 's' ? kSubtract : 0) |
           (product ? kProduct : 0) | (in.has("hi") ? kHigh : 0);
  d.expect_operands(in, product ? 4 : 3);
  std::vector<Reg> dst = {d.result(in.operands[0], type)}, src;
  if (op.imm & kCarryOut) dst.push_back(d.carry());
  for (size_t i = 1; i < in.operands.size(); ++i) src.push_back(d.source(in.operands[i], type));
  if (op.imm & kCarryIn) src.push_back(d.carry());
  d.set(op, dst, src);
  op.exec = bytes == 8 ? &carried<u64> : &carried<u32>;
  return true;
}

// ---- set: a comparison's outcome as a number. regs: d, a, b
template <class D, class S>
void set_number(Warp& w, const Op& op, u32 mask) {
  static constexpr u32 one = std::is_same_v<D, float> ? 0x3f800000u : std::is_same_v<D, f16> ? 0x3c00u : ~0u;
  const auto test = reinterpret_cast<bool (*)(float, float)>(op.apply);
  const u32 *a = w.reg<u32>(op, 1), *b = w.reg<u32>(op, 2);
  u32 values[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    if constexpr (std::is_same_v<S, f16x2>) {
      const auto half = [](u32 v) { return to_float(f16{static_cast<u16>(v)}); };
      const u32 low = test(half(a[l]), half(b[l])), high = test(half(a[l] >> 16), half(b[l] >> 16));
      if (std::is_same_v<D, u32>)
        values[l] = (low ? 0xffffu : 0) | (high ? 0xffff0000u : 0);
      else
        values[l] = (low ? 0x3c00u : 0) | (high ? 0x3c000000u : 0);
    } else if constexpr (std::is_same_v<S, f16>) {
      values[l] = test(to_float(f16{static_cast<u16>(a[l])}), to_float(f16{static_cast<u16>(b[l])})) ? one : 0;
    } else {
      values[l] = test(bits_as<float>(a[l]), bits_as<float>(b[l])) ? one : 0;
    }
  }
  store<u32>(w, op, mask, values);
}

bool decode_set(Decoder& d, const Instruction& in, Op& op) {
  using Test = bool (*)(float, float);
  static const std::map<std::string, Test> tests = {{"eq", [](float a, float b) { return a == b; }},
                                                    {"ne", [](float a, float b) { return a < b || a > b; }},
                                                    {"lt", [](float a, float b) { return a < b; }},
                                                    {"le", [](float a, float b) { return a <= b; }},
                                                    {"gt", [](float a, float b) { return a > b; }},
                                                    {"ge", [](float a, float b) { return a >= b; }},
                                                    {"equ", [](float a, float b) { return !(a < b || a > b); }},
                                                    {"neu", [](float a, float b) { return a != b; }},
                                                    {"ltu", [](float a, float b) { return !(a >= b); }},
                                                    {"leu", [](float a, float b) { return !(a > b); }},
                                                    {"gtu", [](float a, float b) { return !(a <= b); }},
                                                    {"geu", [](float a, float b) { return !(a < b); }},
                                                    {"num", [](float a, float b) { return a == a && b == b; }},
                                                    {"nan", [](float a, float b) { return a != a || b != b; }}};
  if (in.modifiers.size() != 3 || in.operands.size() != 3) return false;
  const auto test = tests.find(in.modifiers[0]);
  const std::string &to = in.modifiers[1], &from = in.modifiers[2];
  if (test == tests.end()) return false;
  op.apply = reinterpret_cast<void (*)()>(test->second);
  const bool integer = to == "u32" || to == "s32";
  if (from == "f32" && integer) op.exec = &set_number<u32, float>;
  if (from == "f32" && to == "f32") op.exec = &set_number<float, float>;
  if (from == "f16" && integer) op.exec = &set_number<u32, f16>;
  if (from == "f16" && to == "f16") op.exec = &set_number<f16, f16>;
  if (from == "f16x2" && integer) op.exec = &set_number<u32, f16x2>;
  if (from == "f16x2" && to == "f16x2") op.exec = &set_number<f16x2, f16x2>;
  if (op.exec == nullptr) return false;
  d.set(op, {d.result(in.operands[0], to)}, {d.source(in.operands[1], from), d.source(in.operands[2], from)});
  return true;
}

bool decode_setp(Decoder& d, const Instruction& in, Op& op) {
  const std::string type = in.last();
  std::vector<Reg> dst, src;
  if (in.operands.empty() || in.modifiers.empty()) return false;
  const Operand& to = in.operands[0];
  if (to.kind == Operand::kPair)
    for (const auto& o : to.list) dst.push_back(d.predicate_or_sink(o));
  else
    dst = {d.predicate(to)};
  const std::vector<std::string> joins = {"and", "or", "xor"};
  for (size_t i = 0; i < joins.size(); ++i)
    if (in.has(joins[i].c_str())) op.imm = static_cast<i64>(i + 1);
  d.expect_operands(in, op.imm ? 4 : 3);
  src = {d.source(in.operands[1], type), d.source(in.operands[2], type)};
  if (op.imm) {
    src.push_back(d.predicate(in.operands[3], true));
    if (in.operands[3].negated) op.imm |= 4;
  }
  op.exec = in.has("ftz") ? comparison_flushed(in.modifiers.at(0), type) : comparison(in.modifiers.at(0), type);
  if (op.exec == nullptr) return false;
  d.set(op, dst, src);
  return true;
}

// 8-bit results live in wider registers, extended by their sign.
template <class From>
Exec to_byte(bool is_signed) {
  if (is_signed) return exec_of<i32, From>([](From v) { return static_cast<i32>(static_cast<i8>(v)); });
  return exec_of<u32, From>([](From v) { return static_cast<u32>(static_cast<u8>(v)); });
}

// From the low bytes (imm) of a 64-bit register.
template <class To>
void from_low_bits(Warp& w, const Op& op, u32 mask) {
  const u64* a = w.reg<u64>(op, 1);
  const int shift = static_cast<int>(64 - 8 * op.imm);
  To values[kLanes];
  for (int l = 0; l < kLanes; ++l)
    values[l] =
        static_cast<To>(op.sign ? static_cast<u64>(static_cast<i64>(a[l] << shift) >> shift) : a[l] << shift >> shift);
  store<To>(w, op, mask, values);
}

bool decode_cvt(Decoder& d, const Instruction& in, Op& op) {
  if (in.modifiers.size() < 2) Decoder::fail("cvt needs two types");
  const std::string to = in.modifiers[in.modifiers.size() - 2], from = in.last();
  if (type_bytes(to) == 1) {
    const bool is_signed = to == "s8";
    if (in.modifiers.size() != 2 || is_float(from)) return false;
    const int bytes = type_bytes(from);
    op.exec = bytes == 8 ? to_byte<u64>(is_signed) : bytes == 4 ? to_byte<u32>(is_signed) : to_byte<u16>(is_signed);
    const Operand& result = in.operands.at(0);
    if (!d.is_register(result.name) || d.is_wide(result.name)) return false;
    d.set(op, {d.result(result, d.type_of(result.name))},
          {d.source(in.operands.at(1), from, Decoder::Wider::kInItsCell)});
    return true;
  }
  op.exec = conversion(in, to, from);
  if (op.exec == nullptr) return false;
  const std::string storage = to == "tf32" ? "b32" : to;
  if (to == "f16x2" || to == "bf16x2") {
    d.expect_operands(in, 3);
    d.set(op, {d.result(in.operands[0], "b32")}, {d.source(in.operands[1], from), d.source(in.operands[2], from)});
    return true;
  }
  d.expect_operands(in, 2);
  const Operand& value = in.operands[1];
  if (value.kind == Operand::kName && d.is_register(value.name) && d.is_wide(value.name) && type_bytes(from) < 8) {
    if (is_float(to) || is_float(from) || in.has("sat")) return false;
    op.exec = type_bytes(to) == 8 ? &from_low_bits<u64> : &from_low_bits<u32>;
    op.imm = type_bytes(from), op.sign = from[0] == 's';
    d.set(op, {d.result(in.operands[0], storage)}, {d.source(value, "b64")});
    op.rule = Rule::kExtend;
    return true;
  }
  d.set(op, {d.result(in.operands[0], storage)}, {d.source(value, from, Decoder::Wider::kInItsCell)});
  const bool integers = !is_float(to) && !is_float(from);
  if (integers && type_bytes(from) < type_bytes(to) && in.has("sat")) Decoder::fail("cvt.sat to a wider type");
  if (integers) op.rule = Rule::kExtend, op.imm = std::min(type_bytes(from), type_bytes(to));
  return true;
}

}  // namespace

namespace {

bool is_alu(const std::string& o) {
  static const std::set<std::string> names = {"add", "sub",  "mul",  "mad",  "fma",  "div",  "rem",  "min",  "max",
                                              "abs", "neg",  "sad",  "shl",  "shr",  "bfe",  "bfi",  "and",  "or",
                                              "xor", "not",  "cnot", "brev", "popc", "clz",  "rcp",  "sqrt", "rsqrt",
                                              "ex2", "lg2",  "sin",  "cos",  "tanh", "cvt",  "setp", "selp", "copysign",
                                              "mov", "cvta", "lop3", "prmt", "shf",  "bmsk", "bfind"};
  return names.count(o) > 0;
}

// Modifiers that the decoders below read; any other would change the result unseen.
bool knows_modifiers(const Instruction& in) {
  static const std::set<std::string> rounds = {"rn", "rz", "rm", "rp", "ftz"};
  static const std::set<std::string> joins = {"and", "or", "xor"};
  static const std::map<std::string, std::set<std::string>> own = {
      {"add", {"sat", "cc"}},
      {"sub", {"cc"}},
      {"mul", {"sat", "lo", "hi", "wide"}},
      {"mad", {"lo", "hi", "wide", "cc"}},
      {"fma", {"sat", "relu"}},
      {"div", {"approx", "full"}},
      {"min", {"NaN"}},
      {"max", {"NaN"}},
      {"rcp", {"approx"}},
      {"sqrt", {"approx"}},
      {"rsqrt", {"approx"}},
      {"ex2", {"approx"}},
      {"lg2", {"approx"}},
      {"sin", {"approx"}},
      {"cos", {"approx"}},
      {"tanh", {"approx"}},
      {"cvta", {"to", "global", "shared", "const", "local", "param"}},
      {"shf", {"l", "r", "wrap", "clamp"}},
      {"bmsk", {"clamp"}},
      {"bfind", {"shiftamt"}},
      {"cvt", {"rni", "rzi", "rmi", "rpi", "rna", "sat"}}};
  const auto known = own.find(in.opcode);
  for (size_t i = 0; i < in.modifiers.size(); ++i) {
    const std::string& m = in.modifiers[i];
    const bool type = type_bytes(m) >= 0 || m == "tf32";
    const bool compares = in.opcode == "setp" && (i == 0 || joins.count(m));
    if (!type && !compares && !rounds.count(m) && (known == own.end() || !known->second.count(m))) return false;
  }
  const bool directed = in.has("rz") || in.has("rm") || in.has("rp");
  const std::string type = in.last();
  if (in.has("sat") && in.opcode != "cvt" && (directed || in.has("ftz") || type_bytes(type) == 8)) return false;
  if (in.has("ftz") && in.opcode != "cvt" && type != "f32") return false;
  if (type == "f64" && in.has("approx")) return false;
  if (in.opcode == "cvt" && in.modifiers.size() >= 2) {
    const std::string &to = in.modifiers[in.modifiers.size() - 2], &from = type;
    const bool integral = in.has("rni") || in.has("rzi") || in.has("rmi") || in.has("rpi");
    if (in.has("sat") && is_float(to) && (to != "f32" || from != "f32" || integral)) return false;
    if (in.has("ftz") && from != "f32") return false;
    if (in.has("ftz") && (to == "f16" || to == "bf16" || to == "f16x2" || to == "bf16x2")) return false;
  }
  return true;
}

}  // namespace

bool decode_alu(Decoder& d, const Instruction& in, Op& op) {
  const std::string& o = in.opcode;
  if (!in.modifiers.empty() && is_alu(o) && !knows_modifiers(in)) Decoder::fail("a modifier of ." + in.last());
  if (o == "mov") return decode_mov(d, in, op);
  if (o == "setp") return decode_setp(d, in, op);
  if (o == "cvt") return decode_cvt(d, in, op);
  if (o == "set") return decode_set(d, in, op);
  if (o == "addc" || o == "subc" || o == "madc" || in.has("cc")) return decode_carry(d, in, op);
  const std::string type = in.last();
  if (o == "cvta") {
    d.expect_operands(in, 2);
    if (in.has("shared") && !in.has("to")) {
      d.set(op, {d.result(in.operands[0], "u64")}, {d.source(in.operands[1], "u64")});
      op.exec = exec_of<u64, u64>([](u64 a) { return a | kSharedWindow; });
    } else if (in.has("shared")) {
      d.set(op, {d.result(in.operands[0], "u64")}, {d.source(in.operands[1], "u64")});
      op.exec = exec_of<u64, u64>([](u64 a) { return a & ~kSharedWindow; });
    } else if (in.has("local") && !in.has("to")) {
      d.set(op, {d.result(in.operands[0], "u64")}, {d.source(in.operands[1], "u64")});
      op.exec = exec_of<u64, u64>([](u64 a) { return a | kLocalWindow; });
    } else if (in.has("local")) {
      d.set(op, {d.result(in.operands[0], "u64")}, {d.source(in.operands[1], "u64")});
      op.exec = exec_of<u64, u64>([](u64 a) { return a & ~kLocalWindow; });
    } else if (in.has("global") || in.has("const") || in.has("param")) {
      d.set(op, {d.result(in.operands[0], "u64")}, {d.source(in.operands[1], "u64")});
      op.exec = &move<u64>;
      op.rule = Rule::kMove;
    } else {
      return false;
    }
    return true;
  }
  if (o == "selp") {
    d.expect_operands(in, 4);
    if (in.operands[3].negated) Decoder::fail("selp of a negated predicate");
    d.set(op, {d.result(in.operands[0], type)},
          {d.source(in.operands[1], type), d.source(in.operands[2], type), d.predicate(in.operands[3])});
    op.exec = type_bytes(type) == 8 ? &select<u64> : &select<u32>;
    op.rule = Rule::kSelect;
    return true;
  }
  if (type == "pred" && (o == "and" || o == "or" || o == "xor" || o == "not")) {
    std::vector<Reg> src;
    for (size_t i = 1; i < in.operands.size(); ++i) {
      if (in.operands[i].negated) Decoder::fail("a negated predicate as an operand");
      src.push_back(d.predicate(in.operands[i]));
    }
    if (o == "and" && src.size() == 2) op.exec = &predicate_logic<decltype([](u32 a, u32 b) { return a & b; })>;
    if (o == "or" && src.size() == 2) op.exec = &predicate_logic<decltype([](u32 a, u32 b) { return a | b; })>;
    if (o == "xor" && src.size() == 2) op.exec = &predicate_logic<decltype([](u32 a, u32 b) { return a ^ b; })>;
    if (o == "not" && src.size() == 1) op.exec = &predicate_logic<decltype([](u32 a, u32) { return ~a; })>;
    if (op.exec == nullptr) return false;
    d.set(op, {d.predicate(in.operands[0])}, src);
    return true;
  }
  if (o == "lop3") {
    d.expect_operands(in, 5);
    if (in.operands[4].kind != Operand::kInt) Decoder::fail("lop3 needs a constant table");
    d.set(op, {d.result(in.operands[0], "b32")},
          {d.source(in.operands[1], "b32"), d.source(in.operands[2], "b32"), d.source(in.operands[3], "b32")});
    op.imm = static_cast<i64>(in.operands[4].bits & 255);
    op.exec = &lop3;
    return true;
  }
  if (o == "prmt") {
    d.expect_operands(in, 4);
    if (in.modifiers.size() != 1) return false;
    d.set(op, {d.result(in.operands[0], "b32")},
          {d.source(in.operands[1], "b32"), d.source(in.operands[2], "b32"), d.source(in.operands[3], "b32")});
    op.exec = exec_of<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return permute(a, b, c); });
    op.rule = Rule::kPrmt;
    return true;
  }
  if (o == "shf") {
    d.expect_operands(in, 4);
    d.set(op, {d.result(in.operands[0], "b32")},
          {d.source(in.operands[1], "b32"), d.source(in.operands[2], "b32"), d.source(in.operands[3], "u32")});
    const bool left = in.has("l"), wrap = in.has("wrap");
    if (left && wrap)
      op.exec = exec_of<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) {
        const u32 n = c & 31;
        return n ? b << n | a >> (32 - n) : b;
      });
    if (left && !wrap)
      op.exec = exec_of<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) {
        const u32 n = std::min(c, 32u);
        return n == 0 ? b : n == 32 ? a : b << n | a >> (32 - n);
      });
    if (!left && wrap)
      op.exec = exec_of<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) {
        const u32 n = c & 31;
        return n ? b << (32 - n) | a >> n : a;
      });
    if (!left && !wrap)
      op.exec = exec_of<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) {
        const u32 n = std::min(c, 32u);
        return n == 0 ? a : n == 32 ? b : b << (32 - n) | a >> n;
      });
    return true;
  }
  if (o == "bmsk") {
    d.expect_operands(in, 3);
    if (!in.has("clamp")) return false;
    d.set(op, {d.result(in.operands[0], "b32")}, {d.source(in.operands[1], "u32"), d.source(in.operands[2], "u32")});
    op.exec = exec_of<u32, u32, u32>([](u32 a, u32 b) {
      u32 r = 0;
      for (u32 i = 0; i < 32; ++i) r |= static_cast<u32>(i >= a && i - a < b) << i;
      return r;
    });
    return true;
  }
  if (o == "bfind") {
    d.expect_operands(in, 2);
    const bool shift = in.has("shiftamt");
    if (type == "u32") op.exec = bfind_exec<u32>(shift);
    if (type == "s32") op.exec = bfind_exec<i32>(shift);
    if (type == "u64") op.exec = bfind_exec<u64>(shift);
    if (type == "s64") op.exec = bfind_exec<i64>(shift);
    if (op.exec == nullptr) return false;
    d.set(op, {d.result(in.operands[0], "u32")}, {d.source(in.operands[1], type)});
    return true;
  }
  if (o == "fns") {
    d.expect_operands(in, 4);
    d.set(op, {d.result(in.operands[0], "b32")},
          {d.source(in.operands[1], "b32"), d.source(in.operands[2], "u32"), d.source(in.operands[3], "s32")});
    op.exec = exec_of<u32, u32, u32, i32>([](u32 bits, u32 base, i32 n) {
      if (n == 0) return base < 32 && (bits >> base & 1) ? base : ~0u;
      i32 left = std::abs(n);
      for (i64 at = base; at >= 0 && at < 32; at += n > 0 ? 1 : -1)
        if (bits >> at & 1 && --left == 0) return static_cast<u32>(at);
      return ~0u;
    });
    return true;
  }
  if (o == "vabsdiff4") {
    d.expect_operands(in, 4);
    if (in.modifiers != std::vector<std::string>{"u32", "u32", "u32"}) return false;
    d.set(op, {d.result(in.operands[0], "u32")},
          {d.source(in.operands[1], "u32"), d.source(in.operands[2], "u32"), d.source(in.operands[3], "u32")});
    op.exec = exec_of<u32, u32, u32, u32>([](u32 a, u32 b, u32) {
      u32 r = 0;
      for (int i = 0; i < 32; i += 8) {
        const i32 difference = static_cast<i32>(a >> i & 255) - static_cast<i32>(b >> i & 255);
        r |= static_cast<u32>(std::abs(difference)) << i;
      }
      return r;
    });
    return true;
  }
  if (o == "dp2a") {
    d.expect_operands(in, 4);
    if (in.modifiers.size() != 3 || in.modifiers[1] != "u32" || in.modifiers[2] != "u32") return false;
    d.set(op, {d.result(in.operands[0], "b32")},
          {d.source(in.operands[1], "b32"), d.source(in.operands[2], "b32"), d.source(in.operands[3], "b32")});
    op.exec = in.modifiers[0] == "lo" ? exec_of<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) {
      return c + (a & 0xffff) * (b & 255) + (a >> 16) * (b >> 8 & 255);
    })
                                      : exec_of<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) {
                                          return c + (a & 0xffff) * (b >> 16 & 255) + (a >> 16) * (b >> 24);
                                        });
    return true;
  }
  if (o == "dp4a") {
    d.expect_operands(in, 4);
    if (in.modifiers.size() != 2) return false;
    const bool sa = in.modifiers[0] == "s32", sb = in.modifiers[1] == "s32";
    d.set(op, {d.result(in.operands[0], "b32")},
          {d.source(in.operands[1], "b32"), d.source(in.operands[2], "b32"), d.source(in.operands[3], "b32")});
    if (sa && sb)
      op.exec = exec_of<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) {
        for (int i = 0; i < 32; i += 8) c += static_cast<u32>(static_cast<i8>(a >> i) * static_cast<i8>(b >> i));
        return c;
      });
    if (!sa && !sb)
      op.exec = exec_of<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) {
        for (int i = 0; i < 32; i += 8) c += (a >> i & 255) * (b >> i & 255);
        return c;
      });
    return op.exec != nullptr;
  }
  // ---- one result and sources of one type, the shifts' amounts apart
  static const std::set<std::string> shifts = {"shl", "shr"};
  static const std::map<std::string, size_t> sources = {
      {"add", 2},  {"sub", 2},  {"mul", 2}, {"mad", 3},  {"fma", 3},     {"div", 2},   {"rem", 2},
      {"min", 2},  {"max", 2},  {"abs", 1}, {"neg", 1},  {"sad", 3},     {"shl", 2},   {"shr", 2},
      {"bfe", 3},  {"bfi", 4},  {"and", 2}, {"or", 2},   {"xor", 2},     {"not", 1},   {"cnot", 1},
      {"brev", 1}, {"popc", 1}, {"clz", 1}, {"rcp", 1},  {"sqrt", 1},    {"rsqrt", 1}, {"ex2", 1},
      {"lg2", 1},  {"sin", 1},  {"cos", 1}, {"tanh", 1}, {"copysign", 2}};
  const auto count = sources.find(o);
  if (count == sources.end()) return false;
  d.expect_operands(in, count->second + 1);
  if (type == "f32")
    op.exec = in.has("ftz") ? float_exec<true>(in) : float_exec<false>(in);
  else if (type == "f64")
    op.exec = double_exec(in);
  else if (type == "f16" || type == "f16x2")
    op.exec = in.has("ftz") ? nullptr : half_exec<f16>(in, type == "f16x2");
  else if (type == "bf16" || type == "bf16x2")
    op.exec = half_exec<bf16>(in, type == "bf16x2");
  else {
    op.exec = integer_exec(in, type);
    const int bytes = type_bytes(type);
    if (op.exec == nullptr && bytes == 2) op.exec = bit_exec<u16>(o);
    if (op.exec == nullptr && bytes == 4) op.exec = bit_exec<u32>(o);
    if (op.exec == nullptr && bytes == 8) op.exec = bit_exec<u64>(o);
  }
  if (op.exec == nullptr) return false;
  std::string result = type;
  if (in.has("wide")) result = type_bytes(type) == 4 ? "u64" : "u32";
  if (o == "popc" || o == "clz") result = "u32";
  std::vector<Reg> src;
  for (size_t i = 1; i < in.operands.size(); ++i) {
    std::string t = type;
    if ((shifts.count(o) && i == 2) || (o == "bfe" && i >= 2) || (o == "bfi" && i >= 3)) t = "u32";
    if (o == "mad" && i == 3) t = result;
    src.push_back(d.source(in.operands[i], t));
  }
  d.set(op, {d.result(in.operands[0], result)}, src);
  if (o == "and") op.rule = Rule::kAnd;
  if (o == "or") op.rule = Rule::kOr;
  if (o == "shl" && type_bytes(type) >= 4) op.rule = Rule::kShl;
  if (o == "shr" && type_bytes(type) >= 4 && type[0] != 's') op.rule = Rule::kShr;
  op.wide = type_bytes(result) == 8;
  return true;
}

}  // namespace gpusim
