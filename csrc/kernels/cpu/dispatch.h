// Which instruction sets are compiled in, which of them this processor can run, and which one is used.
#pragma once

#include <string>
#include <vector>

#include "kernels/cpu/kernel_table.h"

namespace anchor_attention::cpu {

// The steps of the best set that this processor can run, or of the one that `ANCHOR_ATTENTION_CPU_ISA` names: those on
// the set's vectors, and those that its matrix unit may do instead.
// Throw std::invalid_argument if the variable names no set that runs here.
const Kernels& selected_kernels();
const ProductKernels& selected_products(ScalarType dtype, bool allow_split_float32);
const char* selected_instruction_set();

// Names, best first; the last one runs everywhere.
std::vector<std::string> compiled_instruction_sets();
std::vector<std::string> runnable_instruction_sets();

}  // namespace anchor_attention::cpu
