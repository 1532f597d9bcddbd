/* The loop over the tiles of keys on AMD CDNA beyond 128 (gfx90a: 64) and up to 256 dimensions: eight waves in pairs that
 * have the same 32 query rows. One of a pair has the queries and makes the probabilities, the other has the output: so
 * two waves fit on a SIMD, and one multiplies (M) while the other does not.
 *
 *                      tile n                                     n + 1
 *   probabilities   M: S(n) = K Q^T     |  V: softmax(n), P(n)  |  M: S(n+1)        |  V ...
 *   output          rescale             |  M: O += P(n-1) V     |  rescale          |  M ...
 *   barriers                            A                       B
 *
 *   barriers     Before the last few products of M, so that the other wave follows without a gap. Those come first, by
 *                priority, then the other products of M, then V.
 *   exchange     P(n) goes to the other wave through shared memory, in 16 bit, as operands; so does what the output must
 *                be multiplied by, 1 but in the few tiles that move a maximum.
 *   copies       In M a wave loads rows for the tile after the next. What it stores nobody reads at that time: V(n-1)
 *                before A, K(n+1) before A, too, where there is room for two of its buffers, or between A and B. */
#ifndef AITER_GPU_ARCH_GFX9_PAIRED_FORWARD_H
#define AITER_GPU_ARCH_GFX9_PAIRED_FORWARD_H

#include <type_traits>

#include "gpu/arch/gfx9_forward.h"

namespace aiter {

template <int HEAD_DIM, int VALUE_DIM> struct PairedShape : Shape<HEAD_DIM, VALUE_DIM> {
#if defined(AITER_GFX950)
    static constexpr int KEYS = 64;
#else
    static constexpr int KEYS = greater(HEAD_DIM, VALUE_DIM) <= 128 ? 64 : 32; /* in 64 KB of LDS, with P */
#endif
    static constexpr int BLOCKS = 1;
};

template <int HEAD_DIM, int VALUE_DIM>
struct PairedForwardLoop
    : LoopOfWaves<PairedForwardLoop<HEAD_DIM, VALUE_DIM>, HEAD_DIM, VALUE_DIM, PairedShape<HEAD_DIM, VALUE_DIM>> {
    using Base = LoopOfWaves<PairedForwardLoop, HEAD_DIM, VALUE_DIM, PairedShape<HEAD_DIM, VALUE_DIM>>;
    using Base::KEYS, Base::WAVE_ROWS;
    using typename Base::Launch, typename Base::Output, typename Base::Queries, typename Base::Softmax,
        typename Base::Work;
    using Scores = AlternatingScores<KEYS>;
    using Layout = AlternatingLayout<HEAD_DIM, VALUE_DIM, KEYS>;
    using Products = TileProducts<HEAD_DIM, VALUE_DIM, KEYS, Layout, 4>;
    static constexpr int PAIRS = Base::WAVES, GROUP = PAIRS * WAVE, THREADS = 2 * GROUP;
    template <bool VALUES> using Copy = TileCopy<VALUES, Layout, VALUES ? VALUE_DIM : HEAD_DIM, KEYS, GROUP>;
    static constexpr int TILE_BYTES = Layout::KEY_BYTES + Layout::VALUE_BYTES;
    /* Of a pair: P, then for every lane what the output is multiplied by, later maximum and sum. */
    static constexpr int STEP_BYTES = WAVE * 16, P_BYTES = KEYS / 16 * STEP_BYTES, PAIR_BYTES = P_BYTES + WAVE * 8;
    static constexpr int ONE_BYTES = TILE_BYTES + PAIRS * PAIR_BYTES; /* with one buffer for keys */
    static constexpr bool TWO = ONE_BYTES + Layout::KEY_BYTES <= SHARED_LIMIT;
    static constexpr int OTHER_KEYS = TWO ? ONE_BYTES : 0; /* from one buffer to the other */
    static constexpr int SHARED_BYTES = ONE_BYTES + TWO * Layout::KEY_BYTES;
    static_assert(SHARED_BYTES <= SHARED_LIMIT, "more shared memory than a block of this arch can have");

    static __device__ __forceinline__ int pair() { return wave() % PAIRS; }
    static __device__ __forceinline__ int wave_row() { return pair() * WAVE_ROWS; }

    template <class RowTile, class Finish>
    static __device__ __forceinline__ void run(const Launch &launch, SharedAddress shared, const Score &score,
                                               Finish finish) {
#if AITER_CUT
        Base::template each_task<RowTile>(
            launch, shared, [&](const Launch &launch, const auto &task, const RowTile &piece) {
                const auto &scored = task.sequence.scaled(score);
                Softmax softmax(scored.unit);
                if (wave() < PAIRS) {
                    if (!piece.keys.empty())
                        probabilities(launch, piece, shared, scored, Dropout(launch.problem, launch.tensors), softmax);
                } else {
                    Output o;
                    o.clear();
                    if (!piece.keys.empty()) output(launch, piece.sequence, shared, piece.keys, softmax, o);
                    if (launch.work.is_whole(task, softmax, o, pair())) finish(task, softmax, o);
                }
            });
        clear_rest(launch, aiter::blocks(), THREADS);
#else
        const RowTile tile(launch, block());
        if (tile.exists()) {
            const auto &scored = tile.sequence.scaled(score);
            Softmax softmax(scored.unit);
            if (wave() < PAIRS) {
                if (!tile.keys.empty())
                    probabilities(launch, tile, shared, scored, Dropout(launch.problem, launch.tensors), softmax);
            } else {
                Output o;
                o.clear();
                if (!tile.keys.empty()) output(launch, tile.sequence, shared, tile.keys, softmax, o);
                finish(tile, softmax, o);
            }
        }
        clear_rest(launch, Base::blocks(launch), THREADS);
#endif
    }

    static __device__ __forceinline__ SharedAddress exchange(SharedAddress shared) {
        return opaque(shared + TILE_BYTES + pair() * PAIR_BYTES + lane() * 16);
    }
    static __device__ __forceinline__ SharedAddress factor(SharedAddress shared) {
        return opaque(shared + TILE_BYTES + pair() * PAIR_BYTES + P_BYTES + lane() * 4);
    }
    /* In M, before the i-th of its products: copy(k) for the rows of a thread's copy that are due, and the barrier where
     * all operands have been read. */
    template <class ProductsOf, int ROWS, class CopyRow>
    static __device__ __forceinline__ void before_product(int i, CopyRow copy) {
        constexpr int LAST = ProductsOf::PRODUCTS - ProductsOf::AHEAD;
        spread<greater(LAST, 1), ROWS>(i, copy);
        if (i != LAST) return;
        meet();
        __builtin_amdgcn_s_setprio(3);
    }

    template <class RowTile>
    static __device__ __forceinline__ void probabilities(const Launch &launch, const RowTile &tile,
                                                         SharedAddress shared, const Score &score,
                                                         const Dropout &dropout, Softmax &softmax) {
        const Sequence &sequence = tile.sequence;
        const Range &block_keys = tile.keys;
        const int wave_row = tile.first_row + PairedForwardLoop::wave_row();
        const Range keys_of_all = tile.keys_of_all(wave_row, WAVE_ROWS);
        Queries queries;
        Base::load_queries(queries, launch, tile, shared, wave_row, score.query_bits);
        Copy<false> copy(sequence.keys, thread_in_block() % GROUP);
        const SharedAddress to = copy.part.place(shared), p_to = exchange(shared), factor_to = factor(shared);
        /* To the tile from `first` on. Past the last one something is copied for nothing. */
        const auto go_to = [&](int first) { copy.go_to(sequence.keys, lesser(first, block_keys.high - 1)); };
        go_to(block_keys.low);
        copy.load();
        copy.store(to);
        go_to(block_keys.low + KEYS);
        if (TWO) {
            copy.load();
            copy.clear_rest();
            go_to(block_keys.low + 2 * KEYS);
        }
        typename Work::InTurn pieces(launch.work, block_keys.low);
        int buffer = 0;
        for (int first = block_keys.low; first < block_keys.high; first += KEYS) {
            auto products = Products::scores(shared + buffer);
            Scores s;
            meet();
            __builtin_amdgcn_s_setprio(2);
            products.begin();
            buffer = OTHER_KEYS - buffer;
            Products::multiply(products, queries, s, [&](int i) {
                before_product<decltype(products), Copy<false>::ROWS>(i, [&](int k) {
                    if (TWO) copy.store(to + buffer, k);
                    copy.load(k);
                });
            });
            __builtin_amdgcn_s_setprio(0);
            Base::finish_scores(s, first, wave_row, keys_of_all, tile, score);
            float shrink[Output::SLOTS];
            Softmax before = softmax; /* of the piece before */
            const bool cut = pieces.pass(launch.work, first);
            if (cut) softmax = Softmax(softmax.scale);
            softmax.advance(s, shrink);
            Base::drop(s, first, wave_row, sequence, dropout);
#pragma unroll
            for (int j = 0; j < KEYS / 16; ++j) shared_store(p_to + j * STEP_BYTES, round_operand(s, 0, j));
            shared_store(factor_to, cut ? before.maximum[0] : shrink[0]);
            if (cut) shared_store(factor_to + WAVE * 4, before.sum[0]);
            if (!TWO) copy.store(to);
            go_to(first + (TWO ? 3 : 2) * KEYS);
        }
        meet();
        meet(); /* the last factor has been read */
        shared_store(factor_to, softmax.maximum[0]);
        shared_store(factor_to + WAVE * 4, softmax.sum[0]);
        meet();
    }

    static __device__ __forceinline__ void output(const Launch &launch, const Sequence &sequence, SharedAddress shared,
                                                  const Range &block_keys, Softmax &softmax, Output &o) {
        const Work &work = launch.work;
        typename Work::InTurn pieces(work, block_keys.low);
        Copy<true> copy(sequence.keys, thread_in_block() % GROUP);
        const SharedAddress to = copy.part.place(shared), p_from = exchange(shared), factor_from = factor(shared);
        const auto go_to = [&](int first) { copy.go_to(sequence.keys, lesser(first, block_keys.high - 1)); };
        go_to(block_keys.low);
        copy.load();
        meet();
        meet();
        meet();
        for (int first = block_keys.low; first < block_keys.high; first += KEYS) {
            float shrink = shared_load<float>(factor_from);
            if constexpr (CUT) {
                if (__builtin_expect(pieces.is_cut(first), false)) {
                    softmax.maximum[0] = shrink;
                    softmax.sum[0] = shared_load<float>(factor_from + WAVE * 4);
                    pieces.pass(work, first, work.has_rows(pair()), softmax, o, pair());
                    shrink = 1.0f;
                }
            }
            u32x4 p[KEYS / 16];
#pragma unroll
            for (int j = 0; j < KEYS / 16; ++j) p[j] = shared_load<u32x4>(p_from + j * STEP_BYTES);
            copy.store(to);
            go_to(first + KEYS);
            if (__builtin_expect(wave_any(shrink != 1.0f), false)) o.multiply(0, shrink);
            auto products = Products::template outputs<Output>(shared + Layout::KEY_BYTES);
            meet();
            __builtin_amdgcn_s_setprio(2);
            products.begin();
            Products::multiply(
                products, [&](int, int j) { return p[j]; }, o,
                [&](int i) { before_product<decltype(products), Copy<true>::ROWS>(i, [&](int k) { copy.load(k); }); });
            __builtin_amdgcn_s_setprio(0);
        }
        softmax.maximum[0] = shared_load<float>(factor_from);
        softmax.sum[0] = shared_load<float>(factor_from + WAVE * 4);
        if constexpr (CUT) pieces.collect(work, shared, softmax, o, pair());
    }
};

#if defined(AITER_GFX90A)
/* Its alternating loop depends on how the compiler moves registers: it has no move of two that may run beside a matrix
 * instruction. Up to 64 dimensions four waves without barriers do more. */
constexpr int MOST_ALTERNATING = 0, LEAST_PAIRED = 65;
#else
constexpr int MOST_ALTERNATING = 128, LEAST_PAIRED = 129;
#endif
constexpr int MOST_PAIRED = 256; /* beyond, an output takes more registers than half a SIMD has */
template <int HEAD_DIM, int VALUE_DIM, int WIDER = greater(HEAD_DIM, VALUE_DIM)>
using LoopOf =
    std::conditional_t<(WIDER <= MOST_ALTERNATING), AlternatingLoop<HEAD_DIM, VALUE_DIM>,
                       std::conditional_t<(WIDER >= LEAST_PAIRED && WIDER <= MOST_PAIRED),
                                          PairedForwardLoop<HEAD_DIM, VALUE_DIM>, TileLoop<HEAD_DIM, VALUE_DIM>>>;

} // namespace aiter

#endif
