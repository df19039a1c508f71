// The table of this instruction set's steps.
#include "kernels/cpu/kernel_table.h"

#ifndef ANCHOR_ATTENTION_ISA
#error "compile with -DANCHOR_ATTENTION_ISA=<name of the instruction set>"
#endif

#define ANCHOR_ATTENTION_STRING(name) #name
#define ANCHOR_ATTENTION_NAME(name) ANCHOR_ATTENTION_STRING(name)

namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA {

int64_t tile_queries(ScalarType dtype);
int64_t key_alignment(ScalarType dtype);
int64_t packed_row_bytes(int64_t head_dim, ScalarType dtype);
int64_t sum_row_bytes(int64_t head_dim, ScalarType dtype);
int64_t forward_scratch_bytes(const AttentionParams&);
int64_t backward_scratch_bytes(const AttentionParams&);
void pack_rows(const PackRows&);
void pack_working_rows(const PackRows&);
void unpack_rows(const UnpackRows&);
void forward_tile(const ForwardTile&);
void backward_tile(const BackwardTile&);
void finish_grad_q(const FinishGradQ&);
int64_t jvp_scratch_bytes(const AttentionJvpParams&);
int64_t double_backward_scratch_bytes(const AttentionParams&);
void jvp_tile(const JvpTile&);
void double_backward_tile(const DoubleBackwardTile&);
void rope(const RopeTokens&);
void rope_backward(const RopeBackwardTokens&);

extern const Kernels kKernels{
    .name = ANCHOR_ATTENTION_NAME(ANCHOR_ATTENTION_ISA),
    .products =
        {
            .packing =
                {
                    .key_alignment = key_alignment,
                    .packed_row_bytes = packed_row_bytes,
                    .sum_row_bytes = sum_row_bytes,
                    .pack_rows = pack_rows,
                },
            .forward_tile_queries = [](const AttentionParams& p) { return tile_queries(p.dtype); },
            .backward_tile_queries = tile_queries,
            .forward_scratch_bytes = forward_scratch_bytes,
            .backward_scratch_bytes = backward_scratch_bytes,
            .forward_tile = forward_tile,
            .backward_tile = backward_tile,
        },
    .derivatives =
        {
            .packing =
                {
                    .key_alignment = [](ScalarType) -> int64_t { return 1; },
                    .packed_row_bytes = sum_row_bytes,
                    .sum_row_bytes = sum_row_bytes,
                    .pack_rows = pack_working_rows,
                },
            .tile_queries = tile_queries,
            .jvp_scratch_bytes = jvp_scratch_bytes,
            .double_backward_scratch_bytes = double_backward_scratch_bytes,
            .jvp_tile = jvp_tile,
            .double_backward_tile = double_backward_tile,
        },
    .unpack_rows = unpack_rows,
    .finish_grad_q = finish_grad_q,
    .rope = rope,
    .rope_backward = rope_backward,
};

}  // namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA
