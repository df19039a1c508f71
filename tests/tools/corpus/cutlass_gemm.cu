// D (rows, columns) = alpha · A · B + beta · C + a bias per row, by the collectives that CUTLASS builds for Hopper.
// What begins with CASE_ is defined on the command line: types, layouts of A and B, extents of a tile, the schedule of
// its main loop, and the scheduler of tiles. C and D are row-major.

// Products of 48 columns, among others, CuTe has on demand only.
#if CASE_TILE_COLUMNS % 32 != 0
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#endif

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/dispatch_policy.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/gemm/kernel/tile_scheduler.hpp>
#include <numeric>
#include <type_traits>

#include "cutlass_launch.h"

namespace {

using Element = CASE_ELEMENT;
using Output = CASE_OUTPUT;
using Schedule = cutlass::gemm::CASE_SCHEDULE;
using Tile = cute::Shape<cute::Int<CASE_TILE_ROWS>, cute::Int<CASE_TILE_COLUMNS>, cute::Int<CASE_TILE_DEPTH>>;
using OneBlock = cute::Shape<cute::_1, cute::_1, cute::_1>;
using Rows = cutlass::layout::RowMajor;

// Of elements that a bulk copy moves.
template <class T>
constexpr int kAlignment = 16 / sizeof(T);

// Whether two warpgroups share a tile.
constexpr bool kShares = std::is_same_v<Schedule, cutlass::gemm::KernelTmaWarpSpecializedCooperative>;
using OutputTile = cute::Shape<cute::Int<kShares ? 128 : 64>, cute::Int<std::gcd(CASE_TILE_COLUMNS, 32)>>;

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, OneBlock, OutputTile, float, float, Output, Rows,
    kAlignment<Output>, Output, Rows, kAlignment<Output>,
    std::conditional_t<kShares, cutlass::epilogue::TmaWarpSpecializedCooperative,
                       cutlass::epilogue::TmaWarpSpecialized>,
    cutlass::epilogue::fusion::LinCombPerRowBias<Output, float, float, Output, float>>::CollectiveOp;

using MainLoop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::CASE_LAYOUT_A, kAlignment<Element>,
    Element, cutlass::layout::CASE_LAYOUT_B, kAlignment<Element>, float, Tile, OneBlock,
    cutlass::gemm::collective::StageCount<3>, Schedule>::CollectiveOp;

using Gemm = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, MainLoop, Epilogue, CASE_SCHEDULER>;

// Of a matrix without gaps. The stride that is a constant is that of the contiguous axis.
template <class Strides>
Strides packed(int rows, int columns) {
  Strides strides{};
  if constexpr (cute::is_static<std::decay_t<decltype(cute::get<0>(strides))>>::value) {
    cute::get<1>(strides) = rows;
  } else {
    cute::get<0>(strides) = columns;
  }
  cute::get<2>(strides) = 0;
  return strides;
}

// Where the scheduler can share a tile's products among blocks, it does.
template <class Scheduler, class Arguments>
void share_tiles(Arguments& arguments) {
  if constexpr (std::is_same_v<Scheduler, cutlass::gemm::StreamKScheduler>) {
    arguments.decomposition_mode = decltype(arguments.decomposition_mode)::StreamK;
  }
}

}  // namespace

CUTLASS_KERNEL(gemm, Gemm)

// `blocks` of them run at a time. The workspace is of zeros.
extern "C" bool launch_gemm(Launch* launch, int rows, int columns, int depth, int blocks, float alpha, float beta,
                            const Element* a, const Element* b, const Output* c, const float* bias, Output* d,
                            void* workspace, int workspace_bytes) {
  typename Gemm::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = cute::make_shape(rows, columns, depth, 1);
  arguments.mainloop.ptr_A = a;
  arguments.mainloop.dA = packed<typename Gemm::StrideA>(rows, depth);
  arguments.mainloop.ptr_B = b;
  arguments.mainloop.dB = packed<typename Gemm::StrideB>(columns, depth);
  arguments.epilogue.thread.alpha = alpha;
  arguments.epilogue.thread.beta = beta;
  arguments.epilogue.thread.bias_ptr = bias;
  arguments.epilogue.ptr_C = c;
  arguments.epilogue.dC = packed<typename Gemm::StrideC>(rows, columns);
  arguments.epilogue.ptr_D = d;
  arguments.epilogue.dD = packed<typename Gemm::StrideD>(rows, columns);
  arguments.hw_info.sm_count = blocks;
  share_tiles<CASE_SCHEDULER>(arguments.scheduler);
  if (Gemm::get_workspace_size(arguments) > static_cast<std::size_t>(workspace_bytes)) return false;
  return describe<Gemm>(arguments, workspace, launch);
}
