// What a score goes through before it weighs a value, and the running softmax: triton/softmax.py.
//
// Compile-time constants: CAP, the soft cap or 0; ALIBI, whether there are slopes.

#pragma once
#include "step.cuh"

// A score, as a power of two, of a product times the scale (and, in plain cases, LOG2E).
constexpr bool PLAIN = CAP == 0 && !ALIBI;

DEV float finished(float x, int s, int t, float slope) {
  if (PLAIN) return x;
  if (CAP > 0) x = CAP * (1.f - 2.f * inverse(power2(x * (2.f * LOG2E / (CAP > 0 ? CAP : 1))) + 1.f));
  if (ALIBI) x += slope * (float)(s - t);
  return x * LOG2E;
}

// The softmax so far of two columns, and what came of them in a split.
struct Softmax {
  float m[NT][2], mass[NT][2];

  MEMBER void begin() {
    UNROLL for (int n = 0; n < NT; n++) UNROLL for (int c = 0; c < 2; c++) {
      m[n][c] = NOTHING;
      mass[n][c] = 0.f;
    }
  }

  // Scores of COUNT tiles to weights; `alpha` is what older sums are multiplied by.
  template <int COUNT>
  MEMBER void weigh(float (*scores)[COUNT][4], float (*alpha)[2]) {
    UNROLL for (int n = 0; n < NT; n++) UNROLL for (int c = 0; c < 2; c++) {
      float most = scores[n][0][c];
      UNROLL for (int k = 0; k < COUNT; k++)
        most = fmaxf(most, fmaxf(scores[n][k][c], scores[n][k][2 + c]));
      most = fmaxf(m[n][c], most_of_column(most));
      const float safe = most == NOTHING ? 0.f : most;
      alpha[n][c] = power2(m[n][c] - safe);
      m[n][c] = most;
      float sum = 0.f;
      UNROLL for (int k = 0; k < COUNT; k++) UNROLL for (int r = c; r < 4; r += 2) {
        scores[n][k][r] = power2(scores[n][k][r] - safe);
        sum += scores[n][k][r];
      }
      mass[n][c] = mass[n][c] * alpha[n][c] + sum;
    }
  }

  MEMBER void store(const Call &call, i64 at, int g, int t) {
    UNROLL for (int n = 0; n < NT; n++) UNROLL for (int c = 0; c < 2; c++) {
      const float sum = sum_of_column(mass[n][c]);
      if (g == 0) {
        float *to = call.statistics + 2 * (at + 8 * n + 2 * t + c);
        to[0] = m[n][c];
        to[1] = sum;
      }
    }
  }
};
