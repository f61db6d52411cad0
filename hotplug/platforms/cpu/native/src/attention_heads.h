// How a cache is read. Included inside the unnamed namespace of an instruction set's file, as attention_tiles.h is.

// Where the heads of a tile's keys, or values, lie.
struct Places {
    const void* base;
    int64_t block_stride, token_stride, offset;
};

// rows[j] = the `count` heads from position `begin` on, as float32: in place, or converted into `wide` [kKeys][dim].
void heads_of(const AttentionCall& c, const Places& at, const int64_t* blocks, int64_t begin, int64_t count,
              float* wide, const float** rows) {
    int64_t block = begin / c.block_size, inside = begin % c.block_size;
    for (int64_t j = 0; j < count; ++j) {
        const int64_t index = blocks[block] * at.block_stride + inside * at.token_stride + at.offset;
        if (++inside == c.block_size) ++block, inside = 0;
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
