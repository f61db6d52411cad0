// The kernels of attention.h over the vectors of one instruction set. A file includes this inside its own unnamed
// namespace after it has defined `Vec`, `kLanes`, `kColumns` and the functions on `Vec` used below, so
// that nothing is shared with other instruction sets.

constexpr int64_t kKeys = 64;    // of a tile
constexpr int64_t kFewRows = 8;  // up to so many rows a transposed tile of keys does not pay

inline float exponential(float x) { return first_of(exponential(set(x))); }

// cap * tanh(s / cap).
inline Vec capped(Vec s, Vec cap) {
    const Vec twice = least(set(88.0f), s * set(2.0f) / cap);
    return cap * (set(1.0f) - set(2.0f) / (exponential(twice) + set(1.0f)));
}

// out[r][c] of R rows and C vectors = keep[r] * out[r][c] + sum over k < count of a[r][k] * b[k][c]; without `keep`,
// what is there counts nothing. The rows of b are of T: narrow ones are widened as they are loaded.
template <class T, int R, int C>
inline void product_block(const float* a, int64_t a_stride, const void* const* b, int64_t column, int64_t count,
                          const float* keep, float* out, int64_t out_stride) {
    Vec sum[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sum[r][c] = set(0.0f);
    }
    for (int64_t k = 0; k < count; ++k) {
        const T* row = static_cast<const T*>(b[k]) + column;
        Vec v[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) v[c] = load(row + c * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Vec x = set(a[r * a_stride + k]);
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) sum[r][c] = fma(x, v[c], sum[r][c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        float* target = out + r * out_stride + column;
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            if (keep != nullptr) sum[r][c] = fma(set(keep[r]), load(target + c * kLanes), sum[r][c]);
            store(target + c * kLanes, sum[r][c]);
        }
    }
}

template <class T, int R, int C>
inline void product_columns(const float* a, int64_t a_stride, const void* const* b, int64_t column, int64_t columns,
                            int64_t count, const float* keep, float* out, int64_t out_stride) {
    for (; column + C * kLanes <= columns; column += C * kLanes) {
        product_block<T, R, C>(a, a_stride, b, column, count, keep, out, out_stride);
    }
    if constexpr (C > 1) {
        if (column < columns) {
            product_columns<T, R, C / 2>(a, a_stride, b, column, columns, count, keep, out, out_stride);
        }
    }
}

// R rows with as many columns at once as there are registers for.
template <class T, int R>
void product_rows(const float* a, int64_t a_stride, const void* const* b, int64_t columns, int64_t count,
                  const float* keep, float* out, int64_t out_stride) {
    constexpr int C = R == 1 ? 8 : R <= 3 ? 4 : kColumns;
    product_columns<T, R, C>(a, a_stride, b, 0, columns, count, keep, out, out_stride);
}

// `product_block` of any number of rows and of `columns`, a multiple of kLanes.
template <class T>
void product(const float* a, int64_t a_stride, int64_t rows, const void* const* b, int64_t columns, int64_t count,
             const float* keep, float* out, int64_t out_stride) {
    int64_t r = 0;
    const auto next = [&](auto take, int64_t step) {
        take(a + r * a_stride, a_stride, b, columns, count, keep == nullptr ? nullptr : keep + r, out + r * out_stride,
             out_stride);
        r += step;
    };
    while (rows - r >= 6) next(product_rows<T, 6>, 6);
    switch (rows - r) {
        case 5: next(product_rows<T, 5>, 5); break;
        case 4: next(product_rows<T, 4>, 4); break;
        case 3: next(product_rows<T, 3>, 3); break;
        case 2: next(product_rows<T, 2>, 2); break;
        case 1: next(product_rows<T, 1>, 1); break;
        default: break;
    }
}

// Asks memory for the head at `p`. The processor's own prefetcher does not follow heads that lie apart.
inline void ask(const void* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i);
}

// scores[r][j] of R rows for `count` keys, a multiple of 4, as scalar products; asks for what is `soon` read meanwhile,
// two heads a key.
template <class T, int R>
inline void dots_of(const float* q, int64_t dim, const void* const* keys, int64_t count, const void* const* soon,
                    float* scores) {
    for (int64_t j = 0; j < count; j += 4) {
        if (soon != nullptr) {
            for (int64_t i = 2 * j; i < 2 * j + 8; ++i) ask(soon[i], dim * static_cast<int64_t>(sizeof(T)));
        }
        Vec sum[R][4];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
            for (int i = 0; i < 4; ++i) sum[r][i] = set(0.0f);
        }
        for (int64_t d = 0; d < dim; d += kLanes) {
            Vec x[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) x[r] = load(q + r * dim + d);
#pragma GCC unroll 8
            for (int i = 0; i < 4; ++i) {
                const Vec key = load(static_cast<const T*>(keys[j + i]) + d);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) sum[r][i] = fma(x[r], key, sum[r][i]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            _mm_storeu_ps(scores + r * kKeys + j, sums_of(sum[r][0], sum[r][1], sum[r][2], sum[r][3]));
        }
    }
}

template <class T>
void dots(const float* q, int64_t rows, int64_t dim, const void* const* keys, int64_t count, const void* const* soon,
          float* scores) {
    while (rows >= 3) {
        dots_of<T, 3>(q, dim, keys, count, soon, scores);
        rows -= 3, q += 3 * dim, scores += 3 * kKeys, soon = nullptr;
    }
    if (rows == 2) dots_of<T, 2>(q, dim, keys, count, soon, scores);
    if (rows == 1) dots_of<T, 1>(q, dim, keys, count, soon, scores);
}

// to[d][j] = keys[j][d] for j < count, a multiple of 8.
void transpose(const void* const* keys, int64_t count, int64_t dim, float* to) {
    for (int64_t j = 0; j < count; j += 8) {
        for (int64_t d = 0; d < dim; d += 8) {
            __m256 a[8], b[8];
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(static_cast<const float*>(keys[j + i]) + d);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
                b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
            }
#pragma GCC unroll 2
            for (int i = 0; i < 8; i += 4) {
                a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
                a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
                a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
                a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
            }
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                _mm256_storeu_ps(to + (d + i) * kKeys + j, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
                _mm256_storeu_ps(to + (d + i + 4) * kKeys + j, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
            }
        }
    }
}

// rows[j] = the `count` heads from position `begin` on, of values of `size` bytes, where they lie.
void heads_in_place(const AttentionCall& c, const Places& at, const int64_t* blocks, int64_t begin, int64_t count,
                    int64_t size, const void** rows) {
    Walk walk(c, at, blocks, begin);
    for (int64_t j = 0; j < count; ++j) rows[j] = static_cast<const char*>(at.base) + walk.next() * size;
}

// The same converted from narrow values into `wide` [kKeys][dim].
template <class T>
void heads_widened(const AttentionCall& c, const Places& at, const int64_t* blocks, int64_t begin, int64_t count,
                   float* wide, const void** rows) {
    Walk walk(c, at, blocks, begin);
    for (int64_t j = 0; j < count; ++j) {
        const T* narrow = static_cast<const T*>(at.base) + walk.next();
        float* to = wide + j * c.dim;
        for (int64_t d = 0; d < c.dim; d += kLanes) store(to + d, load(narrow + d));
        rows[j] = to;
    }
}

// A row of scores, of which it sees first <= j < last, to exponentials, with its largest score and sum brought up to
// date; returns by what the values mixed so far are to be multiplied.
inline float soften(float* scores, int64_t count, int64_t first, int64_t last, float cap, float& top, float& sum) {
    const int64_t width = (count + kLanes - 1) / kLanes * kLanes;
    if (cap != 0.0f) {
        for (int64_t j = 0; j < width; j += kLanes) store(scores + j, capped(load(scores + j), set(cap)));
    }
    for (int64_t j = 0; j < first; ++j) scores[j] = -__builtin_inff();
    for (int64_t j = last; j < width; ++j) scores[j] = -__builtin_inff();
    Vec most = set(-__builtin_inff());
    for (int64_t j = 0; j < width; j += kLanes) most = greatest(most, load(scores + j));
    const float here = largest_of(most), before = top;
    if (here > top || here != here) top = here;  // a NaN must not pass for a row that sees nothing
    if (top == -__builtin_inff()) {
        unsigned strange = 0;  // a NaN that was not the last of its lane is not in `most`
        for (int64_t j = 0; j < width; j += kLanes) strange |= not_a_number(load(scores + j));
        if (strange == 0) {
            for (int64_t j = 0; j < width; j += kLanes) store(scores + j, set(0.0f));
            return 1.0f;
        }
        top = __builtin_nanf("");
    }
    Vec total = set(0.0f);
    const Vec shift = set(top);
    for (int64_t j = 0; j < width; j += kLanes) {
        const Vec weight = exponential(load(scores + j) - shift);
        store(scores + j, weight);
        total = total + weight;
    }
    const float keep = top == before ? 1.0f : exponential(before - top);
    sum = sum * keep + sum_of(total);
    return keep;
}

// One row to the output: sinks join the sum, and a row that sees nothing is zero.
void finish(const AttentionCall& c, const AttentionRows& rows, int64_t row, const float* mixed, float top, float sum) {
    const int64_t head = rows.first_head + row % rows.heads, query = rows.first_query + row / rows.heads;
    float factor = 1.0f;
    if (c.sinks != nullptr && sum != 0.0f) {
        const float sink = c.sinks[head], most = sink > top ? sink : top;
        factor = exponential(top - most);
        sum = sum * factor + exponential(sink - most);
    }
    const Vec share = set(sum == 0.0f ? 0.0f : factor / sum);
    float* out = c.out + (query * c.heads + head) * c.dim;
    for (int64_t d = 0; d < c.dim; d += kLanes) store(out + d, load(mixed + d) * share);
}

int64_t clamped(int64_t x, int64_t most) { return x < 0 ? 0 : x > most ? most : x; }

// Few rows take heads of T where they lie. Many take them as float32, converted once for all of them.
template <class T>
void attend_over(const AttentionCall& c, const AttentionRows& rows, int64_t begin, int64_t end,
                 const AttentionPart* part) {
    constexpr bool kNarrow = sizeof(T) < sizeof(float);
    alignas(64) float q[kMaxAttentionRows * kMaxHeadDim], own[kMaxAttentionRows * kMaxHeadDim];
    alignas(64) float scores[kMaxAttentionRows * kKeys], turned[kMaxHeadDim * kKeys], wide[2][kKeys * kMaxHeadDim];
    alignas(64) static const float nothing[kMaxHeadDim] = {};
    float own_top[kMaxAttentionRows], own_sum[kMaxAttentionRows], keep[kMaxAttentionRows];
    const void *keys[kKeys], *values[kKeys], *soon[2 * kKeys], *turned_rows[kMaxHeadDim];
    const int64_t count = rows.rows(), dim = c.dim, size = sizeof(T);
    const bool few = count <= kFewRows;
    float* mixed = part != nullptr ? part->mixed : own;
    float* top = part != nullptr ? part->top : own_top;
    float* sum = part != nullptr ? part->sum : own_sum;
    const Vec scale = set(static_cast<float>(c.scale));
    for (int64_t i = 0; i < count; ++i) {
        const float* from = c.q + (rows.first_query + i / rows.heads) * c.q_token_stride +
                            (rows.first_head + i % rows.heads) * c.q_head_stride;
        for (int64_t d = 0; d < dim; d += kLanes) {
            store(q + i * dim + d, load(from + d) * scale);
            store(mixed + i * dim + d, set(0.0f));
        }
        top[i] = -__builtin_inff();
        sum[i] = 0.0f;
    }
    for (int64_t d = 0; d < dim; ++d) turned_rows[d] = turned + d * kKeys;
    const int64_t* blocks = c.block_table + rows.request * c.table_stride;
    const Places k_at{c.k, c.k_block_stride, c.k_token_stride, rows.kv_head * c.k_head_stride};
    const Places v_at{c.v, c.v_block_stride, c.v_token_stride, rows.kv_head * c.v_head_stride};
    const float cap = static_cast<float>(c.soft_cap);
    for (; begin < end; begin += kKeys) {
        const int64_t n = end - begin < kKeys ? end - begin : kKeys;
        const int64_t step = few ? 4 : kLanes * kColumns, padded = (n + step - 1) / step * step;
        bool widened = false;
        if constexpr (kNarrow) {
            if (!few) {
                heads_widened<T>(c, k_at, blocks, begin, n, wide[0], keys);
                heads_widened<T>(c, v_at, blocks, begin, n, wide[1], values);
                widened = true;
            }
        }
        if (!widened) {
            heads_in_place(c, k_at, blocks, begin, n, size, keys);
            heads_in_place(c, v_at, blocks, begin, n, size, values);
        }
        for (int64_t j = n; j < padded; ++j) keys[j] = nothing;
        if (few) {
            const bool whole = n == kKeys;
            if (whole) {  // the values of this tile and the keys of the next
                const int64_t next = end - begin - kKeys < kKeys ? end - begin - kKeys : kKeys;
                heads_in_place(c, k_at, blocks, begin + kKeys, next, size, soon + kKeys);
                for (int64_t j = next; j < kKeys; ++j) soon[kKeys + j] = values[j];
                for (int64_t j = 0; j < kKeys; ++j) soon[j] = values[j];
            }
            dots<T>(q, count, dim, keys, padded, whole ? soon : nullptr, scores);
        } else {
            transpose(keys, padded, dim, turned);
            product<float>(q, dim, count, turned_rows, padded, dim, nullptr, scores, kKeys);
        }
        for (int64_t i = 0; i < count; ++i) {
            const int64_t last = rows.position + i / rows.heads + 1 - begin, first = c.window ? last - c.window : 0;
            keep[i] = soften(scores + i * kKeys, n, clamped(first, n), clamped(last, n), cap, top[i], sum[i]);
        }
        if (few) {
            product<T>(scores, kKeys, count, values, dim, n, keep, mixed, dim);
        } else {
            product<float>(scores, kKeys, count, values, dim, n, keep, mixed, dim);
        }
    }
    if (part != nullptr) return;
    for (int64_t i = 0; i < count; ++i) finish(c, rows, i, mixed + i * dim, top[i], sum[i]);
}

void attend(const AttentionCall& c, const AttentionRows& rows, int64_t begin, int64_t end, const AttentionPart* part) {
    if (c.cache_kind == 0) {
        attend_over<float>(c, rows, begin, end, part);
    } else if (c.cache_kind == 1) {
        attend_over<BFloat16>(c, rows, begin, end, part);
    } else {
        attend_over<Float16>(c, rows, begin, end, part);
    }
}

void merge(const AttentionCall& c, const AttentionRows& rows, const AttentionPart* parts, int64_t count) {
    alignas(64) float mixed[kMaxHeadDim];
    for (int64_t i = 0; i < rows.rows(); ++i) {
        float top = -__builtin_inff(), sum = 0.0f;
        for (int64_t p = 0; p < count; ++p) {
            const float other = parts[p].top[i];
            if (other > top || other != other) top = other;
        }
        for (int64_t d = 0; d < c.dim; d += kLanes) store(mixed + d, set(0.0f));
        for (int64_t p = 0; p < count; ++p) {
            if (parts[p].sum[i] == 0.0f) continue;
            const float factor = exponential(parts[p].top[i] - top);
            sum += parts[p].sum[i] * factor;
            const float* from = parts[p].mixed + i * c.dim;
            for (int64_t d = 0; d < c.dim; d += kLanes) store(mixed + d, fma(set(factor), load(from + d), load(mixed + d)));
        }
        finish(c, rows, i, mixed, top, sum);
    }
}
