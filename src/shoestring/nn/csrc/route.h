/* Which experts a token goes to, and with what weight: nn/moe.py's Routing. For training (routing.h) and for decoding
   steps (infer/csrc/decode.c), so that both take the same experts for the same logits. */

/* logit [E] -> score [E], chosen [A], weight [A]. `bias` may be null; with `replay` `chosen` is given. */
INLINE void route_row(const float *logit, const float *bias, int64_t E, int64_t A, int64_t groups, int64_t kept,
                      int64_t sigmoid, int64_t normalise, float scale, int64_t replay, float *score, int64_t *chosen,
                      float *weight) {
    const int64_t per = E / groups;
    float choice[E], sum = 0, top = -INFINITY;
    if (sigmoid) {
        for (int64_t e = 0; e < E; e++) score[e] = sigmoid1(logit[e]);
    } else {
        for (int64_t e = 0; e < E; e++) top = logit[e] > top ? logit[e] : top;
        for (int64_t e = 0; e < E; e++) score[e] = exp1(logit[e] - top), sum += score[e];
        for (int64_t e = 0; e < E; e++) score[e] /= sum;
    }
    if (!replay) {
        for (int64_t e = 0; e < E; e++) choice[e] = score[e] + (bias ? bias[e] : 0.0f);
        if (groups > 1 && kept < groups) {
            float best[groups];
            char in[groups];
            for (int64_t g = 0; g < groups; g++) {
                float first = -INFINITY, second = -INFINITY;
                for (int64_t e = g * per; e < (g + 1) * per; e++)
                    if (choice[e] > first) second = first, first = choice[e];
                    else if (choice[e] > second) second = choice[e];
                best[g] = sigmoid && per > 1 ? first + second : first;
                in[g] = 0;
            }
            for (int64_t i = 0; i < kept; i++) {
                int64_t g = -1;
                for (int64_t j = 0; j < groups; j++)
                    if (!in[j] && (g < 0 || best[j] > best[g])) g = j;
                in[g] = 1;
            }
            for (int64_t e = 0; e < E; e++)
                if (!in[e / per]) choice[e] = sigmoid ? -INFINITY : 0.0f;
        }
        for (int64_t a = 0; a < A; a++) {
            int64_t best = -1;
            for (int64_t e = 0; e < E; e++) {
                int taken = 0;
                for (int64_t i = 0; i < a; i++) taken |= chosen[i] == e;
                if (!taken && (best < 0 || choice[e] > choice[best])) best = e;
            }
            chosen[a] = best;
        }
    }
    float total = 1e-20f;
    for (int64_t a = 0; a < A; a++) total += score[chosen[a]];
    for (int64_t a = 0; a < A; a++) weight[a] = (normalise ? score[chosen[a]] / total : score[chosen[a]]) * scale;
}
