/* Runs gpu/arch/sm90_row_tiles.h on the CPU, a thread for each lane, and prints which row tile has which number: of padded
 * and of packed sequences. Arguments: query heads, KV heads, bits of heads in a row tile, rows of a row tile, heads (packed)
 * or units (padded) together, then the lengths. What it prints: "padded" or "packed", then a line "sequence head row_tile"
 * for each number. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <barrier>
#include <thread>
#include <vector>

#define __host__
#define __device__
#define __forceinline__ inline

/* What the header needs of gpu/arch.h and gpu/sequence.h, which are for GPUs alone. */
#define AITER_GPU_ARCH_H
#define AITER_GPU_SEQUENCE_H
constexpr int HEAD_DIM = 64;
constexpr bool MASKED = AITER_MASKED;
struct aiter_attention_problem {
    int batch, heads_q, heads_kv, seqlen_q, seqlen_k, packed_k, bits;
    int64_t total_k;
};

namespace aiter {
constexpr int WAVE = 32;
template <class T> T greater(T a, T b) { return a > b ? a : b; }
template <class T> T lesser(T a, T b) { return a < b ? a : b; }

struct Arguments {
    aiter_attention_problem problem;
    const int *tensors;
};
struct Place {
    int batch, head, kv_head, row_tile;
};
inline const int *query_side(const aiter_attention_problem &, const int *lengths) { return lengths; }
inline int length_of(const int *lengths, int batch) { return lengths[batch]; }

/* Lanes meet twice for each exchange. */
static thread_local int own_lane;
static int values[WAVE];
static std::barrier<> meeting(WAVE);
inline int lane() { return own_lane; }
template <class Result> auto exchange(int mine, Result result) {
    values[lane()] = mine;
    meeting.arrive_and_wait();
    const auto found = result();
    meeting.arrive_and_wait();
    return found;
}
inline uint64_t ballot(bool condition) {
    return exchange(condition, [] {
        uint64_t bits = 0;
        for (int l = 0; l < WAVE; ++l) bits |= uint64_t(values[l]) << l;
        return bits;
    });
}
inline int first_lane(uint64_t lanes) { return lanes == 0 ? -1 : __builtin_ctzll(lanes); }
inline int from_lane(int x, int source) {
    return exchange(x, [&] { return values[source & WAVE - 1]; });
}
inline int wave_sum(int x) {
    return exchange(x, [] {
        int sum = 0;
        for (int value : values) sum += value;
        return sum;
    });
}
} // namespace aiter

inline int __reduce_max_sync(unsigned, int x) {
    return aiter::exchange(x, [] {
        int most = aiter::values[0];
        for (int value : aiter::values) most = aiter::greater(most, value);
        return most;
    });
}
inline int __shfl_down_sync(unsigned, int x, int distance) {
    return aiter::exchange(x, [&] { return aiter::values[aiter::lesser(aiter::lane() + distance, aiter::WAVE - 1)]; });
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }

#include "gpu/arch/sm90_row_tiles.h"

template <int BLOCK_ROWS> static int run(const aiter_attention_problem &p, int together, const int *lengths) {
    struct Packing {
        int bits;
        explicit Packing(const aiter_attention_problem &p) : bits(p.bits) {}
    };
    const auto print = [&](const aiter::Place &at) {
        if (at.kv_head != at.head / (p.heads_q / p.heads_kv)) exit(1);
        printf("%d %d %d\n", at.batch, at.head, at.row_tile);
    };
    const int row_tiles = ((p.seqlen_q << p.bits) + BLOCK_ROWS - 1) / BLOCK_ROWS,
              all = row_tiles * p.batch * p.heads_q >> p.bits;
    using Order = aiter::RowTileOrder<Packing, 256>;
    const Order chosen(p, all, 132, true);
    if (chosen.section < 1 || (chosen.together.by > 0) != (all > 0)) return 1;
    const Order order(p, all, {together, together});
    printf("padded\n");
    for (int i = 0; i < all; ++i) print(order.place(i));
    printf("packed\n");
    std::vector<std::thread> lanes;
    for (int l = 0; l < aiter::WAVE; ++l)
        lanes.emplace_back([&, l] {
            aiter::own_lane = l;
            const aiter::Arguments arguments = {p, lengths};
            aiter::PackedOrder<Order, BLOCK_ROWS> packed;
            aiter::Place at;
            for (int number = 0; packed.find(arguments, order, number, at); ++number)
                if (l == 0) print(at);
        });
    for (std::thread &lane : lanes) lane.join();
    return 0;
}

int main(int count, char **words) {
    std::vector<int> numbers;
    for (int i = 1; i < count; ++i) numbers.push_back(atoi(words[i]));
    aiter_attention_problem p = {};
    p.heads_q = numbers[0], p.heads_kv = numbers[1], p.bits = numbers[2];
    const int *lengths = &numbers[5];
    p.batch = static_cast<int>(numbers.size()) - 5;
    for (int b = 0; b < p.batch; ++b) p.seqlen_q = aiter::greater(p.seqlen_q, lengths[b]);
    p.seqlen_k = p.seqlen_q;
    return numbers[3] == 128 ? run<128>(p, numbers[4], lengths) : run<192>(p, numbers[4], lengths);
}
