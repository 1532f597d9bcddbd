/* From a launch to what one block works on: which sequence, heads and query rows, and where their tokens are.
 *
 * Every length, offset and page number that comes from device memory is clamped here, and nowhere else, so that no
 * address built from these views leaves the tensors. */
#ifndef AITER_GPU_SEQUENCE_H
#define AITER_GPU_SEQUENCE_H

#include "gpu/arch.h"

namespace aiter {

using Arguments = aiter_attention_call; /* the kernel parameter */

__device__ __forceinline__ int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }
template <class T> __host__ __device__ __forceinline__ constexpr T lesser(T x, T y) { return x < y ? x : y; }

template <class T> __host__ __device__ __forceinline__ constexpr T greater(T x, T y) { return x < y ? y : x; }

/* Rows of sequence `batch` in a tensor: where they begin (packed) or 0, and how many there are. */
struct Extent {
    int64_t begin;
    int count;
};

/* A wave adds up the lengths before its sequence: all its lanes take part. */
__device__ __forceinline__ Extent extent(const int32_t *lengths, int batch, int most, bool packed, int64_t total) {
    Extent result = {0, most};
    if (packed) {
        int64_t sum = 0;
#pragma unroll 1
        for (int b = lane(); b < batch; b += WAVE) sum += clamp(lengths[b], 0, most);
        /* Over the wave in two parts, so that the exchange is of 32-bit words and neither part overflows. */
        result.begin = (static_cast<int64_t>(uniform(wave_sum(static_cast<int>(sum >> 24)))) << 24) +
                       uniform(wave_sum(static_cast<int>(sum & 0xffffff)));
        result.begin = lesser(result.begin, total);
    }
    if (lengths != nullptr) result.count = uniform(clamp(lengths[batch], 0, most));
    if (packed) result.count = static_cast<int>(lesser<int64_t>(result.count, total - result.begin));
    return result;
}

/* Tokens of K and V of one sequence and KV head. `tile(first)` is the view of the tokens from `first` on; place(row,
 * step) is token row + step of it, or the last token of the sequence where that is past it. `row` differs from lane to
 * lane, `step` is the same for all: it goes into the scalar part of the address. Callers ask only for tiles of up to
 * 128 tokens that begin before `count`. */
template <bool PAGED> struct KeyValueRows;

template <> struct KeyValueRows<false> {
    const char *key, *value;           /* token 0 */
    uint32_t key_stride, value_stride; /* bytes */
    int count;

    struct Tile {
        const char *key_base, *value_base;
        uint32_t key_stride, value_stride, key_last, value_last; /* last: offset of the last token */
        struct Place {
            uint32_t key_step, key_row, value_step, value_row;
        };
        __device__ __forceinline__ Place place(int row, int step) const {
            /* opaque: or the compiler makes 64-bit comparisons of these 32-bit ones */
            const uint32_t k = opaque_scalar(lesser(step * key_stride, key_last));
            const uint32_t v = opaque_scalar(lesser(step * value_stride, value_last));
            return {k, opaque(lesser(row * key_stride, key_last - k)), v,
                    opaque(lesser(row * value_stride, value_last - v))};
        }
        /* The same where lane l has looked up token l; only pages are worth an exchange. */
        __device__ __forceinline__ Place place_of_lane(Place, int row, int step) const { return place(row, step); }
        __device__ __forceinline__ const char *key(Place p, int byte) const {
            return key_base + p.key_step + (p.key_row + byte);
        }
        __device__ __forceinline__ const char *value(Place p, int byte) const {
            return value_base + p.value_step + (p.value_row + byte);
        }
    };
    __device__ __forceinline__ Tile tile(int first) const {
        const uint32_t last = static_cast<uint32_t>(lesser(count - 1 - first, 127));
        return {key + static_cast<int64_t>(first) * key_stride,
                value + static_cast<int64_t>(first) * value_stride,
                key_stride,
                value_stride,
                last * key_stride,
                last * value_stride};
    }
};

template <> struct KeyValueRows<true> {
    const char *key, *value;                    /* page 0 */
    int64_t key_page_stride, value_page_stride; /* bytes */
    uint32_t key_stride, value_stride;
    int count;
    const int32_t *pages;     /* of this sequence */
    int page_size, last_page; /* last_page: of the cache */

    struct Tile {
        const KeyValueRows &rows;
        int first;
        struct Place {
            int page, position;
        };
        __device__ __forceinline__ Place place(int row, int step) const {
            const unsigned t = static_cast<unsigned>(lesser(first + row + step, rows.count - 1));
            const unsigned index = t / static_cast<unsigned>(rows.page_size);
            return {clamp(rows.pages[index], 0, rows.last_page), static_cast<int>(t - index * rows.page_size)};
        }
        __device__ __forceinline__ Place place_of_lane(Place mine, int row, int step) const {
            return {from_lane(mine.page, row + step), from_lane(mine.position, row + step)};
        }
        __device__ __forceinline__ const char *key(Place p, int byte) const {
            return rows.key + p.page * rows.key_page_stride + static_cast<int64_t>(p.position) * rows.key_stride + byte;
        }
        __device__ __forceinline__ const char *value(Place p, int byte) const {
            return rows.value + p.page * rows.value_page_stride + static_cast<int64_t>(p.position) * rows.value_stride +
                   byte;
        }
    };
    __device__ __forceinline__ Tile tile(int first) const { return {*this, first}; }
};

/* One query head of one sequence. Row i of the query sees the first `visible(i)` keys. */
template <bool CAUSAL, bool PAGED> struct Sequence {
    static constexpr bool IS_CAUSAL = CAUSAL, IS_PAGED = PAGED;
    const Element *query;
    Element *output;
    float *lse;                          /* null when not wanted */
    int64_t query_stride, output_stride; /* elements from row to row */
    int rows;                            /* query rows that exist */
    int padded_rows;                     /* rows to be written; past `rows` they are zeros */
    KeyValueRows<PAGED> keys;
    /* Where row 0 stands in the tensor of queries and, not paged, token 0 of `keys` in those of keys and values. */
    int query_batch, query_head, first_query, kv_batch, kv_head, first_key;
    int diagonal; /* causal: keys that row 0 sees, minus 1; may be negative */

    __device__ __forceinline__ int visible(int row) const {
        return CAUSAL ? clamp(row + diagonal + 1, 0, keys.count) : keys.count;
    }

    __device__ __forceinline__ Sequence(const Arguments &arguments, int batch, int head) {
        const aiter_attention_problem &p = arguments.problem;
        const aiter_attention_tensors &t = arguments.tensors;
        const Extent q = extent(t.seqlens_q, batch, p.seqlen_q, p.packed_q, p.total_q);
        const Extent k = extent(t.seqlens_k, batch, p.seqlen_k, p.packed_k, p.total_k);
        kv_head = head / (p.heads_q / p.heads_kv);
        query_batch = p.packed_q ? 0 : batch;
        query_head = head;
        first_query = static_cast<int>(q.begin);
        kv_batch = p.packed_k ? 0 : batch;
        first_key = static_cast<int>(k.begin);

        query_stride = p.query_strides[1];
        output_stride = p.output_strides[1];
        query = static_cast<const Element *>(t.query) + head * p.query_strides[2] +
                (p.packed_q ? q.begin * query_stride : batch * p.query_strides[0]);
        output = static_cast<Element *>(t.output) + head * p.output_strides[2] +
                 (p.packed_q ? q.begin * output_stride : batch * p.output_strides[0]);
        lse = t.lse == nullptr ? nullptr
                               : t.lse + head * p.lse_strides[1] + (p.packed_q ? q.begin : batch * p.lse_strides[0]);
        rows = q.count;
        padded_rows = p.packed_q ? q.count : p.seqlen_q;
        diagonal = k.count - q.count;

        keys.count = k.count;
        keys.key = static_cast<const char *>(t.key) + kv_head * p.key_strides[2] * 2;
        keys.value = static_cast<const char *>(t.value) + kv_head * p.value_strides[2] * 2;
        keys.key_stride = static_cast<uint32_t>(p.key_strides[1] * 2);
        keys.value_stride = static_cast<uint32_t>(p.value_strides[1] * 2);
        if constexpr (PAGED) {
            keys.key_page_stride = p.key_strides[0] * 2;
            keys.value_page_stride = p.value_strides[0] * 2;
            keys.pages = t.page_table + batch * p.page_table_stride;
            keys.page_size = p.page_size;
            keys.last_page = static_cast<int>(p.num_pages - 1);
            if (p.num_pages == 0) keys.count = 0;
        } else {
            keys.key += (p.packed_k ? k.begin * p.key_strides[1] : batch * p.key_strides[0]) * 2;
            keys.value += (p.packed_k ? k.begin * p.value_strides[1] : batch * p.value_strides[0]) * 2;
        }
    }
};

/* Which work a block has. Work comes in units: all that reads one KV head of one sequence. A unit's blocks are numbered
 * together, so that they run at one time and find their keys in the L2 cache. With several chiplets (XCDs), to which
 * the hardware deals consecutive blocks in turn, a unit's blocks all go to one of them; units that are left over when
 * each chiplet has got equally many are spread over all. */
struct Work {
    int unit, part;
};

__device__ __forceinline__ Work work_of_block(int block, int units, int parts) {
    const int spread = units / XCDS * XCDS * parts;
    if (XCDS == 1 || block >= spread) return {block / parts, block % parts};
    const int index = block / XCDS;
    return {index / parts * XCDS + block % XCDS, index % parts};
}

/* A tile of query rows: `unit` is a KV head of a sequence, `member` one of the query heads that read it. */
struct Place {
    int unit, member, row_tile;
    __device__ __forceinline__ int batch(const aiter_attention_problem &p) const { return unit / p.heads_kv; }
    __device__ __forceinline__ int head(const aiter_attention_problem &p) const {
        return unit % p.heads_kv * (p.heads_q / p.heads_kv) + member;
    }
};

/* What every kernel asks of a problem before it launches. */
inline int check_problem(const aiter_attention_problem &p) {
    const int64_t limit = int64_t(1) << 24;
    if (p.key_strides[1] >= limit || p.value_strides[1] >= limit) return LAUNCH_STRIDE_TOO_LARGE;
#if defined(AITER_PAGED) && AITER_PAGED
    if (p.page_size <= 0) return LAUNCH_BAD_PROBLEM;
#else
    if (p.page_size != 0) return LAUNCH_BAD_PROBLEM;
#endif
    if (p.heads_kv <= 0 || p.heads_q % p.heads_kv != 0) return LAUNCH_BAD_PROBLEM;
    return 0;
}

} // namespace aiter

#endif
