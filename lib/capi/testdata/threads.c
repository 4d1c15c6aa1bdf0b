/*
 * Many threads: flows of their own, and one flow with a thread that writes and
 * one that reads.
 *   threads [NAME [raw]]
 */
#include "check.h"

#define THREADS 16
#define ROUNDS  500

static const char *      name = "c.server";
static const qosspec_t * spec = &qos_data;

static int alloc(void)
{
        qosspec_t qs = *spec;
        int       fd = flow_alloc(name, &qs, &long_time);

        must("flow_alloc", fd < 64 ? fd : 64, 64);

        return fd;
}

static void * own_flow(void * arg)
{
        unsigned char buf[1000];
        unsigned char back[1100];
        int           id = *(int *) arg;
        int           fd = alloc();
        int           i;

        for (i = 0; i < ROUNDS; i++) {
                size_t n = 1 + (i * 37 + id) % sizeof(buf);

                memset(buf, id + i, n);
                must("write", flow_write(fd, buf, n), n);
                must("read", flow_read(fd, back, sizeof(back)), n);
                must("bytes", memcmp(buf, back, n), 0);
        }
        must("dealloc", flow_dealloc(fd), 0);

        return NULL;
}

#define MESSAGES 20000

static void * writer(void * arg)
{
        int      fd = *(int *) arg;
        uint32_t i;

        for (i = 0; i < MESSAGES; i++)
                must("write", flow_write(fd, &i, sizeof(i)), sizeof(i));

        return NULL;
}

static void * reader(void * arg)
{
        int      fd = *(int *) arg;
        uint32_t i;
        uint32_t got[2];

        for (i = 0; i < MESSAGES; i++) {
                must("read", flow_read(fd, got, sizeof(got)), sizeof(got[0]));
                must("in order", got[0], i);
        }

        return NULL;
}

static void * read_one(void * arg)
{
        char    buf[8];
        ssize_t n;

        do /* it may begin late */
                n = flow_read(*(int *) arg, buf, sizeof(buf));
        while (n == -EAGAIN || n == -ETIMEDOUT);
        must("read that blocks", n, 1);

        return NULL;
}

static void start(pthread_t * t,
                  void *   (* f)(void *),
                  int *       arg)
{
        must("pthread_create", pthread_create(t, NULL, f, arg), 0);
}

int main(int     argc,
         char ** argv)
{
        pthread_t t[THREADS];
        int       id[THREADS];
        char      buf[8];
        int       fd;
        int       i;

        if (argc > 1)
                name = argv[1];
        if (argc > 2 && strcmp(argv[2], "raw") == 0)
                spec = &qos_raw;

        for (i = 0; i < THREADS; i++) {
                id[i] = i;
                start(&t[i], own_flow, &id[i]);
        }
        for (i = 0; i < THREADS; i++)
                must("pthread_join", pthread_join(t[i], NULL), 0);
        check("threads with flows of their own", failures, 0);

        fd = alloc();
        start(&t[0], reader, &fd);
        start(&t[1], writer, &fd);
        must("pthread_join", pthread_join(t[0], NULL), 0);
        must("pthread_join", pthread_join(t[1], NULL), 0);
        check("reader and writer of one flow", failures, 0);
        must("dealloc", flow_dealloc(fd), 0);

        /* One thread blocks, another must not, or not for ever. */
        fd = alloc();
        start(&t[0], read_one, &fd);
        usleep(50000);
        must("flags", fccntl(fd, FLOWSFLAGS, FLOWFRDWR | FLOWFRNOBLOCK), 0);
        check("non-blocking read beside one that blocks", flow_read(fd, buf, sizeof(buf)), -EAGAIN);
        must("flags", fccntl(fd, FLOWSFLAGS, FLOWFDEFAULT), 0);
        must("time-out", fccntl(fd, FLOWSRCVTIMEO, &short_time), 0);
        check("read with a time-out beside it", flow_read(fd, buf, sizeof(buf)), -ETIMEDOUT);
        must("time-out", fccntl(fd, FLOWSRCVTIMEO, &zero), 0);
        check("read with time-out zero beside it", flow_read(fd, buf, sizeof(buf)), -ETIMEDOUT);
        must("write", flow_write(fd, "x", 1), 1);
        must("pthread_join", pthread_join(t[0], NULL), 0);
        must("dealloc", flow_dealloc(fd), 0);

        return finish();
}
