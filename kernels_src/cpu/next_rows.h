/* Bringing keys and values into the cache before they are packed. */
#ifndef AITER_CPU_NEXT_ROWS_H
#define AITER_CPU_NEXT_ROWS_H

#include "packed.h"

/* The rows of keys and values that will be packed next. They are brought into L2 while others are worked on, a few at a
 * time, as the CPU can queue no more; by itself it does not see rows coming that lie far apart. */
class NextRows {
    const Cached *rows[2 * BLOCK_KEYS];
    int expected = 0, fetched = 0, share = 0;

  public:
    /* `count` keys from the first one on, in so many calls of fetch(). */
    void expect(const KeyRows &source, int64_t first, int count, int64_t calls) {
        source.find(first, count, rows, rows + count);
        expected = 2 * count;
        fetched = 0;
        share = static_cast<int>(ceil_div(expected, calls));
    }

    void fetch() {
        for (int i = 0; i < share && fetched < expected; i++, fetched++)
            if (HEAD_DIM == VALUE_DIM || fetched < expected / 2) prefetch_row<HEAD_DIM>(rows[fetched]);
            else prefetch_row<VALUE_DIM>(rows[fetched]);
    }
};

#endif
