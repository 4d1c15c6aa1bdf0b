/*
 * Cancellation of threads. The calls that wait are cancellation points, as in
 * the reference, but a thread waits in Go, where the C library cannot end it.
 * pthread_cancel is therefore defined here in front of the C library's: it
 * marks the thread as ever, and then has all waits come back to C, where those
 * that are not meant wait again (see shim.c). It may be called from a handler
 * of a signal, so it does no more than a store and a write.
 */
#define _GNU_SOURCE

#include "shim.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

typedef int (* cancel_fn)(pthread_t);

_Atomic uint32_t o7s_cancels;
int              o7s_cancel_fd = -1;
_Atomic int      o7s_forked;

static cancel_fn libc_cancel;

static void child(void)
{
        atomic_store(&o7s_forked, 1);
}

void o7s_cancel_init(void)
{
        libc_cancel   = (cancel_fn) dlsym(RTLD_NEXT, "pthread_cancel");
        o7s_cancel_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

        pthread_atfork(NULL, NULL, child);
}

int pthread_cancel(pthread_t thread)
{
        static const uint64_t one   = 1;
        int                   saved = errno;
        int                   ret;

        if (libc_cancel == NULL) /* before the library was initialised */
                libc_cancel = (cancel_fn) dlsym(RTLD_NEXT, "pthread_cancel");

        if (libc_cancel == NULL)
                return ENOSYS;

        ret = libc_cancel(thread);

        atomic_fetch_add(&o7s_cancels, 1);
        /* Fails when the counter is full: then it is readable anyway. */
        if (o7s_cancel_fd != -1 && !atomic_load(&o7s_forked) &&
            write(o7s_cancel_fd, &one, sizeof(one)) < 0)
                errno = saved;

        return ret;
}
