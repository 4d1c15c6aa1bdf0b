/*
 * Every call, its results and errors, towards server.c.
 *   calls [NAME [PART]]
 */
#include "check.h"

static int alloc(const char * name,
                 qosspec_t *  qs)
{
        int fd = flow_alloc(name, qs, &long_time);

        must("flow_alloc", fd < 64 ? fd : 64, 64);

        return fd;
}

static void echo(const char * name)
{
        char buf[1200];
        char back[1200];
        int  sizes[] = { 1, 2, 63, 64, 65, 1000, 1200 };
        int  fd      = alloc(name, NULL);
        int  fd2     = alloc(name, NULL);
        int  i;

        check("first descriptor", fd, 64);
        check("second descriptor", fd2, 65);
        check("flow_dealloc", flow_dealloc(fd), 0);
        check("descriptor is free again", alloc(name, NULL), fd);

        for (i = 0; i < (int) (sizeof(sizes) / sizeof(sizes[0])); i++) {
                memset(buf, 'a' + i, sizeof(buf));
                must("write", flow_write(fd, buf, sizes[i]), sizes[i]);
                must("read", flow_read(fd, back, sizeof(back)), sizes[i]);
                must("same bytes", memcmp(buf, back, sizes[i]), 0);
                if (sizes[i] == (int) sizeof(back))
                        check("end of a message that filled the buffer", flow_read(fd, back, sizeof(back)), 0);
        }
        /* An empty message is a keep-alive. */
        check("empty write", flow_write(fd, buf, 0), 0);
        check("empty write of nothing", flow_write(fd, NULL, 0), 0);
        must("write", flow_write(fd, "x", 1), 1);
        check("read after it", flow_read(fd, back, sizeof(back)), 1);

        check("flow_dealloc", flow_dealloc(fd), 0);
        check("flow_dealloc", flow_dealloc(fd2), 0);
}

static void errors(const char * name)
{
        char      buf[8];
        int       fd = alloc(name, NULL);
        int       i;
        long long start;

        check("write to -1", flow_write(-1, buf, 1), -EBADF);
        check("read from -1", flow_read(-1, buf, 1), -EBADF);
        check("write to a number that is no flow", flow_write(4000, buf, 1), -ENOTALLOC);
        check("read from a number that is no flow", flow_read(4000, buf, 1), -ENOTALLOC);
        check("dealloc -1", flow_dealloc(-1), -EINVAL);
        check("dealloc of no flow", flow_dealloc(4000), -ENOTALLOC);
        check("write of NULL", flow_write(fd, NULL, 1), -EINVAL);
        check("read to NULL", flow_read(fd, NULL, 1), -EINVAL);
        check("alloc of NULL", flow_alloc(NULL, NULL, NULL), -EINVAL);
        check("unknown name", flow_alloc("no.such.name", NULL, &long_time), -ENAME);
        start = now_ms();
        check("accept with a time-out", flow_accept(NULL, &short_time), -ETIMEDOUT);
        check("it waited", now_ms() - start >= 50, 1);
        check("accept without waiting", flow_accept(NULL, &zero), -ETIMEDOUT);
        i = 0;
        do { /* a machine may be busy, but not always */
                start = now_ms();
                must("accept without waiting", flow_accept(NULL, &zero), -ETIMEDOUT);
        } while (now_ms() - start >= 1000 && ++i < 10);
        check("it did not wait", i < 10, 1);

        must("dealloc", flow_dealloc(fd), 0);
        check("write after dealloc", flow_write(fd, buf, 1), -ENOTALLOC);
        check("fccntl after dealloc", fccntl(fd, FLOWGFLAGS, (uint32_t *) buf), -ENOTALLOC);
}

static void timeouts(const char * name)
{
        struct timespec t;
        char            buf[8];
        int             fd = alloc(name, NULL);
        long long       start;

        check("get read time-out without one", fccntl(fd, FLOWGRCVTIMEO, &t), -EPERM);
        check("get write time-out without one", fccntl(fd, FLOWGSNDTIMEO, &t), -EPERM);
        check("set read time-out", fccntl(fd, FLOWSRCVTIMEO, &short_time), 0);
        check("get read time-out", fccntl(fd, FLOWGRCVTIMEO, &t), 0);
        check("seconds", t.tv_sec, 0);
        check("nanoseconds", t.tv_nsec, short_time.tv_nsec);
        start = now_ms();
        check("read with a time-out", flow_read(fd, buf, sizeof(buf)), -ETIMEDOUT);
        check("it waited", now_ms() - start >= 50, 1);
        check("set read time-out to zero", fccntl(fd, FLOWSRCVTIMEO, &zero), 0);
        check("read with time-out zero", flow_read(fd, buf, sizeof(buf)), -ETIMEDOUT);
        check("set write time-out", fccntl(fd, FLOWSSNDTIMEO, &long_time), 0);
        check("get write time-out", fccntl(fd, FLOWGSNDTIMEO, &t), 0);
        check("seconds", t.tv_sec, long_time.tv_sec);
        check("no read time-out any more", fccntl(fd, FLOWSRCVTIMEO, NULL), 0);
        check("get it", fccntl(fd, FLOWGRCVTIMEO, &t), -EPERM);
        must("write", flow_write(fd, "abc", 3), 3);
        check("read that waits", flow_read(fd, buf, sizeof(buf)), 3);
        must("dealloc", flow_dealloc(fd), 0);
}

static void flags(const char * name)
{
        uint32_t fl = 0;
        char     buf[8];
        int      fd = alloc(name, NULL);

        check("get flags", fccntl(fd, FLOWGFLAGS, &fl), 0);
        check("default flags", fl, FLOWFDEFAULT);
        check("set non-blocking", fccntl(fd, FLOWSFLAGS, FLOWFRDWR | FLOWFNONBLOCK), 0);
        check("read without a message", flow_read(fd, buf, sizeof(buf)), -EAGAIN);
        check("get flags", fccntl(fd, FLOWGFLAGS, &fl), 0);
        check("flags as set", fl, FLOWFRDWR | FLOWFNONBLOCK);
        check("set read-only", fccntl(fd, FLOWSFLAGS, FLOWFRDONLY), 0);
        check("write on a read-only flow", flow_write(fd, "x", 1), -EPERM);
        check("back to the default", fccntl(fd, FLOWSFLAGS, FLOWFDEFAULT), 0);
        check("write", flow_write(fd, "x", 1), 1);
        check("read", flow_read(fd, buf, sizeof(buf)), 1);
        must("dealloc", flow_dealloc(fd), 0);
}

static void partial(const char * name)
{
        char buf[8];
        int  fd = alloc(name, NULL);

        must("write", flow_write(fd, "0123456789", 10), 10);
        check("first part", flow_read(fd, buf, 4), 4);
        check("its bytes", memcmp(buf, "0123", 4), 0);
        check("second part", flow_read(fd, buf, 4), 4);
        check("its bytes", memcmp(buf, "4567", 4), 0);
        check("rest", flow_read(fd, buf, 4), 2);
        check("its bytes", memcmp(buf, "89", 2), 0);
        must("write", flow_write(fd, "0123", 4), 4);
        check("whole message", flow_read(fd, buf, 4), 4);
        check("its end", flow_read(fd, buf, 4), 0);

        check("no partial reads", fccntl(fd, FLOWSFLAGS, FLOWFRDWR | FLOWFRNOPART | FLOWFWNOPART), 0);
        must("write", flow_write(fd, "0123456789", 10), 10);
        check("message longer than the buffer", flow_read(fd, buf, 4), -EMSGSIZE);
        must("write", flow_write(fd, "0123", 4), 4);
        check("message as long as the buffer", flow_read(fd, buf, 4), 4);
        must("write", flow_write(fd, "x", 1), 1);
        check("no mark after it", flow_read(fd, buf, 4), 1);
        must("dealloc", flow_dealloc(fd), 0);
}

static void queues(const char * name)
{
        size_t n = 99;
        char   buf[8];
        int    fd = alloc(name, NULL);
        int    i;

        check("receive queue", fccntl(fd, FLOWGRXQLEN, &n), 0);
        check("is empty", n, 0);
        check("transmit queue", fccntl(fd, FLOWGTXQLEN, &n), 0);
        must("write", flow_write(fd, "!burst", 6), 6);
        for (i = 0; i < 1000 && n != 10; i++) {
                must("receive queue", fccntl(fd, FLOWGRXQLEN, &n), 0);
                usleep(1000);
        }
        check("ten messages wait", n, 10);
        for (i = 0; i < 10; i++) {
                must("read", flow_read(fd, buf, sizeof(buf)), 1);
                must("in order", buf[0], '0' + i);
        }
        must("dealloc", flow_dealloc(fd), 0);
}

static void commands(const char * name)
{
        qosspec_t qs = qos_voice;
        uint16_t  fl = 0;
        int       fd;

        fd = alloc(name, NULL);
        check("get qos", fccntl(fd, FLOWGQOSSPEC, &qs), 0);
        check("raw: not in order", qs.in_order, 0);
        check("raw: delay", qs.delay, UINT32_MAX);
        check("raw: time-out", qs.timeout, 120000);
        check("unknown command", fccntl(fd, 12345), -ENOTSUP);
        check("unknown command of no flow", fccntl(4000, 12345), -ENOTALLOC);
        check("command of no descriptor", fccntl(-1, FLOWGQOSSPEC, &qs), -EBADF);
        check("qos to NULL", fccntl(fd, FLOWGQOSSPEC, NULL), -EINVAL);
        check("flags to NULL", fccntl(fd, FLOWGFLAGS, NULL), -EINVAL);
        check("queue to NULL", fccntl(fd, FLOWGRXQLEN, NULL), -EINVAL);
        check("protocol flags of a raw flow", fccntl(fd, FRCTGFLAGS, &fl), -EPERM);
        check("set protocol flags of a raw flow", fccntl(fd, FRCTSFLAGS, FRCTFRTX), -EPERM);
        must("dealloc", flow_dealloc(fd), 0);

        qs = qos_data;
        fd = alloc(name, &qs);
        check("data: in order", qs.in_order, 1);
        check("data: nothing lost", qs.loss, 0);
        check("data: gap", qs.max_gap, 2000);
        check("data: no checksum", qs.ber, 1);
        check("protocol flags", fccntl(fd, FRCTGFLAGS, &fl), 0);
        check("of a reliable flow", fl, FRCTFRTX | FRCTFRESCNTL | FRCTFLINGER);
        must("dealloc", flow_dealloc(fd), 0);

        qs = qos_voice;
        fd = alloc(name, &qs);
        check("voice: bandwidth", qs.bandwidth, 100000);
        check("voice: availability", qs.availability, 5);
        check("protocol flags", fccntl(fd, FRCTGFLAGS, &fl), 0);
        check("of an unreliable flow", fl, FRCTFRESCNTL);
        must("dealloc", flow_dealloc(fd), 0);
}

static void end(const char * name)
{
        qosspec_t qs;
        uint32_t  fl   = 0;
        uint16_t  frct = 0;
        char      buf[8];
        int       fd = alloc(name, NULL);
        long long start;
        ssize_t   n;

        must("write", flow_write(fd, "last", 4), 4);
        must("write", flow_write(fd, "!bye", 4), 4);
        check("what came before the end", flow_read(fd, buf, sizeof(buf)), 4);
        check("end", flow_read(fd, buf, sizeof(buf)), -EFLOWDOWN);
        check("and again", flow_read(fd, buf, sizeof(buf)), -EFLOWDOWN);
        check("get flags", fccntl(fd, FLOWGFLAGS, &fl), 0);
        check("down", fl & FLOWFDOWN, FLOWFDOWN);
        must("dealloc", flow_dealloc(fd), 0);

        /* A peer that does not read. Raw flows have no flow control. */
        qs = qos_data;
        fd = alloc(name, &qs);
        must("write", flow_write(fd, "!mute", 5), 5);
        must("non-blocking", fccntl(fd, FLOWSFLAGS, FLOWFRDWR | FLOWFNONBLOCK), 0);
        do
                n = flow_write(fd, buf, sizeof(buf));
        while (n == (ssize_t) sizeof(buf));
        check("write to a full queue", n, -EAGAIN);
        must("blocking", fccntl(fd, FLOWSFLAGS, FLOWFDEFAULT), 0);
        must("time-out", fccntl(fd, FLOWSSNDTIMEO, &short_time), 0);
        do { /* what is on its way to the peer may still make room */
                start = now_ms();
                n = flow_write(fd, buf, sizeof(buf));
        } while (n == (ssize_t) sizeof(buf));
        check("with a time-out", n, -ETIMEDOUT);
        check("it waited", now_ms() - start >= 50, 1);
        must("time-out", fccntl(fd, FLOWSSNDTIMEO, &zero), 0);
        check("with time-out zero", flow_write(fd, buf, sizeof(buf)), -ETIMEDOUT);
        /* Release without waiting for a peer that will never have it all. */
        must("no linger", fccntl(fd, FRCTSFLAGS, FRCTFRTX | FRCTFRESCNTL), 0);
        must("protocol flags", fccntl(fd, FRCTGFLAGS, &frct), 0);
        check("protocol flags as set", frct, FRCTFRTX | FRCTFRESCNTL);
        start = now_ms();
        must("dealloc", flow_dealloc(fd), 0);
        check("release without linger", now_ms() - start < 10000, 1);
}

static const struct {
        const char * name;
        void      (* run)(const char *);
} parts[] = {
        { "echo",     echo },
        { "errors",   errors },
        { "timeouts", timeouts },
        { "flags",    flags },
        { "partial",  partial },
        { "queues",   queues },
        { "commands", commands },
        { "end",      end }
};

int main(int     argc,
         char ** argv)
{
        size_t i;

        for (i = 0; i < sizeof(parts) / sizeof(parts[0]); i++)
                if (argc < 3 || strcmp(argv[2], parts[i].name) == 0)
                        parts[i].run(argc > 1 ? argv[1] : "c.server");

        return finish();
}
