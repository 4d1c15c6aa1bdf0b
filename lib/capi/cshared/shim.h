/*
 * What the C files of the library share.
 */
#ifndef O7S_SHIM_H
#define O7S_SHIM_H

#include <stdatomic.h>
#include <stdint.h>

/* An event in a queue. Go fills an array of these. */
struct o7s_event {
        int fd;
        int type;
};

/* What Go returns from a wait that an interruption ended (calls.Interrupted). */
#define O7S_INTERRUPTED (-4095)

/* Number of cancellations of threads so far; calls.Process has a pointer. */
extern _Atomic uint32_t o7s_cancels;

/*
 * Becomes readable with each cancellation; Go waits for it. -1 when there are
 * no descriptors left: then a thread that waits is not cancelled.
 */
extern int o7s_cancel_fd;

/* Set in a child after fork, where nothing of the Go runtime runs. */
extern _Atomic int o7s_forked;

/* Before the first call into Go. */
void o7s_cancel_init(void);

/*
 * Sees to it that every handler of a signal runs on the alternate stack: see
 * signal.c.
 */
void o7s_signals_adopt(void);

/*
 * To be called by a thread before it enters Go for the first time, once the
 * Go runtime has started. It gives it a stack for handlers, and sees to it that
 * Go leaves the signals blocked that the thread blocks.
 */
void o7s_thread_prepare(void);

/* Whether that was done. */
extern _Thread_local int o7s_thread_ready
        __attribute__((tls_model("initial-exec")));

#endif /* O7S_SHIM_H */
