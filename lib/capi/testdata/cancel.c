/*
 * The calls that wait are cancellation points.
 */
#include "check.h"

#include <signal.h>

static const char * name = "c.server";

static int       fd;
static int       full;
static fset_t *  set;
static pthread_t victim;

static void * in_accept(void * arg)
{
        (void) arg;

        return (void *) (intptr_t) flow_accept(NULL, NULL);
}

static void * in_read(void * arg)
{
        char buf[8];

        (void) arg;

        return (void *) (intptr_t) flow_read(fd, buf, sizeof(buf));
}

static void * in_write(void * arg)
{
        char buf[8] = "";

        (void) arg;

        while (flow_write(full, buf, sizeof(buf)) == (ssize_t) sizeof(buf))
                ;

        return NULL;
}

static void cleanup(void * arg)
{
        fqueue_destroy(arg);
}

static void * in_event(void * arg)
{
        fqueue_t * fq = fqueue_create();

        (void) arg;

        pthread_cleanup_push(cleanup, fq);
        fevent(set, fq, NULL);
        pthread_cleanup_pop(1);

        return NULL;
}

static void on_signal(int sig)
{
        (void) sig;

        pthread_cancel(victim);
}

static void cancelled(const char * what,
                      void *    (* f)(void *),
                      int          delay,
                      int          by_signal)
{
        void * ret = NULL;

        must("pthread_create", pthread_create(&victim, NULL, f, NULL), 0);
        usleep(delay);
        if (by_signal)
                raise(SIGUSR1);
        else
                must("pthread_cancel", pthread_cancel(victim), 0);
        must("pthread_join", pthread_join(victim, &ret), 0);
        if (delay > 1000)
                check(what, ret == PTHREAD_CANCELED, 1);
        else
                must(what, ret == PTHREAD_CANCELED, 1);
}

static int       bystander_fd;
static pthread_t bystander_thread;

/* Waits through all of it. */
static void * bystander(void * arg)
{
        char buf[8];

        (void) arg;

        must("bystander", flow_read(bystander_fd, buf, sizeof(buf)), 2);

        return NULL;
}

int main(int     argc,
         char ** argv)
{
        char buf[8];
        int  i;

        if (argc > 1)
                name = argv[1];

        signal(SIGUSR1, on_signal);

        fd           = flow_alloc(name, NULL, &long_time);
        full         = flow_alloc(name, NULL, &long_time);
        bystander_fd = flow_alloc(name, NULL, &long_time);
        set          = fset_create();
        must("alloc", fd >= 64 && full >= 64 && bystander_fd >= 64, 1);
        must("mute", flow_write(full, "!mute", 5), 5);
        must("pthread_create", pthread_create(&bystander_thread, NULL, bystander, NULL), 0);

        cancelled("flow_accept", in_accept, 50000, 0);
        cancelled("flow_read", in_read, 50000, 0);
        cancelled("flow_write", in_write, 200000, 0);
        cancelled("fevent", in_event, 50000, 0);
        cancelled("flow_accept, from a handler", in_accept, 50000, 1);
        cancelled("fevent, from a handler", in_event, 50000, 1);

        /* At any moment of a call. */
        for (i = 0; i < 300; i++) {
                cancelled("read", in_read, i, 0);
                cancelled("accept", in_accept, i, 0);
                cancelled("event", in_event, i, 0);
        }
        check("at any moment", failures, 0);

        /* Nothing is broken by it. */
        must("write", flow_write(fd, "hello", 5), 5);
        check("read afterwards", flow_read(fd, buf, sizeof(buf)), 5);
        must("write", flow_write(bystander_fd, "ok", 2), 2);
        check("a thread that was not meant", pthread_join(bystander_thread, NULL), 0);
        check("dealloc", flow_dealloc(fd), 0);

        return finish();
}
