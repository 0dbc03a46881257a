/* Jobs that MLX passes on disguised as products; see decode.c. Their left matrices are square, CARRIED_SIDE at least. */

#ifndef MILLPOND_DECODE_H
#define MILLPOND_DECODE_H

enum { PASSWORD_BYTES = 32, CARRIED_SIDE = 16 };

/* Make the password; 0 when the system has no chance to give, and nothing can be carried. */
int carried_init(void);

int carries(const float *a);
void run_carried(const float *a, const float *b, float *c);

#endif
