/*
 * Properties of a flow (spec 33 section 7).
 */
#ifndef OUROBOROS_FCCNTL_H
#define OUROBOROS_FCCNTL_H

#include <ouroboros/qos.h>

#include <sys/time.h>
#include <sys/types.h>
#include <time.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Flags of a flow. */
#define FLOWFRDONLY   00000000
#define FLOWFWRONLY   00000001
#define FLOWFRDWR     00000002
#define FLOWFACCMODE  00000003 /* mask of the access mode */
#define FLOWFINVALID  00000003 /* the access mode that is none */

#define FLOWFDOWN     00000004 /* the flow is down */

#define FLOWFRNOBLOCK 00001000 /* reads do not block */
#define FLOWFWNOBLOCK 00002000 /* writes do not block */
#define FLOWFNONBLOCK (FLOWFRNOBLOCK | FLOWFWNOBLOCK)

#define FLOWFRNOPART  00010000 /* a message that does not fit is an error */
#define FLOWFWNOPART  00020000 /* messages are not split */

#define FLOWFDEFAULT  (FLOWFRDWR | FLOWFWNOPART)

/* Flags of the end-to-end protocol. */
#define FRCTFRTX      00000001 /* lost packets are sent again */
#define FRCTFRESCNTL  00000002 /* flow control */
#define FRCTFLINGER   00000004 /* release waits for unacknowledged data */

/* Commands, and their argument. */
#define FLOWSRCVTIMEO 00000001 /* const struct timespec *; NULL: none */
#define FLOWGRCVTIMEO 00000002 /* struct timespec * */
#define FLOWSSNDTIMEO 00000003 /* const struct timespec *; NULL: none */
#define FLOWGSNDTIMEO 00000004 /* struct timespec * */
#define FLOWGQOSSPEC  00000005 /* qosspec_t * */
#define FLOWSFLAGS    00000006 /* uint32_t */
#define FLOWGFLAGS    00000007 /* uint32_t * */
#define FLOWGRXQLEN   00000010 /* size_t *, in packets */
#define FLOWGTXQLEN   00000011 /* size_t *, in packets */

#define FRCTSFLAGS    00001000 /* uint16_t */
#define FRCTGFLAGS    00002000 /* uint16_t * */

int fccntl(int fd,
           int cmd,
           ...);

#ifdef __cplusplus
}
#endif

#endif /* OUROBOROS_FCCNTL_H */
