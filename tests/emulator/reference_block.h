// The textbook's MBInvRes block with candidates, stage by stage, on the very values that the kernels see: in
// float64 what every kernel test compares with, in float32 the plain computation whose error theirs may
// exceed twofold. Wide tensors are laid out as the kernels lay them out.
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

inline tfnas::cuda::LayerTable make_table(const std::vector<std::array<int, 3>>& kernel_width_se) {
  tfnas::cuda::LayerTable table{};
  int row = 0, filter = 0, se_weight = 0, se_reduce_bias = 0, se_expand_bias = 0;
  for (const auto& [kernel, width, se] : kernel_width_se) {
    table.candidate[table.count++] = {kernel, row,       filter,         width,
                                      se,     se_weight, se_reduce_bias, se_expand_bias};
    const int max_width = width + 3;  // rows beyond the width hold values that must not be used
    row += max_width;
    filter += max_width * kernel * kernel;
    se_weight += max_width * se;
    se_reduce_bias += se;
    se_expand_bias += se ? max_width : 0;
  }
  return table;
}

// The operands of the block's 1x1 convolutions: as they are, or rounded as a tf32 product takes them; and
// what a tensor keeps of a value: all of it, or bf16 as every activation, filter and gradient of a plain bf16
// block.
struct Exact {
  template <class C>
  static C operand(C value) {
    return value;
  }
  template <class C>
  static C stored(C value) {
    return value;
  }
};
struct Bf16Tensors {
  static float operand(float value) { return __bfloat162float(__float2bfloat16(value)); }
  static float stored(float value) { return operand(value); }
};
struct Tf32Operands {
  static float stored(float value) { return value; }
  static float operand(float value) {
    return __uint_as_float((__float_as_uint(value) + 0x1000u) &
                           0xffffe000u);  // to nearest, halves away from 0
  }
};

// T: storage type of x, C: what is computed in and every intermediate result is kept in. As in PyTorch on a
// CPU, the statistics of a batch norm and other means over pixels are added in double and rounded once;
// products are added in C, in order.
template <class T, class C = double, class Product = Exact>
class ReferenceBlock {
 public:
  using Stored = T;
  using Computed = C;
  using A = tfnas::cuda::Acc<T>;
  ReferenceBlock(const Shape& shape, const tfnas::cuda::LayerTable& table, int choice, unsigned seed)
      : shape(shape), table(table), choice(choice), random(seed) {
    for (int i = 0; i < table.count; i++) {
      const auto& rows = table.candidate[i];
      all_rows = std::max(all_rows, rows.first_row + rows.width + 3);
      filters = std::max(filters, rows.depthwise_at + (rows.width + 3) * rows.kernel_size * rows.kernel_size);
      if (choice < 0 || choice == i) {
        chosen.push_back(i);
        active_at.push_back(active);
        active += tfnas::cuda::pitch_of(rows.width);
      }
    }
    x = random.normal<T>(shape.in_pixels() * shape.in_channels, 1, 0.3);
    expand = random.normal<A>(int64_t{all_rows} * shape.in_channels, 1 / std::sqrt(shape.in_channels));
    depthwise = random.normal<A>(filters, 0.4);
    project = random.normal<A>(int64_t{all_rows} * shape.out_channels, 1 / std::sqrt(32.0));
    const auto& last = table.candidate[table.count - 1];
    squeezed_stride = last.se_reduce_bias_at + last.se_channels;
    const int se_weights = last.se_weight_at + (last.width + 3) * last.se_channels;
    reduce_weight = random.normal<A>(se_weights, 0.3), expand_weight = random.normal<A>(se_weights, 0.3);
    reduce_bias = random.normal<A>(squeezed_stride), expand_bias = random.normal<A>(all_rows);
    for (size_t k = 0; k < chosen.size(); k++) u.push_back(choice < 0 ? 0.1 * (k + 1) : 1);
  }

  // Batch norm 1 from the wide tensor itself; then the tensor after the depthwise convolution and its
  // statistics.
  void forward_to_y2() {
    rstd1.assign(active, 0), shift1.assign(active, 0), mean2.assign(active, 0), rstd2.assign(active, 0);
    y2.assign(shape.out_pixels() * active, 0);
    h1.assign(shape.in_pixels() * active, 0);
    for_each_channel([&](int k, const tfnas::cuda::CandidateRows& rows, int c) {
      double mean = 0, square = 0;
      std::vector<C> y1(shape.in_pixels());
      for (int64_t p = 0; p < shape.in_pixels(); p++) {
        for (int i = 0; i < shape.in_channels; i++) {
          y1[p] += operand(x[p * shape.in_channels + i]) *
                   operand(expand[int64_t{rows.first_row + c} * shape.in_channels + i]);
        }
        y1[p] = stored(y1[p]);
        mean += y1[p] / shape.in_pixels();
      }
      for (C v : y1) square += (v - mean) * (v - mean) / shape.in_pixels();
      const int v = active_at[k] + c;
      rstd1[v] = static_cast<C>(1 / std::sqrt(square + eps));
      shift1[v] = -rstd1[v] * static_cast<C>(mean);
      for (int64_t p = 0; p < shape.in_pixels(); p++)
        h1[wide(k, c, p, shape.in_pixels())] = stored(y1[p] * rstd1[v] + shift1[v]);
      double sum = 0, squares = 0;
      for_each_output([&](int n, int oy, int ox, int64_t p) {
        C value = 0;
        for_each_tap(rows, n, oy, ox, [&](int tap, int64_t in) {
          value += activate(h1[wide(k, c, in, shape.in_pixels())]) * filter_of(rows, c, tap);
        });
        value = stored(value);
        y2[wide(k, c, p, shape.out_pixels())] = value;
        sum += value;
        squares += double{value} * value;
      });
      sum /= shape.out_pixels();
      mean2[v] = static_cast<C>(sum);
      rstd2[v] = static_cast<C>(1 / std::sqrt(squares / shape.out_pixels() - sum * sum + eps));
    });
  }

  // From y2: gates, y3 and its statistics, the mixture's output without residual.
  void forward_from_y2() {
    const int64_t pixels = shape.out_pixels(), map = pixels / shape.batch;
    pooled.assign(shape.batch * active, 0), gate.assign(shape.batch * active, 1);
    squeezed.assign(shape.batch * squeezed_stride, 0);
    h2.assign(y2.size(), 0), z.assign(y2.size(), 0);
    for_each_channel([&](int k, const tfnas::cuda::CandidateRows&, int c) {
      const int v = active_at[k] + c;
      for (int n = 0; n < shape.batch; n++) {
        double sum = 0;
        for (int64_t p = n * map; p < (n + 1) * map; p++) {
          const int64_t at = wide(k, c, p, pixels);
          h2[at] = stored((y2[at] - mean2[v]) * rstd2[v]);
          sum += activate(h2[at]);
        }
        pooled[n * active + v] = static_cast<C>(sum / map);
      }
    });
    for (size_t k = 0; k < chosen.size(); k++) {
      const auto& rows = table.candidate[chosen[k]];
      const int se = rows.se_channels;
      for (int n = 0; n < shape.batch && se > 0; n++) {
        C* t = &squeezed[n * squeezed_stride + rows.se_reduce_bias_at];
        for (int j = 0; j < se; j++) {
          t[j] = number(reduce_bias[rows.se_reduce_bias_at + j]);
          for (int c = 0; c < rows.width; c++) {
            t[j] +=
                number(reduce_weight[rows.se_weight_at + c * se + j]) * pooled[n * active + active_at[k] + c];
          }
        }
        for (int c = 0; c < rows.width; c++) {
          C s = number(expand_bias[rows.se_expand_bias_at + c]);
          for (int j = 0; j < se; j++)
            s += number(expand_weight[rows.se_weight_at + c * se + j]) * activate(t[j]);
          gate[n * active + active_at[k] + c] = 1 / (1 + std::exp(-s));
        }
      }
    }
    const int outs = shape.out_channels, slots = static_cast<int>(chosen.size());
    y3.assign(slots * pixels * outs, 0), h3 = y3;
    mean3.assign(slots * outs, 0), rstd3.assign(slots * outs, 0), out.assign(pixels * outs, 0);
    for_each_channel([&](int k, const tfnas::cuda::CandidateRows& rows, int c) {
      for (int64_t p = 0; p < pixels; p++) {
        const int64_t at = wide(k, c, p, pixels);
        z[at] = stored(activate(h2[at]) * gate[p / map * active + active_at[k] + c]);
        for (int o = 0; o < outs; o++) {
          y3[(k * pixels + p) * outs + o] +=
              operand(z[at]) * operand(project[int64_t{rows.first_row + c} * outs + o]);
        }
      }
    });
    for (C& value : y3) value = stored(value);
    for (int k = 0; k < slots; k++) {
      for (int o = 0; o < outs; o++) {
        double mean = 0, square = 0;
        for (int64_t p = 0; p < pixels; p++) mean += y3[(k * pixels + p) * outs + o] / pixels;
        for (int64_t p = 0; p < pixels; p++) {
          const double d = y3[(k * pixels + p) * outs + o] - mean;
          square += d * d / pixels;
        }
        mean3[k * outs + o] = static_cast<C>(mean);
        rstd3[k * outs + o] = static_cast<C>(1 / std::sqrt(square + eps));
        for (int64_t p = 0; p < pixels; p++) {
          const int64_t at = (k * pixels + p) * outs + o;
          h3[at] = stored((y3[at] - mean3[k * outs + o]) * rstd3[k * outs + o]);
          out[p * outs + o] += u[k] * h3[at];
        }
      }
    }
  }

  // Textbook backward on the wide tensors (no narrow-space algebra), for a residual block.
  void backward(const std::vector<T>& dout, bool residual) {
    const int64_t pixels = shape.out_pixels(), map = pixels / shape.batch, in_pixels = shape.in_pixels();
    const int outs = shape.out_channels, ins = shape.in_channels;
    dproject.assign(active * outs, 0), dexpand.assign(active * ins, 0), dfilter.assign(active * 49, 0);
    dreduce_weight.assign(reduce_weight.size(), 0), dexpand_weight = dreduce_weight;
    dreduce_bias.assign(squeezed_stride, 0), dexpand_bias.assign(expand_bias.size(), 0);
    dx.assign(in_pixels * ins, 0), du.assign(chosen.size(), 0);
    means1.assign(2 * active, 0), means2.assign(2 * active, 0);
    dh2.assign(y2.size(), 0), dh1.assign(h1.size(), 0);
    for (size_t k = 0; k < chosen.size(); k++) {
      const auto& rows = table.candidate[chosen[k]];
      std::vector<C> dy3(pixels * outs);
      double du_sum = 0;
      for (int o = 0; o < outs; o++) {
        double mean_sum = 0, product_sum = 0;
        for (int64_t p = 0; p < pixels; p++) {
          const C d = number(dout[p * outs + o]), h = h3[(k * pixels + p) * outs + o];
          mean_sum += u[k] * d, product_sum += u[k] * d * h;
          du_sum += d * h + (residual ? d * number(x[p * ins + o]) : C(0));
        }
        const C mean = static_cast<C>(mean_sum / pixels), product = static_cast<C>(product_sum / pixels);
        for (int64_t p = 0; p < pixels; p++) {
          dy3[p * outs + o] = stored(rstd3[k * outs + o] * (u[k] * number(dout[p * outs + o]) - mean -
                                                            h3[(k * pixels + p) * outs + o] * product));
          if (residual) dx[p * ins + o] += u[k] * number(dout[p * outs + o]);
        }
      }
      du[k] = static_cast<C>(du_sum);
      const int se = rows.se_channels;
      std::vector<C> dz(pixels * rows.width), dgate(shape.batch * rows.width), dpooled(dgate.size());
      for (int c = 0; c < rows.width; c++) {
        for (int64_t p = 0; p < pixels; p++) {
          const int64_t at = wide(k, c, p, pixels);
          for (int o = 0; o < outs; o++) {
            dz[p * rows.width + c] +=
                operand(dy3[p * outs + o]) * operand(project[int64_t{rows.first_row + c} * outs + o]);
            dproject[(active_at[k] + c) * outs + o] += operand(z[at]) * operand(dy3[p * outs + o]);
          }
          dz[p * rows.width + c] = stored(dz[p * rows.width + c]);
          dgate[p / map * rows.width + c] += dz[p * rows.width + c] * activate(h2[at]);
        }
      }
      for (int n = 0; n < shape.batch && se > 0; n++) {
        const C* t = &squeezed[n * squeezed_stride + rows.se_reduce_bias_at];
        std::vector<C> dexcited(se);
        for (int c = 0; c < rows.width; c++) {
          const C s = gate[n * active + active_at[k] + c], dv = dgate[n * rows.width + c] * s * (1 - s);
          dexpand_bias[rows.se_expand_bias_at + c] += dv;
          for (int j = 0; j < se; j++) {
            dexpand_weight[rows.se_weight_at + c * se + j] += dv * activate(t[j]);
            dexcited[j] += dv * number(expand_weight[rows.se_weight_at + c * se + j]);
          }
        }
        for (int j = 0; j < se; j++) {
          const C dt = dexcited[j] * slope(t[j]);
          dreduce_bias[rows.se_reduce_bias_at + j] += dt;
          for (int c = 0; c < rows.width; c++) {
            dreduce_weight[rows.se_weight_at + c * se + j] += dt * pooled[n * active + active_at[k] + c];
            dpooled[n * rows.width + c] += dt * number(reduce_weight[rows.se_weight_at + c * se + j]);
          }
        }
      }
      for (int c = 0; c < rows.width; c++) {
        const int v = active_at[k] + c;
        double mean = 0, product = 0;
        for (int64_t p = 0; p < pixels; p++) {
          const int64_t at = wide(k, c, p, pixels);
          const int64_t n = p / map;
          const C s = se ? gate[n * active + v] : C(1);
          dh2[at] = stored((dz[p * rows.width + c] * s + dpooled[n * rows.width + c] / map) * slope(h2[at]));
          mean += dh2[at], product += dh2[at] * h2[at];
        }
        means2[v] = static_cast<C>(mean / pixels), means2[active + v] = static_cast<C>(product / pixels);
        std::vector<C> da1(in_pixels);
        for_each_output([&](int n, int oy, int ox, int64_t p) {
          const int64_t at = wide(k, c, p, pixels);
          const C dy2 = stored(rstd2[v] * (dh2[at] - means2[v] - h2[at] * means2[active + v]));
          for_each_tap(rows, n, oy, ox, [&](int tap, int64_t in) {
            da1[in] += filter_of(rows, c, tap) * dy2;
            dfilter[v * 49 + tap] += activate(h1[wide(k, c, in, in_pixels)]) * dy2;
          });
        });
        mean = product = 0;
        for (int64_t p = 0; p < in_pixels; p++) {
          const int64_t at = wide(k, c, p, in_pixels);
          dh1[at] = stored(stored(da1[p]) * slope(h1[at]));
          mean += dh1[at], product += dh1[at] * h1[at];
        }
        means1[v] = static_cast<C>(mean / in_pixels),
        means1[active + v] = static_cast<C>(product / in_pixels);
        for (int64_t p = 0; p < in_pixels; p++) {
          const int64_t at = wide(k, c, p, in_pixels);
          const C dy1 = operand(rstd1[v] * (dh1[at] - means1[v] - h1[at] * means1[active + v]));
          for (int i = 0; i < ins; i++) {
            dx[p * ins + i] += dy1 * operand(expand[int64_t{rows.first_row + c} * ins + i]);
            dexpand[v * ins + i] += dy1 * operand(x[p * ins + i]);
          }
        }
      }
    }
    for (C& value : dx) value = stored(value);
  }

  template <class V>
  static C number(V value) {
    return static_cast<C>(to_double(value));
  }
  template <class V>
  static C operand(V value) {
    return Product::operand(number(value));
  }
  static C stored(C value) { return Product::stored(value); }
  C activate(C h) const { return stored(tfnas::cuda::activate(shape.act, h)); }
  C slope(C h) const {
    C value, s;
    tfnas::cuda::activate_with_slope(shape.act, h, value, s);
    return s;
  }
  C filter_of(const tfnas::cuda::CandidateRows& rows, int c, int tap) const {
    return stored(number(depthwise[rows.depthwise_at + c * rows.kernel_size * rows.kernel_size + tap]));
  }
  // Index of channel c of the k-th active candidate at pixel p.
  int64_t wide(int k, int c, int64_t p, int64_t pixels) const {
    return pixels * active_at[k] + p * tfnas::cuda::pitch_of(table.candidate[chosen[k]].width) + c;
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
  void for_each_tap(const tfnas::cuda::CandidateRows& rows, int n, int oy, int ox, F f) const {
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
        for (int c = width; c < tfnas::cuda::pitch_of(width); c++) values[wide(k, c, p, pixels)] = {};
      }
    }
  }

  const Shape shape;
  const tfnas::cuda::LayerTable table;
  const int choice;
  Random random;
  const double eps = 1e-5;
  int all_rows = 0, filters = 0, active = 0, squeezed_stride = 0;
  std::vector<int> chosen, active_at;
  std::vector<T> x;
  std::vector<A> expand, depthwise, project, reduce_weight, reduce_bias, expand_weight, expand_bias;
  std::vector<C> u, rstd1, shift1, h1, y2, mean2, rstd2;
  std::vector<C> dproject, dexpand, dfilter, dreduce_weight, dreduce_bias, dexpand_weight, dexpand_bias, dx,
      du;
  std::vector<C> dh2, dh1, means1, means2;  // means [2][active]: of the gradient, of its product with h
  std::vector<C> pooled, squeezed, gate, h2, z, y3, mean3, rstd3, h3, out;
};

template <class To>
std::vector<To> converted(const std::vector<double>& from) {
  std::vector<To> to(from.size());
  for (size_t i = 0; i < from.size(); i++) to[i] = from_double<To>(from[i]);
  return to;
}

}  // namespace emulator_check
