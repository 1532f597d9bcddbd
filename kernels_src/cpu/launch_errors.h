/* What aiter_launch of a CPU kernel returns, and what aiter_error_text says of it. */
#ifndef AITER_CPU_LAUNCH_ERRORS_H
#define AITER_CPU_LAUNCH_ERRORS_H

#include "aiter_abi.h"

enum { OK = 0, OUT_OF_MEMORY = 1, NO_TILES = 2, BAD_VALUES = 3 };

AITER_EXPORT const char *aiter_error_text(int code) {
    switch (code) {
    case OK: return "no error";
    case OUT_OF_MEMORY: return "out of memory";
    case NO_TILES:
        return "Linux does not let this process use the AMX tile registers; AITER_CPU_ARCH can select another arch";
    case BAD_VALUES: return "a length or a page number is out of range";
    default: return "unknown error";
    }
}

#endif
