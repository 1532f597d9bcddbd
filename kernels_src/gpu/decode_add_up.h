/* Decoding: waves of a block that have the same rows and different keys add up what they have. See
 * attention_decode.hip. */
#ifndef AITER_GPU_DECODE_ADD_UP_H
#define AITER_GPU_DECODE_ADD_UP_H

#include "gpu/softmax.h"

namespace aiter {

/* Floats that a lane hands over: O, maximum, sum. */
template <class Output> constexpr int EXCHANGED_FLOATS = Output::SLOTS * (Output::VALUES + 2);

/* Those of a group with a higher number hand theirs to those with a lower one, until `left` groups are left; the same
 * of the next group is `waves` waves on. meet(): where all of them do. Shared memory: EXCHANGED_FLOATS for each lane of
 * half of the waves. */
template <class Softmax, class Output, class Meet>
__device__ __forceinline__ void add_up(char *shared, int group, int groups, int waves, Softmax &softmax, Output &o,
                                       Meet meet, int left = 1) {
    for (int distance = groups / 2; distance >= left; distance /= 2) {
        meet();
        const bool gives = group >= distance && group < 2 * distance, takes = group < distance;
        float *box = reinterpret_cast<float *>(shared) +
                     (wave() - (gives ? distance * waves : 0)) * EXCHANGED_FLOATS<Output> * WAVE + lane();
        if (gives)
#pragma unroll
            for (int slot = 0; slot < Output::SLOTS; ++slot) {
                float *values = box + slot * (Output::VALUES + 2) * WAVE;
                values[0] = softmax.maximum[slot];
                values[WAVE] = softmax.sum[slot];
#pragma unroll
                for (int i = 0; i < Output::VALUES; ++i) values[(i + 2) * WAVE] = o.get(slot, i);
            }
        meet();
        if (takes)
#pragma unroll
            for (int slot = 0; slot < Output::SLOTS; ++slot) {
                const float *values = box + slot * (Output::VALUES + 2) * WAVE;
                const float theirs = values[0], next = __builtin_fmaxf(softmax.maximum[slot], theirs);
                const float reference = next == -INFINITE ? 0.0f : next;
                const float a = exp2(softmax.maximum[slot] - reference), b = exp2(theirs - reference);
                softmax.maximum[slot] = next;
                softmax.sum[slot] = softmax.sum[slot] * a + values[WAVE] * b;
#pragma unroll
                for (int i = 0; i < Output::VALUES; ++i)
                    o.set(slot, i, o.get(slot, i) * a + values[(i + 2) * WAVE] * b);
            }
    }
}

} // namespace aiter

#endif
