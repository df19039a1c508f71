// Comparisons, predicates and what selects by them.
#include <cmath>
#include <functional>

#include "floating.h"
#include "lanewise.h"

namespace emulator {
namespace {

enum BoolOp : int64_t { kNone, kAnd, kOr, kXor };

Mask combine(int64_t op, Mask a, Mask b) {
  switch (op) {
    case kAnd:
      return a & b;
    case kOr:
      return a | b;
    case kXor:
      return a ^ b;
    default:
      return a;
  }
}

template <class F, class T>
Mask compare(Warp& warp, const Instruction& in, int first) {
  const auto* a = row<T>(warp, in.operand[first]);
  const auto* b = row<T>(warp, in.operand[first + 1]);
  Mask result = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    result |= static_cast<Mask>(F{}(decode<T>(a[lane]), decode<T>(b[lane]))) << lane;
  }
  return result;
}

// Operands: p, q or none, a, b, and the predicate of the boolean operation.
template <class F, class T>
void setp(Warp& warp, const Instruction& in) {
  const Mask holds = compare<F, T>(warp, in, 2);
  const Mask other = in.variant == kNone ? 0 : warp.predicate(in.operand[4]);
  if (in.operand[0] != kNoRow) warp.set_predicate(in.operand[0], combine(in.variant, holds, other));
  if (in.operand[1] != kNoRow) warp.set_predicate(in.operand[1], combine(in.variant, ~holds, other));
}

// Writes `if_true` where a comparison holds.
template <class F, class T, uint32_t if_true>
void set(Warp& warp, const Instruction& in) {
  const Mask holds = compare<F, T>(warp, in, 1);
  const Mask other = in.variant == kNone ? 0 : warp.predicate(in.operand[3]);
  const Mask value = combine(in.variant, holds, other);
  alignas(64) uint32_t result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = value >> lane & 1 ? if_true : 0;
  commit(warp.row32(in.operand[0]), result, warp.exec);
}

template <class T, class F>
void register_comparison(Registry& r, const std::string& comparison, const std::string& type, F) {
  constexpr const char* names[] = {"", ".and", ".or", ".xor"};
  for (int64_t op = kNone; op <= kXor; ++op) {
    r["setp." + comparison + names[op] + type] = {&setp<F, T>, op};
    // The type of the result stands between .ftz and the type of the comparison.
    const size_t last = type.rfind('.');
    const std::string before = "set." + comparison + names[op] + type.substr(0, last);
    r[before + ".u32" + type.substr(last)] = {&set<F, T, 0xffffffff>, op};
    r[before + ".s32" + type.substr(last)] = {&set<F, T, 0xffffffff>, op};
    r[before + ".f32" + type.substr(last)] = {&set<F, T, 0x3f800000>, op};
  }
}

template <class T>
void register_equality(Registry& r, const std::string& type) {
  register_comparison<T>(r, "eq", type, std::equal_to<T>{});
  register_comparison<T>(r, "ne", type, std::not_equal_to<T>{});
}

template <class T>
void register_order(Registry& r, const std::string& type) {
  register_equality<T>(r, type);
  register_comparison<T>(r, "lt", type, std::less<T>{});
  register_comparison<T>(r, "le", type, std::less_equal<T>{});
  register_comparison<T>(r, "gt", type, std::greater<T>{});
  register_comparison<T>(r, "ge", type, std::greater_equal<T>{});
  if constexpr (std::unsigned_integral<T>) {
    register_comparison<T>(r, "lo", type, std::less<T>{});
    register_comparison<T>(r, "ls", type, std::less_equal<T>{});
    register_comparison<T>(r, "hi", type, std::greater<T>{});
    register_comparison<T>(r, "hs", type, std::greater_equal<T>{});
  }
}

template <class T, class F>
void register_float_comparisons(Registry& r, const std::string& type, F) {
  const auto value = [](T a) { return F{}(a); };
  using V = decltype(value);
  register_comparison<T>(r, "eq", type, [](T a, T b) { return V{}(a) == V{}(b); });
  register_comparison<T>(r, "ne", type, [](T a, T b) { return V{}(a) < V{}(b) || V{}(a) > V{}(b); });
  register_comparison<T>(r, "lt", type, [](T a, T b) { return V{}(a) < V{}(b); });
  register_comparison<T>(r, "le", type, [](T a, T b) { return V{}(a) <= V{}(b); });
  register_comparison<T>(r, "gt", type, [](T a, T b) { return V{}(a) > V{}(b); });
  register_comparison<T>(r, "ge", type, [](T a, T b) { return V{}(a) >= V{}(b); });
  register_comparison<T>(r, "equ", type, [](T a, T b) { return !(V{}(a) < V{}(b) || V{}(a) > V{}(b)); });
  register_comparison<T>(r, "neu", type, [](T a, T b) { return !(V{}(a) == V{}(b)); });
  register_comparison<T>(r, "ltu", type, [](T a, T b) { return !(V{}(a) >= V{}(b)); });
  register_comparison<T>(r, "leu", type, [](T a, T b) { return !(V{}(a) > V{}(b)); });
  register_comparison<T>(r, "gtu", type, [](T a, T b) { return !(V{}(a) <= V{}(b)); });
  register_comparison<T>(r, "geu", type, [](T a, T b) { return !(V{}(a) < V{}(b)); });
  register_comparison<T>(r, "num", type, [](T a, T b) { return V{}(a) == V{}(a) && V{}(b) == V{}(b); });
  register_comparison<T>(r, "nan", type, [](T a, T b) { return V{}(a) != V{}(a) || V{}(b) != V{}(b); });
}

template <class T>
void selp(Warp& warp, const Instruction& in) {
  const auto* a = row<T>(warp, in.operand[1]);
  const auto* b = row<T>(warp, in.operand[2]);
  const Mask choice = warp.predicate(in.operand[3]);
  alignas(64) Storage<T> result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = choice >> lane & 1 ? a[lane] : b[lane];
  commit(row<T>(warp, in.operand[0]), result, warp.exec);
}

template <class F>
void predicate_logic(Warp& warp, const Instruction& in) {
  const Mask b = in.n_operands > 2 ? warp.predicate(in.operand[2]) : 0;
  warp.set_predicate(in.operand[0], F{}(warp.predicate(in.operand[1]), b));
}

template <class F>
Operation logic(F) {
  return {&predicate_logic<F>, 0};
}

template <class F>
void testp(Warp& warp, const Instruction& in) {
  const uint32_t* a = warp.row32(in.operand[1]);
  Mask result = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    result |= static_cast<Mask>(F{}(std::bit_cast<float>(a[lane]))) << lane;
  }
  warp.set_predicate(in.operand[0], result);
}

template <class F>
Operation test(F) {
  return {&testp<F>, 0};
}

}  // namespace

void register_predicate(Registry& r) {
  register_order<uint16_t>(r, ".u16");
  register_order<int16_t>(r, ".s16");
  register_order<uint32_t>(r, ".u32");
  register_order<int32_t>(r, ".s32");
  register_order<uint64_t>(r, ".u64");
  register_order<int64_t>(r, ".s64");
  register_equality<uint16_t>(r, ".b16");
  register_equality<uint32_t>(r, ".b32");
  register_equality<uint64_t>(r, ".b64");
  register_float_comparisons<float>(r, ".f32", [](float a) { return a; });
  register_float_comparisons<float>(r, ".ftz.f32", [](float a) { return flush<true>(a); });
  register_float_comparisons<double>(r, ".f64", [](double a) { return a; });
  register_float_comparisons<Half>(r, ".f16", [](Half a) { return to_float(a); });
  register_float_comparisons<Bfloat>(r, ".bf16", [](Bfloat a) { return to_float(a); });
  for (const char* type : {"b16", "u16", "s16"}) r[std::string("selp.") + type] = {&selp<uint16_t>, 0};
  for (const char* type : {"b32", "u32", "s32", "f32"}) r[std::string("selp.") + type] = {&selp<uint32_t>, 0};
  for (const char* type : {"b64", "u64", "s64", "f64"}) r[std::string("selp.") + type] = {&selp<uint64_t>, 0};
  r["and.pred"] = logic([](Mask a, Mask b) { return a & b; });
  r["or.pred"] = logic([](Mask a, Mask b) { return a | b; });
  r["xor.pred"] = logic([](Mask a, Mask b) { return a ^ b; });
  r["not.pred"] = logic([](Mask a, Mask) { return ~a; });
  r["mov.pred"] = logic([](Mask a, Mask) { return a; });
  r["testp.finite.f32"] = test([](float a) { return std::isfinite(a); });
  r["testp.infinite.f32"] = test([](float a) { return std::isinf(a); });
  r["testp.number.f32"] = test([](float a) { return !std::isnan(a); });
  r["testp.notanumber.f32"] = test([](float a) { return std::isnan(a); });
  r["testp.normal.f32"] = test([](float a) { return std::isnormal(a); });
  r["testp.subnormal.f32"] = test([](float a) { return std::fpclassify(a) == FP_SUBNORMAL; });
}

}  // namespace emulator
