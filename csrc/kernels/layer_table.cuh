// How a grid of 32-channel chunks is laid over the candidates of a layer.
#pragma once

#include "layer.h"

namespace tfnas::cuda {

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

}  // namespace tfnas::cuda
