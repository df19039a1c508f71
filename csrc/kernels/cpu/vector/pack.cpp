// Rows of keys and values into the working type and back.
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/vector/rows.h"

namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA {
namespace {

template <typename Storage>
const Storage* source_row(const PackRows& p, int64_t i) {
  const int32_t index = p.indices[i];
  return index < 0 ? nullptr : static_cast<const Storage*>(p.source) + index * p.source_stride;
}

// Row i next to row i + 1, element by element; a row that does not exist is zero. The compiler vectorises loops only if
// there is no branch in them.
ANCHOR_ATTENTION_INLINE void stack_rows(const BFloat16* first, const BFloat16* second, int64_t n, BFloat16* target) {
  if (first != nullptr && second != nullptr) {
    for (int64_t d = 0; d < n; ++d) {
      target[2 * d] = first[d];
      target[2 * d + 1] = second[d];
    }
    return;
  }
  for (int64_t d = 0; d < n; ++d) {
    target[2 * d] = first == nullptr ? BFloat16{} : first[d];
    target[2 * d + 1] = second == nullptr ? BFloat16{} : second[d];
  }
}

template <typename Storage, typename T = Working<Storage>>
void pack_working_rows_of(const PackRows& p) {
  const int64_t stride = row_stride<T>(p.head_dim);
  T* packed = static_cast<T*>(p.packed);
  for (int64_t i = 0; i < p.n_rows; ++i) {
    const Storage* row = source_row<Storage>(p, i);
    if (row == nullptr) {
      std::memset(packed + i * stride, 0, stride * sizeof(T));
    } else {
      widen_row(row, p.head_dim, stride, packed + i * stride);
    }
  }
}

template <typename Storage, typename T = Working<Storage>>
void pack_rows_of(const PackRows& p) {
  using Operand = typename OperandOf<Storage>::Type;
  const int64_t stride = row_stride<T>(p.head_dim);
  if constexpr (kDepth<Operand> == 2) {
    // Either two neighbours of a row make an operand, which is how the row lies in memory, or two rows do.
    BFloat16* packed = static_cast<BFloat16*>(p.packed);
    const int64_t padding_bytes = (stride - p.head_dim) * static_cast<int64_t>(sizeof(BFloat16));
    for (int64_t i = 0; i < p.n_rows; i += 2) {
      const Storage* rows[2] = {source_row<Storage>(p, i), source_row<Storage>(p, i + 1)};
      BFloat16* target = packed + i * stride;
      if (p.layout == PackedLayout::stack) {
        stack_rows(rows[0], rows[1], p.head_dim, target);
        std::memset(target + 2 * p.head_dim, 0, 2 * padding_bytes);
        continue;
      }
      for (const Storage* row : rows) {
        if (row == nullptr) {
          std::memset(target, 0, p.head_dim * sizeof(BFloat16));
        } else {
          std::memcpy(target, row, p.head_dim * sizeof(BFloat16));
        }
        std::memset(target + p.head_dim, 0, padding_bytes);
        target += stride;
      }
    }
  } else {
    pack_working_rows_of<Storage>(p);
  }
}

template <typename Storage, typename T = Working<Storage>>
void unpack_rows_of(const UnpackRows& p) {
  const int64_t row_length = p.packed_row_bytes / static_cast<int64_t>(sizeof(T));
  const T scale = static_cast<T>(p.scale);
  for (int64_t j = 0; j < p.n_tokens; ++j) {
    Storage* target = static_cast<Storage*>(p.target) + j * p.target_stride;
    if (p.indices[j] < 0) {
      std::memset(target, 0, p.head_dim * sizeof(Storage));
      continue;
    }
    const T* row = static_cast<const T*>(p.packed) + p.indices[j] * row_length;
    for (int64_t d = 0; d < p.head_dim; ++d) target[d] = narrow<Storage>(row[d] * scale);
  }
}

template <typename Storage, typename T = Working<Storage>>
void finish_grad_q_of(const FinishGradQ& task) {
  const AttentionBackwardParams& p = *task.params;
  const AttentionParams& f = p.forward;
  const T scale = static_cast<T>(f.scale);
  const bool freqs_shared = f.q_freqs_strides.batch == 0;
  const bool first_of_freqs = task.head == 0 && (!freqs_shared || task.batch == 0);
  constexpr int64_t kPiece = 512;
  T grad[kPiece];
  T x[kPiece];
  for (int64_t token = task.token_begin; token < task.token_end; ++token) {
    const int64_t row = task.batch * f.n_queries + token;
    const T* sums = static_cast<const T*>(task.grad_q) + (token - task.token_begin) * task.grad_q_stride;
    const T* freqs = f.q_freqs == nullptr ? nullptr : freqs_of<T>(f.q_freqs, f.q_freqs_strides, task.batch, token);
    T* grad_freqs = nullptr;
    if (p.grad_q_freqs != nullptr) {
      grad_freqs = static_cast<T*>(p.grad_q_freqs) + (freqs_shared ? token : row) * f.head_dim;
      if (first_of_freqs) std::memset(grad_freqs, 0, f.head_dim * sizeof(T));
    }
    const Storage* q = row_of<Storage>(f.q, f.q_strides, task.batch, token, task.head);
    for (int64_t d = 0; d < f.head_dim; d += kPiece) {
      const int64_t n = f.head_dim - d < kPiece ? f.head_dim - d : kPiece;
      for (int64_t i = 0; i < n; ++i) grad[i] = sums[d + i] * scale;
      if (grad_freqs != nullptr) {
        widen_row(q + d, n, n, x);
        add_freqs_grad(grad, x, n, grad_freqs + d);
      }
      if (p.grad_q == nullptr) continue;
      if (freqs != nullptr) unrotate_row(grad, freqs + d, n, grad);
      Storage* out = static_cast<Storage*>(p.grad_q) + (row * f.heads + task.head) * f.head_dim + d;
      for (int64_t i = 0; i < n; ++i) out[i] = narrow<Storage>(grad[i]);
    }
  }
}

}  // namespace

int64_t tile_queries(ScalarType dtype) {
  return dtype == ScalarType::float64 ? kTileQueries<double> : kTileQueries<float>;
}

int64_t key_alignment(ScalarType dtype) {
  return dispatch(dtype, [](auto storage) -> int64_t { return kDepth<typename OperandOf<decltype(storage)>::Type>; });
}

int64_t packed_row_bytes(int64_t head_dim, ScalarType dtype) {
  return dispatch(dtype, [&](auto storage) -> int64_t {
    using Operand = typename OperandOf<decltype(storage)>::Type;
    return row_stride<Sum<Operand>>(head_dim) / kDepth<Operand> * sizeof(Operand);
  });
}

int64_t sum_row_bytes(int64_t head_dim, ScalarType dtype) {
  return dispatch(dtype, [&](auto storage) -> int64_t {
    using T = Working<decltype(storage)>;
    return row_stride<T>(head_dim) * sizeof(T);
  });
}

void pack_rows(const PackRows& p) {
  dispatch(p.dtype, [&](auto storage) { pack_rows_of<decltype(storage)>(p); });
}

void pack_working_rows(const PackRows& p) {
  dispatch(p.dtype, [&](auto storage) { pack_working_rows_of<decltype(storage)>(p); });
}

void unpack_rows(const UnpackRows& p) {
  dispatch(p.dtype, [&](auto storage) { unpack_rows_of<decltype(storage)>(p); });
}

void finish_grad_q(const FinishGradQ& task) {
  dispatch(task.params->forward.dtype, [&](auto storage) { finish_grad_q_of<decltype(storage)>(task); });
}

}  // namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA
