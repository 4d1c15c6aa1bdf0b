/*
 * dev.h alone brings what a program of the reference finds there.
 */
#include <ouroboros/dev.h>

int main(void)
{
        const struct timespec t  = { 0, 0 };
        qosspec_t             qs = qos_raw;
        bool                  ok = flow_alloc(NULL, &qs, &t) < 0;
        uint32_t              ms = qs.timeout;
        ssize_t               n  = flow_write(-1, &ms, sizeof(ms));

        return ok && n < 0 && getpid() > 0 ? 0 : 1;
}
