/* multiply(), by the engine that this dtype and CPU have. */
#ifndef AITER_CPU_MATRIX_H
#define AITER_CPU_MATRIX_H

#include "packed.h"

#if AITER_TILES
#include "matrix_amx.h"
#else
#include "matrix_vector.h"
#endif

#endif
