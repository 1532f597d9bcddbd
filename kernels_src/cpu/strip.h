/* StripWorker, by the engine that this dtype and CPU have. */
#ifndef AITER_CPU_STRIP_H
#define AITER_CPU_STRIP_H

#include "packed.h"

#if AITER_TILES
#include "strip_tiles.h"
#else
#include "narrow_strip.h"
#include "strip_vector.h"
#endif

#endif
