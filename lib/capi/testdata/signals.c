/*
 * Signals while threads are in calls, with handlers that need room on the
 * stack and were installed in every way there is.
 */
#define _GNU_SOURCE

#include "check.h"

#include <signal.h>
#include <sys/wait.h>

#define THREADS 4
#define ROUNDS  5000

static const char * name = "c.server";

static volatile int stop;
static int          handled;

static void handler(int sig)
{
        volatile char room[12000];
        size_t        i;

        for (i = 0; i < sizeof(room); i++)
                room[i] = (char) (i + sig);

        __atomic_fetch_add(&handled, room[1] != 0, __ATOMIC_RELAXED);
}

static void info_handler(int         sig,
                         siginfo_t * info,
                         void *      context)
{
        (void) info;
        (void) context;

        handler(sig);
}

static void * traffic(void * arg)
{
        char buf[100];
        int  fd = flow_alloc(name, NULL, &long_time);
        int  i;

        (void) arg;

        must("alloc", fd >= 64, 1);
        for (i = 0; i < ROUNDS; i++) {
                must("write", flow_write(fd, &i, sizeof(i)), sizeof(i));
                must("read", flow_read(fd, buf, sizeof(buf)), sizeof(i));
                must("bytes", memcmp(buf, &i, sizeof(i)), 0);
        }
        must("dealloc", flow_dealloc(fd), 0);

        return NULL;
}

static void pipe_is_fatal(void)
{
        int   p[2];
        int   status;
        pid_t pid;

        must("pipe", pipe(p), 0);
        close(p[0]);
        pid = fork();
        if (pid == 0) {
                if (write(p[1], "x", 1) < 0)
                        _exit(2);
                _exit(3);
        }
        must("waitpid", waitpid(pid, &status, 0), pid);
        check("SIGPIPE ends a process, as ever", WIFSIGNALED(status) ? WTERMSIG(status) : -WEXITSTATUS(status), SIGPIPE);
        close(p[1]);
}

int main(int     argc,
         char ** argv)
{
        struct sigaction sa;
        pthread_t        t[THREADS];
        pthread_t        main_thread = pthread_self();
        int              i;

        if (argc > 1)
                name = argv[1];

        pipe_is_fatal();

        signal(SIGUSR1, handler);
        memset(&sa, 0, sizeof(sa));
        sa.sa_sigaction = info_handler;
        sa.sa_flags     = SA_SIGINFO;
        must("sigaction", sigaction(SIGUSR2, &sa, NULL), 0);
        check("handler is told as it was set", sigaction(SIGUSR2, NULL, &sa) == 0 && sa.sa_sigaction == info_handler, 1);

        for (i = 0; i < THREADS; i++)
                must("pthread_create", pthread_create(&t[i], NULL, traffic, NULL), 0);

        /* The handlers of these are installed while the threads run. */
        signal(SIGALRM, handler);
        signal(SIGWINCH, handler);

        for (i = 0; i < 20000; i++) {
                static const int sigs[] = { SIGUSR1, SIGUSR2, SIGALRM, SIGWINCH };

                pthread_kill(i % 5 == 4 ? main_thread : t[i % 4], sigs[i % 3]);
                if (i % 16 == 0)
                        usleep(10);
                if (__atomic_load_n(&handled, __ATOMIC_RELAXED) > 15000)
                        break;
        }
        for (i = 0; i < THREADS; i++)
                must("pthread_join", pthread_join(t[i], NULL), 0);
        check("traffic went on", failures, 0);
        check("handlers ran", handled > 100, 1);
        stop = 1;

        return finish();
}
