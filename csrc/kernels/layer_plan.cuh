// One searchable layer as the host sees it: its sizes, where its intermediate results lie, and the tiles of
// its wide kernels. Free of torch, so that the very sequence of launches that runs on a GPU runs under the
// emulator.
#pragma once

#include <array>
#include <map>
#include <mutex>

#include "squeeze_excite.cuh"

namespace tfnas::cuda {

// Hands out pieces of one allocation. With a null base it only counts, which is how its size is asked for.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class V>
  V* take(int64_t count) {
    V* piece = base_ ? reinterpret_cast<V*>(base_ + bytes_) : nullptr;
    bytes_ += (count * static_cast<int64_t>(sizeof(V)) + 255) / 256 * 256;
    return piece;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

// What the forward leaves for the backward, besides x.
template <class T>
struct SavedLayer {
  using A = Acc<T>;
  T *y2, *y3;
  A *mean_x, *covariance_x, *rstd1, *shift1, *mean2, *rstd2, *mean3, *rstd3, *pooled, *squeezed, *gate;
  SavedLayer(const LayerArgs<T>& a, Arena& arena) {
    const LayerSizes size(a);
    y2 = arena.take<T>(size.out_pixels * size.active);
    y3 = arena.take<T>(size.slots * size.out_pixels * a.out_channels);
    mean_x = arena.take<A>(a.in_channels);
    covariance_x = arena.take<A>(int64_t{a.in_channels} * a.in_channels);
    rstd1 = arena.take<A>(size.active), shift1 = arena.take<A>(size.active);
    mean2 = arena.take<A>(size.active), rstd2 = arena.take<A>(size.active);
    mean3 = arena.take<A>(size.slots * a.out_channels), rstd3 = arena.take<A>(size.slots * a.out_channels);
    const int64_t gates = size.widest_se ? int64_t{a.batch} * size.active : 0;
    pooled = arena.take<A>(gates), gate = arena.take<A>(gates);
    squeezed = arena.take<A>(int64_t{a.batch} * size.squeezed_stride);
  }
};

// A run length that cuts `items` into at most `runs` equal runs, in whole multiples of `unit`.
inline int64_t run_length(int64_t items, int64_t runs, int64_t unit) {
  const int64_t run = (items + runs - 1) / runs;
  return (run + unit - 1) / unit * unit;
}
inline int run_count(int64_t items, int64_t run) { return static_cast<int>((items + run - 1) / run); }

struct TileChoice {
  int height, width, images;
  size_t shared_bytes;
};

// The spatial tile of a wide kernel: the one with the least work (products including halo, and padded
// outputs) among those that leave room for `blocks` of them on a multiprocessor, or for fewer if none does.
// `bytes(height, width, images)` and `work(height, width, images)` describe the kernel, which keeps at least
// 32 channels of every pixel of a tile in shared memory; sizes step by the register block.
template <class Bytes, class Work>
TileChoice choose_tile(int map_height, int map_width, int batch, int step_y, int step_x, size_t limit,
                       int blocks, Bytes bytes, Work work) {
  const int most_y = ceil_div(map_height, step_y) * step_y, most_x = ceil_div(map_width, step_x) * step_x;
  constexpr size_t kReserved = 1024;  // of a multiprocessor's shared memory, for every block beside its own
  for (; blocks >= 1; blocks--) {
    const size_t room = (limit + kReserved) / blocks - kReserved;
    TileChoice best{0, 0, 0, 0};
    double least = 0;
    for (int y = step_y; y <= most_y; y += step_y) {
      for (int x = step_x; x <= most_x && size_t{4 * kChunk} * y * x <= room; x += step_x) {
        for (int images = 1; images <= batch && (images == 1 || (y == most_y && x == most_x)); images++) {
          if (bytes(y, x, images) > room) break;
          const double cost = work(y, x, images);
          if (best.height == 0 || cost < least) best = {y, x, images, bytes(y, x, images)}, least = cost;
        }
      }
    }
    if (best.height > 0) return best;
  }
  return {0, 0, 0, 0};  // not even the smallest tile fits
}

// What `choose()` says for these sizes, chosen once: trying all tiles takes longer on the host than a launch.
// `Kernel` is a type of the kernel's own.
template <class Kernel, class Choose>
TileChoice remembered_tile(const std::array<int64_t, 8>& sizes, Choose choose) {
  static std::mutex mutex;
  static std::map<std::array<int64_t, 8>, TileChoice> chosen;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = chosen.find(sizes);
  return found != chosen.end() ? found->second : chosen.emplace(sizes, choose()).first->second;
}

// How many chunks a block of a wide kernel takes, so that all blocks end soonest: the card runs `places` of
// them at a time, and every run of chunks begins with work of about one chunk (it stages x, clears and writes
// tiles).
inline int chunks_per_block(int chunks, int tiles, int places) {
  int best = chunks;
  int64_t least = INT64_MAX;
  for (int runs = 1; runs <= chunks; runs++) {
    const int each = ceil_div(chunks, runs);
    const int64_t waves = (int64_t{tiles} * runs + places - 1) / places;
    if (waves * (each + 1) < least) best = each, least = waves * (each + 1);
  }
  return best;
}

// Gives `args` of a wide kernel the best tile of the layer and enough blocks to fill the card. `bytes(tried)`
// and `work(tried)` describe the kernel, as in choose_tile. Returns the shared memory of a block; `Kernel` is
// a type of the kernel's own.
template <class Kernel, class T, class Args, class Bytes, class Work>
size_t fit_tile(Args& args, const LayerArgs<T>& a, const LayerSizes& size, int map_height, int map_width,
                int step_y, int step_x, int blocks, Bytes bytes, Work work) {
  const auto with = [&](int y, int x, int images) {
    Args tried = args;
    tried.tile_height = y, tried.tile_width = x, tried.tile_images = images;
    return tried;
  };
  const std::array<int64_t, 8> sizes{a.batch,
                                     a.height,
                                     a.width,
                                     a.in_channels,
                                     args.stride,
                                     size.largest_kernel,
                                     a.expand != nullptr,
                                     static_cast<int64_t>(a.device.shared_bytes)};
  const TileChoice tile = remembered_tile<Kernel>(sizes, [&] {
    return choose_tile(
        map_height, map_width, a.batch, step_y, step_x, a.device.shared_bytes, blocks,
        [&](int y, int x, int images) { return bytes(with(y, x, images)); },
        [&](int y, int x, int images) { return work(with(y, x, images)); });
  });
  args.tile_height = tile.height, args.tile_width = tile.width, args.tile_images = tile.images;
  args.chunks_per_block =
      tile.height ? chunks_per_block(size.chunks, args.tiles(), blocks * a.device.multiprocessors) : 1;
  return tile.shared_bytes;
}

}  // namespace tfnas::cuda
