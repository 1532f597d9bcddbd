/* Runs a forward kernel that is linked with this program on random rows and compares it with plain loops in double:
 * what is left of a test on a machine without Python, such as an emulated CPU. Exit status 0: all agree. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "cpu/sequence.h"

static float random_value() { return static_cast<float>(rand()) / static_cast<float>(RAND_MAX) * 4.0f - 2.0f; }

/* Random rows as the kernel reads them, and the values that they stand for. */
struct Rows {
    std::vector<Element> elements;
    std::vector<double> values;

    explicit Rows(int64_t count) : elements(count), values(count) {
        for (int64_t i = 0; i < count; i += LANES) {
            float lanes[LANES];
            for (float &lane : lanes) lane = random_value();
            store_elements(&elements[i], load(lanes), LANES);
            store(lanes, to_floats(&elements[i]));
            for (int l = 0; l < LANES; l++) values[i + l] = lanes[l];
        }
    }
};

static double error_of(int batch, int heads, int group, int seq_q, int seq_k) {
    const int64_t all_heads = heads * group, row_q = all_heads * HEAD_DIM, row_k = static_cast<int64_t>(heads) * HEAD_DIM;
    const Rows query(batch * seq_q * row_q), key(batch * seq_k * row_k), value(batch * seq_k * row_k);
    std::vector<Element> output(batch * seq_q * row_q);
    aiter_attention_call call;
    memset(&call, 0, sizeof call);
    aiter_attention_problem &problem = call.problem;
    problem.batch = batch;
    problem.heads_q = static_cast<int32_t>(all_heads);
    problem.heads_kv = heads;
    problem.seqlen_q = seq_q;
    problem.seqlen_k = seq_k;
    problem.softmax_scale = 0.2f;
    const int64_t strides_q[3] = {seq_q * row_q, row_q, HEAD_DIM}, strides_k[3] = {seq_k * row_k, row_k, HEAD_DIM};
    memcpy(problem.query_strides, strides_q, sizeof strides_q);
    memcpy(problem.output_strides, strides_q, sizeof strides_q);
    memcpy(problem.key_strides, strides_k, sizeof strides_k);
    memcpy(problem.value_strides, strides_k, sizeof strides_k);
    call.tensors.query = query.elements.data();
    call.tensors.key = key.elements.data();
    call.tensors.value = value.elements.data();
    call.tensors.output = output.data();
    call.tensors.workspace = aligned_alloc(256, (aiter_workspace_bytes(&call) / 256 + 1) * 256);
    aiter_cpu_executor executor = {nullptr, 2, 0};
    const int code = aiter_launch(&call, &executor);
    free(call.tensors.workspace);
    if (code != 0) {
        printf("%s\n", aiter_error_text(code));
        return INFINITY;
    }
    double worst = 0.0;
    for (int64_t row = 0; row < batch * seq_q * all_heads; row++) {
        const int64_t b = row / all_heads / seq_q, token = row / all_heads % seq_q, head = row % all_heads / group;
        const int64_t seen = AITER_CAUSAL ? clamp(token + 1 + seq_k - seq_q, 0, seq_k) : seq_k;
        const double *q = &query.values[row * HEAD_DIM], *k = &key.values[b * strides_k[0] + head * HEAD_DIM];
        const double *v = &value.values[b * strides_k[0] + head * HEAD_DIM];
        double sum = 0.0, expected[HEAD_DIM] = {};
        for (int64_t j = 0; j < seen; j++) {
            double score = 0.0;
            for (int d = 0; d < HEAD_DIM; d++) score += q[d] * k[j * row_k + d];
            const double weight = exp(score * problem.softmax_scale);
            sum += weight;
            for (int d = 0; d < HEAD_DIM; d++) expected[d] += weight * v[j * row_k + d];
        }
        for (int d = 0; d < HEAD_DIM; d++) {
            Element lanes[LANES];
            for (Element &lane : lanes) lane = output[row * HEAD_DIM + d];
            const double error = fabs(to_floats(lanes)[0] - (sum > 0.0 ? expected[d] / sum : 0.0));
            worst = error <= worst ? worst : error; /* NaN is worse than anything */
        }
    }
    return worst;
}

int main() {
    const double allowed = sizeof(Element) == 4 ? 1e-5 : 2e-2;
    const int problems[][5] = {{2, 2, 1, 1, 600}, {1, 1, 3, 1, 33}, {1, 2, 2, 70, 90}, {1, 1, 1, 20, 9}};
    int failures = 0;
    for (const int(&p)[5] : problems) {
        const double error = error_of(p[0], p[1], p[2], p[3], p[4]);
        failures += !(error <= allowed);
        printf("batch %d, KV heads %d, group %d, %d x %d: error %.2g\n", p[0], p[1], p[2], p[3], p[4], error);
    }
    return failures != 0;
}
