// cross_similarity_bounds.h against float64: prints a pair of vectors whose cosine is not between its bounds
// and ends with 1, or prints how many pairs were checked, and the largest distance from the middle of the
// bounds, as a part of half their width. Its argument is a factor of the errors that the bounds are made of.

#include "cross_similarity_bounds.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

namespace {

using namespace cisc::cross_similarity;

using Vector = std::vector<float>;

struct Row {
  std::vector<double> unit;
  std::vector<int8_t> numbers;
  Step step;
};

// As quantise_kernel has it, of a row of float32 numbers.
Row row_of(const Vector& vector, float factor) {
  Row row;
  double square = 0.0, rests = 0.0;
  float most = 0.0f;
  for (const float value : vector) {
    square += static_cast<double>(value) * static_cast<double>(value);
    most = std::fmax(most, std::fabs(value));
  }
  const double length = std::sqrt(square);
  const auto quantiser = Quantiser::of(most);
  for (const float value : vector) {
    row.unit.push_back(length > 0.0 ? static_cast<double>(value) / length : 0.0);
    row.numbers.push_back(quantiser.at(value));
    const auto rest = static_cast<double>(quantiser.rest(value, row.numbers.back()));
    rests += rest * rest;
  }
  row.step = quantiser.of_unit(true, rests, length > 0.0 ? static_cast<float>(1.0 / length) : 1.0f, false);
  row.step.error *= factor;
  return row;
}

int64_t pairs = 0;
double largest = 0.0;

void check(const char* name, const Row& query, const Row& guide) {
  const auto channels = static_cast<int64_t>(query.unit.size());
  double cosine = 0.0;
  int32_t sum = 0;
  for (size_t c = 0; c < query.unit.size(); ++c) {
    cosine += query.unit[c] * guide.unit[c];
    sum += query.numbers[c] * guide.numbers[c];
  }
  const float slack = Bounds::slack(channels);
  const auto bounds = Bounds::of(query.step, slack);
  const float most = bounds.most(sum, guide.step), least = bounds.least(most, guide.step.error);
  const auto a = static_cast<double>(query.step.step);
  const double own = static_cast<double>(query.step.error) + static_cast<double>(slack);
  const double above = a * static_cast<double>(most) + own, below = a * static_cast<double>(least) + own;
  largest = std::fmax(largest, std::fabs(2.0 * cosine - above - below) / (above - below));
  ++pairs;
  if (below < cosine && cosine < above) return;
  std::printf("%s: a cosine of %.9g is not between %.9g and %.9g\n", name, cosine, below, above);
  std::exit(1);
}

std::mt19937 chance(1);

float normal() { return std::normal_distribution<float>()(chance); }

Vector random_vector(int channels, int kind) {
  Vector vector(static_cast<size_t>(channels));
  for (float& value : vector) {
    value = normal();
    if (kind == 1) value = std::fmax(value, 0.0f);         // as behind a rectifier
    if (kind == 2) value = value * value * value * value;  // few large ones
    if (kind == 3 && chance() % 16 != 0) value = 0.0f;     // few at all
    if (kind == 4) value = static_cast<float>(chance() % 2) - 0.5f;
    if (kind == 5) value *= 1e-3f;
  }
  if (kind == 5) vector[0] = 1.0f;  // one that all others are small beside
  return vector;
}

// Whose rounding leaves nearly half a step in each channel, along a vector that is rounded to itself; or in
// the other direction.
void check_worst(int channels, float factor) {
  for (const float sign : {0.99f, -0.99f}) {
    Vector rounded(static_cast<size_t>(channels)), along(static_cast<size_t>(channels));
    for (size_t c = 0; c < rounded.size(); ++c) {
      along[c] = chance() % 2 == 0 ? 127.0f : -127.0f;
      const auto whole = static_cast<float>(static_cast<int>(chance() % 253) - 126);
      rounded[c] = c == 0 ? 127.0f : whole + 0.5f * sign * along[c] / 127.0f;
    }
    const Row a = row_of(rounded, factor), b = row_of(along, factor);
    check("the worst", a, b);
    check("the worst", b, a);
    check("the same", a, a);
  }
}

}  // namespace

int main(int, char** words) {
  const float factor = std::stof(words[1]);
  for (const int channels : {1, 2, 3, 64, 100, 300, 1500}) {
    for (int kind = 0; kind < 6; ++kind) {
      std::vector<Row> rows{row_of(Vector(static_cast<size_t>(channels), 0.0f), factor)};
      for (int i = 0; i < 24; ++i) rows.push_back(row_of(random_vector(channels, kind), factor));
      // A cluster of neighbours.
      const Vector middle = random_vector(channels, kind);
      for (int i = 0; i < 24; ++i) {
        Vector near = middle;
        for (float& value : near) value += 0.01f * normal();
        rows.push_back(row_of(near, factor));
      }
      for (const Row& a : rows) {
        for (const Row& b : rows) check("random", a, b);
      }
    }
    for (int i = 0; i < 32; ++i) check_worst(channels, factor);
  }
  std::printf("%lld pairs, at most %.3f of the width\n", static_cast<long long>(pairs), largest);
  return 0;
}
