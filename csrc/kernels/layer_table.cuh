// The candidates of one layer as kernels see them, and how a grid of channel chunks is laid over them.
#pragma once

#include "compat.cuh"

namespace tfnas {

constexpr int kMaxCandidates = 16;
constexpr int kChunk = 32;  // mid channels that a block works on at once: one per lane in the depthwise phase

// A candidate is a range of rows of the packed weights, its width a prefix of that range.
struct CandidateRows {
  int kernel_size;
  int first_row;     // of the mid-first packed weights (expand, project)
  int depthwise_at;  // first element of its depthwise filters, k * k per row
  int width;
  int se_channels;   // 0: no squeeze-and-excitation, and the offsets below mean nothing
  int se_weight_at;  // first element of its se_reduce_weight and se_expand_weight, [rows, se_channels] both
  int se_reduce_bias_at;  // first element of its se_reduce_bias; also its place among the squeezed values of
                          // an image
  int se_expand_bias_at;
};

// Lives in device memory; rebuilt by the host when widths change, which is between epochs only.
struct LayerTable {
  int count;
  CandidateRows candidate[kMaxCandidates];
};

__host__ __device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Wide activations hold active channels only, candidate after candidate, each [pixels, pitch]: a pitch is a
// multiple of 8, so that any width can be read in aligned groups. What lies between width and pitch is never
// written nor used.
__host__ __device__ inline int pitch_of(int width) { return (width + 7) / 8 * 8; }

// Where one chunk lies. Per-channel vectors are laid out like one pixel of the wide activations.
struct Chunk {
  CandidateRows rows;
  int candidate;
  int first;      // first channel of the chunk inside the candidate
  int active_at;  // pitches of the active candidates before: the wide tensor starts at pixels * active_at
  int vector_at;  // of the chunk's first channel in per-channel vectors
  __device__ bool has(int channel) const { return first + channel < rows.width; }
  __device__ int valid() const { return rows.width - first < kChunk ? rows.width - first : kChunk; }
};

// The candidate to run: `choice` points to device memory (a sampled path), or is null (the mixture: all
// candidates).
__device__ inline int chosen(const int* choice) { return choice ? *choice : -1; }

// Chunk number `q` of the chosen candidate, or of all. Returns false past the last one: grids are sized for
// the widest.
__device__ inline bool find_chunk(const LayerTable& layer, int choice, int q, Chunk& chunk) {
  int active_at = 0;
  for (int i = 0; i < layer.count; i++) {
    if (choice >= 0 && i != choice) continue;
    const CandidateRows rows = layer.candidate[i];
    const int chunks = ceil_div(rows.width, kChunk);
    if (q < chunks) {
      chunk = {rows, i, q * kChunk, active_at, active_at + q * kChunk};
      return true;
    }
    q -= chunks;
    active_at += pitch_of(rows.width);
  }
  return false;
}

// The active candidate number `index` of the grid, and where its channels start in per-channel vectors.
__device__ inline bool find_active(const LayerTable& layer, int choice, int index, CandidateRows& rows,
                                   int& active_at) {
  active_at = 0;
  for (int i = 0; i < layer.count; i++) {
    if (choice >= 0 && i != choice) continue;
    rows = layer.candidate[i];
    if (index-- == 0) return true;
    active_at += pitch_of(rows.width);
  }
  return false;
}

}  // namespace tfnas
