/* Where the rows of one sequence lie: the layouts of aiter_abi.h (dense, padded, packed, paged, lists of pages)
 * made alike.
 *
 * A query row is one token of one query head. The heads of a group read the same keys, so their rows are counted
 * together: row r of KV head h is token r / group of query head h * group + r % group.
 */
#ifndef AITER_CPU_SEQUENCE_H
#define AITER_CPU_SEQUENCE_H

#include "aiter_abi.h"
#include "read_fp8.h"
#include "simd.h"

constexpr int HEAD_DIM = AITER_HEAD_DIM; /* of queries and keys */
#if AITER_VALUE_DIM
constexpr int VALUE_DIM = AITER_VALUE_DIM; /* of values and outputs */
#else
constexpr int VALUE_DIM = HEAD_DIM;
#endif
static_assert(HEAD_DIM % 8 == 0 && VALUE_DIM % 8 == 0, "rows are made of whole pieces of 8 elements");

AITER_INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
AITER_INLINE int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }
AITER_INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }
AITER_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;

/* Up to this many query rows of a KV head share its loads of keys and values in row_attention.h; more go through
 * products. */
constexpr int MAX_ROWS = 8;

/* Buffers begin at whole cache lines. */
constexpr int64_t ALIGNMENT = 64;
AITER_INLINE int64_t aligned(int64_t bytes) { return ceil_div(bytes, ALIGNMENT) * ALIGNMENT; }

/* One sequence: its lengths, where it begins in packed tensors, and where its queries stand. */
struct Sequence {
    int64_t tokens_q, tokens_k;
    int64_t first_q, first_k; /* 0 unless packed; lists of pages: first_k is where in the table its own begins */
    int64_t offset;           /* query token i stands at key i + offset */
};

/* The rows of a packed tensor that belong to a sequence. */
struct Span {
    int64_t first, end;
};

/* The list of a sequence's pages among all lists: where in the table it begins, and how many tokens it holds. Both are
 * within what there is, whatever the tensors hold. */
struct PageList {
    int64_t first, tokens;
};

/* Flat lists of pages; there are none where indptr is null. */
struct PageLists {
    const int32_t *indptr = nullptr, *last_page_len = nullptr;
    int64_t entries = 0, page_size = 0;

    PageLists() = default;
    PageLists(const aiter_attention_problem &p, const aiter_attention_tensors &t)
        : indptr(t.page_indptr), last_page_len(t.last_page_len), entries(p.listed_pages), page_size(p.page_size) {}
    /* The backward pass knows no pages. */
    PageLists(const aiter_attention_problem &, const aiter_attention_grad_tensors &) {}

    PageList operator[](int64_t b) const {
        const int64_t first = clamp(indptr[b], 0, entries), pages = clamp(indptr[b + 1], first, entries) - first;
        const int64_t last = last_page_len ? clamp(last_page_len[b], 0, page_size) : page_size;
        return {first, pages > 0 ? (pages - 1) * page_size + last : 0};
    }
};

/* The sequences of a problem. Lengths, starts and offsets are read from the tensors that the caller gave; spans of
 * packed ones are kept in the workspace. */
class Sequences {
    const int32_t *seqlens_q, *seqlens_k, *offsets;
    PageLists lists;
    int64_t batch, most_q, most_k;
    Span *spans_q = nullptr, *spans_k = nullptr; /* null unless packed */

  public:
    static int64_t workspace_bytes(const aiter_attention_problem &p) {
        return (p.packed_q + p.packed_k) * p.batch * static_cast<int64_t>(sizeof(Span));
    }

    template <class Tensors>
    Sequences(const aiter_attention_problem &p, const Tensors &t, void *workspace)
        : seqlens_q(t.seqlens_q), seqlens_k(t.seqlens_k), offsets(t.query_offsets), lists(p, t), batch(p.batch),
          most_q(p.seqlen_q), most_k(p.page_size > 0 && p.num_pages == 0 ? 0 : p.seqlen_k) {
        Span *spans = static_cast<Span *>(workspace);
        if (p.packed_q) find_spans(t.starts_q, seqlens_q, most_q, p.total_q, spans_q = spans);
        if (p.packed_k) find_spans(t.starts_k, seqlens_k, most_k, p.total_k, spans_k = spans + p.packed_q * batch);
    }

    Sequence operator[](int64_t b) const {
        Sequence s{length_of(seqlens_q, b, most_q), length_of(seqlens_k, b, most_k), 0, 0, 0};
        if (spans_q) {
            s.first_q = spans_q[b].first;
            s.tokens_q = spans_q[b].end - spans_q[b].first;
        }
        if (spans_k) {
            s.first_k = spans_k[b].first;
            s.tokens_k = spans_k[b].end - spans_k[b].first;
        }
        if (lists.indptr) {
            const PageList own = lists[b];
            s.first_k = own.first;
            s.tokens_k = minimum(s.tokens_k, own.tokens);
        }
        s.offset = offsets ? offsets[b] : s.tokens_k - s.tokens_q;
        return s;
    }

    /* Calls clear(row) for the rows of packed tensors, of `total` in all, that belong to no sequence. */
    template <class Clear> void for_rest_q(int64_t total, const Clear &clear) const { for_rest(spans_q, total, clear); }
    template <class Clear> void for_rest_k(int64_t total, const Clear &clear) const { for_rest(spans_k, total, clear); }

  private:
    static int64_t length_of(const int32_t *lengths, int64_t b, int64_t most) {
        return lengths ? clamp(lengths[b], 0, most) : most;
    }

    /* One after the other and without overlapping, whatever the tensors hold. */
    void find_spans(const int32_t *starts, const int32_t *lengths, int64_t most, int64_t total, Span *spans) const {
        int64_t end = 0;
        for (int64_t b = 0; b < batch; b++) {
            const int64_t first = starts ? clamp(starts[b], end, total) : end;
            end = minimum(first + length_of(lengths, b, most), starts ? clamp(starts[b + 1], first, total) : total);
            spans[b] = {first, end};
        }
    }

    template <class Clear> void for_rest(const Span *spans, int64_t total, const Clear &clear) const {
        int64_t row = 0;
        for (int64_t b = 0; spans && b < batch; b++) {
            for (; row < spans[b].first; row++) clear(row);
            row = spans[b].end;
        }
        for (; spans && row < total; row++) clear(row);
    }
};

/* Into L2: L1 has too few buffers for lines under way to keep memory busy. */
template <int ELEMENTS> AITER_INLINE void prefetch_row(const Cached *row) {
    constexpr int LINE_ELEMENTS = 64 / sizeof(Cached);
    for (int d = 0; d < ELEMENTS; d += LINE_ELEMENTS) __builtin_prefetch(row + d, 0, 2);
}

/* The rows of one KV head's keys and values. */
struct KeyRows {
    const Cached *key, *value; /* token 0; page 0 when paged */
    int64_t key_stride, value_stride;
    const int32_t *pages; /* null when not paged */
    int64_t page_size, num_pages, key_page_stride, value_page_stride;

    KeyRows(const aiter_attention_problem &p, const aiter_attention_tensors &t, const Sequence &sequence, int64_t b,
            int64_t head)
        : key(static_cast<const Cached *>(t.key) + head * p.key_strides[2]),
          value(static_cast<const Cached *>(t.value) + head * p.value_strides[2]), key_stride(p.key_strides[1]),
          value_stride(p.value_strides[1]), pages(nullptr), page_size(p.page_size), num_pages(p.num_pages),
          key_page_stride(p.key_strides[0]), value_page_stride(p.value_strides[0]) {
        if (page_size > 0) {
            pages = t.page_table + (t.page_indptr ? sequence.first_k : b * p.page_table_stride);
        } else {
            key += sequence.first_k * key_stride + (p.packed_k ? 0 : b * p.key_strides[0]);
            value += sequence.first_k * value_stride + (p.packed_k ? 0 : b * p.value_strides[0]);
        }
    }

    /* Addresses of the rows of tokens [first, first + count). */
    void find(int64_t first, int count, const Cached **keys, const Cached **values) const {
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
            const Cached *k = key + page * key_page_stride, *v = value + page * value_page_stride;
            for (; i < count && position < page_size; i++, position++) {
                keys[i] = k + position * key_stride;
                values[i] = v + position * value_stride;
            }
        }
    }
};

/* What a KV head's keys or values are to be multiplied by. */
AITER_INLINE float descale_of(const float *descale, const int64_t *strides, int64_t b, int64_t head) {
    return AITER_FP8_CACHE && descale ? descale[b * strides[0] + head * strides[1]] : 1.0f;
}

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
