// One kernel per PTX primitive, for one warp: words in, words out, lane l at index l of each row of 32.
#include <cstdint>

#include "kernels/cuda/primitives/convert.cuh"
#include "kernels/cuda/primitives/cp_async.cuh"
#include "kernels/cuda/primitives/exp2.cuh"
#include "kernels/cuda/primitives/ldmatrix.cuh"
#include "kernels/cuda/primitives/mma.cuh"
#include "kernels/cuda/primitives/ordering.cuh"
#include "kernels/cuda/primitives/shared_memory.cuh"

namespace ptx = anchor_attention::ptx;

namespace {

// in: 4 rows of a, 2 of b, 4 of d; out: 4 rows of d.
template <class Multiply>
__device__ void multiply(const uint32_t* in, uint32_t* out, Multiply mma) {
  uint32_t a[4];
  uint32_t b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = in[32 * i + threadIdx.x];
  for (int i = 0; i < 2; ++i) b[i] = in[32 * (4 + i) + threadIdx.x];
  for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(in[32 * (6 + i) + threadIdx.x]);
  mma(d, a, b);
  for (int i = 0; i < 4; ++i) out[32 * i + threadIdx.x] = __float_as_uint(d[i]);
}

// in: four 8 × 16-byte matrices; out: one row per register.
template <class Load>
__device__ void load_matrices(const uint32_t* in, uint32_t* out, Load load) {
  __shared__ alignas(16) uint32_t tile[128];
  for (int i = 0; i < 4; ++i) tile[32 * i + threadIdx.x] = in[32 * i + threadIdx.x];
  __syncwarp();
  uint32_t r[4];
  load(r, ptx::shared_address(tile) + 16 * threadIdx.x);
  for (int i = 0; i < 4; ++i) out[32 * i + threadIdx.x] = r[i];
}

// in: 16 bytes per lane; out: what kBytes of them became, other bytes as they were (−1). Odd lanes do not read.
template <int kBytes>
__device__ void copy(const uint32_t* in, uint32_t* out) {
  __shared__ alignas(16) uint32_t tile[128];
  for (int i = 0; i < 4; ++i) tile[4 * threadIdx.x + i] = 0xffffffffu;
  __syncwarp();
  ptx::cp_async_or_zero<kBytes>(ptx::shared_address(tile + 4 * threadIdx.x), in + 4 * threadIdx.x,
                                threadIdx.x % 2 == 0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = tile[4 * threadIdx.x + i];
}

}  // namespace

#define KERNEL(name) extern "C" __global__ void __launch_bounds__(32) name(const uint32_t* in, uint32_t* out)

KERNEL(mma_bf16) {
  multiply(in, out, [](auto& d, auto& a, auto& b) { ptx::mma_m16n8k16_bf16(d, a, b); });
}
KERNEL(mma_f16) {
  multiply(in, out, [](auto& d, auto& a, auto& b) { ptx::mma_m16n8k16_f16(d, a, b); });
}
KERNEL(mma_tf32) {
  multiply(in, out, [](auto& d, auto& a, auto& b) { ptx::mma_m16n8k8_tf32(d, a, b); });
}
KERNEL(ldmatrix) {
  load_matrices(in, out, [](auto& r, uint32_t address) { ptx::ldmatrix_x4(r, address); });
}
KERNEL(ldmatrix_transposed) {
  load_matrices(in, out, [](auto& r, uint32_t address) { ptx::ldmatrix_x4_transposed(r, address); });
}
KERNEL(cp_async_4) { copy<4>(in, out); }
KERNEL(cp_async_8) { copy<8>(in, out); }
KERNEL(cp_async_16) { copy<16>(in, out); }
KERNEL(pack_bf16x2) {
  out[threadIdx.x] = ptx::pack_bf16x2(__uint_as_float(in[threadIdx.x]), __uint_as_float(in[32 + threadIdx.x]));
}
KERNEL(pack_f16x2) {
  out[threadIdx.x] = ptx::pack_f16x2(__uint_as_float(in[threadIdx.x]), __uint_as_float(in[32 + threadIdx.x]));
}
KERNEL(bf16_to_float) {
  out[threadIdx.x] = __float_as_uint(ptx::bf16_to_float(static_cast<uint16_t>(in[threadIdx.x])));
}
KERNEL(f16_to_float) { out[threadIdx.x] = __float_as_uint(ptx::f16_to_float(static_cast<uint16_t>(in[threadIdx.x]))); }
KERNEL(round_to_tf32) { out[threadIdx.x] = ptx::round_to_tf32(__uint_as_float(in[threadIdx.x])); }
KERNEL(exp2_approx) { out[threadIdx.x] = __float_as_uint(ptx::exp2_approx(__uint_as_float(in[threadIdx.x]))); }
KERNEL(log2_approx) { out[threadIdx.x] = __float_as_uint(ptx::log2_approx(__uint_as_float(in[threadIdx.x]))); }
KERNEL(exp2_polynomial) { out[threadIdx.x] = __float_as_uint(ptx::exp2_polynomial(__uint_as_float(in[threadIdx.x]))); }
KERNEL(maximum_or_nan) {
  const float maximum = ptx::maximum_or_nan(__uint_as_float(in[threadIdx.x]), __uint_as_float(in[32 + threadIdx.x]));
  out[threadIdx.x] = __float_as_uint(maximum);
}
KERNEL(shared_accesses) {
  __shared__ alignas(16) uint32_t words[256];
  const uint32_t base = ptx::shared_address(words);
  const uint32_t chunk[4] = {in[threadIdx.x], in[32 + threadIdx.x], in[64 + threadIdx.x], in[96 + threadIdx.x]};
  ptx::store_shared(base + 16 * threadIdx.x, chunk);
  ptx::store_shared(base + 512 + 8 * threadIdx.x, __uint_as_float(chunk[0]));
  ptx::store_shared(base + 516 + 8 * threadIdx.x, static_cast<uint16_t>(chunk[1]));
  ptx::store_shared(base + 518 + 8 * threadIdx.x, static_cast<uint16_t>(chunk[1] >> 16));
  __syncwarp();
  const uint32_t other = threadIdx.x ^ 1;
  const float2 pair = ptx::load_shared_float2(base + 512 + 8 * other);
  out[threadIdx.x] = ptx::load_shared(base + 16 * other + 12);
  out[32 + threadIdx.x] = __float_as_uint(pair.x);
  out[64 + threadIdx.x] = __float_as_uint(pair.y);
}
// out: the sum of in, the values before each lane's addition, and a word handed over by release and acquire.
KERNEL(ordering) {
  auto* counter = reinterpret_cast<int32_t*>(out);
  if (threadIdx.x == 0) ptx::store_release(counter, 0);
  __syncwarp();
  out[32 + threadIdx.x] = static_cast<uint32_t>(ptx::fetch_add_relaxed(counter, static_cast<int32_t>(in[threadIdx.x])));
  __syncwarp();
  if (threadIdx.x == 1) ptx::store_release(counter + 64, static_cast<int32_t>(in[0]));
  __syncwarp();
  out[96 + threadIdx.x] = static_cast<uint32_t>(ptx::load_acquire(counter + 64));
}

#undef KERNEL

// For a machine with a GPU: runs `kernel` on copies of host memory. Returns the cudaError_t.
extern "C" int run_kernel(const char* name, const uint32_t* in, uint32_t* out, int n_words) {
  using Kernel = void (*)(const uint32_t*, uint32_t*);
  struct Entry {
    const char* name;
    Kernel kernel;
  };
  const Entry entries[] = {{"mma_bf16", mma_bf16},
                           {"mma_f16", mma_f16},
                           {"mma_tf32", mma_tf32},
                           {"ldmatrix", ldmatrix},
                           {"ldmatrix_transposed", ldmatrix_transposed},
                           {"cp_async_4", cp_async_4},
                           {"cp_async_8", cp_async_8},
                           {"cp_async_16", cp_async_16},
                           {"pack_bf16x2", pack_bf16x2},
                           {"pack_f16x2", pack_f16x2},
                           {"bf16_to_float", bf16_to_float},
                           {"f16_to_float", f16_to_float},
                           {"round_to_tf32", round_to_tf32},
                           {"exp2_approx", exp2_approx},
                           {"log2_approx", log2_approx},
                           {"exp2_polynomial", exp2_polynomial},
                           {"maximum_or_nan", maximum_or_nan},
                           {"shared_accesses", shared_accesses},
                           {"ordering", ordering}};
  for (const Entry& entry : entries) {
    const char* a = entry.name;
    const char* b = name;
    while (*a != '\0' && *a == *b) ++a, ++b;
    if (*a != *b) continue;
    uint32_t* device_words = nullptr;
    cudaMalloc(&device_words, 2 * n_words * sizeof(uint32_t));
    cudaMemcpy(device_words, in, n_words * sizeof(uint32_t), cudaMemcpyHostToDevice);
    entry.kernel<<<1, 32>>>(device_words, device_words + n_words);
    cudaMemcpy(out, device_words + n_words, n_words * sizeof(uint32_t), cudaMemcpyDeviceToHost);
    cudaFree(device_words);
    return static_cast<int>(cudaGetLastError());
  }
  return static_cast<int>(cudaErrorInvalidDeviceFunction);
}
