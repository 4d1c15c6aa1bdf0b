/*
 * Serves flows until it is killed: sends every message back, each flow with a
 * thread of its own. A message that begins with '!' is a command:
 *   !bye    release the flow
 *   !mute   read nothing more
 *   !burst  send 10 messages of one byte, '0' to '9'
 */
#define _GNU_SOURCE /* what common programs compile with */

#include "check.h"

static void * serve(void * arg)
{
        int     fd = *(int *) arg;
        char    buf[70000];
        char    c;
        ssize_t n;

        free(arg);

        for (;;) {
                n = flow_read(fd, buf, sizeof(buf));
                if (n < 0)
                        break;
                if (n == 4 && memcmp(buf, "!bye", 4) == 0)
                        break;
                if (n == 5 && memcmp(buf, "!mute", 5) == 0) {
                        for (;;)
                                pause();
                }
                if (n == 6 && memcmp(buf, "!burst", 6) == 0) {
                        for (c = '0'; c <= '9'; c++)
                                must("burst", flow_write(fd, &c, 1), 1);
                        continue;
                }
                if (flow_write(fd, buf, n) < 0)
                        break;
        }
        flow_dealloc(fd);

        return NULL;
}

int main(void)
{
        pthread_t      t;
        pthread_attr_t attr;
        int *          fd;

        pthread_attr_init(&attr);
        pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);

        printf("ready\n");
        fflush(stdout);

        for (;;) {
                fd = malloc(sizeof(*fd));
                *fd = flow_accept(NULL, NULL);
                if (*fd < 0) {
                        printf("accept: %d\n", *fd);
                        fflush(stdout);
                        free(fd);
                        if (finish() != 0)
                                break;
                        usleep(10000);
                        continue;
                }
                if (pthread_create(&t, &attr, serve, fd) != 0)
                        break;
        }

        return 1;
}
