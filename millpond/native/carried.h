/* Jobs that MLX passes on disguised as products: nothing else that it calls on a CPU can be ours, and evaluating a graph
 * up to every layer from outside costs more than short contexts gain. MLX makes the call itself, in its own thread and
 * when the inputs are there. The left matrix begins with a password made when the process started, the right one is what
 * the job works on, and the product's memory takes the result. A job may write to a left matrix that was made for one
 * call. */

#ifndef MILLPOND_CARRIED_H
#define MILLPOND_CARRIED_H

/* Make the password; 0 when the system has no chance to give, and nothing can be carried. */
int carried_init(void);

/* Whether a left matrix of so many floats asks for a job, and the job. */
int carries(const float *a, long floats);
void leave_zeros(void *job, const float *b, long columns, float *c);
void run_carried(const float *a, const float *b, long columns, float *c);

/* The jobs: what describes one, its right matrix of so many columns, and where the result goes. */
void attend_slots(void *job, const float *b, long columns, float *c);
void run_recurrence(void *job, const float *b, long columns, float *c);
void run_layers(void *job, const float *b, long columns, float *c);
void read_layer(void *job, const float *b, long columns, float *c);
void multiply_weights(void *job, const float *b, long columns, float *c);

#endif
