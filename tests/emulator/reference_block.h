// The MBInvRes block with candidates in float64, stage by stage, on the very values that the kernels see:
// what every kernel test compares with. Wide tensors are laid out as the kernels lay them out.
#pragma once

#include "emulator_check.h"
#include "numbers.cuh"

namespace emulator_check {

struct Shape {
  int batch, height, width, in_channels, out_channels, stride, act;
  int out_height() const { return (height - 1) / stride + 1; }
  int out_width() const { return (width - 1) / stride + 1; }
  int64_t in_pixels() const { return int64_t{batch} * height * width; }
  int64_t out_pixels() const { return int64_t{batch} * out_height() * out_width(); }
};

inline tfnas::LayerTable make_table(const std::vector<std::array<int, 3>>& kernel_width_se) {
  tfnas::LayerTable table{};
  int row = 0, filter = 0;
  for (const auto& [kernel, width, se] : kernel_width_se) {
    table.candidate[table.count++] = {kernel, row, filter, width, se};
    const int max_width = width + 3;  // rows beyond the width hold values that must not be used
    row += max_width;
    filter += max_width * kernel * kernel;
  }
  return table;
}

template <class T>
class ReferenceBlock {
 public:
  using A = tfnas::Acc<T>;
  ReferenceBlock(const Shape& shape, const tfnas::LayerTable& table, int choice, unsigned seed)
      : shape(shape), table(table), choice(choice), random(seed) {
    for (int i = 0; i < table.count; i++) {
      const auto& rows = table.candidate[i];
      all_rows = std::max(all_rows, rows.first_row + rows.width + 3);
      filters = std::max(filters, rows.depthwise_at + (rows.width + 3) * rows.kernel_size * rows.kernel_size);
      if (choice < 0 || choice == i) {
        chosen.push_back(i);
        active_at.push_back(active);
        active += tfnas::pitch_of(rows.width);
      }
    }
    x = random.normal<T>(shape.in_pixels() * shape.in_channels, 1, 0.3);
    expand = random.normal<A>(int64_t{all_rows} * shape.in_channels, 1 / std::sqrt(shape.in_channels));
    depthwise = random.normal<A>(filters, 0.4);
    project = random.normal<A>(int64_t{all_rows} * shape.out_channels, 1 / std::sqrt(32.0));
  }

  // Batch norm 1 from the wide tensor itself; then the tensor after the depthwise convolution and its
  // statistics.
  void forward_to_y2() {
    rstd1.assign(active, 0), shift1.assign(active, 0), mean2.assign(active, 0), rstd2.assign(active, 0);
    y2.assign(shape.out_pixels() * active, 0);
    h1.assign(shape.in_pixels() * active, 0);
    for_each_channel([&](int k, const tfnas::CandidateRows& rows, int c) {
      double mean = 0, square = 0;
      std::vector<double> y1(shape.in_pixels());
      for (int64_t p = 0; p < shape.in_pixels(); p++) {
        for (int i = 0; i < shape.in_channels; i++) {
          y1[p] += to_double(x[p * shape.in_channels + i]) *
                   to_double(expand[int64_t{rows.first_row + c} * shape.in_channels + i]);
        }
        mean += y1[p] / shape.in_pixels();
      }
      for (double v : y1) square += (v - mean) * (v - mean) / shape.in_pixels();
      const int v = active_at[k] + c;
      rstd1[v] = 1 / std::sqrt(square + eps);
      shift1[v] = -rstd1[v] * mean;
      for (int64_t p = 0; p < shape.in_pixels(); p++)
        h1[wide(k, c, p, shape.in_pixels())] = y1[p] * rstd1[v] + shift1[v];
      double sum = 0, squares = 0;
      for_each_output([&](int n, int oy, int ox, int64_t p) {
        double value = 0;
        for_each_tap(rows, n, oy, ox, [&](int tap, int64_t in) {
          value += activate(h1[wide(k, c, in, shape.in_pixels())]) * filter_of(rows, c, tap);
        });
        y2[wide(k, c, p, shape.out_pixels())] = value;
        sum += value;
        squares += value * value;
      });
      mean2[v] = sum / shape.out_pixels();
      rstd2[v] = 1 / std::sqrt(squares / shape.out_pixels() - mean2[v] * mean2[v] + eps);
    });
  }

  double activate(double h) const { return tfnas::activate(shape.act, h); }
  double slope(double h) const {
    double value, s;
    tfnas::activate_with_slope(shape.act, h, value, s);
    return s;
  }
  double filter_of(const tfnas::CandidateRows& rows, int c, int tap) const {
    return to_double(depthwise[rows.depthwise_at + c * rows.kernel_size * rows.kernel_size + tap]);
  }
  // Index of channel c of the k-th active candidate at pixel p.
  int64_t wide(int k, int c, int64_t p, int64_t pixels) const {
    return pixels * active_at[k] + p * tfnas::pitch_of(table.candidate[chosen[k]].width) + c;
  }
  template <class F>
  void for_each_channel(F f) const {
    for (size_t k = 0; k < chosen.size(); k++) {
      for (int c = 0; c < table.candidate[chosen[k]].width; c++)
        f(static_cast<int>(k), table.candidate[chosen[k]], c);
    }
  }
  template <class F>
  void for_each_output(F f) const {
    int64_t p = 0;
    for (int n = 0; n < shape.batch; n++) {
      for (int y = 0; y < shape.out_height(); y++) {
        for (int x = 0; x < shape.out_width(); x++) f(n, y, x, p++);
      }
    }
  }
  // f(tap, input pixel) for every tap of the filter that lies inside the image.
  template <class F>
  void for_each_tap(const tfnas::CandidateRows& rows, int n, int oy, int ox, F f) const {
    const int k = rows.kernel_size;
    for (int tap = 0; tap < k * k; tap++) {
      const int y = oy * shape.stride + tap / k - k / 2, x = ox * shape.stride + tap % k - k / 2;
      if (y < 0 || y >= shape.height || x < 0 || x >= shape.width) continue;
      f(tap, (int64_t{n} * shape.height + y) * shape.width + x);
    }
  }
  // Only what kernels may write: channels between width and pitch are set to zero before comparing.
  template <class V>
  void clear_unused(V& values, int64_t pixels) const {
    for (size_t k = 0; k < chosen.size(); k++) {
      const int width = table.candidate[chosen[k]].width;
      for (int64_t p = 0; p < pixels; p++) {
        for (int c = width; c < tfnas::pitch_of(width); c++) values[wide(k, c, p, pixels)] = {};
      }
    }
  }

  const Shape shape;
  const tfnas::LayerTable table;
  const int choice;
  Random random;
  const double eps = 1e-5;
  int all_rows = 0, filters = 0, active = 0;
  std::vector<int> chosen, active_at;
  std::vector<T> x;
  std::vector<A> expand, depthwise, project;
  std::vector<double> rstd1, shift1, h1, y2, mean2, rstd2;
};

template <class To>
std::vector<To> converted(const std::vector<double>& from) {
  std::vector<To> to(from.size());
  for (size_t i = 0; i < from.size(); i++) to[i] = from_double<To>(from[i]);
  return to;
}

}  // namespace emulator_check
