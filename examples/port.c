/* Ada2MS in plain C, in double precision: one group of parameters. The names are those of ada2ms/core/spec.py.

   cc -O2 -shared -fPIC -ffp-contract=off -o port.so port.c -lm          (examples/port_c.py does this, and checks it) */
#include <math.h>
#include <stddef.h>

typedef struct {
    size_t n;          /* entries */
    double *p, *m, *v; /* parameter, first and second moment */
    double s;          /* with scope "tensor": its own second moment of the whole */
    long t;            /* updates */
} Tensor;

typedef struct {
    double b1, b2, eps, weight_decay, max_norm; /* max_norm: INFINITY if there is none */
    int per_tensor, skip;                       /* scope "tensor"; nonfinite "skip" */
    double s;                                   /* with scope "model" */
    long k, skipped;                            /* completed updates, and steps that were skipped */
} Optimizer;

static double bias_correction(double beta, long count) { return beta > 0 ? -expm1(count * log(beta)) : 1; }

static double sum_of_squares(const double *g, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += g[i] * g[i];
    return sum;
}

/* One step; g[j] is NULL where a tensor has no gradient. lr and a are those of the count of completed updates, o->k. */
void ada2ms_step(Optimizer *o, Tensor *tensors, size_t count, const double *const *g, double lr, double a) {
    double total = 0, numel = 0;
    int any = 0;
    for (size_t j = 0; j < count; j++) {
        if (!g[j]) continue;
        total += sum_of_squares(g[j], tensors[j].n);
        numel += tensors[j].n;
        any = 1;
    }
    if (!any) return;
    if (o->skip && !isfinite(total)) {
        o->skipped++;
        return;
    }
    double c = isinf(o->max_norm) || total == 0 ? 1 : o->max_norm / sqrt(total);
    if (c > 1) c = 1; /* a NaN stays one */
    o->k++;
    o->s = o->b2 * o->s + (1 - o->b2) * (numel > 0 ? c * total * c / numel : 0);
    for (size_t j = 0; j < count; j++) {
        Tensor *x = &tensors[j];
        if (!g[j]) continue;
        x->t++;
        double own = x->n > 0 ? c * sum_of_squares(g[j], x->n) * c / x->n : 0;
        x->s = o->b2 * x->s + (1 - o->b2) * own;
        double s_hat = o->per_tensor ? x->s / bias_correction(o->b2, x->t) : o->s / bias_correction(o->b2, o->k);
        for (size_t i = 0; i < x->n; i++) {
            double y = c * g[j][i];
            x->m[i] = o->b1 * x->m[i] + (1 - o->b1) * y;
            x->v[i] = o->b2 * x->v[i] + (1 - o->b2) * y * y;
            double m_hat = x->m[i] / bias_correction(o->b1, x->t), v_hat = x->v[i] / bias_correction(o->b2, x->t);
            double d = pow(v_hat, a / 2) * pow(s_hat, (1 - a) / 2) + o->eps;
            if (d == 0) d = INFINITY; /* without eps, where nothing has moved yet: no update */
            x->p[i] = x->p[i] * (1 - lr * o->weight_decay) - lr * m_hat / d;
        }
    }
}
