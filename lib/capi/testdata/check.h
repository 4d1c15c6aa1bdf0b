/*
 * What the test programs share. Each check prints one line, "ok WHAT" or "FAIL
 * WHAT: GOT, want WANT", so that runs against two libraries can be compared.
 */
#ifndef CHECK_H
#define CHECK_H

#include <ouroboros/dev.h>
#include <ouroboros/errno.h>
#include <ouroboros/fccntl.h>
#include <ouroboros/fqueue.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures;

/* Returns whether got is want. */
static int check(const char * what,
                 long long    got,
                 long long    want)
{
        if (got == want)
                printf("ok %s\n", what);
        else {
                printf("FAIL %s: %lld, want %lld\n", what, got, want);
                __atomic_fetch_add(&failures, 1, __ATOMIC_RELAXED);
        }
        fflush(stdout);

        return got == want;
}

/* The same without a line when all is well, for what is done many times. */
static void must(const char * what,
                 long long    got,
                 long long    want)
{
        if (got == want)
                return;

        printf("FAIL %s: %lld, want %lld\n", what, got, want);
        fflush(stdout);
        _exit(1);
}

/* ms since some time. */
static long long now_ms(void)
{
        struct timespec t;

        clock_gettime(CLOCK_MONOTONIC, &t);

        return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

static const struct timespec zero = { 0, 0 };
static const struct timespec short_time = { 0, 50 * 1000000 };
static const struct timespec long_time = { 20, 0 };

/* Uses what a program may not need, so that compilers do not complain. */
static int finish(void)
{
        (void) zero;
        (void) short_time;
        (void) long_time;
        (void) now_ms;
        (void) must;
        (void) check;

        return failures == 0 ? 0 : 1;
}

#endif /* CHECK_H */
