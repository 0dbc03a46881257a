/* Products with weights of up to eight bits in whole numbers; see whole_rows.c. */

#ifndef MILLPOND_WHOLE_ROWS_H
#define MILLPOND_WHOLE_ROWS_H

#include <stddef.h>

#include "kernels.h"

/* Vectors as these products take them: of each group of inputs, whole numbers 256 high + low, their scale and their sum. */
struct planes {
    int8_t *high, *low;
    float *scales, *sums;
};

/* Have such products computed so from now on, where this machine can; returns whether it does. */
int use_whole_rows(void);

/* Whether weights are such, on a machine that can. */
int whole(const struct weights *w);

/* Memory of ``rows`` vectors, and where they are in it. */
size_t planes_bytes(const struct weights *w, long rows);
struct planes planes_at(const struct weights *w, long rows, void *memory);

/* Whether they are the same for both. */
int planes_alike(const struct weights *a, const struct weights *b);

/* Those behind the first ones. */
struct planes planes_behind(const struct weights *w, const struct planes *planes, long rows);

void take_rows(const struct weights *w, const float *from, long rows, const struct planes *to);

/* Floats that whole_rows needs. */
long whole_room(const struct weights *w);

/* C[m][from..to) = A[m][inputs] . W[from..to)[inputs]. */
void whole_rows(const struct weights *w, float *room, long m, const struct planes *a, long from, long to, float *c,
                long ldc);

#endif
