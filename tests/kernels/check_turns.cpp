/* Runs what gpu/backward.h says of the backward pass in one go on the CPU, for as many drawn problems as is said: which block
 * of keys each ticket gets, which tiles of queries that block adds to, and how many blocks come there before it. Exit status
 * 1 and a line for each problem where a block would wait for one that has drawn its ticket later, or for ever; where two tiles
 * share a place, or one is past the last; or where a pair of row and key that see each other is left out. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <tuple>
#include <vector>

#include "aiter_abi.h"

#define __host__
#define __device__
#define __forceinline__ inline

/* What the headers need of gpu/arch.h and gpu/score.h, which are for GPUs alone. A wave has one lane here. */
#define AITER_GPU_ARCH_H
#define AITER_GPU_SCORE_H
constexpr bool CAUSAL = AITER_CAUSAL, WINDOW = AITER_WINDOW, CHUNK = AITER_CHUNK, MASKED = CAUSAL || WINDOW;
constexpr bool DROPOUT = false, PAGED = false, FP8 = false, SOFTCAP = false, MASKS_OF_BITS = false;
constexpr int CACHED_BYTES = 2;
#define AITER_WGMMA 1

namespace aiter {
constexpr int HEAD_DIM = 64, VALUE_DIM = 64, WAVE = 1, XCDS = 1;
constexpr int LAUNCH_STRIDE_TOO_LARGE = -1, LAUNCH_BAD_PROBLEM = -2, LAUNCH_GRID_TOO_LARGE = -3;
using Element = uint16_t;
struct Chunk {};
constexpr float INFINITE = __builtin_inff();
struct Score {
    Score times(float) const { return *this; }
};
template <class T> constexpr T greater(T a, T b) { return a > b ? a : b; }
template <class T> constexpr T lesser(T a, T b) { return a < b ? a : b; }
constexpr int round_up(int x, int step) { return (x + step - 1) / step * step; }
inline int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }
inline int lane() { return 0; }
inline int thread_in_block() { return 0; }
inline int block() { return 0; }
inline int wave_sum(int x) { return x; }
inline int from_lane(int x, int) { return x; }
template <class T> T uniform(T x) { return x; }
template <class T> T opaque(T x) { return x; }
template <class T> T opaque_scalar(T x) { return x; }
inline float usual_nan(float x) { return x; }
template <class T, class X> void global_store(T *, X) {}
template <class Tensors> float alibi_slope(const aiter_attention_problem &, const Tensors &, int, int) { return 0; }
} // namespace aiter

#include "gpu/backward.h"

static uint64_t state;
static int drawn(int least, int most) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return least + static_cast<int>((state >> 33) % static_cast<uint64_t>(most - least + 1));
}

struct Problem {
    aiter::GradArguments arguments = {};
    std::vector<int32_t> lengths_q, lengths_k, starts_q = {0}, starts_k = {0}, offsets;

    explicit Problem(uint64_t number) {
        state = number;
        aiter_attention_problem &p = arguments.problem.forward;
        aiter_attention_grad_tensors &t = arguments.tensors;
        p.batch = drawn(1, 24), p.heads_kv = drawn(1, 3), p.heads_q = p.heads_kv * drawn(1, 3);
        const int most_q = drawn(1, 700), most_k = drawn(1, 900);
        for (int b = 0; b < p.batch; ++b) {
            lengths_q.push_back(drawn(0, 5) == 0 ? 0 : drawn(1, most_q));
            lengths_k.push_back(drawn(0, 5) == 0 ? 0 : drawn(1, most_k));
            offsets.push_back(drawn(-most_q, most_k));
            starts_q.push_back(starts_q.back() + lengths_q.back() + drawn(0, 3) * drawn(0, 1));
            starts_k.push_back(starts_k.back() + lengths_k.back());
        }
        p.seqlen_q = most_q, p.seqlen_k = most_k;
        p.packed_q = drawn(0, 1), p.packed_k = drawn(0, 1);
        if (p.packed_q) t.starts_q = starts_q.data(), p.total_q = starts_q.back();
        else t.seqlens_q = lengths_q.data();
        if (p.packed_k) t.starts_k = starts_k.data(), p.total_k = starts_k.back();
        else t.seqlens_k = lengths_k.data();
        if (drawn(0, 1)) t.query_offsets = offsets.data();
        p.window_left = drawn(0, 3) == 0 ? -1 : drawn(0, 400), p.window_right = drawn(0, 3) == 0 ? -1 : drawn(0, 300);
        p.attention_chunk = drawn(1, 500);
    }
};

static const char *wrong(const aiter::GradArguments &arguments) {
    using Share = aiter::Share<aiter::GRAD_ALL, 128, 64>;
    const aiter_attention_problem &p = arguments.problem.forward;
    const aiter::QuerySums sums(arguments);
    std::map<int64_t, int> turns;                           /* of each place, so far */
    std::map<int64_t, std::tuple<int, int, int>> tile_at;   /* sequence, head, row */
    std::map<std::tuple<int, int, int, int>, bool> covered; /* sequence, head, tile, block of keys */
    for (int ticket = 0; ticket < p.batch * p.heads_kv * Share::blocks(p); ++ticket) {
        const Share share(arguments, ticket);
        for (int head = share.first_head; head < share.first_head + share.heads_passing; ++head)
            for (int count = 0; count < share.tiles; ++count) {
                const int row = share.tile_row(count);
                const int64_t place = sums.tile(share.sequence, head, row);
                const std::tuple<int, int, int> tile(share.sequence.batch, head, row);
                if (place < 0 || place >= aiter::QuerySums::tiles_of_head(p) * p.heads_q)
                    return "a place past the last";
                if (!tile_at.emplace(place, tile).second && tile_at[place] != tile) return "two tiles in one place";
                if (turns[place]++ != share.turn(row)) return "a turn that is not the next";
                covered[{share.sequence.batch, head, row / 64, share.row_block}] = true;
            }
    }
    for (int batch = 0; batch < p.batch; ++batch) {
        const aiter::GradSequence sequence(arguments, batch);
        for (int row = 0; row < sequence.query.count; ++row) {
            const aiter::Range keys = sequence.mask.keys_of(row);
            for (int block = keys.low / 128; !keys.empty() && block * 128 < keys.high; ++block)
                for (int head = 0; head < p.heads_q; ++head)
                    if (!covered.count({batch, head, row / 64, block})) return "a row and a key left out";
        }
    }
    return nullptr;
}

int main(int count, char **words) {
    int failed = 0;
    for (int number = 0; count == 2 && number < atoi(words[1]); ++number) {
        const Problem problem(static_cast<uint64_t>(number));
        if (const char *what = wrong(problem.arguments)) ++failed, printf("problem %d: %s\n", number, what);
    }
    return failed > 0;
}
