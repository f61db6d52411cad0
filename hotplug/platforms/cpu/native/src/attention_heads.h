// How a cache is read. Included inside the unnamed namespace of an instruction set's file, as attention_tiles.h is.

// Where the heads of a tile's keys, or values, lie.
struct Places {
    const void* base;
    int64_t block_stride, token_stride, offset;
};

// Where heads lie one after the other, from a position on.
struct Walk {
    const Places& at;
    const int64_t* blocks;
    int64_t block_size, block, inside;

    Walk(const AttentionCall& c, const Places& at, const int64_t* blocks, int64_t begin)
        : at(at), blocks(blocks), block_size(c.block_size), block(begin / block_size), inside(begin % block_size) {}

    // The index of the next head's first value.
    int64_t next() {
        const int64_t index = blocks[block] * at.block_stride + inside * at.token_stride + at.offset;
        if (++inside == block_size) ++block, inside = 0;
        return index;
    }
};
