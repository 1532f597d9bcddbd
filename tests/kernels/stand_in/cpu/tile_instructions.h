/* The AMX instructions in plain C++, in the place of kernels_src/cpu/tile_instructions.h. A tile that is used while it is
 * not configured ends the process. */
#ifndef STAND_IN_TILE_INSTRUCTIONS_H
#define STAND_IN_TILE_INSTRUCTIONS_H

#include "../avx512.h"

namespace stand_in {

struct TileRegisters {
    bool configured;
    Ints rows[8][LANES];
};
static thread_local TileRegisters tile_registers;

inline Ints (&tile(int index))[LANES] {
    require(tile_registers.configured, "a tile is used that is not configured");
    return tile_registers.rows[index];
}

/* Elements 2i and 2i + 1 of a row. */
#if AITER_DTYPE_BF16
inline Floats low(Ints pairs) { return low_bf16(pairs); }
inline Floats high(Ints pairs) { return high_bf16(pairs); }
#else
inline Floats low(Ints pairs) { return vcvtph2ps(0xffff, (__m256i)__builtin_convertvector(pairs, HalfWords)); }
inline Floats high(Ints pairs) { return low(pairs >> 16); }
#endif

}  // namespace stand_in

template <int TILE>
static void load_tile(const void *p, int64_t row_bytes) {
    for (stand_in::Ints &row : stand_in::tile(TILE)) {
        memcpy(&row, p, sizeof row);
        p = static_cast<const char *>(p) + row_bytes;
    }
}

template <int TILE>
static void store_tile(void *p, int64_t row_bytes) {
    for (const stand_in::Ints &row : stand_in::tile(TILE)) {
        memcpy(p, &row, sizeof row);
        p = static_cast<char *>(p) + row_bytes;
    }
}

template <int TILE>
static void zero_tile() {
    memset(stand_in::tile(TILE), 0, sizeof stand_in::tile(TILE));
}

/* TDPBF16PS, TDPFP16PS: lower and upper elements are summed apart, from zero; then both sums come to the tile. */
template <int SUMS, int LEFT, int RIGHT>
static void multiply_tiles() {
    using namespace stand_in;
    for (int i = 0; i < stand_in::LANES; i++) {
        const Floats left_low = low(tile(LEFT)[i]), left_high = high(tile(LEFT)[i]);
        Floats low_sum = Floats{}, high_sum = Floats{};
        for (int k = 0; k < stand_in::LANES; k++) {
            low_sum = fma(left_low[k] - Floats{}, low(tile(RIGHT)[k]), low_sum);
            high_sum = fma(left_high[k] - Floats{}, high(tile(RIGHT)[k]), high_sum);
        }
        tile(SUMS)[i] = (Ints)flush(flush((Floats)tile(SUMS)[i]) + flush(low_sum + high_sum));
    }
}

struct Tiles {
    Tiles() { stand_in::tile_registers = {true, {}}; }
    ~Tiles() { stand_in::tile_registers = {}; }
    Tiles(const Tiles &) = delete;
    Tiles &operator=(const Tiles &) = delete;

    static bool permitted() { return true; }
};

#endif
