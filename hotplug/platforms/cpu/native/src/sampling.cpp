// See sampling.h. Filters look for their threshold among few candidates instead of sorting the vocabulary: the k-th
// largest is not below the k-th largest of the tops of blocks, and what a nucleus of mass p leaves out of V tokens
// weighs 1 - p together, so that no token lighter than (1 - p) / V is in it.
#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>

namespace hotplug {
namespace {

constexpr int64_t kNoToken = -2;  // NO_TOKEN in hotplug/core/ops/sampling.py

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// In [0, 1): SplitMix64's finalizer, as `uniform` in hotplug/core/ops/sampling.py.
double uniform(int64_t seed, int64_t counter) {
    uint64_t x = static_cast<uint64_t>(seed) + (static_cast<uint64_t>(counter) + 1) * 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    x = x ^ x >> 31;
    return static_cast<double>(x >> 11) * 0x1p-53;
}

struct Candidate {
    float value, weight;
};

// What a row needs beside its scores: of `vocab` values each but for tops and sums.
struct Scratch {
    float *scaled, *other, *weights, *tops;
    Candidate* candidates;
    double* sums;

    static int64_t bytes(int64_t vocab) {
        return 8 * divide_up(vocab, kShares) + (8 + 3 * 4) * vocab + 4 * divide_up(vocab, kTopOf) + 64;
    }

    Scratch(uint8_t* memory, int64_t vocab) {
        sums = reinterpret_cast<double*>(memory);
        candidates = reinterpret_cast<Candidate*>(sums + divide_up(vocab, kShares));
        scaled = reinterpret_cast<float*>(candidates + vocab);
        other = scaled + vocab;
        weights = other + vocab;
        tops = weights + vocab;
    }
};

float kth_largest(float* values, int64_t count, int64_t k) {
    std::nth_element(values, values + k - 1, values + count, std::greater<float>());
    return values[k - 1];
}

// The value of the last candidate, from the largest down, ahead of which there is less than `mass`; that of the first
// at least.
float last_within(Candidate* candidates, int64_t count, double mass) {
    const auto before = [](const Candidate& a, const Candidate& b) { return a.value > b.value; };
    int64_t begin = 0, end = count;
    double ahead = 0;  // of `begin`, which is within
    while (end - begin > 16) {
        const int64_t middle = begin + (end - begin) / 2;
        std::nth_element(candidates + begin, candidates + middle, candidates + end, before);
        double upper = ahead;
        for (int64_t i = begin; i < middle; ++i) upper += static_cast<double>(candidates[i].weight);
        if (upper < mass) {
            begin = middle, ahead = upper;
        } else {
            end = middle;
        }
    }
    std::sort(candidates + begin, candidates + end, before);
    float last = candidates[begin].value;
    for (int64_t i = begin; i < end && ahead < mass; ++i) {
        last = candidates[i].value;
        ahead += static_cast<double>(candidates[i].weight);
    }
    return last;
}

// The smallest scaled score that top-k, then top-p, keep.
float threshold(const RowKernels& kernels, const Scratch& s, int64_t vocab, int64_t top_k, float top_p) {
    float least = -INFINITY;
    int64_t count = 0;  // of candidates in `other`
    const bool by_count = top_k > 0 && top_k < vocab;
    if (by_count) {
        const int64_t blocks = divide_up(vocab, kTopOf);
        float bound = -INFINITY;
        if (2 * top_k <= blocks) {
            std::copy(s.tops, s.tops + blocks, s.other);
            bound = kth_largest(s.other, blocks, top_k);
        }
        count = kernels.at_least(s.scaled, vocab, bound, s.other);
        least = kth_largest(s.other, count, top_k);
    }
    if (!(top_p < 1.0f)) return least;
    double mass = 0;
    if (by_count) {
        count = kernels.at_least(s.other, count, least, s.other);
        mass = kernels.exponentials(s.other, count, -INFINITY, s.weights);
    } else {
        mass = kernels.exponentials(s.scaled, vocab, -INFINITY, s.weights);
        const double light = (1.0 - static_cast<double>(top_p)) * mass / static_cast<double>(vocab);
        const double bound = top_p > 0 ? std::log(light) - 1e-3 : 0.0;  // a little less, for what rounding changes
        count = kernels.at_least(s.scaled, vocab, static_cast<float>(std::min(bound, 0.0)), s.other);
        kernels.exponentials(s.other, count, -INFINITY, s.weights);
    }
    for (int64_t i = 0; i < count; ++i) s.candidates[i] = {s.other[i], s.weights[i]};
    return std::max(least, last_within(s.candidates, count, static_cast<double>(top_p) * mass));
}

// The first of the shares in s.weights up to which they sum to more than `target` of their sum.
int64_t draw(const Scratch& s, int64_t vocab, double target) {
    const int64_t blocks = divide_up(vocab, kShares);
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b) total += s.sums[b];
    target *= total;
    double ahead = 0;
    int64_t block = 0;
    for (; block + 1 < blocks && ahead + s.sums[block] <= target; ++block) ahead += s.sums[block];
    for (int64_t i = block * kShares; i < vocab; ++i) {
        ahead += static_cast<double>(s.weights[i]);
        if (ahead > target) return i;
    }
    return vocab - 1;
}

// The best token, if its score is finite: no score of the row is NaN then either.
int64_t best_of(const RowKernels& kernels, const float* logits, int64_t vocab) {
    const int64_t best = kernels.argmax(logits, vocab);
    return std::isfinite(logits[best]) ? best : kNoToken;
}

int64_t sample_one(const RowKernels& kernels, const Scratch& s, const float* logits, int64_t vocab, float temperature,
                   int64_t top_k, float top_p, float min_p, double where) {
    const int64_t best = best_of(kernels, logits, vocab);
    if (temperature == 0.0f || best == kNoToken) return best;
    const float most = logits[best];
    if (std::isnan(temperature)) return vocab - 1;  // every share is NaN then, and no sum of them above any target
    kernels.scale(logits, vocab, most, temperature, s.scaled, s.tops);
    const float least = threshold(kernels, s, vocab, top_k, top_p);
    const float total = static_cast<float>(kernels.exponentials(s.scaled, vocab, least, s.weights));
    kernels.shares(s.weights, vocab, total, min_p * (1.0f / total), s.sums);  // the best has e^0
    return draw(s, vocab, where);
}

}  // namespace

int argmax(const hp_argmax_call& c, const RowKernels& kernels, Pool& pool) {
    if (c.rows < 0 || c.vocab <= 0) return HP_BAD_ARGUMENT;
    pool.run_rows(c.rows, c.vocab, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) c.out[i] = best_of(kernels, c.logits + i * c.stride, c.vocab);
    });
    return HP_OK;
}

int sample(const hp_sample_call& c, const RowKernels& kernels, Pool& pool, Allocate allocate, void* context) {
    if (c.rows < 0 || c.vocab <= 0) return HP_BAD_ARGUMENT;
    for (int64_t i = 0; i < c.rows; ++i) {
        const int64_t entry = c.batch_rows == nullptr ? i : c.batch_rows[i];
        if (entry < 0 || entry >= c.batch) return HP_BAD_ARGUMENT;
    }
    if (c.rows == 0) return HP_OK;
    // Rows of an item go one after the other through memory of its own.
    const int64_t items = std::min<int64_t>(c.rows, 4 * pool.threads()), size = Scratch::bytes(c.vocab) / 64 * 64;
    auto* memory = static_cast<uint8_t*>(allocate(context, static_cast<size_t>(items * size)));
    if (memory == nullptr) return HP_OUT_OF_MEMORY;
    pool.run(items, [&](int64_t item) {
        const Scratch scratch(memory + item * size, c.vocab);
        for (int64_t i = item; i < c.rows; i += items) {
            const int64_t entry = c.batch_rows == nullptr ? i : c.batch_rows[i];
            c.out[i] = sample_one(kernels, scratch, c.logits + i * c.stride, c.vocab, c.temperature[entry],
                                  c.top_k == nullptr ? 0 : c.top_k[entry], c.top_p == nullptr ? 1.0f : c.top_p[entry],
                                  c.min_p == nullptr ? 0.0f : c.min_p[entry], uniform(c.seeds[entry], c.counters[i]));
        }
    });
    return HP_OK;
}

}  // namespace hotplug
