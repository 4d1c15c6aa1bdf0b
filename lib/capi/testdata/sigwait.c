/*
 * A program that waits for signals with sigwait, as it is done with threads:
 * it blocks them, and no thread of the library may take or unblock them.
 */
#define _GNU_SOURCE

#include "check.h"

#include <signal.h>
#include <sys/wait.h>

#define WAITERS 4
#define ROUNDS  20

static int sigs[5];

static void handler(int sig)
{
        (void) sig;

        _exit(3);
}

/* Whether the thread blocks just the signals of main. */
static int blocks(void)
{
        sigset_t mask;
        size_t   i;
        int      sig;
        int      n = 0;

        pthread_sigmask(SIG_SETMASK, NULL, &mask);
        for (i = 0; i < sizeof(sigs) / sizeof(sigs[0]); i++)
                if (!sigismember(&mask, sigs[i]))
                        return 0;
        for (sig = 1; sig <= SIGRTMAX; sig++)
                n += sigismember(&mask, sig) == 1;

        return n == sizeof(sigs) / sizeof(sigs[0]);
}

static void * wait_for_flow(void * arg)
{
        must("the mask of a thread", blocks(), 1);
        must("accept", flow_accept(NULL, arg), -ETIMEDOUT);
        must("the mask of a thread that was in Go", blocks(), 1);

        return NULL;
}

/* One that waits already is not lost when the thread enters Go. */
static void * pending(void * arg)
{
        sigset_t set;
        char     buf[1];

        sigemptyset(&set);
        sigaddset(&set, *(int *) arg);
        pthread_kill(pthread_self(), *(int *) arg);
        must("read", flow_read(4000, buf, 1), -ENOTALLOC);
        must("waited", sigtimedwait(&set, NULL, &zero), *(int *) arg);

        return NULL;
}

int main(void)
{
        struct timespec wait = { 0, 300 * 1000000 };
        pthread_t       t[WAITERS];
        sigset_t        set;
        sigset_t        one;
        size_t          i;
        int             sig;
        int             n;

        sigs[0] = SIGTERM;
        sigs[1] = SIGUSR1;
        sigs[2] = SIGCHLD;
        sigs[3] = SIGRTMIN;
        sigs[4] = SIGRTMAX;

        sigemptyset(&set);
        for (i = 0; i < sizeof(sigs) / sizeof(sigs[0]); i++)
                sigaddset(&set, sigs[i]);

        /*
         * As loggers of crashes do. The library has its own use for one of
         * these; that Go has SIGURG is documented.
         */
        for (sig = 1; sig < 32; sig++)
                if (!sigismember(&set, sig) && sig != SIGURG)
                        signal(sig, handler);

        must("block", pthread_sigmask(SIG_BLOCK, &set, NULL), 0);

        for (i = 0; i < sizeof(sigs) / sizeof(sigs[0]); i++) {
                must("pthread_create", pthread_create(&t[0], NULL, pending, &sigs[i]), 0);
                must("pthread_join", pthread_join(t[0], NULL), 0);
        }

        for (i = 0; i < WAITERS; i++)
                must("pthread_create", pthread_create(&t[i], NULL, wait_for_flow, &wait), 0);

        for (n = 0; n < ROUNDS; n++)
                for (i = 0; i < sizeof(sigs) / sizeof(sigs[0]); i++) {
                        sigemptyset(&one);
                        sigaddset(&one, sigs[i]);
                        must("kill", kill(getpid(), sigs[i]), 0);
                        must("sigwait", sigtimedwait(&one, NULL, &long_time), sigs[i]);
                        usleep(1000);
                }

        for (i = 0; i < WAITERS; i++)
                must("pthread_join", pthread_join(t[i], NULL), 0);
        check("signals were waited for", blocks(), 1);

        return finish();
}
