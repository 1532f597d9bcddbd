/* The loop over the tiles of keys, for every arch whose waves work alone.
 *
 *   publish     the tile that was on its way is the current one (block barrier)
 *   issue       the tile after it sets off: its copy runs during what follows
 *   scores      S = Q K^T          matrix unit
 *   mask        only where the diagonal or the end of the sequence cuts the tile
 *   update      P = exp2(S - max)  vector unit, while other waves use the matrix unit
 *   accumulate  O += P V           matrix unit
 *
 * A loop is a struct with the members of this one; an arch with a better way to go through the tiles brings its own,
 * and attention_forward.hip picks it. */
#ifndef AITER_GPU_TILE_LOOP_H
#define AITER_GPU_TILE_LOOP_H

#include "gpu/softmax.h"

namespace aiter {

template <int HEAD_DIM, class Sequence> struct TileLoop : Shape<HEAD_DIM> {
    using Tile = Shape<HEAD_DIM>;
    using Queries = Query<HEAD_DIM, Tile::ROW_TILES>;
    using KeysAndValues = KeyValueTile<HEAD_DIM, Tile::KEYS, Tile::WAVES * WAVE>;
    using Scores = Accumulator<Tile::ROW_TILES, Tile::KEYS>;
    using Output = Accumulator<Tile::ROW_TILES, HEAD_DIM>;
    using Softmax = OnlineSoftmax<Output::SLOTS>;
    static constexpr int THREADS = Tile::WAVES * WAVE;
    static constexpr int WAVE_ROWS = Tile::ROW_TILES * ROW_TILE;
    static constexpr int SHARED_BYTES = KeysAndValues::SHARED_BYTES + Tile::WAVES * Queries::SHARED_BYTES;

    /* This wave's, for its query rows and later for store_output. */
    static __device__ __forceinline__ SharedAddress query_memory(SharedAddress shared) {
        return shared + KeysAndValues::SHARED_BYTES + wave() * Queries::SHARED_BYTES;
    }

    /* For the rows from block_row on: leaves in `o` the sums of P V, and in `softmax` what they must be divided by.
     * At its end, calls finish() in every wave that has rows: a loop may use more threads than its WAVES have. */
    template <class Finish>
    static __device__ __forceinline__ void attend(const Sequence &sequence, SharedAddress shared, int block_row,
                                                  bool negate, Softmax &softmax, Output &o, Finish finish) {
        const int wave_row = block_row + wave() * WAVE_ROWS;
        const int rows_end = lesser(block_row + Tile::WAVES * WAVE_ROWS, sequence.rows);
        const int keys_end = block_row < rows_end ? sequence.visible(rows_end - 1) : 0; /* of the block */
        const int wave_keys = sequence.visible(lesser(wave_row + WAVE_ROWS, sequence.rows) - 1);
        const int unmasked_keys = sequence.visible(wave_row);

        o.clear();
        if (keys_end == 0) return finish();
        KeysAndValues tile(shared, thread_in_block());
        tile.issue(sequence.keys, 0);
        Queries queries;
        queries.load(
            query_memory(shared),
            [&](int row) {
                row += wave_row;
                return row < sequence.rows ? sequence.query + row * sequence.query_stride : nullptr;
            },
            negate);

        for (int first = 0; first < keys_end; first += Tile::KEYS) {
            tile.publish(barrier);
            if (first + Tile::KEYS < keys_end) tile.issue(sequence.keys, first + Tile::KEYS);
            if (first >= wave_keys) continue; /* causal: the tile is the other waves' */
            Scores s;
            tile.scores(queries, s);
            if (first + Tile::KEYS > unmasked_keys) mask(s, sequence, wave_row, first);
            softmax.update(s, o);
            tile.accumulate(s, o);
        }
        finish();
    }
};

} // namespace aiter

#endif
