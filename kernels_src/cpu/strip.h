/* StripWorker, by the engine that this dtype and CPU have. */
#ifndef AITER_CPU_STRIP_H
#define AITER_CPU_STRIP_H

#include "packed.h"

/* Few rows with the bits of many: tiles have no other way to their sums. */
#if AITER_BATCH_INVARIANT && !AITER_TILES
#define AITER_NARROW_STRIPS 1
#include "narrow_strip.h"
#endif

#if AITER_TILES
#include "strip_tiles.h"
#else
#include "strip_vector.h"
#endif

#endif
