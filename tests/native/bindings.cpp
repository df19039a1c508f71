// The torch-free C++ behind a Python module, for tests only.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "key_ranges.h"

#define ANCHOR_ATTENTION_ISA tested
#include "kernels/cpu/simd.h"

namespace py = pybind11;
using namespace anchor_attention;

namespace {

using Numbers = std::vector<int64_t>;

KeyRangeTable table_of(const Numbers& q_ranges, const Numbers& k_offsets, const Numbers& k_ranges) {
  return make_key_range_table(q_ranges, k_offsets, k_ranges, 1 << 30, 1 << 30);
}

}  // namespace

PYBIND11_MODULE(anchor_attention_native, m) {
  m.def("transpose", [](const Numbers& q_ranges, const Numbers& k_offsets, const Numbers& k_ranges) {
    const TransposedKeyRangeTable out = transpose(table_of(q_ranges, k_offsets, k_ranges).view());
    return std::tuple(out.k_ranges, out.q_offsets, out.q_ranges);
  });
  m.def("area", [](const Numbers& q_ranges, const Numbers& k_offsets, const Numbers& k_ranges) {
    return table_of(q_ranges, k_offsets, k_ranges).area();
  });
  m.def("exp2", [](py::array_t<float> x) {
    py::array_t<float> out(x.size());
    constexpr int kLanes = cpu::tested::kLanes<float>;
    for (py::ssize_t i = 0; i + kLanes <= x.size(); i += kLanes) {
      cpu::tested::store(out.mutable_data() + i, cpu::tested::exp2(cpu::tested::load(x.data() + i)));
    }
    return out;
  });
  m.def("round_trip_16", [](py::array_t<uint16_t> bits, bool bfloat) {
    py::array_t<uint16_t> out(bits.size());
    for (py::ssize_t i = 0; i < bits.size(); ++i) {
      const uint16_t value = bits.data()[i];
      out.mutable_data()[i] =
          bfloat ? cpu::tested::narrow<cpu::tested::BFloat16>(cpu::tested::widen(cpu::tested::BFloat16{value})).bits
                 : cpu::tested::narrow<cpu::tested::Float16>(cpu::tested::widen(cpu::tested::Float16{value})).bits;
    }
    return out;
  });
  m.def("narrow", [](py::array_t<float> x, bool bfloat) {
    py::array_t<uint16_t> out(x.size());
    for (py::ssize_t i = 0; i < x.size(); ++i) {
      out.mutable_data()[i] = bfloat ? cpu::tested::narrow<cpu::tested::BFloat16>(x.data()[i]).bits
                                     : cpu::tested::narrow<cpu::tested::Float16>(x.data()[i]).bits;
    }
    return out;
  });
  m.def("compact_keys", [](const Numbers& q_ranges, const Numbers& k_offsets, const Numbers& k_ranges, int64_t n_keys,
                           std::optional<py::array_t<bool>> mask, int64_t alignment) {
    const KeyRangeTable table = table_of(q_ranges, k_offsets, k_ranges);
    const CompactedKeys out = compact_keys(table.view(), mask ? mask->data() : nullptr, n_keys, alignment);
    return std::tuple(out.source, out.table.q_ranges, out.table.k_offsets, out.table.k_ranges);
  });
}
