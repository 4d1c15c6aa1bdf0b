/*
 * Flows: allocate, accept, read, write (spec 33, 34).
 *
 * Every call returns a negative error number (ouroboros/errno.h) when it
 * fails. Time-outs are durations: NULL is the default of the call, zero means
 * "do not wait". All calls may be made from any thread.
 */
#ifndef OUROBOROS_DEV_H
#define OUROBOROS_DEV_H

#include <ouroboros/qos.h>

#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#ifdef __cplusplus
extern "C" {
#endif

/*
 * Asks for a flow to a name and returns its descriptor, 64 or higher. qs NULL
 * asks for qos_raw; otherwise it receives the QoS of the flow. Default
 * time-out: 20 s, after which the result is -EPERM.
 */
int     flow_alloc(const char *            dst,
                   qosspec_t *             qs,
                   const struct timespec * timeo);

/*
 * Waits for a flow to one of the names that the program or process is bound
 * to. qs, unless NULL, receives the QoS that was asked for. Default: for ever.
 */
int     flow_accept(qosspec_t *             qs,
                    const struct timespec * timeo);

/* Joins a broadcast layer. */
int     flow_join(const char *            layer,
                  const struct timespec * timeo);

/* Releases a flow. May wait until the peer has all data of a reliable flow. */
int     flow_dealloc(int fd);

/* Writes one message and returns count. */
ssize_t flow_write(int          fd,
                   const void * buf,
                   size_t       count);

/*
 * Reads the next message, or more of one that did not fit the buffer of the
 * read before. A message that filled the buffer exactly is followed by a read
 * that returns 0 (not with FLOWFRNOPART).
 */
ssize_t flow_read(int    fd,
                  void * buf,
                  size_t count);

#ifdef __cplusplus
}
#endif

#endif /* OUROBOROS_DEV_H */
