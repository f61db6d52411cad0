// Attention of prompt chunks for AMX, with the accuracy of float32: a factor is the sum of two bfloat16, its rounding
// and what that leaves, and three of the four products are summed, in float32. The fourth is below 2^-17 of the whole.
//
// Everything is transposed, so that a lane is a row (a query of a head) from scores to results: scores are keys times
// queries, results values times the exponentials of scores. Tiles of the left factor hold 16 keys, or 16 dims of
// values, by 32 of what is summed over; those of the right factor pairs of that by 16 rows. The pairs of a group of 32
// dims are p and p + 16, those of keys are neighbours. Scores are in units of ln 2.
//
// What is not finite gives NaN in the rows that see it.
#include <immintrin.h>

#include "amx.h"
#include "attention.h"

namespace hotplug {
namespace {

#include "amx_tiles.h"
#include "attention_heads.h"

// rows[j] = the `count` heads from position `begin` on, as float32: in place, or converted into `wide` [kKeys][dim].
void heads_of(const AttentionCall& c, const Places& at, const int64_t* blocks, int64_t begin, int64_t count,
              float* wide, const float** rows) {
    Walk walk(c, at, blocks, begin);
    for (int64_t j = 0; j < count; ++j) {
        const int64_t index = walk.next();
        if (c.cache_kind == 0) {
            rows[j] = static_cast<const float*>(at.base) + index;
            continue;
        }
        const auto* narrow = static_cast<const uint16_t*>(at.base) + index;
        float* to = wide + j * c.dim;
        for (int64_t d = 0; d < c.dim; d += 8) {
            const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(narrow + d));
            _mm256_storeu_ps(to + d, c.cache_kind == 2
                                         ? _mm256_cvtph_ps(halves)
                                         : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)));
        }
        rows[j] = to;
    }
}

using Vec = __m512;
using Ints = __m512i;

constexpr int64_t kKeys = 128;      // whose tiles are made for all rows of an item
constexpr int64_t kSum = 32;        // dims or keys of a tile that are summed over
constexpr int64_t kRows = 16;       // of a tile
constexpr int64_t kLeastRows = 32;  // below it making tiles of the keys takes longer than it saves
constexpr float kInfinity = __builtin_inff();

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec set(float x) { return _mm512_set1_ps(x); }

// 2^x for x <= 0; 0 below -100, because results without a normal exponent take a hundred times as long. NaN stays. The
// polynomial is Cephes'.
inline Vec power(Vec x) {
    const __mmask16 some = _mm512_cmp_ps_mask(x, set(-100.0f), _CMP_NLT_UQ);
    x = _mm512_max_ps(set(-100.0f), x);
    const Vec n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Vec r = _mm512_sub_ps(x, n);
    Vec p = set(1.535336188e-4f);
    p = _mm512_fmadd_ps(p, r, set(1.339887440e-3f));
    p = _mm512_fmadd_ps(p, r, set(9.618437358e-3f));
    p = _mm512_fmadd_ps(p, r, set(5.550332471e-2f));
    p = _mm512_fmadd_ps(p, r, set(2.402264791e-1f));
    p = _mm512_fmadd_ps(p, r, set(6.931472029e-1f));
    p = _mm512_fmadd_ps(p, r, set(1.0f));
    return _mm512_maskz_scalef_ps(some, p, n);
}

// Tiles of the rounded values, and of what rounding left.
struct Tiles {
    uint8_t *high, *low;

    Tiles at(int64_t tile, int64_t line = 0) const {
        const int64_t offset = tile * kTileBytes + line * 64;
        return {high + offset, low + offset};
    }
};

struct Pairs {
    Ints high, low;
};

// 16 pairs in two parts, each rounded to nearest with halves up.
inline Pairs pairs_of(Vec first, Vec second) {
    const Ints upper = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000)), half = _mm512_set1_epi32(0x8000);
    const auto raised = [&](Vec x) { return _mm512_add_epi32(_mm512_castps_si512(x), half); };
    const auto rounded = [&](Ints x) { return _mm512_castsi512_ps(_mm512_and_si512(x, upper)); };
    const auto joined = [&](Ints a, Ints b) {  // the upper half of b, and below it that of a
        return _mm512_ternarylogic_epi32(upper, b, _mm512_srli_epi32(a, 16), 0xca);
    };
    const Ints a = raised(first), b = raised(second);
    return {joined(a, b), joined(raised(_mm512_sub_ps(first, rounded(a))), raised(_mm512_sub_ps(second, rounded(b))))};
}

inline void store(const Tiles& to, const Pairs& pairs) {
    _mm512_store_si512(to.high, pairs.high);
    _mm512_store_si512(to.low, pairs.low);
}

// 16 x 16 words of four bytes, in place.
inline void transpose(Ints* a) {
    Ints b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 4) {
        const Ints low0 = _mm512_unpacklo_epi32(a[i], a[i + 1]), high0 = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        const Ints low1 = _mm512_unpacklo_epi32(a[i + 2], a[i + 3]), high1 = _mm512_unpackhi_epi32(a[i + 2], a[i + 3]);
        b[i] = _mm512_unpacklo_epi64(low0, low1);
        b[i + 1] = _mm512_unpackhi_epi64(low0, low1);
        b[i + 2] = _mm512_unpacklo_epi64(high0, high1);
        b[i + 3] = _mm512_unpackhi_epi64(high0, high1);
    }
    // b[4 k + j] holds in its part m column 4 m + j of rows 4 k .. 4 k + 3.
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const Ints even0 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88), odd0 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
        const Ints even1 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
        const Ints odd1 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
        a[j] = _mm512_shuffle_i32x4(even0, even1, 0x88);
        a[4 + j] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
        a[8 + j] = _mm512_shuffle_i32x4(even0, even1, 0xdd);
        a[12 + j] = _mm512_shuffle_i32x4(odd0, odd1, 0xdd);
    }
}

// A line of each pair to a line of each lane.
inline void store_transposed(const Tiles& to, Pairs* pairs) {
    for (int part = 0; part < 2; ++part) {
        Ints words[16];
        for (int i = 0; i < 16; ++i) words[i] = part ? pairs[i].low : pairs[i].high;
        transpose(words);
        for (int i = 0; i < 16; ++i) _mm512_store_si512((part ? to.low : to.high) + 64 * i, words[i]);
    }
}

// One part of COUNT left tiles, which lie `next` apart, with a part of the right one in register 6 or 7.
template <int COUNT>
inline void times_high(const uint8_t* a, int64_t next) {
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a + next, 64);
    _tile_dpbf16ps(1, 5, 6);
    if (COUNT == 4) {
        _tile_loadd(4, a + 2 * next, 64);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(5, a + 3 * next, 64);
        _tile_dpbf16ps(3, 5, 6);
    }
}
template <int COUNT>
inline void times_low(const uint8_t* a, int64_t next) {
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 7);
    _tile_loadd(5, a + next, 64);
    _tile_dpbf16ps(1, 5, 7);
    if (COUNT == 4) {
        _tile_loadd(4, a + 2 * next, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_loadd(5, a + 3 * next, 64);
        _tile_dpbf16ps(3, 5, 7);
    }
}

// out[i] = left[i] right, summed over `groups` tiles, for COUNT tiles i that follow each other; `fresh`: instead of +=.
template <int COUNT>
void product(const Tiles& left, int64_t stride, bool exact, const Tiles& right, int64_t groups, bool fresh, float* out) {
    const int64_t next = stride * kTileBytes;
    settle();
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
        if (COUNT == 4) _tile_zero(2);
        if (COUNT == 4) _tile_zero(3);
    } else {
        _tile_loadd(0, out, 64);
        _tile_loadd(1, out + 256, 64);
        if (COUNT == 4) _tile_loadd(2, out + 512, 64);
        if (COUNT == 4) _tile_loadd(3, out + 768, 64);
    }
    for (int64_t g = 0; g < groups; ++g) {
        const Tiles a = left.at(g), b = right.at(g);
        _tile_loadd(6, b.high, 64);
        _tile_loadd(7, b.low, 64);
        times_high<COUNT>(a.high, next);
        times_low<COUNT>(a.high, next);
        if (!exact) times_high<COUNT>(a.low, next);
    }
    _tile_stored(0, out, 64);
    _tile_stored(1, out + 256, 64);
    if (COUNT == 4) _tile_stored(2, out + 512, 64);
    if (COUNT == 4) _tile_stored(3, out + 768, 64);
}

// The same for `count` tiles, an even number. `exact` says that the left factor has no lesser part.
void products(const Tiles& left, int64_t stride, bool exact, int64_t count, const Tiles& right, int64_t groups,
              bool fresh, float* out) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) product<4>(left.at(i * stride), stride, exact, right, groups, fresh, out + 256 * i);
    if (i < count) product<2>(left.at(i * stride), stride, exact, right, groups, fresh, out + 256 * i);
}

// What the lanes of a tile of rows have come to.
struct Lanes {
    alignas(64) int32_t position[kRows];  // of the query; below all keys where there is no row
    alignas(64) float top[kRows], sum[kRows];
    int64_t first, last;  // position
    bool whole, begun;
};

// Scores of `count` keys, of which a lane sees those `from` .. `to` unless it sees `all`, to tiles of their
// exponentials; the lanes' largest score and sum, and the results so far, are brought up to date.
inline void soften(float* scores, int64_t count, bool all, Ints from, Ints to, Lanes& lanes, float* mixed, int64_t dim,
                   const Tiles& out) {
    const Vec before = load(lanes.top);
    Vec most[4] = {before, before, before, before};
    for (int64_t j = 0; j < count; j += 4) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            float* at = scores + (j + i) * kRows;
            Vec score = load(at);
            if (!all) {
                const Ints key = _mm512_set1_epi32(static_cast<int32_t>(j + i));
                const __mmask16 seen = _mm512_cmple_epi32_mask(from, key) & _mm512_cmple_epi32_mask(key, to);
                score = _mm512_mask_mov_ps(set(-kInfinity), seen, score);
                store(at, score);
            }
            most[i] = _mm512_max_ps(most[i], score);
        }
    }
    const Vec top = _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3]));
    const __mmask16 none = _mm512_cmp_ps_mask(top, set(-kInfinity), _CMP_EQ_OQ);
    const Vec shift = _mm512_mask_mov_ps(top, none, _mm512_setzero_ps());
    const Vec keep = power(_mm512_sub_ps(before, shift));
    store(lanes.top, top);
    if (lanes.begun && _mm512_cmp_ps_mask(keep, set(1.0f), _CMP_NEQ_UQ)) {
        for (int64_t d = 0; d < dim; ++d) store(mixed + d * kRows, _mm512_mul_ps(load(mixed + d * kRows), keep));
    }
    Vec total[2] = {_mm512_mul_ps(load(lanes.sum), keep), _mm512_setzero_ps()};
    for (int64_t j = 0; j < count; j += 2) {
        const Vec first = power(_mm512_sub_ps(load(scores + j * kRows), shift));
        const Vec second = power(_mm512_sub_ps(load(scores + (j + 1) * kRows), shift));
        total[0] = _mm512_add_ps(total[0], first);
        total[1] = _mm512_add_ps(total[1], second);
        store(out.at(j / kSum, j % kSum / 2), pairs_of(first, second));
    }
    store(lanes.sum, _mm512_add_ps(total[0], total[1]));
}

// Queries to tiles [rows / 16][dim / 32].
void make_queries(const AttentionCall& c, const AttentionRows& rows, const Tiles& out) {
    const Vec scale = set(static_cast<float>(c.scale * 1.4426950408889634));
    const int64_t count = rows.rows(), groups = c.dim / kSum;
    for (int64_t first = 0; first < count; first += kRows) {
        for (int64_t g = 0; g < groups; ++g) {
            Pairs pairs[kRows] = {};
            for (int64_t i = 0; i < kRows && first + i < count; ++i) {
                const int64_t row = first + i;
                const float* from = c.q + (rows.first_query + row / rows.heads) * c.q_token_stride +
                                    (rows.first_head + row % rows.heads) * c.q_head_stride + g * kSum;
                pairs[i] = pairs_of(_mm512_mul_ps(load(from), scale), _mm512_mul_ps(load(from + 16), scale));
            }
            store_transposed(out.at(first / kRows * groups + g), pairs);
        }
    }
}

// Keys to tiles [keys / 16][dim / 32] and values to tiles [dim / 16][keys / 32], with zeros for what lacks.
void make_keys(const AttentionCall& c, const int64_t* blocks, const Places& k_at, const Places& v_at, int64_t begin,
               int64_t count, const Tiles& keys, const Tiles& values) {
    alignas(64) float wide[kSum * kMaxHeadDim];
    alignas(64) static const float nothing[kMaxHeadDim] = {};
    const int64_t groups = c.dim / kSum, padded = (count + kSum - 1) / kSum;
    const float* rows[kSum];
    for (int64_t part = 0; part < padded; ++part) {
        const int64_t first = part * kSum, n = count - first < kSum ? count - first : kSum;
        heads_of(c, k_at, blocks, begin + first, n, wide, rows);
        for (int64_t j = n; j < kSum; ++j) rows[j] = nothing;
        for (int64_t j = 0; j < kSum; ++j) {
            for (int64_t g = 0; g < groups; ++g) {
                const float* from = rows[j] + g * kSum;
                store(keys.at((first + j) / 16 * groups + g, j % 16), pairs_of(load(from), load(from + 16)));
            }
        }
        heads_of(c, v_at, blocks, begin + first, n, wide, rows);
        for (int64_t j = n; j < kSum; ++j) rows[j] = nothing;
        for (int64_t d = 0; d < c.dim; d += 16) {
            Pairs pairs[16];
            for (int64_t j = 0; j < 16; ++j) pairs[j] = pairs_of(load(rows[2 * j] + d), load(rows[2 * j + 1] + d));
            store_transposed(values.at(d / 16 * padded + part), pairs);
        }
    }
}

// Results of a tile of rows, [dim][16], to where they belong.
void finish(const AttentionCall& c, const AttentionRows& rows, int64_t first, const Lanes& lanes, const float* mixed,
            const AttentionPart* part) {
    const int64_t count = rows.rows() - first < kRows ? rows.rows() - first : kRows;
    Vec factor = set(1.0f);
    if (part != nullptr) {
        for (int64_t i = 0; i < count; ++i) {
            part->top[first + i] = lanes.top[i] * 0.69314718055994531f;
            part->sum[first + i] = lanes.sum[i];
        }
    } else {
        Vec sum = load(lanes.sum);
        const __mmask16 none = _mm512_cmp_ps_mask(sum, _mm512_setzero_ps(), _CMP_EQ_OQ);
        if (c.sinks != nullptr) {
            alignas(64) float sinks[kRows];
            for (int64_t i = 0; i < kRows; ++i) {
                sinks[i] = c.sinks[rows.first_head + (first + i) % rows.heads] * 1.44269504088896341f;
            }
            const Vec top = load(lanes.top), sink = load(sinks), most = _mm512_max_ps(sink, top);
            factor = power(_mm512_sub_ps(top, most));
            sum = _mm512_fmadd_ps(sum, factor, power(_mm512_sub_ps(sink, most)));
        }
        factor = _mm512_mask_mov_ps(_mm512_div_ps(factor, sum), none, _mm512_setzero_ps());
    }
    for (int64_t d = 0; d < c.dim; d += 16) {
        Ints words[16];
        for (int64_t i = 0; i < 16; ++i) {
            const Vec value = lanes.begun ? load(mixed + (d + i) * kRows) : _mm512_setzero_ps();
            words[i] = _mm512_castps_si512(_mm512_mul_ps(value, factor));
        }
        transpose(words);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t row = first + i, query = rows.first_query + row / rows.heads;
            const int64_t head = rows.first_head + row % rows.heads;
            float* to = part != nullptr ? part->mixed + row * c.dim : c.out + (query * c.heads + head) * c.dim;
            _mm512_storeu_si512(to + d, words[i]);
        }
    }
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

void attend(const AttentionCall& c, const AttentionRows& rows, int64_t begin, int64_t end, const AttentionPart* part) {
    const int64_t count = rows.rows(), dim = c.dim, groups = dim / kSum;
    if (count < kLeastRows) return kAttentionAvx512.attend(c, rows, begin, end, part);
    constexpr int64_t kTiles = kMaxAttentionRows / kRows, kParts = kMaxHeadDim * 2;  // bytes of a row's part
    alignas(64) uint8_t q[2][kMaxAttentionRows * kParts], k[2][kKeys * kParts], v[2][kKeys * kParts];
    alignas(64) uint8_t weights[2][kKeys * kRows * 2];
    alignas(64) float scores[kKeys * kRows], mixed[kMaxAttentionRows * kMaxHeadDim];
    Lanes lanes[kTiles];
    const Tiles queries{q[0], q[1]}, keys{k[0], k[1]}, values{v[0], v[1]}, shares{weights[0], weights[1]};
    const int64_t tiles = (count + kRows - 1) / kRows;
    make_queries(c, rows, queries);
    for (int64_t t = 0; t < tiles; ++t) {
        Lanes& mine = lanes[t];
        const int64_t last = least(count, (t + 1) * kRows) - 1;
        for (int64_t i = 0; i < kRows; ++i) {
            const int64_t row = t * kRows + i;
            mine.position[i] = row < count ? static_cast<int32_t>(rows.position + row / rows.heads) : -1;
            mine.top[i] = -kInfinity;
            mine.sum[i] = 0.0f;
        }
        mine.first = rows.position + t * kRows / rows.heads;
        mine.last = rows.position + last / rows.heads;
        mine.whole = last == (t + 1) * kRows - 1;
        mine.begun = false;
    }
    const int64_t* blocks = c.block_table + rows.request * c.table_stride;
    const Places k_at{c.k, c.k_block_stride, c.k_token_stride, rows.kv_head * c.k_head_stride};
    const Places v_at{c.v, c.v_block_stride, c.v_token_stride, rows.kv_head * c.v_head_stride};
    const bool exact = c.cache_kind == 1;
    const int64_t window = least(c.window, int64_t{1} << 30);
    tiles_on();
    for (; begin < end; begin += kKeys) {
        const int64_t n = least(kKeys, end - begin), padded = (n + kSum - 1) / kSum;
        make_keys(c, blocks, k_at, v_at, begin, n, keys, values);
        for (int64_t t = 0; t < tiles; ++t) {
            Lanes& mine = lanes[t];
            const int64_t seen = least(n, mine.last + 1 - begin);  // of these keys, by any lane
            if (seen <= 0 || (c.window && mine.first - c.window >= begin + n - 1)) continue;
            const int64_t parts = (seen + kSum - 1) / kSum, wide = parts * kSum;
            products(keys, groups, exact, 2 * parts, queries.at(t * groups), groups, true, scores);
            const bool all = mine.whole && wide <= n && mine.first >= begin + wide - 1 &&
                             (!c.window || mine.last - c.window < begin);
            const Ints position = _mm512_sub_epi32(_mm512_load_si512(mine.position),
                                                   _mm512_set1_epi32(static_cast<int32_t>(begin)));
            const Ints to = _mm512_min_epi32(position, _mm512_set1_epi32(static_cast<int32_t>(n - 1)));
            const Ints from = c.window ? _mm512_sub_epi32(position, _mm512_set1_epi32(static_cast<int32_t>(window - 1)))
                                       : _mm512_setzero_si512();
            float* const results = mixed + t * kRows * dim;
            soften(scores, wide, all, from, to, mine, results, dim, shares);
            products(values, padded, exact, dim / 16, shares, parts, !mine.begun, results);
            mine.begun = true;
        }
    }
    tiles_off();
    for (int64_t t = 0; t < tiles; ++t) finish(c, rows, t * kRows, lanes[t], mixed + t * kRows * dim, part);
}

void merge(const AttentionCall& c, const AttentionRows& rows, const AttentionPart* parts, int64_t count) {
    kAttentionAvx512.merge(c, rows, parts, count);
}

}  // namespace

const AttentionKernels kAttentionAmx = {attend, merge, kSum, 96};

}  // namespace hotplug
