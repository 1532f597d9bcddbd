/* The AMX instructions, each as a function, and the tile registers while a thread has them. Included by its path from
 * the root of the sources, so that tests can put others in its place (tests/kernels/stand_in). */
#ifndef AITER_CPU_TILE_INSTRUCTIONS_H
#define AITER_CPU_TILE_INSTRUCTIONS_H

#include <sys/syscall.h>
#include <unistd.h>

#include "simd.h"

template <int TILE> AITER_INLINE void load_tile(const void *p, int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row_bytes), "i"(TILE) : "memory");
}

template <int TILE> AITER_INLINE void store_tile(void *p, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row_bytes), "i"(TILE) : "memory");
}

template <int TILE> AITER_INLINE void zero_tile() { asm volatile("tilezero %%tmm%c0" ::"i"(TILE)); }

/* sums += left * right: VEX.128.{F3: bf16, F2: fp16}.0F38.W0 5C /r, in bytes as older assemblers lack the latter. */
template <int SUMS, int LEFT, int RIGHT> AITER_INLINE void multiply_tiles() {
#if AITER_DTYPE_BF16
    constexpr int PREFIX = 2;
#else
    constexpr int PREFIX = 3;
#endif
    asm volatile(".byte 0xc4, 0xe2, %c0, 0x5c, %c1" ::"i"((15 - RIGHT) << 3 | PREFIX), "i"(0xc0 | SUMS << 3 | LEFT));
}

/* Tile registers configured for this thread while it lives. */
struct Tiles {
    Tiles() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shapes;
        asm volatile("ldtilecfg %0" ::"m"(shapes));
    }
    ~Tiles() { asm volatile("tilerelease"); }
    Tiles(const Tiles &) = delete;
    Tiles &operator=(const Tiles &) = delete;

    /* Linux hands out the tile registers on request, once per process. */
    static bool permitted() {
        constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
        static const bool granted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
        return granted;
    }
};

#endif
