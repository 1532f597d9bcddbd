/* A program for the host: where the blocks and waves of sm_90a's forward kernel keep what pieces of keys leave behind
 * (gpu/pieces.h), for many numbers of rows. Exit status 1 and a line for each call in which one would write where
 * another does, or past the workspace. */
#include <stdio.h>

#include "gpu/tile_loop.h"

#include "gpu/arch/sm90_forward.h"

using aiter::lesser;
using Loop = aiter::WarpgroupLoop<aiter::HEAD_DIM, aiter::VALUE_DIM>;
using Pieces = Loop::Work;
constexpr int MULTIPROCESSORS = 132;

static int check(int batch, int rows, int keys) {
    aiter_attention_problem p = {};
    p.batch = batch, p.heads_q = p.heads_kv = 1, p.seqlen_q = rows, p.seqlen_k = keys, p.batch_invariant = 1;
    const int64_t row_tiles = int64_t(batch) * ((rows + Loop::BLOCK_ROWS - 1) / Loop::BLOCK_ROWS);
    const Pieces work = Loop::work_of(p, row_tiles, MULTIPROCESSORS);
    const int64_t workspace = work.workspace_bytes(row_tiles, MULTIPROCESSORS, true);
    if (work.keys == 0 || work.dealt == 0 && Pieces::IN_SHARED) return 0; /* nothing is cut, or nothing is in memory */
    const int64_t parts = work.dealt > 0 ? row_tiles * work.dealt : lesser<int64_t>(row_tiles, MULTIPROCESSORS);
    const int64_t part = (workspace - Pieces::PARTS_AT) / parts;
    /* In turn all waves of a warpgroup with rows go through the loop; dealt, those without rows leave nothing. */
    const int own_rows = lesser(rows, Loop::BLOCK_ROWS);
    const int waves = work.dealt > 0 ? (own_rows + 15) / 16 : (own_rows + 63) / 64 * 4;
    const int64_t written = Pieces::POINT_BYTES + waves * int64_t(Pieces::VALUE_BYTES);
    if (written <= part) return 0;
    printf("%d sequences of %d rows, %d keys: a part has %lld bytes, %lld are written\n", batch, rows, keys,
           static_cast<long long>(part), static_cast<long long>(written));
    return 1;
}

int main() {
    int wrong = 0;
    for (int batch : {1, 3, 67, 150, 1000})
        for (int rows : {1, 15, 16, 17, 32, 48, 49, 64, 65, 100, 112, 113, 128, 129, 500})
            for (int keys : {1, 2000, 4200, 100000}) wrong += check(batch, rows, keys);
    return wrong != 0;
}
