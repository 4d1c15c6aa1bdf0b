/*
 * The functions of the interface, on top of the Go functions of main.go.
 *
 * A thread enters Go, waits there if it has to, and comes back with a result
 * or because threads were cancelled: then it looks, here, whether it is one of
 * them, and goes on waiting if not.
 */
#define _GNU_SOURCE

#include "shim.h"

#include <ouroboros/dev.h>
#include <ouroboros/errno.h>
#include <ouroboros/fccntl.h>
#include <ouroboros/fqueue.h>

#include <pthread.h>
#include <stdarg.h>
#include <stdlib.h>

#include "_cgo_export.h"

/* Longest read and write: Go's slices are shorter than the address space. */
#define MAX_COUNT ((size_t) 1 << 30)

#define NS_PER_S 1000000000LL

/* The longest time-out, in s: more does not fit 64 bits of ns. */
#define MAX_TIMEO 9000000000LL

#define EVENTS 1024

struct flow_set {
        int id;
};

struct fqueue {
        size_t           n;    /* events that there are */
        size_t           next; /* first that was not read */
        int              type; /* of the one read last, or a negative number */
        struct o7s_event events[EVENTS];
};

__attribute__((constructor))
static void init(void)
{
        o7s_cancel_init();
        /* Waits until the Go runtime has started. */
        o7s_thread_prepare();
        o7s_go_start();
}

/*
 * The first thing of every call: whether this is a child of fork, where there
 * is no Go, else it is made sure that the thread may enter Go.
 */
static int forked(void)
{
        if (atomic_load_explicit(&o7s_forked, memory_order_relaxed))
                return 1;

        if (!o7s_thread_ready)
                o7s_thread_prepare();

        return 0;
}

/*
 * To be read before pthread_testcancel: a cancellation that the test misses
 * has then incremented it by the time Go compares.
 */
static uint32_t cancels(void)
{
        return atomic_load(&o7s_cancels);
}

/* ns of a time-out, -1 for NULL, -2 when it is none. */
static int64_t duration(const struct timespec * t)
{
        if (t == NULL)
                return -1;

        if (t->tv_sec < 0 || t->tv_nsec < 0 || t->tv_nsec >= NS_PER_S)
                return -2;

        if (t->tv_sec > MAX_TIMEO)
                return MAX_TIMEO * NS_PER_S;

        return t->tv_sec * NS_PER_S + t->tv_nsec;
}

static void abort_op(void * op)
{
        o7s_go_abort(*(int *) op);
}

/* Waits for the end of an operation. */
static int finish(int op)
{
        uint32_t seen;
        int      ret;

        do {
                seen = cancels();
                pthread_cleanup_push(abort_op, &op);
                pthread_testcancel();
                pthread_cleanup_pop(0);
                ret = o7s_go_wait(op, seen);
        } while (ret == O7S_INTERRUPTED);

        return ret;
}

/* Waits for a flow. */
static int finish_flow(int         op,
                       qosspec_t * qs)
{
        int fd = finish(op);

        if (fd >= 0 && qs != NULL)
                o7s_go_qos(fd, qs);

        return fd;
}

int flow_alloc(const char *            dst,
               qosspec_t *             qs,
               const struct timespec * timeo)
{
        int64_t d = duration(timeo);

        if (forked())
                return -EIRMD;

        if (dst == NULL || d == -2)
                return -EINVAL;

        o7s_signals_adopt();

        return finish_flow(o7s_go_alloc((char *) dst, qs, d), qs);
}

int flow_accept(qosspec_t *             qs,
                const struct timespec * timeo)
{
        int64_t d = duration(timeo);

        if (forked())
                return -EIRMD;

        if (d == -2)
                return -EINVAL;

        o7s_signals_adopt();

        return finish_flow(o7s_go_accept(d), qs);
}

int flow_join(const char *            layer,
              const struct timespec * timeo)
{
        int64_t d = duration(timeo);

        if (forked())
                return -EIRMD;

        if (layer == NULL || d == -2)
                return -EINVAL;

        o7s_signals_adopt();

        return finish_flow(o7s_go_join((char *) layer, d), NULL);
}

int flow_dealloc(int fd)
{
        if (forked())
                return -EIRMD;

        return finish(o7s_go_dealloc(fd));
}

ssize_t flow_write(int          fd,
                   const void * buf,
                   size_t       count)
{
        uint32_t seen;
        ssize_t  ret;

        if (forked())
                return -EIRMD;

        if (buf == NULL && count > 0)
                return -EINVAL;

        if (count > MAX_COUNT)
                return -EMSGSIZE;

        do {
                seen = cancels();
                pthread_testcancel();
                ret = o7s_go_write(fd, (void *) buf, count, seen);
        } while (ret == O7S_INTERRUPTED);

        return ret;
}

ssize_t flow_read(int    fd,
                  void * buf,
                  size_t count)
{
        uint32_t seen;
        ssize_t  ret;

        if (forked())
                return -EIRMD;

        if (buf == NULL && count > 0)
                return -EINVAL;

        if (count > MAX_COUNT)
                count = MAX_COUNT;

        do {
                seen = cancels();
                pthread_testcancel();
                ret = o7s_go_read(fd, buf, count, seen);
        } while (ret == O7S_INTERRUPTED);

        return ret;
}

/* fccntl without its argument: NULL where there must be something. */
static int missing(int fd)
{
        int ret = o7s_go_check(fd);

        return ret < 0 ? ret : -EINVAL;
}

static int set_timeo(int                     fd,
                     int                     cmd,
                     const struct timespec * t)
{
        int64_t d = duration(t);

        if (d == -2)
                return missing(fd);

        return o7s_go_set(fd, cmd, d);
}

static int get_timeo(int               fd,
                     int               cmd,
                     struct timespec * t)
{
        int64_t d;
        int     ret;

        if (t == NULL)
                return missing(fd);

        ret = o7s_go_get(fd, cmd, &d);
        if (ret == 0) {
                t->tv_sec  = d / NS_PER_S;
                t->tv_nsec = d % NS_PER_S;
        }

        return ret;
}

int fccntl(int fd,
           int cmd,
           ...)
{
        va_list    l;
        int64_t    v;
        uint32_t * flags;
        uint16_t * frct;
        size_t *   len;
        qosspec_t * qs;
        int        ret;

        if (forked())
                return -EIRMD;

        va_start(l, cmd);

        switch (cmd) {
        case FLOWSRCVTIMEO:
        case FLOWSSNDTIMEO:
                ret = set_timeo(fd, cmd, va_arg(l, const struct timespec *));
                break;
        case FLOWGRCVTIMEO:
        case FLOWGSNDTIMEO:
                ret = get_timeo(fd, cmd, va_arg(l, struct timespec *));
                break;
        case FLOWGQOSSPEC:
                qs = va_arg(l, qosspec_t *);
                ret = qs == NULL ? missing(fd) : o7s_go_qos(fd, qs);
                break;
        case FLOWSFLAGS:
        case FRCTSFLAGS:
                ret = o7s_go_set(fd, cmd, va_arg(l, uint32_t));
                break;
        case FLOWGFLAGS:
                flags = va_arg(l, uint32_t *);
                if (flags == NULL) {
                        ret = missing(fd);
                        break;
                }
                ret = o7s_go_get(fd, cmd, &v);
                if (ret == 0)
                        *flags = (uint32_t) v;
                break;
        case FRCTGFLAGS:
                frct = va_arg(l, uint16_t *);
                if (frct == NULL) {
                        ret = missing(fd);
                        break;
                }
                ret = o7s_go_get(fd, cmd, &v);
                if (ret == 0)
                        *frct = (uint16_t) v;
                break;
        case FLOWGRXQLEN:
        case FLOWGTXQLEN:
                len = va_arg(l, size_t *);
                if (len == NULL) {
                        ret = missing(fd);
                        break;
                }
                ret = o7s_go_get(fd, cmd, &v);
                if (ret == 0)
                        *len = (size_t) v;
                break;
        default:
                ret = o7s_go_check(fd);
                if (ret == 0)
                        ret = -ENOTSUP;
        }

        va_end(l);

        return ret;
}

fset_t * fset_create(void)
{
        fset_t * set;

        if (forked())
                return NULL;

        o7s_signals_adopt();

        set = malloc(sizeof(*set));
        if (set == NULL)
                return NULL;

        set->id = o7s_go_set_create();
        if (set->id < 0) {
                free(set);
                return NULL;
        }

        return set;
}

void fset_destroy(fset_t * set)
{
        if (set == NULL)
                return;

        if (!forked())
                o7s_go_set_destroy(set->id);

        free(set);
}

void fset_zero(fset_t * set)
{
        if (set != NULL && !forked())
                o7s_go_set_zero(set->id);
}

int fset_add(fset_t * set,
             int      fd)
{
        if (set == NULL)
                return -EINVAL;

        return forked() ? -EIRMD : o7s_go_set_add(set->id, fd);
}

bool fset_has(const fset_t * set,
              int            fd)
{
        return set != NULL && !forked() && o7s_go_set_has(set->id, fd) != 0;
}

void fset_del(fset_t * set,
              int      fd)
{
        if (set != NULL && !forked())
                o7s_go_set_del(set->id, fd);
}

fqueue_t * fqueue_create(void)
{
        fqueue_t * fq = calloc(1, sizeof(*fq));

        if (fq != NULL)
                fq->type = -EINVAL;

        return fq;
}

void fqueue_destroy(fqueue_t * fq)
{
        free(fq);
}

int fqueue_next(fqueue_t * fq)
{
        if (fq == NULL)
                return -EINVAL;

        if (fq->next == fq->n) {
                fq->type = -EPERM;
                return -EPERM;
        }

        fq->type = fq->events[fq->next].type;

        return fq->events[fq->next++].fd;
}

enum fqtype fqueue_type(fqueue_t * fq)
{
        return (enum fqtype) (fq == NULL ? -EINVAL : fq->type);
}

ssize_t fevent(fset_t *                set,
               fqueue_t *              fq,
               const struct timespec * timeo)
{
        int64_t         d = duration(timeo);
        struct timespec end;
        uint32_t        seen;
        int             ret;

        if (set == NULL || fq == NULL || d == -2)
                return -EINVAL;

        if (fq->next < fq->n)
                return 1;

        if (forked())
                return -EIRMD;

        if (d > 0) {
                clock_gettime(CLOCK_MONOTONIC, &end);
                end.tv_sec  += d / NS_PER_S;
                end.tv_nsec += d % NS_PER_S;
        }

        for (;;) {
                seen = cancels();
                pthread_testcancel();
                ret = o7s_go_event(set->id, fq->events, EVENTS, d, seen);
                if (ret != O7S_INTERRUPTED)
                        break;
                if (d > 0) { /* what is left */
                        struct timespec now;

                        clock_gettime(CLOCK_MONOTONIC, &now);
                        d = (end.tv_sec - now.tv_sec) * NS_PER_S +
                            end.tv_nsec - now.tv_nsec;
                        if (d < 0)
                                d = 0;
                }
        }

        if (ret < 0)
                return ret;

        fq->n    = (size_t) ret;
        fq->next = 0;

        return 1;
}
