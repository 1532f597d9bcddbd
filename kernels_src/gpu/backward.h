/* What the blocks of the backward pass work on: rows of two tensors that belong together, and which of them see which.
 *
 * Every pass has the same form. A block owns rows of a pair (x, y) of tensors and lets rows of another pair pass by:
 *
 *                          own x, y            passing x, y        gives
 *   GRAD_QUERY             query, grad_output  key, value          grad_query
 *   GRAD_KEY_VALUE         key, value          query, grad_output  grad_key, grad_value
 *   GRAD_KEY, GRAD_VALUE   the same, one gradient each: for head dimensions that leave no registers for both
 *
 * and with P and dS (or their transposes: rows are the own ones, columns the passing ones) of own and passing rows
 *
 *   P = exp2(scale * x_own x_passing^T - log_sum)      dS = P * (y_own y_passing^T - delta)
 *   gradient of x_own += dS x_passing                  gradient of y_own += P^ y_passing
 *
 * where log_sum (base 2) and delta = rowsum(output * grad_output) - grad_lse belong to query rows, whichever side they
 * are on. */
#ifndef AITER_GPU_BACKWARD_H
#define AITER_GPU_BACKWARD_H

#include "gpu/sequence.h"

namespace aiter {

enum Pass { GRAD_QUERY, GRAD_KEY_VALUE, GRAD_KEY, GRAD_VALUE };

__host__ __device__ constexpr bool owns_queries(int pass) { return pass == GRAD_QUERY; }
__host__ __device__ constexpr bool gives_x(int pass) { return pass != GRAD_VALUE; }
__host__ __device__ constexpr bool gives_y(int pass) { return pass == GRAD_KEY_VALUE || pass == GRAD_VALUE; }

using GradArguments = aiter_attention_grad_call; /* the kernel parameter */

/* Rows of one head of one sequence in one tensor. */
struct Rows {
    char *row_0;
    int64_t stride; /* bytes */
    __device__ __forceinline__ char *row(int i) const { return row_0 + i * stride; }
};

/* Of a query row, as the workspace holds them. */
struct alignas(8) Terms {
    float log_sum, delta;
};

struct RowPair {
    Rows x, y;
    Terms *terms; /* of query rows */
    int count;
};

/* One sequence: its rows of the query side (query, output, their gradients) and of the key side. */
struct GradSequence {
    const GradArguments &arguments;
    int batch;
    Extent query, key;
    int diagonal; /* causal: query row i sees the keys up to i + diagonal */

    __device__ __forceinline__ GradSequence(const GradArguments &arguments, int batch)
        : arguments(arguments), batch(batch) {
        const aiter_attention_problem &p = arguments.problem.forward;
        query = extent(arguments.tensors.seqlens_q, batch, p.seqlen_q, p.packed_q, p.total_q);
        key = extent(arguments.tensors.seqlens_k, batch, p.seqlen_k, p.packed_k, p.total_k);
        diagonal = key.count - query.count;
    }
    __device__ __forceinline__ Rows rows(const void *tensor, const int64_t (&strides)[3], const Extent &extent,
                                         bool packed, int head) const {
        const int64_t first = head * strides[2] + (packed ? extent.begin * strides[1] : batch * strides[0]);
        return {static_cast<char *>(const_cast<void *>(tensor)) + first * 2, strides[1] * 2};
    }
    __device__ __forceinline__ Rows query_rows(const void *tensor, const int64_t (&strides)[3], int head) const {
        return rows(tensor, strides, query, arguments.problem.forward.packed_q, head);
    }
    __device__ __forceinline__ Rows key_rows(const void *tensor, const int64_t (&strides)[3], int head) const {
        return rows(tensor, strides, key, arguments.problem.forward.packed_k, head);
    }
    __device__ __forceinline__ int64_t query_tokens() const {
        const aiter_attention_problem &p = arguments.problem.forward;
        return p.packed_q ? p.total_q : int64_t(p.batch) * p.seqlen_q;
    }
    /* A row of all tokens for every query head. */
    __device__ __forceinline__ Terms *terms(int head) const {
        const aiter_attention_problem &p = arguments.problem.forward;
        return static_cast<Terms *>(arguments.tensors.workspace) + head * query_tokens() +
               (p.packed_q ? query.begin : int64_t(batch) * p.seqlen_q);
    }
    __device__ __forceinline__ RowPair queries(int head) const {
        return {query_rows(arguments.tensors.query, arguments.problem.forward.query_strides, head),
                query_rows(arguments.tensors.grad_output, arguments.problem.grad_output_strides, head), terms(head),
                query.count};
    }
    /* From the rows of a query head to those of the next. */
    __device__ __forceinline__ void next_head(RowPair &pair) const {
        pair.x.row_0 += arguments.problem.forward.query_strides[2] * 2;
        pair.y.row_0 += arguments.problem.grad_output_strides[2] * 2;
        pair.terms += query_tokens();
    }
    __device__ __forceinline__ RowPair keys(int head) const {
        return {key_rows(arguments.tensors.key, arguments.problem.forward.key_strides, head),
                key_rows(arguments.tensors.value, arguments.problem.forward.value_strides, head), nullptr, key.count};
    }
    /* Rows of the gradients to be written: past the valid ones they are zeros. */
    __device__ __forceinline__ int padded_queries() const {
        return arguments.problem.forward.packed_q ? query.count : arguments.problem.forward.seqlen_q;
    }
    __device__ __forceinline__ int padded_keys() const {
        return arguments.problem.forward.packed_k ? key.count : arguments.problem.forward.seqlen_k;
    }
};

/* The passing rows that an own row takes part with: low <= row < high. */
struct Window {
    int low, high;
};

template <bool CAUSAL, int PASS> __device__ __forceinline__ Window window(const GradSequence &sequence, int own_row) {
    if (owns_queries(PASS))
        return {0, CAUSAL ? clamp(own_row + sequence.diagonal + 1, 0, sequence.key.count) : sequence.key.count};
    return {CAUSAL ? clamp(own_row - sequence.diagonal, 0, sequence.query.count) : 0, sequence.query.count};
}

} // namespace aiter

#if defined(__HIP__)
#include "gpu/arch/gfx9_backward.h"
#else
#include "gpu/arch/sm80_backward.h"
#endif

#endif
