/* The launch ABI: everything that crosses between Python and a compiled kernel.
 *
 *   Python                                         kernel .so (one per spec)
 *   ------                                         -------------------------
 *   problem  sizes, strides, scale ------------->  aiter_launch(problem, tensors, executor)
 *            made once per shape, then reused
 *   tensors  addresses, new for every call ----->
 *   executor where it runs: a HIP/CUDA stream, --> returns 0, or a code that aiter_error_text
 *            or on a CPU an aiter_cpu_executor     turns into words; it never aborts
 *
 * aiter/abi.py mirrors these structs with ctypes; tests/test_abi.py compares the two field by field. Plain C, so that
 * a kernel needs no framework header and builds in seconds.
 *
 * Layouts.  "Row" is one token of one head: head_dim elements with unit stride. Strides count elements.
 *   dense    query/output (batch, seqlen_q, heads_q, head_dim), key/value (batch, seqlen_k, heads_kv, head_dim).
 *            With seqlens_q / seqlens_k given, sequence b has only that many valid rows (padded batch): rows of the
 *            output past them are zeros (log-sum-exp -inf), and what stands in the padding has no effect.
 *   packed   (packed_q / packed_k = 1) query, or key and value, are (total, heads, head_dim), sequences one after the
 *            other; sequence b begins at seqlens[0] + ... + seqlens[b-1]. The batch stride is not used.
 *   paged    (page_size > 0) token t of sequence b lies in page page_table[b * page_table_stride + t / page_size] at
 *            position t % page_size. The strides of key and value are then {page, position, head}.
 *
 * Values that live in device memory (seqlens, page_table) are not checked by the host: kernels clamp lengths to
 * [0, seqlen_q/k], packed ends to [0, total] and page numbers to [0, num_pages), so that no access leaves the tensors.
 */
#ifndef AITER_ABI_H
#define AITER_ABI_H

#include <stdint.h>

#define AITER_ABI_VERSION 1

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
    int32_t seqlen_k;          /* the same for keys; paged: the most tokens that a row of the page table holds */
    int32_t packed_q;          /* 0 or 1 */
    int32_t packed_k;          /* 0 or 1; never together with pages */
    int32_t page_size;         /* tokens per page; 0 when key and value are not paged */
    int64_t total_q;           /* packed: rows in query, else 0 */
    int64_t total_k;           /* packed: rows in key, else 0 */
    int64_t num_pages;         /* paged: pages in the cache, else 0 */
    int64_t page_table_stride; /* paged: elements from one row of the table to the next, else 0 */
    int64_t query_strides[3];  /* batch, token, head */
    int64_t key_strides[3];    /* batch, token, head; paged: page, position, head */
    int64_t value_strides[3];
    int64_t output_strides[3];
    int64_t lse_strides[2]; /* batch, head; consecutive tokens are adjacent */
    float softmax_scale;
    int32_t reserved; /* 0 */
} aiter_attention_problem;

typedef struct aiter_attention_tensors {
    const void *query;
    const void *key;
    const void *value;
    void *output;
    float *lse;                /* null when not wanted; natural logarithm */
    const int32_t *seqlens_q;  /* (batch,) or null */
    const int32_t *seqlens_k;  /* (batch,) or null */
    const int32_t *page_table; /* (batch, pages) or null */
    void *workspace;           /* aiter_workspace_bytes(problem) bytes, 256-byte aligned, or null when that is 0 */
} aiter_attention_tensors;

/* The backward pass, from the saved output and log-sum-exp; never with pages. Every element of the three gradients is
 * written, zeros for padding rows. Gradients of keys and values sum over the query heads that share a KV head. */
typedef struct aiter_attention_grad_problem {
    aiter_attention_problem forward;
    int64_t grad_output_strides[3]; /* batch, token, head */
    int64_t grad_query_strides[3];
    int64_t grad_key_strides[3];
    int64_t grad_value_strides[3];
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
    const int32_t *seqlens_q;
    const int32_t *seqlens_k;
    void *workspace;
} aiter_attention_grad_tensors;

/* Runs body(data) once on each of num_threads threads, the caller among them, and returns when all are done: the
 * signature of libgomp's GOMP_parallel, so that kernels share the thread pool that PyTorch has already started. */
typedef void (*aiter_parallel)(void (*body)(void *), void *data, unsigned num_threads, unsigned flags);

typedef struct aiter_cpu_executor {
    aiter_parallel parallel; /* null: the kernel starts its own short-lived threads */
    int32_t num_threads;     /* at least 1 */
    int32_t reserved;        /* 0 */
} aiter_cpu_executor;

typedef struct aiter_description {
    uint32_t abi_version;   /* AITER_ABI_VERSION of the build */
    uint32_t problem_bytes; /* sizeof the structs that this kernel's launch takes */
    uint32_t tensors_bytes;
} aiter_description;

/* What every kernel .so exports; a backward kernel defines AITER_BACKWARD before it includes this header. */
#ifdef AITER_BACKWARD
typedef aiter_attention_grad_problem aiter_problem;
typedef aiter_attention_grad_tensors aiter_tensors;
#else
typedef aiter_attention_problem aiter_problem;
typedef aiter_attention_tensors aiter_tensors;
#endif

AITER_EXPORT void aiter_describe(aiter_description *description);
AITER_EXPORT int64_t aiter_workspace_bytes(const aiter_problem *problem);
AITER_EXPORT int aiter_launch(const aiter_problem *problem, const aiter_tensors *tensors, void *executor);
AITER_EXPORT const char *aiter_error_text(int code); /* never null; valid until this thread's next launch */

#endif
