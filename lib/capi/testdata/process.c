/*
 * What a process is to the daemon: announced before main, not inherited by a
 * child of fork, started anew by exec.
 *   process announced     waits for a line without a call
 *   process fork NAME     uses a flow in a child
 *   process exec NAME     becomes a child that talks
 *   process alone         there is no daemon, then one
 */
#define _GNU_SOURCE

#include "check.h"

#include <sys/wait.h>

static int talk(const char * name)
{
        char buf[8];
        int  fd = flow_alloc(name, NULL, &long_time);

        if (fd < 0)
                return fd;
        must("write", flow_write(fd, "hi", 2), 2);
        must("read", flow_read(fd, buf, sizeof(buf)), 2);

        return flow_dealloc(fd);
}

static int in_child(void)
{
        int   status;
        pid_t pid = fork();

        if (pid == 0)
                return 1;
        must("waitpid", waitpid(pid, &status, 0), pid);
        check("child ended", status, 0);

        return 0;
}

static void in_fork(const char * name)
{
        char       buf[8];
        fset_t *   set = fset_create();
        fqueue_t * fq  = fqueue_create();
        int        fd  = flow_alloc(name, NULL, &long_time);

        must("alloc", fd >= 64, 1);
        if (in_child()) {
                must("read", flow_read(fd, buf, sizeof(buf)), -EIRMD);
                must("write", flow_write(fd, buf, 1), -EIRMD);
                must("alloc", flow_alloc(name, NULL, NULL), -EIRMD);
                must("accept", flow_accept(NULL, NULL), -EIRMD);
                must("join", flow_join("x", NULL), -EIRMD);
                must("dealloc", flow_dealloc(fd), -EIRMD);
                must("fccntl", fccntl(fd, FLOWGFLAGS, (uint32_t *) buf), -EIRMD);
                must("fset_create", fset_create() == NULL, 1);
                must("fset_add", fset_add(set, fd), -EIRMD);
                must("fevent", fevent(set, fq, NULL), -EIRMD);
                fset_destroy(set);
                exit(0);
        }
        must("write", flow_write(fd, "hi", 2), 2);
        check("the parent's flow lives", flow_read(fd, buf, sizeof(buf)), 2);
}

int main(int     argc,
         char ** argv)
{
        char line[8];

        if (argc < 2)
                return 2;

        if (strcmp(argv[1], "announced") == 0) {
                printf("ready\n");
                fflush(stdout);
                return fgets(line, sizeof(line), stdin) == NULL;
        }
        if (strcmp(argv[1], "alone") == 0) {
                char buf[8];

                check("alloc without a daemon", flow_alloc("x", NULL, NULL), -EIRMD);
                check("accept without a daemon", flow_accept(NULL, NULL), -EIRMD);
                check("read without a daemon", flow_read(64, buf, sizeof(buf)), -ENOTALLOC);
                printf("ready\n");
                fflush(stdout);
                if (fgets(line, sizeof(line), stdin) == NULL)
                        return 1;
                check("alloc with one", flow_alloc("no.such.name", NULL, NULL), -ENAME);
                return finish();
        }
        if (argc < 3)
                return 2;
        if (strcmp(argv[1], "fork") == 0)
                in_fork(argv[2]);
        else if (strcmp(argv[1], "exec") == 0) {
                if (in_child()) {
                        execl(argv[0], argv[0], "talk", argv[2], NULL);
                        _exit(1);
                }
        } else
                check("talk", talk(argv[2]), 0);

        return finish();
}
