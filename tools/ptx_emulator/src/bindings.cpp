// What Python sees: the list of operations, kernels built from lowered code, memory, and one launch at a time.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "machine.h"

namespace py = pybind11;

namespace emulator {
namespace {

// One row of lowered code: guard, target, wide operands, number of operands, operands.
constexpr int kCodeColumns = 4 + kMaxOperands;
// Operands up to here are there in every instruction; those that it does not have are kNoRow.
constexpr int32_t kFewOperands = 16;
using CodeArray = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

// tracked: entries of all instructions behind each other; tracked_ends: where each instruction's end; moves: per
// instruction, whether it only renames a register.
Kernel make_kernel(const std::vector<std::string>& operations, const CodeArray& code, std::vector<int32_t> tracked,
                   const std::vector<uint32_t>& tracked_ends, const std::vector<bool>& moves, int32_t n_rows,
                   int32_t n_predicates, uint32_t static_shared_end, uint32_t local_bytes,
                   uint32_t registers_per_thread, std::vector<std::pair<int32_t, uint32_t>> constants32,
                   std::vector<std::pair<int32_t, uint64_t>> constants64) {
  const size_t n = operations.size();
  if (code.ndim() != 2 || code.shape(0) != static_cast<py::ssize_t>(n) || code.shape(1) != kCodeColumns ||
      tracked_ends.size() != n || moves.size() != n) {
    throw py::value_error("code must be (" + std::to_string(n) + ", " + std::to_string(kCodeColumns) + ")");
  }
  Kernel kernel;
  kernel.n_rows = n_rows;
  kernel.n_predicates = n_predicates;
  kernel.static_shared_end = static_shared_end;
  kernel.local_bytes = local_bytes;
  kernel.registers_per_thread = registers_per_thread;
  kernel.constants32 = std::move(constants32);
  kernel.constants64 = std::move(constants64);
  kernel.tracked_pool = std::move(tracked);
  const auto cells = code.unchecked<2>();
  const auto kept = [&](size_t i) { return std::max(cells(static_cast<py::ssize_t>(i), 3), kFewOperands); };
  for (size_t i = 0; i < n; ++i) {
    for (int j = 0; j < kept(i); ++j) kernel.operand_pool.push_back(cells(static_cast<py::ssize_t>(i), 4 + j));
  }
  size_t first_operand = 0;
  for (size_t i = 0; i < n; ++i) {
    const auto found = registry().find(operations[i]);
    if (found == registry().end()) throw py::key_error(operations[i]);
    kernel.uses_wgmma |= operations[i].starts_with("wgmma.");
    const auto at = static_cast<py::ssize_t>(i);
    const uint32_t first_tracked = i == 0 ? 0 : tracked_ends[i - 1];
    kernel.code.push_back(
        {found->second.handler, found->second.variant, cells(at, 0), cells(at, 1), static_cast<uint32_t>(cells(at, 2)),
         cells(at, 3), std::span(kernel.operand_pool).subspan(first_operand, kept(i)),
         std::span(kernel.tracked_pool).subspan(first_tracked, tracked_ends[i] - first_tracked), moves[i]});
    first_operand += kept(i);
  }
  return kernel;
}

py::tuple launch_kernel(const Kernel& kernel, GlobalMemory& memory, std::array<uint32_t, 3> grid,
                        std::array<uint32_t, 3> block, uint32_t dynamic_shared_bytes, const py::bytes& parameters,
                        const py::bytes& constants, uint64_t seed, uint32_t concurrent_blocks, uint64_t spin_limit,
                        uint64_t reluctant, bool lists_products, bool lax) {
  const auto as_bytes = [](const py::bytes& data) {
    const std::string text = data;
    return std::vector<uint8_t>(text.begin(), text.end());
  };
  Launch launch{};
  launch.kernel = &kernel;
  launch.options = {grid,       block,     dynamic_shared_bytes, seed, concurrent_blocks,
                    spin_limit, reluctant, lists_products,       lax};
  launch.global = &memory;
  launch.parameters = as_bytes(parameters);
  launch.constants = as_bytes(constants);
  py::object fault = py::none();
  std::unique_ptr<Fault> caught;
  {
    py::gil_scoped_release release;
    try {
      launch.run();
    } catch (const Fault& thrown) {
      caught = std::make_unique<Fault>(thrown);
    }
  }
  if (caught) {
    fault = py::make_tuple(static_cast<int>(caught->kind), caught->message, caught->block, caught->warp, caught->lane,
                           caught->pc);
  }
  py::array_t<uint64_t> counts({launch.counts.size(), size_t{7}});
  auto cells = counts.mutable_unchecked<2>();
  for (size_t i = 0; i < launch.counts.size(); ++i) {
    const InstructionCounts& c = launch.counts[i];
    const uint64_t values[] = {c.warps,          c.threads,   c.requests, c.shared_wavefronts, c.ideal_wavefronts,
                               c.global_sectors, c.bulk_bytes};
    for (int j = 0; j < 7; ++j) cells(static_cast<py::ssize_t>(i), j) = values[j];
  }
  return py::make_tuple(counts, fault, launch.products);
}

}  // namespace

PYBIND11_MODULE(EMULATOR_MODULE, m) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Fault& fault) {
      PyErr_SetString(PyExc_ValueError, fault.message.c_str());
    }
  });
  m.attr("MAX_OPERANDS") = kMaxOperands;
  m.attr("NEGATED_PREDICATE") = kNegatedPredicate;
  m.attr("SHARED_BASE") = kSharedBase;
  m.attr("SPECIAL_ROWS") = static_cast<int>(kSpecialRows);
  m.def("operations", [] {
    std::vector<std::string> names;
    for (const auto& [name, operation] : registry()) names.push_back(name);
    return names;
  });
  m.def("variable_address", [](uint64_t number) { return window_base(kFirstVariableSlot + number); });
  py::class_<Kernel>(m, "Kernel").def(py::init(&make_kernel));
  py::class_<GlobalMemory>(m, "GlobalMemory")
      .def(py::init<>())
      .def("add",
           [](GlobalMemory& self, const std::string& name, uintptr_t data, uint64_t size, bool writable, bool poisoned,
              bool write_once) {
             return self.add(name, reinterpret_cast<uint8_t*>(data), size, writable, poisoned, write_once);
           })
      .def("remove", &GlobalMemory::remove)
      .def("written",
           [](const GlobalMemory& self, uint64_t base) {
             const std::vector<uint8_t>& written = self.written(base);
             return py::bytes(reinterpret_cast<const char*>(written.data()), written.size());
           })
      .def("place_variable",
           [](GlobalMemory& self, size_t number, const std::string& name, uintptr_t data, uint64_t size,
              bool writable) { self.place_variable(number, name, reinterpret_cast<uint8_t*>(data), size, writable); })
      .def("forget_variables", &GlobalMemory::forget_variables);
  m.def("launch", &launch_kernel);
}

}  // namespace emulator
