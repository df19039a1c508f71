// The torch-free C++ behind a Python module, for tests only.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "key_ranges.h"

#define ANCHOR_ATTENTION_ISA tested
#include "kernels/cpu/vector/simd.h"
#include "tile_model.h"

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
  // C + A · B on tiles 0, 1, 2 of the given shapes, loaded from and stored to arrays of 16 × 64 bytes; `operands` are
  // the numbers of the tiles that the product names.
  m.def("tile_multiply_add",
        [](const std::array<int, 3>& rows, const std::array<int, 3>& row_bytes, const std::array<int, 3>& operands,
           py::array_t<float> c, py::array_t<uint16_t> a, py::array_t<uint16_t> b) {
          cpu::TileConfig config;
          for (int tile = 0; tile < 3; ++tile) {
            config.rows[tile] = static_cast<uint8_t>(rows[tile]);
            config.row_bytes[tile] = static_cast<uint16_t>(row_bytes[tile]);
          }
          tile_model::configure(config);
          tile_model::load(0, c.data(), 64);
          tile_model::load(1, a.data(), 64);
          tile_model::load(2, b.data(), 64);
          tile_model::multiply_add(operands[0], operands[1], operands[2]);
          py::array_t<float> out({16, 16});
          std::fill_n(out.mutable_data(), out.size(), 0.0f);
          tile_model::store(0, out.mutable_data(), 64);
          tile_model::release();
          return out;
        });
  m.def("use_unconfigured_tile", [] {
    tile_model::release();
    tile_model::zero(0);
  });
  m.def("compact_keys", [](const Numbers& q_ranges, const Numbers& k_offsets, const Numbers& k_ranges,
                           std::optional<py::array_t<bool>> mask, int64_t alignment) {
    const KeyRangeTable table = table_of(q_ranges, k_offsets, k_ranges);
    const CompactedKeys out = compact_keys(table.view(), mask ? mask->data() : nullptr, alignment);
    return std::tuple(out.source, out.first_copy, out.table.q_ranges, out.table.k_offsets, out.table.k_ranges);
  });
  m.def("count_readers", [](const Numbers& q_ranges, const Numbers& k_offsets, const Numbers& k_ranges) {
    std::vector<std::array<int64_t, 3>> readers;
    for (const KeyReaders& r : count_readers(table_of(q_ranges, k_offsets, k_ranges).view())) {
      readers.push_back({r.begin, r.end, r.n_queries});
    }
    return readers;
  });
}
