/*
 * Sets and queues: many flows to server.c, and one thread that waits.
 *   events NAME FLOWS
 */
#include "check.h"

#define ROUNDS 20

static const char * name = "c.server";

static int alloc(void)
{
        int fd = flow_alloc(name, NULL, &long_time);

        must("flow_alloc", fd < 64 ? fd : 64, 64);

        return fd;
}

static void basics(void)
{
        fset_t *   set = fset_create();
        fqueue_t * fq  = fqueue_create();
        fset_t *   more[40];
        char       buf[8];
        int        fd  = alloc();
        int        fd2 = alloc();
        int        i;
        int        n;
        long long  start;

        must("fset_create", set != NULL, 1);
        must("fqueue_create", fq != NULL, 1);
        check("empty set has no flow", fset_has(set, fd), 0);
        check("add", fset_add(set, fd), 0);
        check("has it", fset_has(set, fd), 1);
        check("not the other", fset_has(set, fd2), 0);
        check("add to no set", fset_add(NULL, fd), -EINVAL);
        check("add no flow", fset_add(set, 4000), -EINVAL);
        check("next of an empty queue", fqueue_next(fq), -EPERM);
        start = now_ms();
        check("nothing happens", fevent(set, fq, &short_time), -ETIMEDOUT);
        check("it waited", now_ms() - start >= 50, 1);
        check("nothing, without waiting", fevent(set, fq, &zero), -ETIMEDOUT);
        check("no set", fevent(NULL, fq, &zero), -EINVAL);
        check("no queue", fevent(set, NULL, &zero), -EINVAL);

        must("write", flow_write(fd, "one", 3), 3);
        check("a message", fevent(set, fq, NULL), 1);
        check("while it is unread", fevent(set, fq, &zero), 1);
        check("of this flow", fqueue_next(fq), fd);
        check("is a message", fqueue_type(fq), FLOW_PKT);
        check("no more", fqueue_next(fq), -EPERM);
        check("read", flow_read(fd, buf, sizeof(buf)), 3);
        check("nothing happens any more", fevent(set, fq, &short_time), -ETIMEDOUT);

        /* One event for each message, read one at a time. */
        must("write", flow_write(fd, "!burst", 6), 6);
        for (n = 0; n < 10;) {
                if (fevent(set, fq, &long_time) != 1)
                        break;
                while (fqueue_next(fq) == fd && fqueue_type(fq) == FLOW_PKT) {
                        must("read", flow_read(fd, buf, sizeof(buf)), 1);
                        n++;
                }
        }
        check("ten events for ten messages", n, 10);
        check("and no more", fevent(set, fq, &short_time), -ETIMEDOUT);

        /* What waits when a flow is added is an event. */
        must("write", flow_write(fd2, "two", 3), 3);
        must("time-out", fccntl(fd2, FLOWSRCVTIMEO, &long_time), 0);
        for (i = 0; i < 1000; i++) {
                size_t len = 0;

                must("queue", fccntl(fd2, FLOWGRXQLEN, &len), 0);
                if (len == 1)
                        break;
                usleep(1000);
        }
        must("add", fset_add(set, fd2), 0);
        check("event of an added flow", fevent(set, fq, &long_time), 1);
        check("it is that", fqueue_next(fq), fd2);
        check("read", flow_read(fd2, buf, sizeof(buf)), 3);

        fset_del(set, fd2);
        check("deleted", fset_has(set, fd2), 0);
        must("write", flow_write(fd2, "two", 3), 3);
        check("read", flow_read(fd2, buf, sizeof(buf)), 3);
        check("no event of it", fevent(set, fq, &short_time), -ETIMEDOUT);

        must("write", flow_write(fd, "!bye", 4), 4);
        check("the end", fevent(set, fq, &long_time), 1);
        check("of this flow", fqueue_next(fq), fd);
        check("is a release", fqueue_type(fq), FLOW_DEALLOC);

        fset_zero(set);
        check("zero", fset_has(set, fd), 0);

        for (n = 0; n < 40; n++) {
                more[n] = fset_create();
                if (more[n] == NULL)
                        break;
        }
        check("there is a limit to sets", n >= 30 && n < 32, 1);
        while (--n >= 0)
                fset_destroy(more[n]);

        fqueue_destroy(fq);
        fset_destroy(set);
        must("dealloc", flow_dealloc(fd), 0);
        must("dealloc", flow_dealloc(fd2), 0);
}

/* A flow that its peer has released before the set knows it. */
static void released(void)
{
        fset_t *   set = fset_create();
        fqueue_t * fq  = fqueue_create();
        char       buf[8];
        uint32_t   fl  = 0;
        int        fd  = alloc();
        int        n   = 0;
        int        i;

        must("write", flow_write(fd, "!burst", 6), 6);
        must("write", flow_write(fd, "!bye", 4), 4);
        for (i = 0; i < 20000 && (fl & FLOWFDOWN) == 0; i++) {
                must("flags", fccntl(fd, FLOWGFLAGS, &fl), 0);
                usleep(1000);
        }
        must("add", fset_add(set, fd), 0);
        for (;;) {
                must("fevent", fevent(set, fq, &long_time), 1);
                while (fqueue_next(fq) == fd && fqueue_type(fq) == FLOW_PKT) {
                        must("read", flow_read(fd, buf, sizeof(buf)), 1);
                        must("in order", buf[0], '0' + n);
                        n++;
                }
                if (fqueue_type(fq) == FLOW_DEALLOC)
                        break;
        }
        check("its release, after all messages", n, 10);
        must("dealloc", flow_dealloc(fd), 0);
        fqueue_destroy(fq);
        fset_destroy(set);
}

static void many(int flows)
{
        fset_t *   set  = fset_create();
        fqueue_t * fq   = fqueue_create();
        int *      fd   = calloc(flows, sizeof(*fd));
        int *      got  = calloc(65536, sizeof(*got));
        int        left = flows * ROUNDS;
        char       buf[100];
        int        i;
        int        e;

        for (i = 0; i < flows; i++) {
                fd[i] = alloc();
                must("add", fset_add(set, fd[i]), 0);
                must("write", flow_write(fd[i], &fd[i], sizeof(fd[i])), sizeof(fd[i]));
        }
        while (left > 0) {
                must("fevent", fevent(set, fq, &long_time), 1);
                while ((e = fqueue_next(fq)) >= 0) {
                        must("type", fqueue_type(fq), FLOW_PKT);
                        must("read", flow_read(e, buf, sizeof(buf)), sizeof(e));
                        must("of the flow", memcmp(buf, &e, sizeof(e)), 0);
                        left--;
                        if (++got[e] < ROUNDS)
                                must("write", flow_write(e, &e, sizeof(e)), sizeof(e));
                }
        }
        check("many flows", left, 0);
        check("nothing more", fevent(set, fq, &short_time), -ETIMEDOUT);
        for (i = 0; i < flows; i++)
                must("dealloc", flow_dealloc(fd[i]), 0);
        fqueue_destroy(fq);
        fset_destroy(set);
        free(fd);
        free(got);
}

int main(int     argc,
         char ** argv)
{
        if (argc > 1)
                name = argv[1];

        basics();
        released();
        many(argc > 2 ? atoi(argv[2]) : 50);

        return finish();
}
