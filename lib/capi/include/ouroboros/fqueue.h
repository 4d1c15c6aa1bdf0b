/*
 * Waiting for many flows: a set says which, a queue receives what happened
 * (spec 33 section 8).
 */
#ifndef OUROBOROS_FQUEUE_H
#define OUROBOROS_FQUEUE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <time.h>

#ifdef __cplusplus
extern "C" {
#endif

enum fqtype {
        FLOW_PKT     = (1 << 0), /* there is a message to read */
        FLOW_DOWN    = (1 << 1), /* the flow is down */
        FLOW_UP      = (1 << 2), /* and up again */
        FLOW_ALLOC   = (1 << 3), /* not used */
        FLOW_DEALLOC = (1 << 4), /* the other end or the layer released it */
        FLOW_PEER    = (1 << 5)  /* the peer timed out */
};

/*
 * fqueue_type returns an enumerator or, when fqueue_next did not return a
 * descriptor before, a negative error number.
 */

struct flow_set;
struct fqueue;

typedef struct flow_set fset_t;
typedef struct fqueue fqueue_t;

/* NULL when there are too many sets, or no memory. */
fset_t *    fset_create(void);

void        fset_destroy(fset_t * set);

fqueue_t *  fqueue_create(void);

void        fqueue_destroy(fqueue_t * fq);

/* Removes all flows. */
void        fset_zero(fset_t * set);

/* 0, or a negative error number. Messages that wait already are an event. */
int         fset_add(fset_t * set,
                     int      fd);

bool        fset_has(const fset_t * set,
                     int            fd);

void        fset_del(fset_t * set,
                     int      fd);

/* The descriptor of the next event, or -EPERM after the last. */
int         fqueue_next(fqueue_t * fq);

/* What happened to the descriptor that fqueue_next returned last. */
enum fqtype fqueue_type(fqueue_t * fq);

/*
 * Waits for events and moves them to the queue: 1, or a negative error number,
 * -ETIMEDOUT after timeo (NULL: waits for ever). Returns 1 at once while the
 * queue has events.
 */
ssize_t     fevent(fset_t *                set,
                   fqueue_t *              fq,
                   const struct timespec * timeo);

#ifdef __cplusplus
}
#endif

#endif /* OUROBOROS_FQUEUE_H */
