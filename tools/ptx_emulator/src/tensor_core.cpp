// mma.sync: D = A·B + C on the fragments of a warp.
//
// Products are exact. Groups of them are added to the accumulator and the sum is cut to float32 toward zero, which is
// what the hardware was measured to do (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores",
// 2021); the few bits that its adder drops before that are kept here.
#include <bit>

#include "floating.h"

namespace emulator {
namespace {

float truncated(double x) {
  const float nearest = static_cast<float>(x);
  const bool away = std::abs(static_cast<double>(nearest)) > std::abs(x) && !std::isinf(nearest);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(nearest) - (away ? 1 : 0));
}

struct Tf32 {
  static constexpr int kPerRegister = 1;
  static constexpr int kGroup = 4;
  // The hardware ignores the 13 low bits.
  static float part(uint32_t bits, int) { return std::bit_cast<float>(bits & ~uint32_t{0x1fff}); }
};

template <class T>
struct Sixteen {
  static constexpr int kPerRegister = 2;
  static constexpr int kGroup = 8;
  static float part(uint32_t bits, int i) { return to_float(T{static_cast<uint16_t>(bits >> 16 * i)}); }
};

constexpr int kRows = 16;
constexpr int kColumns = 8;
using Row = double __attribute__((vector_size(kColumns * sizeof(double))));

// Operands: D, A, B, C. Lane l holds of A the rows l/4 and l/4 + 8, alternating by register, of B the column l/4, and
// of each the elements along K that begin at (l mod 4)·kPerRegister, a new group of columns every four lanes' width.
template <class Type, int K, bool HalfAccumulator>
void multiply(Warp& warp, const Instruction& in) {
  if (!warp.converge(kFullMask)) return;
  constexpr int kWidth = 4 * Type::kPerRegister;  // elements along K that one register of the 4 lanes covers
  constexpr int kSteps = K / kWidth;
  constexpr int kAccumulators = HalfAccumulator ? 2 : 4;
  double a[kRows][K];
  Row b[K];
  Row sum[kRows];
  const int32_t* rows_d = in.operand.data();
  const int32_t* rows_a = rows_d + kAccumulators;
  const int32_t* rows_b = rows_a + 2 * kSteps;
  const int32_t* rows_c = rows_b + kSteps;
  for (int step = 0; step < kSteps; ++step) {
    const uint32_t* low = warp.row32(rows_a[2 * step]);
    const uint32_t* high = warp.row32(rows_a[2 * step + 1]);
    const uint32_t* column = warp.row32(rows_b[step]);
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < Type::kPerRegister; ++i) {
        const int k = step * kWidth + lane % 4 * Type::kPerRegister + i;
        a[lane / 4][k] = Type::part(low[lane], i);
        a[lane / 4 + 8][k] = Type::part(high[lane], i);
        b[k][lane / 4] = Type::part(column[lane], i);
      }
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      float element;
      if constexpr (HalfAccumulator) {
        element = to_float(Half{static_cast<uint16_t>(warp.row32(rows_c[i / 2])[lane] >> 16 * (i % 2))});
      } else {
        element = std::bit_cast<float>(warp.row32(rows_c[i])[lane]);
      }
      sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = element;
    }
  }
  for (int first = 0; first < K; first += Type::kGroup) {
    for (int k = first; k < first + Type::kGroup; ++k) {
      for (int row = 0; row < kRows; ++row) sum[row] += a[row][k] * b[k];
    }
    for (Row& row : sum) {
      for (int column = 0; column < kColumns; ++column) row[column] = truncated(row[column]);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; i += 2) {
      const Row& row = sum[lane / 4 + i / 2 * 8];
      const double pair[] = {row[lane % 4 * 2], row[lane % 4 * 2 + 1]};
      if constexpr (HalfAccumulator) {
        warp.row32(rows_d[i / 2])[lane] =
            static_cast<uint32_t>(from_double<Half>(pair[1]).bits) << 16 | from_double<Half>(pair[0]).bits;
      } else {
        warp.row32(rows_d[i])[lane] = std::bit_cast<uint32_t>(canonical(static_cast<float>(pair[0])));
        warp.row32(rows_d[i + 1])[lane] = std::bit_cast<uint32_t>(canonical(static_cast<float>(pair[1])));
      }
    }
  }
}

}  // namespace

void register_tensor_core(Registry& r) {
  const std::string prefix = "mma.sync.aligned.m16n8k";
  r[prefix + "16.row.col.f32.bf16.bf16.f32"] = {&multiply<Sixteen<Bfloat>, 16, false>, 0};
  r[prefix + "8.row.col.f32.bf16.bf16.f32"] = {&multiply<Sixteen<Bfloat>, 8, false>, 0};
  r[prefix + "16.row.col.f32.f16.f16.f32"] = {&multiply<Sixteen<Half>, 16, false>, 0};
  r[prefix + "8.row.col.f32.f16.f16.f32"] = {&multiply<Sixteen<Half>, 8, false>, 0};
  r[prefix + "16.row.col.f16.f16.f16.f16"] = {&multiply<Sixteen<Half>, 16, true>, 0};
  r[prefix + "8.row.col.f16.f16.f16.f16"] = {&multiply<Sixteen<Half>, 8, true>, 0};
  r[prefix + "8.row.col.f32.tf32.tf32.f32"] = {&multiply<Tf32, 8, false>, 0};
  r[prefix + "4.row.col.f32.tf32.tf32.f32"] = {&multiply<Tf32, 4, false>, 0};
}

}  // namespace emulator
