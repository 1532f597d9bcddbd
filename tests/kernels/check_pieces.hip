/* A program for the host: where the blocks and waves of sm_90a's forward kernel keep what pieces of keys leave behind
 * (gpu/pieces.h), for many numbers of rows; and how clusters share pieces that few rows see and add them up
 * (gpu/arch/sm90_shared_piece.h). Exit status 1 and a line for each call in which one would write where another does, or
 * past its room, or in which a piece or a column would have nobody, or two. */
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

using Shared = Loop::Shared;

/* Parts of `count` pieces, of which a cluster has `at_once` at one time, each shared by as many blocks. */
static const char *fault_of_parts(int at_once, int sharing) {
    const int blocks = at_once * sharing, bits = Shared::strip_bits(blocks);
    if (1 << bits > Shared::OUTPUT_WAVES) return "a wave would have two strips of columns";
    for (int strip = 0; strip < Shared::STRIPS; ++strip)
        if (strip >> bits >= blocks) return "a strip of columns has no block";
    if (Shared::STRIPS % (1 << bits) != 0) return "a block would expect strips that there are none of";
    if (at_once * Shared::POINT_BYTES > Shared::POINTS_BYTES ||
        Shared::POINTS_BYTES + (at_once << bits) * Shared::STRIP_BYTES > Shared::TURN_BYTES)
        return "parts have no room";
    return nullptr;
}
static const char *fault_of_cluster(const Loop::Launch &launch, int64_t row_tiles) {
    const int pieces = aiter::greater(launch.work.dealt, 1), sharing = launch.sharing.by, together = launch.together;
    if (sharing * together > Shared::MOST_TOGETHER) return "the cluster is too large";
    if (sharing * Shared::MOST_LINES < Shared::VALUE_LINES) return "a line of values has no block";
    if (together == 1) return launch.tasks == row_tiles * pieces ? nullptr : "not all pieces are taken";
    if (launch.tasks != row_tiles * together) return "blocks are not those of the clusters";
    if (together < pieces && !(Shared::IN_TURNS && sharing == 1)) return "no turns are taken here";
    for (int count = 2; count <= pieces; ++count)
        if (const char *fault = fault_of_parts(lesser(together, count), sharing)) return fault;
    return nullptr;
}
static int check_clusters(int batch, int heads, int rows, int keys) {
    aiter_attention_problem p = {};
    p.batch = batch, p.heads_q = p.heads_kv = heads, p.seqlen_q = rows, p.seqlen_k = keys, p.batch_invariant = 1;
    const int64_t row_tiles = int64_t(batch) * heads;
    Loop::Launch launch;
    launch.work = Loop::work_of(p, row_tiles, MULTIPROCESSORS);
    launch.box = Loop::KEYS, launch.tasks = static_cast<int>(launch.work.count(row_tiles));
    const char *fault =
        Shared::takes(launch, row_tiles, MULTIPROCESSORS) ? fault_of_cluster(launch, row_tiles) : nullptr;
    if (fault == nullptr) return 0;
    printf("%d x %d rows, %d heads, %d keys, %d pieces at once by %d: %s\n", batch, rows, heads, keys, launch.together,
           launch.sharing.by, fault);
    return 1;
}

int main() {
    int wrong = 0;
    for (int batch : {0, 1, 2, 3, 5, 8, 17, 40})
        for (int heads : {1, 2, 3, 4, 7, 8})
            for (int rows : {1, 16})
                for (int keys = 0; keys < 140000; keys += keys < 20000 ? 500 : 9000)
                    wrong += check_clusters(batch, heads, rows, keys);
    for (int batch : {1, 3, 67, 150, 1000})
        for (int rows : {1, 15, 16, 17, 32, 48, 49, 64, 65, 100, 112, 113, 128, 129, 500})
            for (int keys : {1, 2000, 4200, 100000}) wrong += check(batch, rows, keys);
    return wrong != 0;
}
