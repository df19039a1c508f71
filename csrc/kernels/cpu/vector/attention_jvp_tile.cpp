// Values and tangents of one tile of queries, queries in the vectors' lanes as in the forward. Along (a, b, c):
//   T = scale · (K a + B q)        W = P · (T − reference)        out' = V W + C P − mean(W) · out        lse' =
//   mean(T)
// The reference is one number for each row, on which the result does not depend: without it, the part of T that all
// keys share would be subtracted only after summation. It is the mean of T over the row's first chunk.
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/vector/outer_product.h"
#include "kernels/cpu/vector/rows.h"
#include "kernels/cpu/vector/softmax.h"

namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA {
namespace {

template <typename T>
struct JvpScratch {
  JvpScratch(void* base, const AttentionJvpParams& params, int64_t n_tangents) : scratch(base) {
    const AttentionParams& p = params.forward;
    const int64_t n = n_tangents, queries = kTileQueries<T>;
    const int64_t stride = row_stride<T>(p.head_dim), value_stride = row_stride<T>(p.value_dim);
    rows = scratch.take<T>(queries * (stride > value_stride ? stride : value_stride));
    out_rows = scratch.take<T>(queries * value_stride);
    q_panel = scratch.take<T>(p.head_dim * queries);
    q_scaled_panel = scratch.take<T>(params.k_tangents.data == nullptr ? 0 : p.head_dim * queries);
    q_tangent_panels = scratch.take<T>(params.q_tangents.data == nullptr ? 0 : n * p.head_dim * queries);
    out_panel = scratch.take<T>(p.value_dim * queries);
    out_tangent_panels = scratch.take<T>(n * p.value_dim * queries);
    scores = scratch.take<T>(kChunkKeys * kStripColumns<T>);
    tangent_scores = scratch.take<T>(kChunkKeys * kStripColumns<T>);
    chunk_max = scratch.take<T>(kStripColumns<T>);
    correction = scratch.take<T>(kStripColumns<T>);
    row_max = scratch.take<T>(queries);
    row_sum = scratch.take<T>(queries);
    reference = scratch.take<T>(n * queries);
    residual = scratch.take<T>(n * queries);
  }

  Scratch scratch;
  T* rows;                // [tile_queries, stride head_dim or value_dim]
  T* out_rows;            // [tile_queries, stride_value_dim], the outputs
  T* q_panel;             // [strips, head_dim, strip_columns]
  T* q_scaled_panel;      // the same, times scale
  T* q_tangent_panels;    // [n_tangents, strips, head_dim, strip_columns], times scale
  T* out_panel;           // [strips, value_dim, strip_columns], not yet divided by row_sum
  T* out_tangent_panels;  // [n_tangents, strips, value_dim, strip_columns], likewise
  T* scores;              // [chunk_keys, strip_columns], without scale; then probabilities
  T* tangent_scores;      // [chunk_keys, strip_columns]; then W
  T* chunk_max;           // [strip_columns]
  T* correction;          // [strip_columns], what the earlier sums are multiplied by
  T* row_max;             // [tile_queries], in units of log 2; of rows whose lse is known: lse
  T* row_sum;             // [tile_queries]
  T* reference;           // [n_tangents, tile_queries]
  T* residual;            // [n_tangents, tile_queries], sums of W
};

template <typename T>
struct StoreKnownProbabilities {
  const JvpScratch<T>& s;
  const T* lse;  // of the strip
  T factor;

  template <int kRows, int kVectors>
  ANCHOR_ATTENTION_INLINE void operator()(const Block<kRows, kVectors, T>& block, int64_t row, int64_t) const {
    for (int j = 0; j < kVectors; ++j) {
      const Vector<T> normaliser = load(lse + j * kLanes<T>);
      for (int i = 0; i < kRows; ++i) {
        store(s.scores + (row + i) * kStripColumns<T> + j * kLanes<T>, exp2(block.value[i][j] * factor - normaliser));
      }
    }
  }
};

template <typename T>
struct StoreBlock {
  T* target;

  template <int kRows, int kVectors>
  ANCHOR_ATTENTION_INLINE void operator()(const Block<kRows, kVectors, T>& block, int64_t row, int64_t) const {
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kVectors; ++j) {
        store(target + (row + i) * kStripColumns<T> + j * kLanes<T>, block.value[i][j]);
      }
    }
  }
};

// Turns the tangents of a chunk's scores into W, in place, and sums it. `first`: the row's first chunk.
template <typename T>
static ANCHOR_ATTENTION_NOINLINE void weight_tangents(const JvpScratch<T>& s, int64_t n_keys, int64_t vectors,
                                                      T* row_reference, T* row_residual, bool first) {
  constexpr int64_t kStride = kStripColumns<T>;
  for (int64_t column = 0; column < vectors * kLanes<T>; column += kLanes<T>) {
    const T* probabilities = s.scores + column;
    T* tangents = s.tangent_scores + column;
    if (first) {
      // A chunk whose probabilities are all 0 has a mean, too.
      const Vector<T> kLeast = splat(static_cast<T>(0x1p-60));
      Vector<T> weights{}, sum{};
      for (int64_t key = 0; key < n_keys; ++key) {
        const Vector<T> weight = maximum(load(probabilities + key * kStride), kLeast);
        sum += weight * load(tangents + key * kStride);
        weights += weight;
      }
      store(row_reference + column, sum / weights);
    }
    const Vector<T> reference = load(row_reference + column);
    Vector<T> sums[2]{};
    int64_t key = 0;
    for (; key + 2 <= n_keys; key += 2) {
      for (int i = 0; i < 2; ++i) {
        T* at = tangents + (key + i) * kStride;
        const Vector<T> weighted = load(probabilities + (key + i) * kStride) * (load(at) - reference);
        store(at, weighted);
        sums[i] += weighted;
      }
    }
    if (key < n_keys) {
      T* at = tangents + key * kStride;
      const Vector<T> weighted = load(probabilities + key * kStride) * (load(at) - reference);
      store(at, weighted);
      sums[0] += weighted;
    }
    const Vector<T> earlier = load(row_residual + column) * load(s.correction + column);
    store(row_residual + column, earlier + (sums[0] + sums[1]));
  }
}

template <typename T>
ANCHOR_ATTENTION_INLINE void multiply_rows(T* rows, int64_t n, T factor) {
  for (int64_t i = 0; i < n; ++i) rows[i] *= factor;
}

template <typename Storage, typename T = Working<Storage>>
ANCHOR_ATTENTION_INLINE void begin_tile(const JvpTile& tile, const JvpScratch<T>& s) {
  const AttentionJvpParams& params = *tile.params;
  const AttentionParams& p = params.forward;
  constexpr int64_t kQueries = kTileQueries<T>;
  const int64_t stride = row_stride<T>(p.head_dim);
  const T factor = static_cast<T>(p.scale < 0 ? -p.scale : p.scale);
  load_queries<Storage>(p, tile.batch, tile.head, tile.q_begin, tile.n_queries, stride, s.rows);
  // As in the forward, the sign of the scale goes into the queries.
  if (p.scale < 0) multiply_rows(s.rows, tile.n_queries * stride, T(-1));
  to_panel(s.rows, tile.n_queries, stride, p.head_dim, s.q_panel);
  if (params.k_tangents.data != nullptr) {
    multiply_rows(s.rows, tile.n_queries * stride, factor);
    to_panel(s.rows, tile.n_queries, stride, p.head_dim, s.q_scaled_panel);
  }
  for (int64_t t = 0; params.q_tangents.data != nullptr && t < tile.n_tangents; ++t) {
    const Storage* data =
        static_cast<const Storage*>(params.q_tangents.data) + (tile.first_tangent + t) * params.q_tangents.stride;
    load_rows<Storage>(data, params.q_tangents.strides, tile.batch, tile.head, tile.q_begin, tile.n_queries, p.head_dim,
                       stride, s.rows);
    multiply_rows(s.rows, tile.n_queries * stride, static_cast<T>(p.scale));
    to_panel(s.rows, tile.n_queries, stride, p.head_dim, s.q_tangent_panels + t * p.head_dim * kQueries);
  }
  std::memset(s.out_panel, 0, p.value_dim * kQueries * sizeof(T));
  std::memset(s.out_tangent_panels, 0, tile.n_tangents * p.value_dim * kQueries * sizeof(T));
  std::memset(s.reference, 0, tile.n_tangents * kQueries * sizeof(T));
  std::memset(s.residual, 0, tile.n_tangents * kQueries * sizeof(T));
  const T* lse = static_cast<const T*>(p.lse) + (tile.batch * p.heads + tile.head) * p.n_queries + tile.q_begin;
  for (int64_t i = 0; i < kQueries; ++i) {
    // A finite start, and a known lse of +inf for rows without keys: see the forward and the backward.
    s.row_max[i] = static_cast<T>(-1e38);
    s.row_sum[i] = 0;
    if (!params.knows_value) continue;
    const bool has_keys = i < tile.n_queries && lse[i] != -kInfinity<T>;
    s.row_max[i] = has_keys ? static_cast<T>(lse[i] * kLog2E) : kInfinity<T>;
    s.row_sum[i] = has_keys ? T(1) : T(0);
  }
  for (int64_t column = 0; column < kStripColumns<T>; ++column) s.correction[column] = 1;
}

template <typename Storage, typename T = Working<Storage>>
ANCHOR_ATTENTION_INLINE void store_outputs(const JvpTile& tile, const JvpScratch<T>& s) {
  const AttentionJvpParams& params = *tile.params;
  const AttentionParams& p = params.forward;
  const int64_t stride = row_stride<T>(p.value_dim), out_stride = p.heads * p.value_dim;
  const int64_t first_out = (tile.batch * p.n_queries + tile.q_begin) * out_stride + tile.head * p.value_dim;
  const int64_t first_lse = (tile.batch * p.heads + tile.head) * p.n_queries + tile.q_begin;
  Storage* out = static_cast<Storage*>(p.out) + first_out;
  const auto store_rows = [&](const T* rows, Storage* target) {
    for (int64_t i = 0; i < tile.n_queries; ++i) {
      for (int64_t d = 0; d < p.value_dim; ++d) target[i * out_stride + d] = narrow<Storage>(rows[i * stride + d]);
    }
  };
  if (params.knows_value) {
    for (int64_t i = 0; i < tile.n_queries; ++i) {
      widen_row(out + i * out_stride, p.value_dim, stride, s.out_rows + i * stride);
    }
  } else {
    from_panel(s.out_panel, s.row_sum, tile.n_queries, p.value_dim, stride, s.out_rows);
    if (tile.first_tangent == 0) {
      store_rows(s.out_rows, out);
      T* lse = static_cast<T*>(p.lse) + first_lse;
      for (int64_t i = 0; i < tile.n_queries; ++i) {
        lse[i] = static_cast<T>((s.row_max[i] + log2(s.row_sum[i])) * kLn2);
      }
    }
  }
  for (int64_t t = 0; t < tile.n_tangents; ++t) {
    const int64_t tangent = tile.first_tangent + t;
    T* lse_tangents = static_cast<T*>(params.lse_tangents) + tangent * p.batch * p.heads * p.n_queries + first_lse;
    from_panel(s.out_tangent_panels + t * p.value_dim * kTileQueries<T>, s.row_sum, tile.n_queries, p.value_dim, stride,
               s.rows);
    for (int64_t i = 0; i < tile.n_queries; ++i) {
      const T sum = s.row_sum[i];
      const T mean = sum == 0 ? T(0) : s.residual[t * kTileQueries<T> + i] / sum;
      lse_tangents[i] = sum == 0 ? T(0) : s.reference[t * kTileQueries<T> + i] + mean;
      for (int64_t d = 0; d < p.value_dim; ++d) s.rows[i * stride + d] -= mean * s.out_rows[i * stride + d];
    }
    store_rows(s.rows,
               static_cast<Storage*>(params.out_tangents) + tangent * p.batch * p.n_queries * out_stride + first_out);
  }
}

template <typename Storage, typename T = Working<Storage>>
void jvp_tile_of(const JvpTile& tile) {
  const AttentionJvpParams& params = *tile.params;
  const AttentionParams& p = params.forward;
  const JvpScratch<T> s(tile.scratch, params, tile.n_tangents);
  const int64_t stride = row_stride<T>(p.head_dim), value_stride = row_stride<T>(p.value_dim);
  const int64_t columns = round_up_to_lanes<T>(tile.n_queries);
  const T factor = static_cast<T>((p.scale < 0 ? -p.scale : p.scale) * kLog2E);
  begin_tile<Storage>(tile, s);

  constexpr int64_t kStrip = kStripColumns<T>;
  const Rows<T> probabilities{s.scores, kStrip}, weighted{s.tangent_scores, kStrip};
  bool first_chunk = true;
  for (int64_t r = 0; r < tile.n_key_ranges; ++r) {
    const int64_t range_end = tile.key_ranges[2 * r + 1];
    for (int64_t key = tile.key_ranges[2 * r]; key < range_end; key += kChunkKeys) {
      const int64_t n_keys = range_end - key < kChunkKeys ? range_end - key : kChunkKeys;
      const auto rows_of = [&](const void* rows, int64_t tangent) {
        return Broadcast<T>{static_cast<const T*>(rows) + (tangent * tile.tangent_rows + key) * stride, stride, 1};
      };
      const auto columns_of = [&](const void* rows, int64_t tangent) {
        return Broadcast<T>{static_cast<const T*>(rows) + (tangent * tile.tangent_rows + key) * value_stride, 1,
                            value_stride};
      };
      for (int64_t strip = 0; strip < columns; strip += kStrip) {
        const int64_t vectors = (columns - strip < kStrip ? columns - strip : kStrip) / kLanes<T>;
        const Rows<T> q_strip{s.q_panel + strip * p.head_dim, kStrip};
        if (params.knows_value) {
          strip_product(vectors, n_keys, p.head_dim, rows_of(tile.k_rows, 0), q_strip, strip,
                        StoreKnownProbabilities<T>{s, s.row_max + strip, factor});
        } else {
          for (int64_t column = 0; column < kStrip; column += kLanes<T>) {
            store(s.chunk_max + column, splat(-kInfinity<T>));
          }
          strip_product(vectors, n_keys, p.head_dim, rows_of(tile.k_rows, 0), q_strip, strip,
                        StoreScores<T>{s.scores, s.chunk_max});
          online_softmax<T>(s, n_keys, vectors, strip, factor);
          strip_product(vectors, p.value_dim, n_keys, columns_of(tile.v_rows, 0), probabilities, strip,
                        RescaleAndAdd<T>{s.out_panel + strip * p.value_dim, s.correction});
        }
        for (int64_t t = 0; t < tile.n_tangents; ++t) {
          T* const out_strip = s.out_tangent_panels + t * p.value_dim * kTileQueries<T> + strip * p.value_dim;
          const bool moves_scores = params.q_tangents.data != nullptr || tile.k_tangent_rows != nullptr;
          if (params.q_tangents.data != nullptr) {
            const T* panel = s.q_tangent_panels + t * p.head_dim * kTileQueries<T> + strip * p.head_dim;
            strip_product(vectors, n_keys, p.head_dim, rows_of(tile.k_rows, 0), Rows<T>{panel, kStrip}, strip,
                          StoreBlock<T>{s.tangent_scores});
          }
          if (tile.k_tangent_rows != nullptr) {
            const Rows<T> scaled{s.q_scaled_panel + strip * p.head_dim, kStrip};
            const Broadcast<T> rows = rows_of(tile.k_tangent_rows, t);
            if (params.q_tangents.data == nullptr) {
              strip_product(vectors, n_keys, p.head_dim, rows, scaled, strip, StoreBlock<T>{s.tangent_scores});
            } else {
              strip_product(vectors, n_keys, p.head_dim, rows, scaled, 0, AddTo<T>{s.tangent_scores, kStrip});
            }
          }
          if (moves_scores) {
            const int64_t at = t * kTileQueries<T> + strip;
            weight_tangents(s, n_keys, vectors, s.reference + at, s.residual + at, first_chunk);
            strip_product(vectors, p.value_dim, n_keys, columns_of(tile.v_rows, 0), weighted, strip,
                          RescaleAndAdd<T>{out_strip, s.correction});
          }
          if (tile.v_tangent_rows == nullptr) continue;
          const Broadcast<T> v_columns = columns_of(tile.v_tangent_rows, t);
          if (moves_scores) {
            strip_product(vectors, p.value_dim, n_keys, v_columns, probabilities, 0, AddTo<T>{out_strip, kStrip});
          } else {
            strip_product(vectors, p.value_dim, n_keys, v_columns, probabilities, strip,
                          RescaleAndAdd<T>{out_strip, s.correction});
          }
        }
      }
      first_chunk = false;
    }
  }
  store_outputs<Storage>(tile, s);
}

}  // namespace

int64_t jvp_scratch_bytes(const AttentionJvpParams& p) {
  return dispatch(p.forward.dtype, [&](auto storage) {
    return JvpScratch<Working<decltype(storage)>>(nullptr, p, p.n_tangents).scratch.used();
  });
}

void jvp_tile(const JvpTile& tile) {
  dispatch(tile.params->forward.dtype, [&](auto storage) { jvp_tile_of<decltype(storage)>(tile); });
}

}  // namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA
