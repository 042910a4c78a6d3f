// SPDX-License-Identifier: Apache-2.0
#include "distill/signal_rows.h"

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "core/error.h"
#include "core/random.h"
#include "core/vectorised.h"
#include "models/row_kernels.h"

namespace alambic::distill {
namespace {

constexpr std::int64_t kBlock = 256;  // columns whose sum is kept, so that a draw looks into one block only

inline float load(const float* from) { return *from; }
inline float load(const at::BFloat16* from) { return static_cast<float>(*from); }

// z = logits * scale; returns the largest.
template <class T>
ALAMBIC_VECTORISED float scale_row(const T* logits, float scale, float* z, std::int64_t columns) {
  float highest = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : highest)
  for (std::int64_t i = 0; i < columns; ++i) {
    z[i] = load(logits + i) * scale;
    highest = z[i] > highest ? z[i] : highest;
  }
  return highest;
}
template float scale_row(const float*, float, float*, std::int64_t);
template float scale_row(const at::BFloat16*, float, float*, std::int64_t);

// e = exp(exponent (z - highest)), and the sum of each block.
ALAMBIC_VECTORISED void exp_row(const float* z, float highest, float exponent, float* e, float* block_sums, std::int64_t columns) {
  for (std::int64_t begin = 0; begin < columns; begin += kBlock) {
    const std::int64_t end = begin + kBlock < columns ? begin + kBlock : columns;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = begin; i < end; ++i) {
      const float value = models::kernels::fast_exp((z[i] - highest) * exponent);
      e[i] = value;
      sum += value;
    }
    block_sums[begin / kBlock] = sum;
  }
}

ALAMBIC_VECTORISED double sum_of_row(const float* e, std::int64_t columns) {
  double sum = 0;
  for (std::int64_t begin = 0; begin < columns; begin += kBlock) {
    const std::int64_t end = begin + kBlock < columns ? begin + kBlock : columns;
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (std::int64_t i = begin; i < end; ++i) part += e[i];
    sum += part;
  }
  return sum;
}

ALAMBIC_VECTORISED float highest_of(const float* z, std::int64_t count) {
  float highest = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : highest)
  for (std::int64_t i = 0; i < count; ++i) highest = z[i] > highest ? z[i] : highest;
  return highest;
}

struct Candidate {
  float value;
  std::int32_t id;
};
// Better ones first: by value, of equal ones the smaller id.
bool better(const Candidate& a, const Candidate& b) { return a.value > b.value || (a.value == b.value && a.id < b.id); }

struct Workspace {
  std::vector<float> z, e, proposal, block_sums;
  std::vector<double> cumulative;
  std::vector<Candidate> heap;
  std::vector<std::int32_t> draws;

  explicit Workspace(const RowSettings& settings) {
    const std::size_t columns = settings.form.vocabulary_size, blocks = (columns + kBlock - 1) / kBlock;
    z.resize(columns), e.resize(columns), block_sums.resize(blocks), cumulative.resize(blocks);
    if (settings.form.kind == SignalKind::kWeighted) proposal.resize(columns);
    heap.reserve(static_cast<std::size_t>(settings.form.slots));
    draws.resize(static_cast<std::size_t>(settings.form.slots));
  }
};

// The worst of those kept stands first in a heap; a block whose largest is not above it is passed over.
void select_top(const SignalForm& form, Workspace& work) {
  const std::int64_t columns = form.vocabulary_size;
  const auto k = static_cast<std::size_t>(form.slots);
  work.heap.clear();
  for (std::int64_t begin = 0; begin < columns; begin += 64) {
    const std::int64_t end = std::min<std::int64_t>(columns, begin + 64);
    if (work.heap.size() == k && !(highest_of(work.z.data() + begin, end - begin) > work.heap.front().value)) continue;
    for (std::int64_t i = begin; i < end; ++i) {
      const Candidate candidate{.value = work.z[static_cast<std::size_t>(i)], .id = static_cast<std::int32_t>(i)};
      if (work.heap.size() == k) {
        if (!(candidate.value > work.heap.front().value)) continue;
        std::pop_heap(work.heap.begin(), work.heap.end(), better);
        work.heap.back() = candidate;
      } else {
        work.heap.push_back(candidate);
      }
      std::push_heap(work.heap.begin(), work.heap.end(), better);
    }
  }
  std::sort_heap(work.heap.begin(), work.heap.end(), better);
}

void top_k_row(const SignalForm& form, Workspace& work, std::int32_t* ids, std::uint32_t* codes, float* tail) {
  select_top(form, work);
  double kept = 0;
  for (const Candidate& each : work.heap) kept += work.e[static_cast<std::size_t>(each.id)];
  std::vector<float>& e = work.e;
  std::size_t n = 0;
  std::vector<float> values(work.heap.size());
  // The others are summed by themselves: a small tail as a difference from 1 would be rounding alone.
  for (const Candidate& each : work.heap) values[n++] = std::exchange(e[static_cast<std::size_t>(each.id)], 0.0f);
  const double rest = sum_of_row(e.data(), form.vocabulary_size), total = kept + rest;
  for (n = 0; n < work.heap.size(); ++n) {
    ids[n] = work.heap[n].id;
    codes[n] = narrow(static_cast<float>(values[n] / total), form.mantissa_bits());
  }
  *tail = static_cast<float>(rest / total);
}

// Ids drawn in proportion to e, sorted.
void draw(const std::vector<float>& e, std::uint64_t seed, Workspace& work) {
  double total = 0;
  for (std::size_t block = 0; block < work.block_sums.size(); ++block) work.cumulative[block] = total += static_cast<double>(work.block_sums[block]);
  for (std::size_t j = 0; j < work.draws.size(); ++j) {
    const double target = static_cast<double>(mix64(seed + j) >> 11) * 0x1p-53 * total;
    const auto found = std::upper_bound(work.cumulative.begin(), work.cumulative.end(), target);
    const auto block = static_cast<std::size_t>(std::min(found, work.cumulative.end() - 1) - work.cumulative.begin());
    double sum = block == 0 ? 0 : work.cumulative[block - 1];
    const std::size_t begin = block * kBlock, end = std::min(e.size(), begin + kBlock);
    std::size_t last = begin;
    for (std::size_t i = begin; i < end; ++i) {
      if (e[i] <= 0) continue;
      last = i;  // sums of a block in another order differ in their last bits, so the search may run off the end
      sum += static_cast<double>(e[i]);
      if (sum > target) break;
    }
    work.draws[j] = static_cast<std::int32_t>(last);
  }
  std::sort(work.draws.begin(), work.draws.end());
}

void sampled_row(const RowSettings& settings, Workspace& work, float highest, std::uint64_t seed, std::int32_t* ids, std::uint32_t* codes) {
  const SignalForm& form = settings.form;
  const bool weighted = form.kind == SignalKind::kWeighted;
  double factor = 0;  // of e / proposal: (sum of the proposal / sum of e) / draws
  if (weighted) {
    double sum = 0, proposal_sum = 0;
    for (const float part : work.block_sums) sum += static_cast<double>(part);
    exp_row(work.z.data(), highest, static_cast<float>(settings.proposal_exponent), work.proposal.data(), work.block_sums.data(), form.vocabulary_size);
    for (const float part : work.block_sums) proposal_sum += static_cast<double>(part);
    factor = proposal_sum / sum / static_cast<double>(form.slots);
  }
  draw(weighted ? work.proposal : work.e, seed, work);
  std::size_t entries = 0;
  for (std::size_t j = 0; j < work.draws.size();) {
    const std::int32_t id = work.draws[j];
    std::uint32_t count = 0;
    for (; j < work.draws.size() && work.draws[j] == id; ++j) ++count;
    ids[entries] = id;
    codes[entries] = count;
    if (weighted) {
      const auto place = static_cast<std::size_t>(id);
      const double weight = count * factor * static_cast<double>(work.e[place]) / static_cast<double>(work.proposal[place]);
      const float share = std::min(1.0f, static_cast<float>(weight / kLargestWeight));
      codes[entries] = narrow_unbiased(share, kWeightMantissaBits, static_cast<std::uint32_t>(mix64(~seed + static_cast<std::uint64_t>(id)) >> 32));
    }
    ++entries;
  }
  std::fill(ids + entries, ids + form.slots, -1);
  std::fill(codes + entries, codes + form.slots, 0u);
}

}  // namespace

std::int64_t signal_of_rows(const RowSettings& settings, const at::Tensor& logits_KV, const std::uint64_t* seeds, std::int32_t* ids, std::uint32_t* codes, float* tails) {
  const SignalForm& form = settings.form;
  const std::int64_t rows = logits_KV.size(0), stride = logits_KV.stride(0), slots = form.slots;
  if (logits_KV.dim() != 2 || logits_KV.size(1) < static_cast<std::int64_t>(form.vocabulary_size) || logits_KV.stride(1) != 1)
    fail(ErrorKind::kBug, "logits ", logits_KV.sizes(), " for a signal over ", form.vocabulary_size, " ids");
  const auto scale = static_cast<float>(1 / settings.temperature);
  std::atomic<std::int64_t> first_bad = rows;
  const auto run = [&](const auto* logits) {
    at::parallel_for(0, rows, 2, [&](std::int64_t begin, std::int64_t end) {
      Workspace work(settings);
      for (std::int64_t row = begin; row < end; ++row) {
        const float highest = scale_row(logits + row * stride, scale, work.z.data(), form.vocabulary_size);
        exp_row(work.z.data(), highest, 1, work.e.data(), work.block_sums.data(), form.vocabulary_size);
        double sum = 0;
        for (const float part : work.block_sums) sum += static_cast<double>(part);
        if (!std::isfinite(sum)) {
          for (std::int64_t seen = first_bad; row < seen && !first_bad.compare_exchange_weak(seen, row);) continue;
          continue;
        }
        if (form.kind == SignalKind::kTopK) top_k_row(form, work, ids + row * slots, codes + row * slots, tails + row);
        else sampled_row(settings, work, highest, seeds[row], ids + row * slots, codes + row * slots), tails[row] = 0;
      }
    });
  };
  if (logits_KV.scalar_type() == at::kFloat) run(logits_KV.const_data_ptr<float>());
  else run(logits_KV.const_data_ptr<at::BFloat16>());
  return first_bad == rows ? -1 : first_bad.load();
}

}  // namespace alambic::distill
