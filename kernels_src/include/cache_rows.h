/* Where a token goes in a cache: what the CPU's and the GPU's cache_write share.
 *
 * The work is a list of tokens, each with all its heads: those of the query (where it is rotated), then those of the new
 * keys, then those of the new values. Every number that comes from device memory is held against the tensors' sizes
 * here, and nowhere else. */
#ifndef AITER_CACHE_ROWS_H
#define AITER_CACHE_ROWS_H

#include "aiter_abi.h"
#include "fp8.h"

enum TokenFate { TOKEN_IS_WRITTEN, TOKEN_IS_SKIPPED, TOKEN_HAS_NO_PLACE };

/* All heads of one token on their way. */
struct CacheToken {
    TokenFate fate;
    int which; /* 0 query, 1 key, 2 value */
    const void *from;
    void *to;
    int64_t from_at, from_head, from_element; /* elements: to its first one; from head to head; to the next */
    int64_t to_at, to_head, to_element;
    int32_t heads, dim;
    int32_t rotary_dim; /* 0: as it is */
    int64_t angles;     /* row of the angles */
    const float *scale; /* of the first head; null: 1 */
    int64_t scale_stride;
};

AITER_BOTH int64_t query_units(const aiter_cache_write_call &call) {
    const aiter_cache_write_problem &p = call.problem;
    if (p.heads_q == 0) return 0;
    return call.tensors.starts_q ? p.total_q : static_cast<int64_t>(p.batch) * p.seqlen_q;
}
AITER_BOTH int64_t new_units(const aiter_cache_write_call &call) {
    const aiter_cache_write_problem &p = call.problem;
    return call.tensors.starts_new ? p.total_new : static_cast<int64_t>(p.batch) * p.seqlen_new;
}
AITER_BOTH int64_t cache_write_units(const aiter_cache_write_call &call) {
    return query_units(call) + 2 * new_units(call);
}

/* Token i of sequence b. */
struct TokenRow {
    int64_t b, i, packed_row;
    bool exists, packed;

    AITER_MEMBER int64_t offset(const int64_t *strides) const {
        return packed ? packed_row * strides[1] : b * strides[0] + i * strides[1];
    }
};

/* Token number `unit` of all; of packed ones, the sequence is the last that begins at it or before. */
AITER_BOTH TokenRow find_row(const int32_t *starts, int32_t batch, int32_t seqlen, int64_t unit) {
    if (!starts) {
        const int64_t b = unit / seqlen;
        return {b, unit - b * seqlen, 0, true, false};
    }
    int32_t low = 0, high = batch - 1;
    while (low < high) {
        const int32_t middle = low + (high - low + 1) / 2;
        if (starts[middle] <= unit) low = middle;
        else high = middle - 1;
    }
    return {low, unit - starts[low], unit, starts[low] <= unit && unit < starts[low + 1], true};
}

/* The offset of the place that new token i of sequence b goes to. */
AITER_BOTH TokenFate find_place(const aiter_cache_write_call &call, const int64_t *strides, int64_t b, int64_t i,
                                int64_t *offset) {
    const aiter_cache_write_problem &p = call.problem;
    const aiter_cache_write_tensors &t = call.tensors;
    int64_t page, position;
    if (t.slots) {
        const int64_t slot =
            p.wide_slots ? static_cast<const int64_t *>(t.slots)[i] : static_cast<const int32_t *>(t.slots)[i];
        if (slot < 0) return TOKEN_IS_SKIPPED;
        page = slot / p.page_size;
        position = slot - page * p.page_size;
    } else {
        const int64_t place = t.seqlens[b] + i;
        if (t.seqlens[b] < 0 || place > 0x7fffffff) return TOKEN_HAS_NO_PLACE;
        const uint32_t entry = static_cast<uint32_t>(place) / static_cast<uint32_t>(p.page_size);
        if (entry >= static_cast<uint32_t>(t.page_table ? p.table_width : 1)) return TOKEN_HAS_NO_PLACE;
        page = t.page_table ? t.page_table[b * p.page_table_stride + entry] : b;
        position = place - static_cast<int64_t>(entry) * p.page_size;
    }
    *offset = page * strides[0] + position * strides[1];
    return page >= 0 && page < p.num_pages ? TOKEN_IS_WRITTEN : TOKEN_HAS_NO_PLACE;
}

AITER_BOTH CacheToken cache_token(const aiter_cache_write_call &call, int64_t unit) {
    const aiter_cache_write_problem &p = call.problem;
    const aiter_cache_write_tensors &t = call.tensors;
    const int64_t queries = query_units(call), news = new_units(call);
    const int which = unit < queries ? 0 : unit < queries + news ? 1 : 2;
    const bool query = which == 0, key = which == 1;
    const TokenRow row = query ? find_row(t.starts_q, p.batch, p.seqlen_q, unit)
                               : find_row(t.starts_new, p.batch, p.seqlen_new, unit - queries - (key ? 0 : news));
    const int64_t *from = query ? p.query_strides : key ? p.key_strides : p.value_strides;
    const int64_t *to = query ? p.rotated_strides : key ? p.key_cache_strides : p.value_cache_strides;
    CacheToken token;
    token.which = which;
    token.from = query ? t.query : key ? t.key : t.value;
    token.to = query ? t.rotated : key ? t.key_cache : t.value_cache;
    token.from_at = row.offset(from), token.from_head = from[2], token.from_element = from[3];
    token.to_at = row.offset(to), token.to_head = to[2], token.to_element = to[3];
    token.heads = query ? p.heads_q : p.heads_kv;
    token.dim = query || key ? p.head_dim : p.value_dim;
    const int64_t *scale_strides = key ? p.key_scale_strides : p.value_scale_strides;
    token.scale = query ? nullptr : key ? t.key_scale : t.value_scale;
    if (token.scale) token.scale += row.b * scale_strides[0];
    token.scale_stride = scale_strides[1];
    token.rotary_dim = query || key ? p.rotary_dim : 0;
    token.fate = !row.exists ? TOKEN_IS_SKIPPED
                 : query     ? TOKEN_IS_WRITTEN
                             : find_place(call, to, row.b, row.i, &token.to_at);
    token.angles = 0;
    if (token.rotary_dim > 0 && token.fate == TOKEN_IS_WRITTEN) {
        const int64_t step = query ? p.query_step : 1;
        token.angles = (t.rotary_positions ? t.rotary_positions[row.b] : t.seqlens[row.b]) + row.i * step;
        if (token.angles < 0 || token.angles >= p.rotary_length) token.fate = TOKEN_HAS_NO_PLACE;
    }
    return token;
}

#endif
