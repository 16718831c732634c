// Attention of the encoder and over its states at many sizes, inputs and results in memory of exactly their size, for the
// sanitizers.
//
// Each result is held against the formula in doubles. Exit status 1 and a line that names the sizes if one differs.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>

#include "../../csrc/encoder_attention.h"
#include "../../csrc/latent_cross_attention.h"
#include "../../csrc/simd.h"

namespace {

using Size = std::int64_t;

std::mt19937 generator(0);

// Exactly so many floats: one further is an error to AddressSanitizer, as it would not be in a vector's spare memory.
std::unique_ptr<float[]> random(Size count) {
  std::unique_ptr<float[]> values(new float[static_cast<std::size_t>(count)]);
  std::normal_distribution<float> normal;
  std::generate_n(values.get(), count, [&] { return normal(generator); });
  return values;
}

// |out - softmax(q . keys) values| of one query, the greatest of its dims.
double error(const float* q, double scale, const float* keys, Size key_row, const float* values, Size value_row,
             Size num_keys, Size dim, Size value_dim, const float* out) {
  const std::unique_ptr<double[]> scores(new double[static_cast<std::size_t>(num_keys)]);
  double top = -INFINITY, sum = 0, worst = 0;
  for (Size k = 0; k < num_keys; ++k) {
    scores[k] = 0;
    for (Size d = 0; d < dim; ++d) scores[k] += scale * q[d] * keys[k * key_row + d];
    top = std::max(top, scores[k]);
  }
  for (Size k = 0; k < num_keys; ++k) sum += scores[k] = std::exp(scores[k] - top);
  for (Size d = 0; d < value_dim; ++d) {
    double mixed = 0;
    for (Size k = 0; k < num_keys; ++k) mixed += scores[k] / sum * values[k * value_row + d];
    const double difference = std::abs(mixed - out[d]);
    if (!(difference <= worst)) worst = difference;  // NaN too
  }
  return worst;
}

bool is_good(const char* what, double worst, Size a, Size b, Size c, Size d, int threads, int lanes) {
  if (worst < 1e-4) return true;
  std::printf("%s %lld %lld %lld %lld, %d threads, %d lanes: off by %g\n", what, static_cast<long long>(a),
              static_cast<long long>(b), static_cast<long long>(c), static_cast<long long>(d), threads, lanes, worst);
  return false;
}

bool check_encoder(Size pictures, Size tokens, Size heads, Size dim, int threads, int lanes) {
  const Size width = heads * dim;
  const auto qkv = random(pictures * tokens * 3 * width), out = random(pictures * tokens * width);
  trocr_fast::cpu::encoder_attention({qkv.get(), out.get(), pictures, tokens, heads, dim}, threads, lanes);
  double worst = 0;
  for (Size row = 0; row < pictures * tokens; ++row) {
    const float* const picture = qkv.get() + row / tokens * tokens * 3 * width;
    for (Size head = 0; head < heads; ++head) {
      const double found = error(qkv.get() + row * 3 * width + head * dim, 1 / std::sqrt(static_cast<double>(dim)),
                                 picture + width + head * dim, 3 * width, picture + 2 * width + head * dim, 3 * width,
                                 tokens, dim, dim, out.get() + row * width + head * dim);
      if (!(found <= worst)) worst = found;
    }
  }
  return is_good("encoder", worst, pictures, tokens, heads, dim, threads, lanes);
}

bool check_latent(Size lines, Size beams, Size heads, Size keys, Size width, int threads, int lanes) {
  const Size rows = lines * beams;
  const auto q = random(rows * heads * width), states = random(lines * keys * width), out = random(rows * heads * width);
  trocr_fast::cpu::latent_cross_attention(
      {q.get(), width, rows * width, states.get(), out.get(), rows, heads, lines, keys, width}, threads, lanes);
  double worst = 0;
  for (Size row = 0; row < rows; ++row) {
    const float* const line = states.get() + row / beams * keys * width;
    for (Size head = 0; head < heads; ++head) {
      const double found = error(q.get() + (head * rows + row) * width, 1, line, width, line, width, keys, width, width,
                                 out.get() + (row * heads + head) * width);
      if (!(found <= worst)) worst = found;
    }
  }
  return is_good("latent", worst, lines, rows, keys, width, threads, lanes);
}

}  // namespace

int main() {
  bool good = true;
  for (int lanes = 4; lanes <= trocr_fast::simd::most_lanes(); lanes *= 2) {
    for (const int threads : {1, 3}) {
      for (const Size tokens : {1, 11, 12, 16, 17, 31, 33, 70}) {
        for (const Size dim : {1, 16, 37, 64}) good = check_encoder(2, tokens, 2, dim, threads, lanes) && good;
      }
      for (const Size keys : {1, 95, 97, 200}) {
        for (const Size width : {1, 32, 200, 217}) {
          good = check_latent(2, 1, 3, keys, width, threads, lanes) && good;
          good = check_latent(1, 3, 6, keys, width, threads, lanes) && good;
        }
      }
    }
  }
  return good ? 0 : 1;
}
