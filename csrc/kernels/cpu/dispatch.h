// Which instruction sets are compiled in, which this processor runs, and which one is used.
#pragma once

#include <string>
#include <vector>

#include "kernels/cpu/kernels.h"

namespace anchor_attention::cpu {

// The best set that this processor runs, or the one that `ANCHOR_ATTENTION_CPU_ISA` names.
// Throws std::invalid_argument if it names none that runs here.
const Kernels& selected_kernels();

// Names, best first; the last one runs everywhere.
std::vector<std::string> compiled_instruction_sets();
std::vector<std::string> runnable_instruction_sets();

}  // namespace anchor_attention::cpu
