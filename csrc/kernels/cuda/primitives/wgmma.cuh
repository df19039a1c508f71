// Matrix products of a warpgroup (sm_90a): d (64 × N, float32) += a (64 × 16) · b (16 × N), issued asynchronously.
// Between the issue and the wait that covers it, d and a's registers belong to the tensor cores.
#pragma once

#include <cstdint>

namespace anchor_attention::ptx {

enum class MatrixType { bf16, f16 };

// Which axis of an operand in shared memory is contiguous: the contracted one, or the rows of a / columns of b.
enum class Major : int32_t { contracted = 0, outer = 1 };

template <MatrixType kType>
struct MatrixTypeName;
template <>
struct MatrixTypeName<MatrixType::bf16> {
  static constexpr char kText[] = "bf16";
};
template <>
struct MatrixTypeName<MatrixType::f16> {
  static constexpr char kText[] = "f16";
};

// Operand in shared memory whose rows of 16-byte chunks are permuted as a bulk tensor copy does for rows of
// kSwizzleBytes. `group_stride`: bytes between groups of eight rows; `slab_stride`: between neighbouring slabs of
// kSwizzleBytes along the contiguous axis where that is the outer axis and longer than a slab, elsewhere 0. A slab
// begins at a multiple of eight rows; steps along a contiguous contracted axis add their bytes to `shared`.
template <int kSwizzleBytes>
__device__ inline uint64_t matrix_descriptor(uint32_t shared, uint32_t group_stride, uint32_t slab_stride) {
  static_assert(kSwizzleBytes == 32 || kSwizzleBytes == 64 || kSwizzleBytes == 128, "a swizzle of the hardware");
  constexpr uint64_t kMode = kSwizzleBytes == 128 ? 1 : kSwizzleBytes == 64 ? 2 : 3;
  return kMode << 62 | static_cast<uint64_t>(group_stride >> 4) << 32 |
         static_cast<uint64_t>(slab_stride >> 4 & 0x3fff) << 16 | (shared >> 4 & 0x3fff);
}

// The same operand `bytes` further on in shared memory.
__device__ inline uint64_t advanced(uint64_t descriptor, uint32_t bytes) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + (bytes >> 4);
  return descriptor >> 32 << 32 | low;
}

// Orders earlier accesses to the registers of d and a before the products that follow.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending of the latest groups are under way.
template <int kPending>
__device__ inline void wgmma_wait() {
  static_assert(kPending >= 0 && kPending < 8, "wgmma.wait_group takes 0 … 7");
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Nothing else tells the compiler that the tensor cores use registers between a fence and a wait: accumulators and
// operands pass `keep_order` after they have been computed and before the fence, and accumulators again after the wait.
template <int kCount>
__device__ inline void keep_order(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int kCount>
__device__ inline void keep_order(uint32_t (&operands)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kCount; ++i) asm volatile("" : "+r"(operands[i / 4][i % 4])::"memory");
}

// acc += a · b, or acc = a · b where `accumulate` is false; N is twice the number of registers. With g = lane / 4 and
// t = lane % 4, register 4n + 2r + i of warp w holds row 16w + g + 8r, column 8n + 2t + i.
template <int kColumns>
struct Wgmma;

// Lists of eight operands; an asm statement cannot be unrolled by a template.
#define ANCHOR_ATTENTION_D8(i)                                                                                \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define ANCHOR_ATTENTION_D16(i) ANCHOR_ATTENTION_D8(i), ANCHOR_ATTENTION_D8(i + 8)
#define ANCHOR_ATTENTION_D24(i) ANCHOR_ATTENTION_D16(i), ANCHOR_ATTENTION_D8(i + 16)
#define ANCHOR_ATTENTION_D32(i) ANCHOR_ATTENTION_D16(i), ANCHOR_ATTENTION_D16(i + 16)
#define ANCHOR_ATTENTION_D48(i) ANCHOR_ATTENTION_D32(i), ANCHOR_ATTENTION_D16(i + 32)
#define ANCHOR_ATTENTION_D64(i) ANCHOR_ATTENTION_D32(i), ANCHOR_ATTENTION_D32(i + 32)
#define ANCHOR_ATTENTION_NAMES_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define ANCHOR_ATTENTION_NAMES_24 ANCHOR_ATTENTION_NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define ANCHOR_ATTENTION_NAMES_32 ANCHOR_ATTENTION_NAMES_24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define ANCHOR_ATTENTION_NAMES_48 \
  ANCHOR_ATTENTION_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define ANCHOR_ATTENTION_NAMES_64 \
  ANCHOR_ATTENTION_NAMES_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// Operands after the `count` accumulators are numbered by the caller: o0 = %count, and so on.
#define ANCHOR_ATTENTION_WGMMA(n, count, registers, o0, o1, o2, o3, o4, o5, o6, o7)                                  \
  template <>                                                                                                        \
  struct Wgmma<n> {                                                                                                  \
    template <MatrixType kType, Major kMajorA, Major kMajorB>                                                        \
    static __device__ inline void multiply(float (&d)[count], uint64_t a, uint64_t b, bool accumulate) {             \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " o2                                                            \
                   ", 0;\n"                                                                                          \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." o5 "." o5 " {" ANCHOR_ATTENTION_NAMES_##count   \
                   "}, " o0 ", " o1 ", p, 1, 1, " o3 ", " o4 ";\n}"                                                  \
                   : registers                                                                                       \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kMajorA)),              \
                     "n"(static_cast<int>(kMajorB)), "C"(MatrixTypeName<kType>::kText)                               \
                   : "memory");                                                                                      \
    }                                                                                                                \
    template <MatrixType kType, Major kMajorB>                                                                       \
    static __device__ inline void multiply(float (&d)[count], const uint32_t (&a)[4], uint64_t b, bool accumulate) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " o5                                                            \
                   ", 0;\n"                                                                                          \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." o7 "." o7 " {" ANCHOR_ATTENTION_NAMES_##count   \
                   "}, {" o0 "," o1 "," o2 "," o3 "}, " o4 ", p, 1, 1, " o6 ";\n}"                                   \
                   : registers                                                                                       \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),          \
                     "n"(static_cast<int>(kMajorB)), "C"(MatrixTypeName<kType>::kText)                               \
                   : "memory");                                                                                      \
    }                                                                                                                \
  };

ANCHOR_ATTENTION_WGMMA(32, 16, ANCHOR_ATTENTION_D16(0), "%16", "%17", "%18", "%19", "%20", "%21", "%22", "%23")
ANCHOR_ATTENTION_WGMMA(48, 24, ANCHOR_ATTENTION_D24(0), "%24", "%25", "%26", "%27", "%28", "%29", "%30", "%31")
ANCHOR_ATTENTION_WGMMA(64, 32, ANCHOR_ATTENTION_D32(0), "%32", "%33", "%34", "%35", "%36", "%37", "%38", "%39")
ANCHOR_ATTENTION_WGMMA(96, 48, ANCHOR_ATTENTION_D48(0), "%48", "%49", "%50", "%51", "%52", "%53", "%54", "%55")
ANCHOR_ATTENTION_WGMMA(128, 64, ANCHOR_ATTENTION_D64(0), "%64", "%65", "%66", "%67", "%68", "%69", "%70", "%71")

#undef ANCHOR_ATTENTION_WGMMA
#undef ANCHOR_ATTENTION_NAMES_16
#undef ANCHOR_ATTENTION_NAMES_24
#undef ANCHOR_ATTENTION_NAMES_32
#undef ANCHOR_ATTENTION_NAMES_48
#undef ANCHOR_ATTENTION_NAMES_64
#undef ANCHOR_ATTENTION_D8
#undef ANCHOR_ATTENTION_D16
#undef ANCHOR_ATTENTION_D24
#undef ANCHOR_ATTENTION_D32
#undef ANCHOR_ATTENTION_D48
#undef ANCHOR_ATTENTION_D64

}  // namespace anchor_attention::ptx
