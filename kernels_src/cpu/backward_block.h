/* The gradient of one block of query rows with respect to one tile of keys: five products, in the layouts of packed.h.
 *
 *                keys of the tile ->                                   a strip of STRIP_ROWS keys at a time:
 *   query rows   S  = Q K^T         P  = 2^(score(S) - lse)            dV^T += dO^T P
 *       |        dP = dO V^T        dS = P (dP - delta) score'(S)      dK^T += Q^T dS
 *       v
 *                                             when all strips are done:   dQ += dS K
 *
 * Keys lie along the vector lanes here. So the right operands of all products are what is packed once per tile of keys
 * (K^T, V^T, K) or has just been computed (P, dS), the left ones are rows of Q and dO as they come, and the numbers
 * that belong to a row, its log-sum-exp and delta = dO . O - d(lse), are broadcast.
 *
 * In float32 the order of sums matters. S is summed as the forward pass does it: the error of a dominant score then
 * cancels against that of the log-sum-exp, while a better sum of S would make P worse. For few rows that is lane by
 * lane; here, in short parts. dP is summed in shorter parts always, as little may remain of dP - delta. Where one
 * strip holds all keys, neither the log-sum-exp nor the output of the forward pass is needed, nor the rounding of
 * either (WholeRow). */
#ifndef AITER_CPU_BACKWARD_BLOCK_H
#define AITER_CPU_BACKWARD_BLOCK_H

#include <string.h>

#include "dropout.h"
#include "mask.h"
#include "matrix.h"
#include "packed.h"
#include "score.h"

constexpr int WIDTH = round_up(DIM, LANES); /* K and dQ have head_dim along the lanes */
constexpr int VALUE_STEPS = STEPS<VALUE_DIM>;
/* Keys per tile: K^T, V^T, K and the gradients of keys and values share L2 with a block of rows. */
constexpr int TILE_ROOM = 65536 / ((DIM + VALUE_WIDTH) / 2);
constexpr int TILE_STRIPS = (TILE_ROOM < 1024 ? TILE_ROOM : 1024) / STRIP_ROWS;
constexpr int TILE_KEYS = TILE_STRIPS * STRIP_ROWS;
constexpr int TILE_STEPS = TILE_KEYS / STEP_ELEMENTS;
#if AITER_TILES
constexpr int BLOCK_ROWS = BLOCK_KEYS; /* query rows are packed as keys are in the forward pass */
constexpr int QUERY_PART = TILE_STEPS;
constexpr int STRIP_MULTIPLE = STRIP_VECTORS; /* tiles come in pairs: a narrower strip is filled with zeros */
#else
constexpr int BLOCK_ROWS = 64; /* S, dP, P and dS of a strip fit L1 */
constexpr int QUERY_PART = 64; /* steps of keys that dQ is summed over at a time: what they need of K fits L1 */
constexpr int STRIP_MULTIPLE = 1;
#endif
constexpr int BLOCK_ROW_STEPS = BLOCK_ROWS / STEP_ELEMENTS;
constexpr int GRAD_PART = FULL_PRECISION ? 32 : VALUE_STEPS; /* steps that dP is summed over at a time */
constexpr int LEFT_ROW =
    TILE_STEPS + LANES; /* steps from one row of dS to the next: no power of two, for the L1 cache */

/* Where the rows of one operand lie: row r is token r / group of head r % group. */
struct Rows {
    Element *first;
    int64_t token_stride, head_stride, group;

    Rows(const void *tensor, const int64_t *strides, int64_t batch, int64_t token, int64_t head, int64_t heads)
        : first(static_cast<Element *>(const_cast<void *>(tensor)) + batch * strides[0] + token * strides[1] +
                head * heads * strides[2]),
          token_stride(strides[1]), head_stride(strides[2]), group(heads) {}

    Element *operator[](int64_t row) const {
        return group == 1 ? first + row * token_stride : first + row / group * token_stride + row % group * head_stride;
    }
};

/* Keys of a tile, counted from its first one. */
struct TileKeys {
    int first, end;

    bool contains(int key) const { return key >= first && key < end; }
};

/* A tile of keys and the gradients that it gathers. */
struct KeyTile {
    Step *keys_t;         /* K^T [strip][DIM_STEPS][STRIP_ROWS] */
    Step *values_t;       /* V^T [strip][VALUE_STEPS][STRIP_ROWS] */
    Step *keys;           /* K [key step][WIDTH] */
    float *grad_keys_t;   /* [strip][DIM][STRIP_ROWS] */
    float *grad_values_t; /* [strip][VALUE_WIDTH][STRIP_ROWS] */
    int64_t first;        /* of its keys */
    int count, vectors;   /* keys, and the vectors that hold them */
    TileKeys seen;        /* keys that any query row sees: the others take no part */
};

/* A block of query rows. */
struct RowBlock {
    Step *queries, *grads;     /* Q, dO, as pack_row_steps leaves them */
    Step *queries_t, *grads_t; /* Q^T, dO^T, as pack_step_rows leaves them */
    const float *lse, *delta;  /* lse as a power of two; rows that take no part have +inf, which makes P zero */
    const float *rest;         /* 2^(lse - what lse was before it was rounded to a float) */
    int32_t *high, *low;       /* each row sees the keys from low to high - 1; low only with AITER_WINDOW */
    int32_t *place;            /* of each row among the keys, and its slope: only with AITER_ALIBI */
    float *slope;
    int32_t *row, *head;       /* of each row, as dropout counts them: only with AITER_DROPOUT */
    Visibility seen;           /* by the rows */
    int rows;                  /* a multiple of KEY_MULTIPLE */
    int score_part, grad_part; /* steps that S and dP are summed over at a time */
    bool whole;                /* one strip holds all keys: delta is -d(lse) only, and lse says which rows take part */

    /* Whether a row sees each of the keys `first` + lane. */
    IntVec sees(int row, int32_t first) const {
        return in_range(lane_index() + first, WINDOW ? low[row] : 0, high[row]);
    }

    /* Whether the weight of each of the keys `first` + lane is kept. */
    AITER_INLINE_MEMBER IntVec keeps(const Dropout &dropout, int r, int32_t first) const {
        return dropout.kept(broadcast(head[r]), broadcast(row[r]), lane_index() + first);
    }

    /* Scores of a row's products with the keys `first` + lane, and their derivative by scale q.k. */
    AITER_INLINE_MEMBER Vec score(const Score &score, int row, int32_t first, Vec products, Vec &derivative) const {
        const IntVec distance = ALIBI ? place[row] - (lane_index() + first) : IntVec{};
        return score(products, distance, ALIBI ? slope[row] : 0.0f, derivative);
    }
};

/* What lies between the products. */
struct Weights {
    float *scores, *grads;    /* S, dP [row][STRIP_ROWS] */
    Step *right, *grad_right; /* P, dS [row step][STRIP_ROWS] */
    Step *grad_left;          /* dS [row][LEFT_ROW] */
};

/* A product with a strip of keys along the lanes, `part` steps summed at a time. A switch of its own: by way of
 * strip.h's with_vectors, g++ 12 inlines the products and makes them 2 % slower. */
template <class A>
static __attribute__((noinline)) void product(int vectors, float *c, const Step *a, const Step *b, int count, int steps,
                                              bool accumulate, int part) {
    switch (vectors) {
#if !AITER_TILES
    case 1: return multiply<1, Lanes, A, Lanes>(c, a, b, count, steps, accumulate, part);
#endif
#if AITER_AVX512 && !AITER_TILES || AITER_AVX2
    case 2: return multiply<2, Lanes, A, Lanes>(c, a, b, count, steps, accumulate, part);
#endif
    default: return multiply<STRIP_VECTORS, Lanes, A, Lanes>(c, a, b, count, steps, accumulate, part);
    }
}

/* K^T or V^T of a tile. */
template <int N> static void pack_columns(Step *columns, const Rows &rows, const KeyTile &tile, float sign) {
    for (int v = 0; v < tile.vectors; v++) {
        const Element *lanes[LANES];
        for (int i = 0; i < LANES; i++)
            lanes[i] = tile.seen.contains(v * LANES + i) ? rows[tile.first + v * LANES + i] : nullptr;
        pack_lanes<N>(columns + v / STRIP_VECTORS * STEPS<N> * STRIP_ROWS, v % STRIP_VECTORS, lanes, sign);
    }
}

/* K of a tile, for dQ. */
static void pack_rows(Step *steps, const Rows &rows, const KeyTile &tile) {
    auto row_of = [&](int key) -> const Element * { return tile.seen.contains(key) ? rows[tile.first + key] : NO_ROW; };
    for (int key = 0; key < tile.vectors * LANES; key += STEP_ELEMENTS, steps += WIDTH)
        for (int d = 0; d < WIDTH; d += LANES) {
            StepVec v = StepVec{};
            if (d < HEAD_DIM) {
#if AITER_PAIRS
                v = interleave(row_of(key) + d, row_of(key + 1) + d, HEAD_DIM - d);
#else
                v = to_floats(row_of(key) + d, HEAD_DIM - d);
#endif
            }
            store_steps(steps + d, v);
        }
}

/* Stores values of two rows as a right operand and, where `left` is not null, also as rows of a left one. */
AITER_INLINE void store_pair(Step *right, Step *left, Vec low, Vec high) {
#if AITER_PAIRS
#if AITER_DTYPE_BF16
    const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
    HalfVec halves[2];
    memcpy(halves, &both, sizeof halves);
#else
    const HalfVec halves[2] = {to_elements(low), to_elements(high)};
#endif
    store_steps(right, widen(halves[0]) | (widen(halves[1]) << 16));
    if (left) {
        memcpy(left, &halves[0], sizeof halves[0]);
        memcpy(left + LEFT_ROW, &halves[1], sizeof halves[1]);
    }
#else
    store(right, low);
    store(right + Lanes::ROW, high);
    if (left) {
        store(left, low);
        store(left + LEFT_ROW, high);
    }
#endif
}

/* P, where dropout keeps it, and dS of a row, for the keys `first` + lane. */
template <bool MASKED>
AITER_INLINE void weights_of(const Weights &w, const RowBlock &block, int row, int at, int32_t first,
                             const Score &score, const Dropout &dropout, Vec &weights, Vec &grads) {
    Vec derivative;
    const Vec scores = block.score(score, row, first, load(w.scores + at), derivative);
    weights = exp2<EXP2_DEGREE>(scores - block.lse[row]);
    if (FULL_PRECISION) weights *= block.rest[row];
    const Vec grad = load(w.grads + at);
    if (DROPOUT) { /* what reaches a weight is that of the output's, where it is kept */
        const IntVec kept = block.keeps(dropout, row, first);
        grads = weights * ((kept ? grad * dropout.scale : Vec{}) - block.delta[row]);
        weights = kept ? weights : Vec{};
    } else {
        grads = weights * (grad - block.delta[row]);
    }
    if (SOFTCAP) grads *= derivative;
    if (MASKED) { /* selected, not multiplied: what is masked may be inf or NaN */
        const IntVec sees = block.sees(row, first);
        weights = sees ? weights : Vec{};
        grads = sees ? grads : Vec{};
    }
}

/* From S and dP to P and dS, for a strip that begins at `first_key` of the tile. */
template <bool MASKED>
static void differentiate(const Weights &w, const RowBlock &block, int64_t tile_first, int first_key, int vectors,
                          const Score &given, const Dropout &random) {
    const Score score = given; /* copies, as what is stored could change what only a reference points to */
    const Dropout dropout = random;
    for (int r = 0; r < block.rows; r += 2) {
        for (int v = 0; v < vectors; v++) {
            const int32_t first = static_cast<int32_t>(tile_first + first_key + v * LANES);
            Vec low, high, grad_low, grad_high;
            weights_of<MASKED>(w, block, r, Lanes::at(r, v), first, score, dropout, low, grad_low);
            weights_of<MASKED>(w, block, r + 1, Lanes::at(r + 1, v), first, score, dropout, high, grad_high);
            const int right = Lanes::at(r / STEP_ELEMENTS, v);
            store_pair(w.right + right, nullptr, low, high);
            store_pair(w.grad_right + right, w.grad_left + r * LEFT_ROW + (first_key + v * LANES) / STEP_ELEMENTS,
                       grad_low, grad_high);
        }
    }
}

/* P and dS of a row, by a softmax of its own, and so without the rounding of the log-sum-exp and the output of the
 * forward pass, which would be most of the error of few numbers: for a row that sees no key beyond the strip. */
struct WholeRow {
    Vec weights[STRIP_VECTORS], grads[STRIP_VECTORS];

    WholeRow(const Weights &w, const RowBlock &block, int row, int vectors, const Score &score,
             const Dropout &dropout) {
        const IntVec takes_part = broadcast(block.lse[row] == INFINITE ? 0 : -1);
        Vec most = broadcast(-INFINITE), derivatives[STRIP_VECTORS];
        for (int v = 0; v < vectors; v++) {
            const Vec scores = block.score(score, row, v * LANES, load(w.scores + Lanes::at(row, v)), derivatives[v]);
            weights[v] = block.sees(row, v * LANES) & takes_part ? scores : broadcast(-INFINITE);
            most = maximum(weights[v], most);
        }
        float largest = most[0];
        for (int i = 1; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
        Vec total = Vec{}, products = Vec{};
        for (int v = 0; v < vectors; v++) total += weights[v] = exp2<EXP2_DEGREE>(weights[v] - largest);
        const float factor = 1.0f / sum(total);
        for (int v = 0; v < vectors; v++) {
            const IntVec sees = block.sees(row, v * LANES) & takes_part;
            grads[v] = sees ? load(w.grads + Lanes::at(row, v)) : Vec{};
            if (DROPOUT) grads[v] = block.keeps(dropout, row, v * LANES) ? grads[v] * dropout.scale : Vec{};
            weights[v] = sees ? weights[v] * factor : Vec{};
            products += weights[v] * grads[v];
        }
        const float delta = sum(products) + block.delta[row];
        for (int v = 0; v < vectors; v++) {
            grads[v] = weights[v] * (grads[v] - delta);
            if (SOFTCAP) grads[v] = block.sees(row, v * LANES) & takes_part ? grads[v] * derivatives[v] : Vec{};
            if (DROPOUT) weights[v] = block.keeps(dropout, row, v * LANES) ? weights[v] : Vec{};
        }
    }
};

static AITER_OUTLINE void differentiate_whole(const Weights &w, const RowBlock &block, int vectors, const Score &score,
                                              const Dropout &dropout) {
    for (int r = 0; r < block.rows; r += 2) {
        const WholeRow low(w, block, r, vectors, score, dropout), high(w, block, r + 1, vectors, score, dropout);
        for (int v = 0; v < vectors; v++) {
            const int right = Lanes::at(r / STEP_ELEMENTS, v);
            store_pair(w.right + right, nullptr, low.weights[v], high.weights[v]);
            store_pair(w.grad_right + right, w.grad_left + r * LEFT_ROW + v * LANES / STEP_ELEMENTS, low.grads[v],
                       high.grads[v]);
        }
    }
}

/* Adds the block's part to the gradients of the tile's keys and values, and leaves dS for the keys that are returned:
 * those that the block sees, rounded to whole vectors and strips. */
static TileKeys gather(const KeyTile &tile, const RowBlock &block, const Weights &w, const Score &score,
                       const Dropout &dropout) {
    const int seen = static_cast<int>(minimum(tile.count, block.seen.some.high - tile.first));
    const int vectors = round_up((seen + LANES - 1) / LANES, STRIP_MULTIPLE), row_steps = block.rows / STEP_ELEMENTS;
    const int64_t before = WINDOW ? clamp(block.seen.some.low - tile.first, 0, tile.count) : 0;
    const int first_vector = static_cast<int>(before / STRIP_ROWS * STRIP_VECTORS);
    for (int v = first_vector; v < vectors; v += STRIP_VECTORS) {
        const int width = static_cast<int>(minimum(STRIP_VECTORS, vectors - v)), first_key = v * LANES;
        const int64_t strip = first_key;
        product<RowSteps<HEAD_DIM>>(width, w.scores, block.queries, tile.keys_t + strip * DIM_STEPS, block.rows,
                                    DIM_STEPS, false, block.score_part);
        product<RowSteps<VALUE_DIM>>(width, w.grads, block.grads, tile.values_t + strip * VALUE_STEPS, block.rows,
                                     VALUE_STEPS, false, block.grad_part);
        if (FULL_PRECISION && block.whole) differentiate_whole(w, block, width, score, dropout);
        else if (block.seen.cuts(tile.first + first_key, width * LANES))
            differentiate<true>(w, block, tile.first, first_key, width, score, dropout);
        else differentiate<false>(w, block, tile.first, first_key, width, score, dropout);
        product<StepColumns<VALUE_DIM>>(width, tile.grad_values_t + strip * VALUE_WIDTH, block.grads_t, w.right,
                                        VALUE_WIDTH, row_steps, true, row_steps);
        product<StepColumns<HEAD_DIM>>(width, tile.grad_keys_t + strip * DIM, block.queries_t, w.grad_right, DIM,
                                       row_steps, true, row_steps);
    }
    return {first_vector * LANES, vectors * LANES};
}

/* dQ [row][WIDTH] (+)= dS K, over these keys of the tile. */
static __attribute__((noinline)) void add_grad_queries(float *grad_queries, const KeyTile &tile, const RowBlock &block,
                                                       const Weights &w, TileKeys keys, bool accumulate) {
    constexpr int REST = WIDTH % STRIP_ROWS / LANES, WHOLE = WIDTH - REST * LANES;
    using Left = Strided<LEFT_ROW>;
    using Right = Strided<WIDTH>;
    const int end = keys.end / STEP_ELEMENTS;
    for (int first = keys.first / STEP_ELEMENTS; first < end; first += QUERY_PART, accumulate = true) {
        const int steps = static_cast<int>(minimum(QUERY_PART, end - first));
        const Step *left = w.grad_left + first, *right = tile.keys + first * WIDTH;
        for (int d = 0; d < WHOLE; d += STRIP_ROWS)
            multiply<STRIP_VECTORS, Right, Left, Right>(grad_queries + d, left, right + d, block.rows, steps,
                                                        accumulate);
        if constexpr (REST > 0)
            multiply<REST, Right, Left, Right>(grad_queries + WHOLE, left, right + WHOLE, block.rows, steps,
                                               accumulate);
    }
}

static void write_grad_queries(const Rows &rows, int64_t first, int count, const float *grad_queries, float scale) {
    for (int r = 0; r < count; r++, grad_queries += WIDTH)
        for (int d = 0; d < HEAD_DIM; d += LANES)
            store_elements(rows[first + r] + d, load(grad_queries + d) * scale, HEAD_DIM - d);
}

/* Writes rows of dK or dV, which lie along the lanes until now. */
template <int N> static void write_columns(const Rows &rows, const KeyTile &tile, const float *columns, float scale) {
    for (int v = 0; v < tile.vectors; v++) {
        const float *strip = columns + static_cast<int64_t>(v / STRIP_VECTORS) * PADDED<N> * STRIP_ROWS;
        for (int d = 0; d < N; d += LANES) {
            Vec square[LANES];
            for (int i = 0; i < LANES; i++)
                square[i] = d + i < PADDED<N> ? load(strip + Lanes::at(d + i, v % STRIP_VECTORS)) * scale : Vec{};
            transpose(square);
            for (int i = 0; i < LANES && v * LANES + i < tile.count; i++)
                store_elements(rows[tile.first + v * LANES + i] + d, square[i], N - d);
        }
    }
}

#endif
