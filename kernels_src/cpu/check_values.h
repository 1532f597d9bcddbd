/* Are lengths and page numbers, which callers give in tensors, in range? A look at each costs nothing beside the rows
 * that it stands for, so every call looks; which of them is wrong, the caller finds out for the message. */
#ifndef AITER_CPU_CHECK_VALUES_H
#define AITER_CPU_CHECK_VALUES_H

#include "aiter_abi.h"
#include "mask.h"
#include "starts.h"

/* Lengths from 0 to `most`; `total` rows in all where `fill`, else no more than those. */
static inline bool lengths_fit(const int32_t *lengths, int64_t batch, int64_t most, bool packed, int64_t total,
                               bool fill) {
    if (!lengths) return true;
    int64_t sum = 0;
    for (int64_t b = 0; b < batch; b++) {
        if (lengths[b] < 0 || lengths[b] > most) return false;
        sum += lengths[b];
    }
    return !packed || (fill ? sum == total : sum <= total);
}

/* Lists of pages that do not fall and end within the entries, and hold no more tokens than they may. */
static inline bool lists_fit(const aiter_attention_problem &p, const aiter_attention_tensors &t) {
    if (!t.page_indptr) return true;
    if (!starts_fit(t.page_indptr, nullptr, p.batch, p.listed_pages, p.listed_pages)) return false;
    const PageLists lists(p, t);
    for (int64_t b = 0; b < p.batch; b++) {
        const int64_t tokens = lists[b].tokens;
        if (tokens > p.seqlen_k || (t.seqlens_k && t.seqlens_k[b] > tokens)) return false;
        if (t.page_indptr[b] == t.page_indptr[b + 1] || !t.last_page_len) continue;
        if (t.last_page_len[b] < 0 || t.last_page_len[b] > p.page_size) return false;
    }
    return true;
}

/* Where pages are named, those that the valid tokens lie in, from the first that any row sees. */
static inline bool pages_fit(const aiter_attention_problem &p, const aiter_attention_tensors &t) {
    if (p.page_size <= 0) return true;
    const Mask mask(p);
    const PageLists lists(p, t);
    for (int64_t b = 0; b < p.batch; b++) {
        const PageList own = lists.indptr ? lists[b] : PageList{b * p.page_table_stride, p.seqlen_k};
        Sequence s{p.seqlen_q, t.seqlens_k ? t.seqlens_k[b] : own.tokens, 0, own.first, 0};
        if (p.packed_q && t.starts_q) s.tokens_q = t.starts_q[b + 1] - t.starts_q[b];
        if (t.seqlens_q) s.tokens_q = minimum(t.seqlens_q[b], s.tokens_q);
        s.offset = t.query_offsets ? t.query_offsets[b] : s.tokens_k - s.tokens_q;
        const int32_t *pages = t.page_table + s.first_k;
        const int64_t first = s.tokens_q > 0 ? mask.seen_by(s, 0).low : s.tokens_k; /* that any row sees */
        for (int64_t i = first / p.page_size; first < s.tokens_k && i * p.page_size < s.tokens_k; i++)
            if (pages[i] < 0 || pages[i] >= p.num_pages) return false;
    }
    return true;
}

static inline bool values_fit(const aiter_attention_problem &p, const aiter_attention_tensors &t) {
    if (!p.check_values) return true;
    const bool sums_q = p.packed_q && !t.starts_q, sums_k = p.packed_k && !t.starts_k;
    return lengths_fit(t.seqlens_q, p.batch, p.seqlen_q, sums_q, p.total_q, p.check_values == 2) &&
           lengths_fit(t.seqlens_k, p.batch, p.seqlen_k, sums_k, p.total_k, false) &&
           starts_fit(t.starts_q, t.seqlens_q, p.batch, p.seqlen_q, p.total_q) &&
           starts_fit(t.starts_k, t.seqlens_k, p.batch, p.seqlen_k, p.total_k) && lists_fit(p, t) && pages_fit(p, t);
}

#endif
