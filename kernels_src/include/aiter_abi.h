/* The launch ABI: everything that crosses between Python and a compiled kernel.
 *
 *   Python                                         kernel .so (one per spec)
 *   ------                                         -------------------------
 *   call     problem: sizes, strides, scalars -->  aiter_launch(call, executor)
 *            tensors: addresses
 *            packed anew for every call            returns 0, or a code that aiter_error_text
 *   executor where it runs: a HIP/CUDA stream, --> turns into words; it never aborts
 *            or on a CPU an aiter_cpu_executor
 *
 * What selects code is in the spec, and reaches the source as macros; what is only a number is in the call.
 *
 * aiter/abi.py mirrors these structs with ctypes; tests/test_abi.py compares the two field by field. Plain C, so that
 * a kernel needs no framework header and builds in seconds.
 *
 * Layouts.  "Row" is one token of one head: head_dim elements with unit stride. Strides count elements.
 *   dense    query/output (batch, seqlen_q, heads_q, head_dim), key/value (batch, seqlen_k, heads_kv, head_dim).
 *            With seqlens_q / seqlens_k given, sequence b has only that many valid rows (padded batch): rows of the
 *            output past them are zeros (log-sum-exp -inf), and what stands in the padding has no effect.
 *   packed   (packed_q / packed_k = 1) query, or key and value, are (total, heads, head_dim), sequences one after the
 *            other. Sequence b begins at starts[b] and ends at starts[b + 1] or, where there are seqlens too, after
 *            that many rows if that comes first; without starts, it begins at seqlens[0] + ... + seqlens[b-1]. The
 *            batch stride is not used.
 *   paged    (page_size > 0) token t of sequence b lies in page page_table[b * page_table_stride + t / page_size] at
 *            position t % page_size. The strides of key and value are then {page, position, head}.
 *   lists    (paged, with page_indptr) the same, but page_table is one flat list: the pages of sequence b are its entries
 *            page_indptr[b] to before page_indptr[b + 1], of which the last holds last_page_len[b] tokens (without that,
 *            page_size). These, and seqlens_k if there are any, say how many tokens a sequence has.
 *
 * Rows of the output that belong to no sequence (padding, and packed rows before, between and past the sequences)
 * become zeros, their log-sum-exp -inf, where clear_rest is 1; else they are left as they are.
 *
 * Which keys a row sees. Query token i of a sequence stands at key i + offset, where offset is query_offsets[b] or, by
 * default, seqlen_k - seqlen_q of that sequence: the last query at the last key. AITER_CAUSAL: it sees the keys up to
 * there. AITER_WINDOW, never together with AITER_CAUSAL: it sees key j where
 * i + offset - window_left <= j <= i + offset + window_right; -1 is no limit on that side. Only keys from 0 to
 * seqlen_k - 1 exist. A row that sees none is zeros, log-sum-exp -inf. Pages that no row of a tile sees are not read.
 *
 * 8-bit keys and values. AITER_E4M3FN, AITER_E4M3FNUZ, AITER_E5M2: elements of key and value are floats of 8 bits, and
 * stand for themselves times their descale (null: 1). Each is a number of the query's type too, so that all is as if
 * they had been converted; key_descale multiplies softmax_scale, value_descale the finished row. Forward only.
 *
 * Scores. s = softmax_scale * q.k; then AITER_SOFTCAP: s = softcap * tanh(s / softcap); then AITER_ALIBI:
 * s = s - slope * |i + offset - j|, the slope of query head h being alibi_slopes[b * alibi_stride + h].
 *
 * AITER_CHUNK, always with AITER_WINDOW: of the keys that the window leaves, a row sees those of its own chunk, which are
 * attention_chunk keys from a multiple of that on: its place is one of them, whether there is a key or not.
 *
 * AITER_DROPOUT: weights of the softmax are left out at random, with a probability of dropout_threshold / 65536, and the
 * others are divided by that of being kept. Which ones, philox.h says: it depends on the seed and the offset in rng_state,
 * and on the sequence, the query head, and the row and the key within the sequence. The log-sum-exp is that of all.
 *
 * A sink is a score of a query head that joins the sum of the softmax with no value to weight: the output is multiplied
 * by 1 / (1 + exp(sink - log-sum-exp)); the log-sum-exp that is returned is that of the keys alone.
 *
 * Values that live in device memory (seqlens, starts, page_table, page_indptr, last_page_len, offsets) are not checked by
 * the host: kernels clamp lengths to [0, seqlen_q/k], packed rows to [0, total], lists of pages to [0, listed_pages] and
 * page numbers to [0, num_pages), so that no access leaves the tensors.
 */
#ifndef AITER_ABI_H
#define AITER_ABI_H

#include <stdint.h>

#define AITER_ABI_VERSION 4

#ifdef __cplusplus
#define AITER_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define AITER_EXPORT __attribute__((visibility("default")))
#endif

typedef struct aiter_attention_problem {
    int32_t batch;
    int32_t heads_q;
    int32_t heads_kv;          /* divides heads_q; query head h reads KV head h / (heads_q / heads_kv) */
    int32_t seqlen_q;          /* rows per sequence, or the most that any sequence has */
    int32_t seqlen_k;          /* the same for keys; paged: the most tokens that a row of the page table,
                                  or any list of pages, holds */
    int32_t packed_q;          /* 0 or 1 */
    int32_t packed_k;          /* 0 or 1; never together with pages */
    int32_t page_size;         /* tokens per page; 0 when key and value are not paged */
    int64_t total_q;           /* packed: rows in query, else 0 */
    int64_t total_k;           /* packed: rows in key, else 0 */
    int64_t num_pages;         /* paged: pages in the cache, else 0 */
    int64_t page_table_stride; /* paged: elements from one row of the table to the next, else 0 */
    int64_t listed_pages;      /* lists: entries in page_table, else 0 */
    int64_t query_strides[3];  /* batch, token, head */
    int64_t key_strides[3];    /* batch, token, head; paged: page, position, head */
    int64_t value_strides[3];
    int64_t output_strides[3];
    int64_t lse_strides[2];         /* batch, head; consecutive tokens are adjacent */
    int64_t key_descale_strides[2]; /* batch, KV head; 0 where all have the same */
    int64_t value_descale_strides[2];
    int64_t alibi_stride; /* from one sequence's slopes to the next one's; 0 where all have the same */
    float softmax_scale;
    float softcap;             /* positive where AITER_SOFTCAP */
    int32_t window_left;       /* where AITER_WINDOW: keys before a row's own that it sees, or -1: all */
    int32_t window_right;      /* the same for keys after it */
    int32_t clear_rest;        /* 0 or 1 */
    int32_t batch_invariant;   /* 1: no bit of a sequence's result may depend on the rest of the batch; a CPU's forward
                                * kernel is built for it, with AITER_BATCH_INVARIANT */
    int32_t check_values;      /* CPU kernels: 1, refuse lengths and page numbers that are out of range; 2, and lengths
                                of packed queries that do not fill them; 3, as 1, and do nothing else */
    int32_t attention_chunk;   /* at least 1 where AITER_CHUNK */
    int32_t dropout_threshold; /* from 0 to 65535, where AITER_DROPOUT */
    int32_t reserved;          /* 0 */
} aiter_attention_problem;

typedef struct aiter_attention_tensors {
    const void *query;
    const void *key;
    const void *value;
    void *output;
    float *lse;                   /* null when not wanted; natural logarithm */
    const int32_t *seqlens_q;     /* (batch,) or null */
    const int32_t *seqlens_k;     /* (batch,) or null */
    const int32_t *starts_q;      /* packed: (batch + 1,) or null */
    const int32_t *starts_k;      /* packed: (batch + 1,) or null */
    const int32_t *query_offsets; /* (batch,) or null */
    const int32_t *page_table;    /* (batch, pages), (listed_pages,) or null */
    const int32_t *page_indptr;   /* lists: (batch + 1,), else null */
    const int32_t *last_page_len; /* lists: (batch,) or null */
    const float *alibi_slopes;    /* (heads_q,) or (batch, heads_q); where AITER_ALIBI */
    const float *sinks;           /* (heads_q,) or null */
    const int64_t *rng_state;     /* (2,) seed and offset, of which the low 32 bits count; where AITER_DROPOUT */
    const float *key_descale;     /* (1,), (heads_kv,) or (batch, heads_kv), or null; where keys are 8-bit floats */
    const float *value_descale;
    void *workspace; /* aiter_workspace_bytes(call) bytes, 256-byte aligned, or null when that is 0 */
} aiter_attention_tensors;

typedef struct aiter_attention_call {
    aiter_attention_problem problem;
    aiter_attention_tensors tensors;
} aiter_attention_call;

/* The backward pass, from the saved output and log-sum-exp; never with pages. Every element of the three gradients is
 * written, zeros for rows that belong to no sequence. Gradients of keys and values sum over the query heads that share
 * a KV head. The weights are exp(s - lse): where lse_is_given, it need not follow from the keys at hand alone, but may
 * have a sink or the keys of other devices in it. */
typedef struct aiter_attention_grad_problem {
    aiter_attention_problem forward;
    int64_t grad_output_strides[3]; /* batch, token, head */
    int64_t grad_query_strides[3];
    int64_t grad_key_strides[3];
    int64_t grad_value_strides[3];
    int32_t lse_is_given; /* 0: lse is the log-sum-exp of these very keys */
    int32_t reserved;     /* 0 */
} aiter_attention_grad_problem;

typedef struct aiter_attention_grad_tensors {
    const void *query;
    const void *key;
    const void *value;
    const void *output;
    const float *lse;
    const void *grad_output;
    const float *grad_lse; /* laid out as lse, or null when it is zero */
    void *grad_query;
    void *grad_key;
    void *grad_value;
    const int32_t *seqlens_q; /* as in the forward pass, these seven */
    const int32_t *seqlens_k;
    const int32_t *starts_q;
    const int32_t *starts_k;
    const int32_t *query_offsets;
    const float *alibi_slopes;
    const int64_t *rng_state;
    void *workspace;
} aiter_attention_grad_tensors;

typedef struct aiter_attention_grad_call {
    aiter_attention_grad_problem problem;
    aiter_attention_grad_tensors tensors;
} aiter_attention_grad_call;

/* Runs body(data) once on each of num_threads threads, the caller among them, and returns when all are done: the
 * signature of libgomp's GOMP_parallel, so that kernels share the thread pool that PyTorch has already started. */
typedef void (*aiter_parallel)(void (*body)(void *), void *data, unsigned num_threads, unsigned flags);

typedef struct aiter_cpu_executor {
    aiter_parallel parallel; /* null: the kernel starts its own short-lived threads */
    int32_t num_threads;     /* at least 1 */
    int32_t reserved;        /* 0 */
} aiter_cpu_executor;

typedef struct aiter_description {
    uint32_t abi_version; /* AITER_ABI_VERSION of the build */
    uint32_t call_bytes;  /* sizeof the aiter_call that this kernel's launch takes */
} aiter_description;

/* Writing new keys and values into a cache, which is pages of tokens; an un-paged one has a page for each sequence.
 * Strides of the caches are those of {page, position, head, element}, whichever order memory has them in.
 *
 *   by slots    token t goes to position slots[t] % page_size of page slots[t] / page_size; not where that is negative
 *   by lengths  token i of sequence b goes to place seqlens[b] + i of that sequence: page page_table[b][place /
 *               page_size], or, without a table, the one place of page b. New tokens are (batch, seqlen_new, heads), or
 *               packed with starts_new. Here keys may be rotated on their way, and queries too, to `rotated`.
 *
 * Rotation (rotary embedding): elements x, y of a pair become x cos - y sin, y cos + x sin, computed in float32; the
 * angles of pair d are row n of rotary_cos and rotary_sin, (rotary_length, rotary_dim / 2), where n is the token's place
 * in its sequence, counted from rotary_positions[b] instead of seqlens[b] where they are given. Pairs are elements 2d and
 * 2d + 1 (interleaved), or d and d + rotary_dim / 2. Query i has place i * query_step.
 *
 * AITER_E4M3FN, AITER_E4M3FNUZ, AITER_E5M2: the cache holds 8-bit floats, element / scale, rounded to nearest even; what
 * is too large, infinities too, becomes the largest finite one. A null scale is 1.
 *
 * A token whose place is in no page of the cache, or has no angles, is not written, and a query of that kind stays as it
 * is: on CPUs nothing is written then, and the launch says so. */
typedef struct aiter_cache_write_problem {
    int32_t batch;   /* 1 where there are slots */
    int32_t heads_q; /* 0: no query to rotate */
    int32_t heads_kv;
    int32_t seqlen_q;   /* query tokens per sequence, or the most that any has */
    int32_t seqlen_new; /* the same for new tokens; the number of slots */
    int32_t head_dim;
    int32_t value_dim;
    int32_t page_size;
    int32_t table_width; /* pages in a row of page_table, else 0 */
    int32_t rotary_dim;  /* even, at most head_dim; 0: no rotation */
    int32_t rotary_length;
    int32_t interleaved; /* 0 or 1 */
    int32_t query_step;  /* 1: each query stands one place further; 0: all stand where the first does */
    int32_t wide_slots;  /* slots are int64_t, not int32_t */
    int64_t num_pages;
    int64_t page_table_stride; /* elements from one row of the table to the next, else 0 */
    int64_t total_q;           /* rows in query where it is packed, else 0 */
    int64_t total_new;         /* the same for new tokens */
    int64_t query_strides[4];  /* batch, token, head, element */
    int64_t rotated_strides[4];
    int64_t key_strides[4];
    int64_t value_strides[4];
    int64_t key_cache_strides[4]; /* page, position, head, element */
    int64_t value_cache_strides[4];
    int64_t cos_stride; /* from one place's angles to the next one's */
    int64_t sin_stride;
    int64_t key_scale_strides[2]; /* sequence, head; 0 where all have the same */
    int64_t value_scale_strides[2];
} aiter_cache_write_problem;

typedef struct aiter_cache_write_tensors {
    const void *query;
    void *rotated; /* like query */
    const void *key;
    const void *value;
    void *key_cache;
    void *value_cache;
    const void *slots;         /* (seqlen_new,), or null: by lengths */
    const int32_t *seqlens;    /* (batch,) tokens that are in the cache already */
    const int32_t *page_table; /* (batch, table_width) or null */
    const int32_t *starts_q;   /* (batch + 1,) where query is packed, else null */
    const int32_t *starts_new; /* the same for new tokens */
    const void *rotary_cos;    /* of the elements' type */
    const void *rotary_sin;
    const int32_t *rotary_positions; /* (batch,) or null */
    const float *key_scale;          /* (1,), (heads_kv,) or (batch, heads_kv), or null */
    const float *value_scale;
    void *workspace; /* none is needed: null */
} aiter_cache_write_tensors;

typedef struct aiter_cache_write_call {
    aiter_cache_write_problem problem;
    aiter_cache_write_tensors tensors;
} aiter_cache_write_call;

/* What every kernel .so exports; a kernel that is not a forward one says so before it includes this header. */
#if defined(AITER_BACKWARD)
typedef aiter_attention_grad_call aiter_call;
#elif defined(AITER_CACHE_WRITE)
typedef aiter_cache_write_call aiter_call;
#else
typedef aiter_attention_call aiter_call;
#endif

AITER_EXPORT void aiter_describe(aiter_description *description);
AITER_EXPORT int64_t aiter_workspace_bytes(const aiter_call *call); /* reads call->problem alone */
AITER_EXPORT int aiter_launch(const aiter_call *call, void *executor);
AITER_EXPORT const char *aiter_error_text(int code); /* never null; valid until this thread's next launch */

#endif
