/* Where the rows of one sequence lie: the layouts of aiter_abi.h (dense, padded, packed, paged) made alike.
 *
 * A query row is one token of one query head. The heads of a group read the same keys, so their rows are counted
 * together: row r of KV head h is token r / group of query head h * group + r % group.
 */
#ifndef AITER_CPU_SEQUENCE_H
#define AITER_CPU_SEQUENCE_H

#include "aiter_abi.h"
#include "simd.h"

constexpr int HEAD_DIM = AITER_HEAD_DIM;

AITER_INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
AITER_INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }
AITER_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;

/* Up to this many query rows of a KV head share its loads of keys and values in row_attention.h; more go through
 * products. */
constexpr int MAX_ROWS = 8;

/* Buffers begin at whole cache lines. */
constexpr int64_t ALIGNMENT = 64;
AITER_INLINE int64_t aligned(int64_t bytes) { return ceil_div(bytes, ALIGNMENT) * ALIGNMENT; }

/* Lengths of one sequence and, when packed, the token at which it begins. */
struct Sequence {
    int64_t tokens_q, tokens_k;
    int64_t first_q, first_k; /* 0 unless packed */
};

AITER_INLINE int64_t length_of(const int32_t *lengths, int64_t b, int64_t most) {
    return lengths ? clamp(lengths[b], 0, most) : most;
}

/* Packed: where each of the `batch` sequences begins, and in the last entry where the last one ends. */
static inline void find_starts(const int32_t *lengths, int64_t batch, int64_t most, int64_t total, int64_t *starts) {
    starts[0] = 0;
    for (int64_t b = 0; b < batch; b++) starts[b + 1] = minimum(starts[b] + length_of(lengths, b, most), total);
}

static inline Sequence find_sequence(const int64_t *starts_q, const int32_t *seqlens_q, int64_t most_q,
                                     const int64_t *starts_k, const int32_t *seqlens_k, int64_t most_k, int64_t b) {
    Sequence s{length_of(seqlens_q, b, most_q), length_of(seqlens_k, b, most_k), 0, 0};
    if (starts_q) {
        s.first_q = starts_q[b];
        s.tokens_q = starts_q[b + 1] - starts_q[b];
    }
    if (starts_k) {
        s.first_k = starts_k[b];
        s.tokens_k = starts_k[b + 1] - starts_k[b];
    }
    return s;
}

/* The keys that this query token sees are those below this. */
AITER_INLINE int64_t visible_keys(const Sequence &sequence, int64_t token) {
#if AITER_CAUSAL
    return clamp(token + 1 + sequence.tokens_k - sequence.tokens_q, 0, sequence.tokens_k);
#else
    (void)token;
    return sequence.tokens_k;
#endif
}

/* Into L2: L1 has too few buffers for lines under way to keep memory busy. */
AITER_INLINE void prefetch_row(const Element *row) {
    constexpr int LINE_ELEMENTS = 64 / sizeof(Element);
    for (int d = 0; d < HEAD_DIM; d += LINE_ELEMENTS) __builtin_prefetch(row + d, 0, 2);
}

/* The rows of one KV head's keys and values. */
struct KeyRows {
    const Element *key, *value; /* token 0; page 0 when paged */
    int64_t key_stride, value_stride;
    const int32_t *pages; /* null when not paged */
    int64_t page_size, num_pages, key_page_stride, value_page_stride;

    KeyRows(const aiter_attention_problem &p, const aiter_attention_tensors &t, const Sequence &sequence, int64_t b,
            int64_t head)
        : key(static_cast<const Element *>(t.key) + head * p.key_strides[2]),
          value(static_cast<const Element *>(t.value) + head * p.value_strides[2]), key_stride(p.key_strides[1]),
          value_stride(p.value_strides[1]), pages(nullptr), page_size(p.page_size), num_pages(p.num_pages),
          key_page_stride(p.key_strides[0]), value_page_stride(p.value_strides[0]) {
        if (page_size > 0) {
            pages = t.page_table + b * p.page_table_stride;
        } else {
            key += sequence.first_k * key_stride + (p.packed_k ? 0 : b * p.key_strides[0]);
            value += sequence.first_k * value_stride + (p.packed_k ? 0 : b * p.value_strides[0]);
        }
    }

    /* Addresses of the rows of tokens [first, first + count). */
    void find(int64_t first, int count, const Element **keys, const Element **values) const {
        if (!pages) {
            for (int i = 0; i < count; i++) {
                keys[i] = key + (first + i) * key_stride;
                values[i] = value + (first + i) * value_stride;
            }
            return;
        }
        int64_t entry = first / page_size, position = first % page_size;
        for (int i = 0; i < count; entry++, position = 0) {
            const int64_t page = clamp(pages[entry], 0, num_pages - 1);
            const Element *k = key + page * key_page_stride, *v = value + page * value_page_stride;
            for (; i < count && position < page_size; i++, position++) {
                keys[i] = k + position * key_stride;
                values[i] = v + position * value_stride;
            }
        }
    }
};

/* The rows of the query heads that share one KV head, and what is written for them. */
struct QueryRows {
    const Element *query;
    Element *output;
    float *lse; /* null when not wanted */
    int64_t group, query_strides[2], output_strides[2] /* token, head */, lse_head_stride;

    QueryRows(const aiter_attention_problem &p, const aiter_attention_tensors &t, const Sequence &sequence, int64_t b,
              int64_t head)
        : group(p.heads_q / p.heads_kv), query_strides{p.query_strides[1], p.query_strides[2]},
          output_strides{p.output_strides[1], p.output_strides[2]}, lse_head_stride(p.lse_strides[1]) {
        const int64_t first_head = head * group, batch = p.packed_q ? 0 : b, token = sequence.first_q;
        query = static_cast<const Element *>(t.query) + batch * p.query_strides[0] + token * p.query_strides[1] +
                first_head * p.query_strides[2];
        output = static_cast<Element *>(t.output) + batch * p.output_strides[0] + token * p.output_strides[1] +
                 first_head * p.output_strides[2];
        lse = t.lse ? t.lse + batch * p.lse_strides[0] + first_head * p.lse_strides[1] + token : nullptr;
    }

    int64_t token(int64_t row) const { return row / group; }
    const Element *query_row(int64_t row) const {
        return query + row / group * query_strides[0] + row % group * query_strides[1];
    }
    Element *output_row(int64_t row) const {
        return output + row / group * output_strides[0] + row % group * output_strides[1];
    }
    void store_lse(int64_t row, float value) const {
        if (lse) lse[row % group * lse_head_stride + row / group] = value;
    }
};

#endif
