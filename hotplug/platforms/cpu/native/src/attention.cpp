// Divides a step's attention among threads.
#include "attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "pool.h"

namespace hotplug {
namespace {

constexpr int64_t kItemsPerThread = 4;  // wanted, so that threads end together
constexpr int64_t kLeastKeys = 128;     // of a part, below which merging costs more than it brings

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether all that the call would read and write lies in its tensors.
bool valid(const AttentionCall& c, int64_t lanes) {
    if (c.dim <= 0 || c.dim % lanes != 0 || c.dim > kMaxHeadDim || c.block_size <= 0 || c.cache_kind < 0 ||
        c.cache_kind > 2 || c.kv_heads <= 0 || c.heads <= 0 || c.heads % c.kv_heads != 0 || c.window < 0) {
        return false;
    }
    if (c.query_start[0] != 0 || c.query_start[c.requests] > c.tokens) return false;
    for (int64_t r = 0; r < c.requests; ++r) {
        if (c.query_start[r + 1] < c.query_start[r]) return false;
        if (c.query_start[r + 1] == c.query_start[r]) continue;
        const int64_t blocks = divide_up(std::max<int64_t>(0, c.seq_lens[r]), c.block_size);
        if (blocks > c.table_blocks) return false;
        const int64_t* row = c.block_table + r * c.table_stride;
        for (int64_t b = 0; b < blocks; ++b) {
            if (row[b] < 0 || row[b] >= c.num_blocks) return false;
        }
    }
    return true;
}

std::vector<AttentionRows> divided(const AttentionCall& c, int64_t together) {
    std::vector<AttentionRows> found;
    const int64_t group = c.heads / c.kv_heads, heads = std::min(group, kMaxAttentionRows);
    const int64_t queries = std::max<int64_t>(1, together / group);
    for (int64_t r = 0; r < c.requests; ++r) {
        const int64_t first = c.query_start[r], last = c.query_start[r + 1];
        for (int64_t query = first; query < last; query += queries) {
            AttentionRows rows{};
            rows.request = r;
            rows.first_query = query;
            rows.queries = std::min(queries, last - query);
            rows.position = c.seq_lens[r] - last + query;
            rows.begin = c.window ? std::max<int64_t>(0, rows.position + 1 - c.window) : 0;
            rows.end = std::max(rows.begin, rows.position + rows.queries);
            for (int64_t kv = 0; kv < c.kv_heads; ++kv) {
                for (int64_t head = 0; head < group; head += heads) {
                    rows.kv_head = kv;
                    rows.first_head = kv * group + head;
                    rows.heads = std::min(heads, group - head);
                    found.push_back(rows);
                }
            }
        }
    }
    return found;
}

// Into how many parts the keys of all rows are split.
int64_t parts_of(const std::vector<AttentionRows>& all, int threads) {
    if (threads == 1) return 1;
    int64_t longest = 0;
    for (const AttentionRows& rows : all) longest = std::max(longest, rows.end - rows.begin);
    const int64_t wanted = divide_up(kItemsPerThread * threads, static_cast<int64_t>(all.size()));
    return std::max<int64_t>(1, std::min(wanted, longest / kLeastKeys));
}

}  // namespace

int attention(const AttentionCall& c, const AttentionKernels& kernels, Pool& pool, Allocate allocate, void* context) {
    if (c.tokens == 0) return HP_OK;
    if (c.requests < 0 || !valid(c, kernels.lanes)) return HP_BAD_ARGUMENT;
    const int64_t used = c.query_start[c.requests], width = c.heads * c.dim;
    std::memset(c.out + used * width, 0, static_cast<size_t>((c.tokens - used) * width) * 4);
    const std::vector<AttentionRows> all = divided(c, kernels.rows);
    if (all.empty()) return HP_OK;
    const int64_t count = static_cast<int64_t>(all.size()), parts = parts_of(all, pool.threads());
    if (parts == 1) {
        pool.run(count, [&](int64_t i) { kernels.attend(c, all[i], all[i].begin, all[i].end, nullptr); });
        return HP_OK;
    }
    const int64_t most = std::max_element(all.begin(), all.end(), [](const auto& a, const auto& b) {
                             return a.rows() < b.rows();
                         })->rows();
    auto* memory = static_cast<float*>(allocate(context, static_cast<size_t>(count * parts * most * (c.dim + 2)) * 4));
    if (memory == nullptr) return HP_OUT_OF_MEMORY;
    std::vector<AttentionPart> places(static_cast<size_t>(count * parts));
    float* sums = memory + count * parts * most * c.dim;
    for (int64_t i = 0; i < count * parts; ++i) {
        places[i] = {memory + i * most * c.dim, sums + 2 * i * most, sums + (2 * i + 1) * most};
    }
    pool.run(count * parts, [&](int64_t item) {
        const AttentionRows& rows = all[item / parts];
        const int64_t each = divide_up(rows.end - rows.begin, parts), begin = rows.begin + item % parts * each;
        kernels.attend(c, rows, std::min(begin, rows.end), std::min(begin + each, rows.end), &places[item]);
    });
    pool.run_rows(count, parts * most * c.dim, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) kernels.merge(c, all[i], &places[i * parts], parts);
    });
    return HP_OK;
}

}  // namespace hotplug
