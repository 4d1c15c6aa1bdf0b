/*
 * Signals. A thread that is in one of the library's calls may be running Go
 * code, on a stack of Go, which is small and without room for a handler. The
 * kernel puts a handler with SA_ONSTACK on the thread's alternate stack, which
 * Go sees to; one without would overwrite Go's memory. C programs do not know,
 * and need not: the library has the flag set on every handler.
 *
 * sigaction and the signal functions are defined here in front of the C
 * library's, which every handler of a program goes through, unless this
 * library was loaded with dlopen or the handler installed before. Those are
 * found when a flow or set is made, as the Go runtime itself does when it
 * starts.
 *
 * Which thread blocks which signals is the program's affair, too: one that
 * waits for SIGTERM with sigwait blocks it in all its threads, and knows of no
 * others. Go unblocks some signals in every thread that runs Go, and its own
 * threads are there before the program could block any. The kernel would give
 * them the signal, which ends the process. So Go's threads block all but what
 * Go needs, and the threads of the program what they did before.
 */
#define _GNU_SOURCE

#include "shim.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "_cgo_export.h"

/*
 * Go's alternate stacks have 32 KiB. Handlers of C programs are used to the
 * room of a thread's stack and may interrupt each other, so each thread gets a
 * larger one before it enters Go, which then leaves it as it is. Only what is
 * used takes memory.
 */
#define STACK_SIZE (512 * 1024)

typedef int (* sigaction_fn)(int, const struct sigaction *, struct sigaction *);
typedef void (* handler_fn)(int);
typedef handler_fn (* signal_fn)(int, handler_fn);

static sigaction_fn libc_sigaction(void)
{
        static _Atomic(sigaction_fn) fn;
        sigaction_fn                 f = atomic_load(&fn);

        if (f == NULL) {
                f = (sigaction_fn) dlsym(RTLD_NEXT, "sigaction");
                atomic_store(&fn, f);
        }

        return f;
}

_Thread_local int o7s_thread_ready;

static pthread_key_t  key; /* has the threads' alternate stacks */
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* Below a stack is a page that nothing may touch. */
static size_t guard(void)
{
        return (size_t) sysconf(_SC_PAGESIZE);
}

/* Called at the end of a thread. */
static void free_stack(void * mem)
{
        stack_t ss;

        if (sigaltstack(NULL, &ss) != 0)
                return;

        if (ss.ss_sp == (char *) mem + guard()) {
                if ((ss.ss_flags & SS_ONSTACK) != 0)
                        return; /* ends in a handler: lost */
                ss.ss_flags = SS_DISABLE;
                sigaltstack(&ss, NULL);
        }
        munmap(mem, guard() + STACK_SIZE);
}

static void make_key(void)
{
        pthread_key_create(&key, free_stack);
}

static void make_stack(void)
{
        stack_t ss;
        char *  mem;

        pthread_once(&once, make_key);

        if (sigaltstack(NULL, &ss) != 0 || (ss.ss_flags & SS_DISABLE) == 0)
                return; /* the program has its own */

        mem = mmap(NULL, guard() + STACK_SIZE, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
        if (mem == MAP_FAILED)
                return; /* Go's has to do */

        mprotect(mem, guard(), PROT_NONE);

        ss.ss_sp    = mem + guard();
        ss.ss_size  = STACK_SIZE;
        ss.ss_flags = 0;
        if (sigaltstack(&ss, NULL) != 0 || pthread_setspecific(key, mem) != 0)
                free_stack(mem);
}

/*
 * Is given to a thread while it blocks everything, and arrives in the moment
 * in which Go sets the mask that it wants the thread to have. Go unblocks this
 * signal, and nothing on Linux sends it.
 */
#define SIG_MASK SIGSTKFLT

static void fill_mask(sigset_t * mask)
{
        /* What faults cause, and what Go's scheduler sends. */
        static const int open[] = {
                SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS, SIGURG
        };
        size_t i;

        sigfillset(mask); /* but for the C library's own */
        for (i = 0; i < sizeof(open) / sizeof(open[0]); i++)
                sigdelset(mask, open[i]);
}

/* The interrupted thread goes on with the mask that this sets. */
static void set_mask(int         sig,
                     siginfo_t * info,
                     void *      context)
{
        (void) sig;

        if (info->si_code == SI_TKILL && info->si_pid == getpid())
                fill_mask(&((ucontext_t *) context)->uc_sigmask);
}

static void catch_mask(void)
{
        sigaction_fn     f = libc_sigaction();
        struct sigaction sa = { 0 };

        if (f == NULL)
                return;

        sa.sa_sigaction = set_mask;
        sa.sa_flags     = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
        sigfillset(&sa.sa_mask); /* what waits must not slip in behind */
        f(SIG_MASK, &sa, NULL);
}

/* Has the thread block everything, whatever Go does when it meets it next. */
static void hold_mask(sigset_t * old)
{
        sigset_t all;

        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, old);
        pthread_kill(pthread_self(), SIG_MASK);
}

void o7s_thread_prepare(void)
{
        sigset_t mask;

        o7s_thread_ready = 1;

        make_stack();

        /* Go changes the mask when the thread comes in first, and only then. */
        hold_mask(&mask);
        o7s_go_enter();
        pthread_sigmask(SIG_SETMASK, &mask, NULL);
}

struct start {
        void * (* run)(void *);
        void *    arg;
};

static void * start_thread(void * arg)
{
        struct start s = *(struct start *) arg;

        free(arg);

        hold_mask(NULL);

        return s.run(s.arg);
}

/* The linker has the library's calls of pthread_create, which are Go's, here. */
int __real_pthread_create(pthread_t *            thread,
                          const pthread_attr_t * attr,
                          void *              (* run)(void *),
                          void *                 arg);

int __wrap_pthread_create(pthread_t *            thread,
                          const pthread_attr_t * attr,
                          void *              (* run)(void *),
                          void *                 arg)
{
        static pthread_once_t caught = PTHREAD_ONCE_INIT;
        struct start *        s;
        int                   ret;

        pthread_once(&caught, catch_mask);

        s = malloc(sizeof(*s));
        if (s == NULL)
                return EAGAIN;

        s->run = run;
        s->arg = arg;

        ret = __real_pthread_create(thread, attr, start_thread, s);
        if (ret != 0)
                free(s);

        return ret;
}

static int is_function(const struct sigaction * sa)
{
        return (sa->sa_flags & SA_SIGINFO) != 0 ||
               (sa->sa_handler != SIG_DFL && sa->sa_handler != SIG_IGN);
}

int sigaction(int                             sig,
              const struct sigaction *        act,
              struct sigaction *              old)
{
        sigaction_fn     f = libc_sigaction();
        struct sigaction sa;

        if (f == NULL) {
                errno = ENOSYS;
                return -1;
        }

        if (sig == SIG_MASK) { /* nobody will miss a handler */
                if (old != NULL)
                        memset(old, 0, sizeof(*old));
                return 0;
        }

        if (act != NULL && is_function(act)) {
                sa = *act;
                sa.sa_flags |= SA_ONSTACK;
                act = &sa;
        }

        return f(sig, act, old);
}

static void adopt(int sig)
{
        sigaction_fn     f = libc_sigaction();
        struct sigaction sa;

        if (f == NULL || f(sig, NULL, &sa) != 0)
                return;

        if (!is_function(&sa) || (sa.sa_flags & SA_ONSTACK) != 0)
                return;

        sa.sa_flags |= SA_ONSTACK;
        f(sig, &sa, NULL);
}

void o7s_signals_adopt(void)
{
        int sig;

        /* The C library refuses the two it keeps to itself. */
        for (sig = 1; sig <= SIGRTMAX; sig++)
                adopt(sig);
}

static handler_fn with(const char * name,
                       int          sig,
                       handler_fn   handler)
{
        signal_fn  f = (signal_fn) dlsym(RTLD_NEXT, name);
        handler_fn old;

        if (f == NULL) /* not every C library has all three */
                f = (signal_fn) dlsym(RTLD_NEXT, "signal");

        if (f == NULL) {
                errno = ENOSYS;
                return SIG_ERR;
        }

        if (sig == SIG_MASK)
                return SIG_DFL;

        old = f(sig, handler);
        if (old != SIG_ERR)
                adopt(sig);

        return old;
}

handler_fn signal(int        sig,
                  handler_fn handler)
{
        return with("signal", sig, handler);
}

handler_fn bsd_signal(int        sig,
                      handler_fn handler)
{
        return with("bsd_signal", sig, handler);
}

/* What signal is when a program asks for strict standards. */
handler_fn __sysv_signal(int        sig,
                         handler_fn handler);

handler_fn __sysv_signal(int        sig,
                         handler_fn handler)
{
        return with("__sysv_signal", sig, handler);
}
