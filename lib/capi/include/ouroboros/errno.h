/*
 * Error numbers beyond POSIX (spec 33 section 2). Calls return them negated.
 */
#ifndef OUROBOROS_ERRNO_H
#define OUROBOROS_ERRNO_H

#include <errno.h>

#define ENOTALLOC  1000 /* descriptor is not an allocated flow */
#define EIPCPTYPE  1001 /* unknown type of IPC process */
#define EIRMD      1002 /* cannot talk to the resource manager */
#define EIPCP      1003 /* IPC process failed, or none can reach the name */
#define EIPCPSTATE 1004 /* IPC process is in the wrong state */
#define EFLOWDOWN  1005 /* flow is down */
#define EFLOWPEER  1006 /* peer timed out */
#define ENAME      1007 /* naming error */
#define ECRYPT     1008 /* encryption or key exchange error */
#ifndef EAUTH
#define EAUTH      1009 /* authentication error */
#endif

#endif /* OUROBOROS_ERRNO_H */
