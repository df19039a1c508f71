// What a launch of one of CUTLASS's kernels consists of, found without a driver.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <cstring>

// Stands where a tensor map would: what the driver was to make it of. cutlass_programs.py reads it.
struct TensorMapArguments {
  char mark[8] = {'t', 'i', 'l', 'e', 'd', 'm', 'a', 'p'};
  std::uint64_t unused;  // For drivers before CUDA 13.2, CUTLASS clears a bit of a map's second word.
  std::uint64_t address;
  std::uint64_t dims[5];
  std::uint64_t strides[4];
  std::uint16_t box[5];
  std::uint8_t element_strides[5];
  std::uint8_t data_type;
  std::uint8_t rank;
  std::uint8_t interleave;
  std::uint8_t swizzle;
  std::uint8_t l2_promotion;
  std::uint8_t oob_fill;
};
static_assert(sizeof(TensorMapArguments) <= sizeof(CUtensorMap));

// The host code of a kernel finds this one before the driver's.
extern "C" CUresult CUDAAPI cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType data_type, cuuint32_t rank,
                                                   void* address, const cuuint64_t* dims, const cuuint64_t* strides,
                                                   const cuuint32_t* box, const cuuint32_t* element_strides,
                                                   CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                                   CUtensorMapL2promotion l2_promotion,
                                                   CUtensorMapFloatOOBfill oob_fill) {
  TensorMapArguments arguments{};
  arguments.address = reinterpret_cast<std::uintptr_t>(address);
  for (cuuint32_t axis = 0; axis < rank; ++axis) {
    arguments.dims[axis] = dims[axis];
    if (axis + 1 < rank) arguments.strides[axis] = strides[axis];
    arguments.box[axis] = static_cast<std::uint16_t>(box[axis]);
    arguments.element_strides[axis] = static_cast<std::uint8_t>(element_strides[axis]);
  }
  arguments.data_type = static_cast<std::uint8_t>(data_type);
  arguments.rank = static_cast<std::uint8_t>(rank);
  arguments.interleave = static_cast<std::uint8_t>(interleave);
  arguments.swizzle = static_cast<std::uint8_t>(swizzle);
  arguments.l2_promotion = static_cast<std::uint8_t>(l2_promotion);
  arguments.oob_fill = static_cast<std::uint8_t>(oob_fill);
  std::memset(map, 0, sizeof *map);
  std::memcpy(map, &arguments, sizeof arguments);
  return CUDA_SUCCESS;
}

// The same fields as `Launch` of cutlass_programs.py.
struct Launch {
  std::int32_t grid[3];
  std::int32_t block[3];
  std::int32_t shared_bytes;
  std::int32_t parameter_bytes;
  unsigned char parameters[4096];
};

// Fills in a launch; false where the kernel cannot compute what the arguments ask for.
template <class Kernel>
bool describe(const typename Kernel::Arguments& arguments, void* workspace, Launch* launch) {
  if (!Kernel::can_implement(arguments)) return false;
  const auto parameters = Kernel::to_underlying_arguments(arguments, workspace);
  static_assert(sizeof parameters <= sizeof launch->parameters);
  const dim3 grid = Kernel::get_grid_shape(parameters);
  const dim3 block = Kernel::get_block_shape();
  *launch = {};
  launch->grid[0] = static_cast<std::int32_t>(grid.x);
  launch->grid[1] = static_cast<std::int32_t>(grid.y);
  launch->grid[2] = static_cast<std::int32_t>(grid.z);
  launch->block[0] = static_cast<std::int32_t>(block.x);
  launch->block[1] = static_cast<std::int32_t>(block.y);
  launch->block[2] = static_cast<std::int32_t>(block.z);
  launch->shared_bytes = Kernel::SharedStorageSize;
  launch->parameter_bytes = sizeof parameters;
  std::memcpy(launch->parameters, &parameters, sizeof parameters);
  return true;
}

// The kernel `name` of a type that computes `Kernel`.
#define CUTLASS_KERNEL(name, Kernel)                                                                           \
  extern "C" __global__ void __launch_bounds__(Kernel::MaxThreadsPerBlock, Kernel::MinBlocksPerMultiprocessor) \
      name(const __grid_constant__ typename Kernel::Params parameters) {                                       \
    extern __shared__ __align__(1024) char shared_memory[];                                                    \
    Kernel kernel;                                                                                             \
    kernel(parameters, shared_memory);                                                                         \
  }
