// Rotary embedding and its gradients for a run of tokens.
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/vector/rows.h"

namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA {
namespace {

// Rows are rotated in pieces that live in registers and the first-level cache, whatever the head's size.
constexpr int64_t kPiece = 256;

template <typename Storage, typename T = Working<Storage>>
void rope_of(const RopeTokens& task) {
  const RopeParams& p = *task.params;
  T piece[kPiece];
  for (int64_t token = task.token_begin; token < task.token_end; ++token) {
    const T* freqs = freqs_of<T>(p.freqs, p.freqs_strides, task.batch, token);
    Storage* out = static_cast<Storage*>(p.out) + (task.batch * p.tokens + token) * p.heads * p.head_dim;
    for (int64_t head = 0; head < p.heads; ++head, out += p.head_dim) {
      const Storage* x = row_of<Storage>(p.x, p.x_strides, task.batch, token, head);
      for (int64_t d = 0; d < p.head_dim; d += kPiece) {
        const int64_t n = p.head_dim - d < kPiece ? p.head_dim - d : kPiece;
        widen_row(x + d, n, n, piece);
        rotate_row<T>(piece, freqs + d, n, piece);
        for (int64_t i = 0; i < n; ++i) out[d + i] = narrow<Storage>(piece[i]);
      }
    }
  }
}

template <typename Storage, typename T = Working<Storage>>
void rope_backward_of(const RopeBackwardTokens& task) {
  const RopeBackwardParams& p = *task.params;
  const RopeParams& f = p.forward;
  const bool freqs_shared = f.freqs_strides.batch == 0;
  T grad[kPiece];
  T x[kPiece];
  for (int64_t token = task.token_begin; token < task.token_end; ++token) {
    for (int64_t batch = 0; batch < f.batch; ++batch) {
      const T* freqs = freqs_of<T>(f.freqs, f.freqs_strides, batch, token);
      T* grad_freqs = nullptr;
      if (p.grad_freqs != nullptr) {
        grad_freqs = static_cast<T*>(p.grad_freqs) + (freqs_shared ? token : batch * f.tokens + token) * f.head_dim;
        if (!freqs_shared || batch == 0) std::memset(grad_freqs, 0, f.head_dim * sizeof(T));
      }
      for (int64_t head = 0; head < f.heads; ++head) {
        const Storage* grad_out = row_of<Storage>(p.grad_out, p.grad_out_strides, batch, token, head);
        for (int64_t d = 0; d < f.head_dim; d += kPiece) {
          const int64_t n = f.head_dim - d < kPiece ? f.head_dim - d : kPiece;
          widen_row(grad_out + d, n, n, grad);
          if (grad_freqs != nullptr) {
            widen_row(row_of<Storage>(f.x, f.x_strides, batch, token, head) + d, n, n, x);
            add_freqs_grad(grad, x, n, grad_freqs + d);
          }
          if (p.grad_x == nullptr) continue;
          unrotate_row(grad, freqs + d, n, grad);
          Storage* out =
              static_cast<Storage*>(p.grad_x) + ((batch * f.tokens + token) * f.heads + head) * f.head_dim + d;
          for (int64_t i = 0; i < n; ++i) out[i] = narrow<Storage>(grad[i]);
        }
      }
    }
  }
}

}  // namespace

void rope(const RopeTokens& task) {
  dispatch(task.params->dtype, [&](auto storage) { rope_of<decltype(storage)>(task); });
}

void rope_backward(const RopeBackwardTokens& task) {
  dispatch(task.params->forward.dtype, [&](auto storage) { rope_backward_of<decltype(storage)>(task); });
}

}  // namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA
