//go:build ignore

/*
 * Socket shim of `o7s-router run`, preloaded into the program (LD_PRELOAD).
 *
 * A TCP socket of the program stays what it is until it is connected to an
 * address that stands for a name, or bound to a port that is served under a
 * name. Then the agent, which is the `o7s-router run` process, hands over a
 * UNIX stream socket, and the shim puts it in the place of the TCP socket
 * (dup3). Reading, writing, polling, fork, exec and close are the kernel's from
 * there on; the shim is not on the data path.
 *
 * What the shim has to know about a socket is in the socket's own UNIX
 * addresses, not in memory: it survives fork, exec, dup and SCM_RIGHTS. A name
 * ends in
 *
 *     <4|6><address, 32 hexadecimal digits>-<port, 4>
 *
 *   connected:  local    NUL o7s/<id>/<number, 8 digits>/<end of name>
 *               peer     the same form; no name: not established yet
 *   listening:  local    <dir>/l/<number, 8 digits>-<end of name>
 *   accepted:   local    the listening socket's
 *               peer     as for connected
 *
 * A socket is ours when its local name is, which nobody but the agent can give.
 *
 * The environment variable O7S_RUN says where the agent is, see start(). Each
 * request is one SEQPACKET connection to it, one packet there and one back
 * (struct request, struct reply): nothing is kept open, so programs that close
 * all descriptors, fork or drop their rights do no harm.
 *
 * It needs nothing but a C library, is linked without one and names no symbol
 * versions, so that one object serves every glibc, old or new.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

/* Operations of the agent; the numbers are agent.go's. */
enum { OP_CONNECT = 1, OP_BIND, OP_LISTEN, OP_RESOLVE, OP_REVERSE, OP_STATUS };

/* Flags of a request. */
enum { REQ_NONBLOCK = 1, REQ_REUSEPORT = 2, REQ_V6 = 4 };

/* Result of a request that is none of the agent's affairs. */
#define NOT_OURS (-1)

/* All in host order: both ends are on one machine. */
struct request {
	uint8_t  token[16];
	uint32_t op;
	uint32_t flags;
	uint32_t family;   /* 4 or 6 */
	uint32_t port;
	uint8_t  addr[16]; /* network order; IPv4 in the first four */
	char     text[256];
};

struct reply {
	int32_t result; /* 0, a positive errno, or NOT_OURS */
	char    text[256];
};

/* Flags of O7S_RUN. */
enum { RUN_LISTEN = 1, RUN_ONLY = 2, RUN_ADDRESSES = 4 };

static struct {
	int      active;
	unsigned flags;
	uint8_t  token[16];
	char     agent[64]; /* abstract name, without the NUL before it */
	char     conn[64];  /* what abstract names of ours start with */
	char     dir[80];   /* what names of listening sockets start with */
} run;

/* The private addresses that stand for names: 198.19.0.0/16, fd6f:3773::/64.
 * Not loopback addresses: programs trust those. */
static const uint8_t range4[2] = { 198, 19 };
static const uint8_t range6[8] = { 0xfd, 0x6f, 0x37, 0x73 };
static const uint8_t mapped[12] = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff };
static const uint8_t self4[4] = { 198, 19, 0, 1 };

#define NAME_END 38 /* digits of the end of a name */

static int hexdigit(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	if (c >= 'a' && c <= 'f')
		return c - 'a' + 10;
	return -1;
}

static int unhex(const char *s, uint8_t *out, size_t n)
{
	for (size_t i = 0; i < n; i++) {
		int a = hexdigit(s[2 * i]), b = a < 0 ? -1 : hexdigit(s[2 * i + 1]);
		if (b < 0)
			return -1;
		out[i] = (uint8_t)(a << 4 | b);
	}
	return 0;
}

/* Copies the word at *s, of less than n bytes, and steps over it. */
static int word(const char **s, char *out, size_t n)
{
	size_t i = 0;

	while (**s == ' ')
		(*s)++;
	for (; **s && **s != ' '; (*s)++) {
		if (i + 1 >= n)
			return -1;
		out[i++] = **s;
	}
	out[i] = 0;
	return i ? 0 : -1;
}

/*
 * Reads O7S_RUN: "1 AGENT TOKEN FLAGS CONN DIR", see agent.go. It is done before the
 * program runs, because some programs (nginx, sshd) replace their environment.
 * It does nothing else: no system call, no memory, no symbol looked up.
 */
__attribute__((constructor)) static void start(void)
{
	const char *s = getenv("O7S_RUN");
	char version[8], token[40], flags[8];

	if (!s || word(&s, version, sizeof(version)) || version[0] != '1' || version[1] ||
	    word(&s, run.agent, sizeof(run.agent)) || word(&s, token, sizeof(token)) ||
	    strlen(token) != 32 || unhex(token, run.token, 16) ||
	    word(&s, flags, sizeof(flags)) || word(&s, run.conn, sizeof(run.conn)))
		return;
	while (*s == ' ')
		s++;
	if (!*s || strlen(s) >= sizeof(run.dir)) /* the last: it may have spaces */
		return;
	memcpy(run.dir, s, strlen(s) + 1);
	run.flags = (unsigned)(flags[0] - '0');
	run.active = 1;
}

/* The libraries' own functions. Found at the first use: a lookup that two
 * threads do at once finds the same. */
static void *next(void **slot, const char *name)
{
	void *p = __atomic_load_n(slot, __ATOMIC_RELAXED);

	if (!p) {
		p = dlsym(RTLD_NEXT, name);
		__atomic_store_n(slot, p, __ATOMIC_RELAXED);
	}
	return p;
}

#define NEXT(name) ({ static void *slot; (__typeof__(&name))next(&slot, #name); })

/* ---- requests ---- */

/*
 * Asks the agent. The reply's descriptor, or -1, goes to *fd. Returns the
 * reply's result; -2 with errno set when the agent cannot be asked or, unless
 * restart is set, a signal came.
 */
static int ask(struct request *q, struct reply *r, int *fd, int restart)
{
	struct sockaddr_un to = { .sun_family = AF_UNIX };
	size_t len = strlen(run.agent);
	union {
		struct cmsghdr align;
		char buf[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec iov = { r, sizeof(*r) };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1,
			    .msg_control = control.buf, .msg_controllen = sizeof(control.buf) };
	ssize_t n;
	int s, e;

	*fd = -1;
	memcpy(q->token, run.token, sizeof(q->token));
	memcpy(to.sun_path + 1, run.agent, len);
	s = (int)syscall(SYS_socket, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (s < 0)
		return -2;
	do
		n = syscall(SYS_connect, s, &to, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + len));
	while (n < 0 && errno == EINTR);
	if (n == 0)
		n = syscall(SYS_sendto, s, q, sizeof(*q), MSG_NOSIGNAL, NULL, 0);
	if (n < 0)
		goto fail;
	do
		n = syscall(SYS_recvmsg, s, &m, MSG_CMSG_CLOEXEC);
	while (n < 0 && errno == EINTR && restart);
	if (n < 0)
		goto fail;
	if (n != (ssize_t)sizeof(*r)) { /* the agent went, or does not know us */
		errno = ENETDOWN;
		goto fail;
	}
	syscall(SYS_close, s);
	struct cmsghdr *c = m.msg_controllen ? CMSG_FIRSTHDR(&m) : NULL;
	if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS && c->cmsg_len == CMSG_LEN(sizeof(int)))
		memcpy(fd, CMSG_DATA(c), sizeof(int));
	r->text[sizeof(r->text) - 1] = 0;
	return r->result;
fail:
	e = errno;
	syscall(SYS_close, s);
	errno = e;
	return -2;
}

/* ---- names and addresses ---- */

struct addr {
	unsigned family; /* 4 or 6; 0: none of the program's protocols */
	unsigned port;
	uint8_t  ip[16];
};

static struct addr from_sockaddr(const struct sockaddr *sa, socklen_t len)
{
	struct addr a = { 0 };

	if (!sa || len < (socklen_t)sizeof(sa_family_t))
		return a;
	if (sa->sa_family == AF_INET && len >= (socklen_t)sizeof(struct sockaddr_in)) {
		struct sockaddr_in in;
		memcpy(&in, sa, sizeof(in));
		a.family = 4;
		a.port = ntohs(in.sin_port);
		memcpy(a.ip, &in.sin_addr, 4);
	} else if (sa->sa_family == AF_INET6 && len >= 24) { /* as the kernel: the scope may be missing */
		a.family = 6;
		a.port = ntohs(((const struct sockaddr_in6 *)(const void *)sa)->sin6_port);
		memcpy(a.ip, &((const struct sockaddr_in6 *)(const void *)sa)->sin6_addr, 16);
	}
	return a;
}

/* Gives an address to the program as the kernel does: cut to *len, whose new
 * value is the full length. */
static void to_sockaddr(const struct addr *a, struct sockaddr *sa, socklen_t *len)
{
	union {
		struct sockaddr_in  in;
		struct sockaddr_in6 in6;
	} u;
	socklen_t n;

	memset(&u, 0, sizeof(u));
	if (a->family == 4) {
		u.in.sin_family = AF_INET;
		u.in.sin_port = htons((uint16_t)a->port);
		memcpy(&u.in.sin_addr, a->ip, 4);
		n = sizeof(u.in);
	} else {
		u.in6.sin6_family = AF_INET6;
		u.in6.sin6_port = htons((uint16_t)a->port);
		memcpy(&u.in6.sin6_addr, a->ip, 16);
		n = sizeof(u.in6);
	}
	if (!sa || !len)
		return;
	memcpy(sa, &u, *len < n ? *len : n);
	*len = n;
}

/* Whether the address stands for a name. */
static int synthetic(const struct addr *a)
{
	if (a->family == 4)
		return !memcmp(a->ip, range4, sizeof(range4));
	return !memcmp(a->ip, range6, sizeof(range6)) ||
	       (!memcmp(a->ip, mapped, sizeof(mapped)) && !memcmp(a->ip + 12, range4, sizeof(range4)));
}

static int wildcard(const struct addr *a)
{
	for (size_t i = 0; i < 16; i++)
		if (a->ip[i])
			return 0;
	return 1;
}

/* Reads the end of a UNIX name; s is behind its last character. */
static int name_end(const char *s, struct addr *a)
{
	uint8_t port[2];

	s -= NAME_END;
	if ((s[0] != '4' && s[0] != '6') || s[33] != '-' || unhex(s + 1, a->ip, 16) || unhex(s + 34, port, 2))
		return -1;
	a->family = (unsigned)(s[0] - '0');
	a->port = (unsigned)port[0] << 8 | port[1];
	return 0;
}

/* What a UNIX name of len bytes is: */
enum kind { FOREIGN, CONNECTION, LISTENER };

static enum kind classify(const struct sockaddr_un *un, socklen_t len, struct addr *a, const char **number)
{
	size_t n, p;

	if (len <= (socklen_t)offsetof(struct sockaddr_un, sun_path) || un->sun_family != AF_UNIX)
		return FOREIGN;
	n = len - offsetof(struct sockaddr_un, sun_path);
	if (n > sizeof(un->sun_path))
		return FOREIGN;
	if (un->sun_path[0] == 0) {
		p = strlen(run.conn);
		if (n != 1 + p + 9 + NAME_END || memcmp(un->sun_path + 1, run.conn, p) || name_end(un->sun_path + n, a))
			return FOREIGN;
		*number = un->sun_path + 1 + p;
		return CONNECTION;
	}
	n = strnlen(un->sun_path, n);
	p = strlen(run.dir);
	if (n != p + 9 + NAME_END || memcmp(un->sun_path, run.dir, p) || name_end(un->sun_path + n, a))
		return FOREIGN;
	*number = un->sun_path + p;
	return LISTENER;
}

struct sock {
	struct sockaddr_un un;
	struct addr local;
	const char *number; /* in un: eight digits */
};

/* What a descriptor is. It leaves errno alone. */
static enum kind look(int fd, struct sock *s)
{
	socklen_t len = sizeof(s->un);
	enum kind k = FOREIGN;
	int e = errno;

	if (syscall(SYS_getsockname, fd, &s->un, &len) == 0)
		k = classify(&s->un, len < (socklen_t)sizeof(s->un) ? len : (socklen_t)sizeof(s->un), &s->local, &s->number);
	errno = e;
	return k;
}

static int sockopt(int fd, int level, int opt)
{
	int v = 0, e = errno;
	socklen_t len = sizeof(v);

	if (syscall(SYS_getsockopt, fd, level, opt, &v, &len) < 0)
		v = -1;
	errno = e;
	return v;
}

#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif

static int is_tcp(int fd)
{
	int p;

	if (sockopt(fd, SOL_SOCKET, SO_TYPE) != SOCK_STREAM)
		return 0;
	p = sockopt(fd, SOL_SOCKET, SO_PROTOCOL);
	return p == IPPROTO_TCP || p == IPPROTO_MPTCP;
}

static struct request request(uint32_t op, const struct addr *a)
{
	struct request q;

	memset(&q, 0, sizeof(q));
	q.op = op;
	if (a) {
		q.family = a->family;
		q.port = a->port;
		memcpy(q.addr, a->ip, sizeof(q.addr));
	}
	return q;
}

static void copy_text(char *to, const char *from, size_t n)
{
	if (n > sizeof(((struct request *)0)->text) - 1)
		n = sizeof(((struct request *)0)->text) - 1;
	memcpy(to, from, n);
	to[n] = 0;
}

/* ---- epoll: a registration belongs to the socket, not to its number, and
 * goes with the socket that is traded. The last one of each descriptor is
 * noted here and made again; the kernel is asked whether it is still true. ---- */

#define MAX_FD 65536

static struct {
	int      epfd; /* plus 1; 0: none */
	uint32_t events;
	uint64_t data;
} registered[MAX_FD]; /* untouched pages take no memory */

/*
 * Notes what is registered, and registers. Returns what the C library's does.
 */
EXPORT int epoll_ctl(int epfd, int op, int fd, struct epoll_event *ev)
{
	int r = NEXT(epoll_ctl)(epfd, op, fd, ev);

	if (r == 0 && run.active && fd >= 0 && fd < MAX_FD) {
		if (op == EPOLL_CTL_DEL) {
			if (registered[fd].epfd == epfd + 1)
				registered[fd].epfd = 0;
		} else if (ev) {
			registered[fd].events = ev->events;
			registered[fd].data = ev->data.u64;
			registered[fd].epfd = epfd + 1;
		}
	}
	return r;
}

/* Puts the socket s in the place of fd. */
static int trade(int fd, int s)
{
	static const int timeouts[] = { SO_RCVTIMEO, SO_SNDTIMEO };
	struct epoll_event ev;
	int epfd = -1, fl, cloexec, e = errno;

	fl = (int)syscall(SYS_fcntl, fd, F_GETFL);
	cloexec = (int)syscall(SYS_fcntl, fd, F_GETFD);
	if (fl >= 0 && fl & O_NONBLOCK)
		syscall(SYS_fcntl, s, F_SETFL, O_RDWR | O_NONBLOCK);
	for (size_t i = 0; i < sizeof(timeouts) / sizeof(timeouts[0]); i++) {
		char v[16];
		socklen_t len = sizeof(v);
		if (syscall(SYS_getsockopt, fd, SOL_SOCKET, timeouts[i], v, &len) == 0)
			syscall(SYS_setsockopt, s, SOL_SOCKET, timeouts[i], v, len);
	}
	if (fd < MAX_FD && registered[fd].epfd) {
		epfd = registered[fd].epfd - 1;
		ev.events = registered[fd].events;
		ev.data.u64 = registered[fd].data;
		if (syscall(SYS_epoll_ctl, epfd, EPOLL_CTL_DEL, fd, &ev) < 0)
			epfd = -1; /* another descriptor had this number */
	}
	if (syscall(SYS_dup3, s, fd, cloexec > 0 && cloexec & FD_CLOEXEC ? O_CLOEXEC : 0) < 0) {
		e = errno;
		syscall(SYS_close, s);
		errno = e;
		return -1;
	}
	syscall(SYS_close, s);
	if (epfd >= 0)
		syscall(SYS_epoll_ctl, epfd, EPOLL_CTL_ADD, fd, &ev);
	errno = e;
	return 0;
}

/* ---- what programs call ---- */

/* How a connection under way stands: 0 done, EINPROGRESS, or why it failed. */
static int status(const struct sock *s)
{
	struct request q = request(OP_STATUS, NULL);
	struct reply r;
	int fd, res, e = errno;

	copy_text(q.text, s->number, 8);
	res = ask(&q, &r, &fd, 1);
	errno = e;
	return res;
}

/*
 * To an address that stands for a name: asks the agent for a flow. A blocking
 * socket gets 0 when the flow is there, or -1 with EHOSTUNREACH (nobody has the
 * name), ECONNREFUSED (nobody serves it), ETIMEDOUT, ENETDOWN (no daemon); a
 * non-blocking one EINPROGRESS, and then becomes writable, or SO_ERROR says
 * why not. Called again: EALREADY, EISCONN, or why it failed.
 */
EXPORT int connect(int fd, const struct sockaddr *sa, socklen_t len)
{
	struct addr to;
	struct sock s;
	struct request q;
	struct reply r;
	enum kind k = FOREIGN;
	int got, res, ours;

	if (!run.active || !(to = from_sockaddr(sa, len)).family)
		return NEXT(connect)(fd, sa, len);
	ours = synthetic(&to);
	if (!ours && !(run.flags & (RUN_ONLY | RUN_ADDRESSES | RUN_LISTEN)))
		return NEXT(connect)(fd, sa, len);
	k = look(fd, &s);
	if (k == CONNECTION) {
		res = status(&s);
		errno = res == 0 ? EISCONN : res == EINPROGRESS ? EALREADY : res > 0 ? res : ECONNRESET;
		return -1;
	}
	if (k == LISTENER) {
		struct sockaddr_un un;
		socklen_t n = sizeof(un);
		if (syscall(SYS_getpeername, fd, &un, &n) == 0) {
			errno = EISCONN;
			return -1;
		}
	} else if (!is_tcp(fd)) {
		return NEXT(connect)(fd, sa, len);
	}
	q = request(OP_CONNECT, &to);
	if ((int)syscall(SYS_fcntl, fd, F_GETFL) & O_NONBLOCK)
		q.flags |= REQ_NONBLOCK;
	res = ask(&q, &r, &got, 0);
	if (res == NOT_OURS || (res == -2 && errno != EINTR && !ours && !(run.flags & RUN_ONLY))) {
		if (k == FOREIGN)
			return NEXT(connect)(fd, sa, len);
		res = ENETUNREACH; /* its port is served under a name: it is no TCP socket */
	}
	if (got >= 0 && trade(fd, got) < 0)
		return -1;
	if (res == 0 && got >= 0)
		return 0;
	if (res == -2) {
		if (errno != EINTR && errno != EMFILE && errno != ENFILE)
			errno = ENETDOWN;
	} else if (res == 0 || (res == EINPROGRESS && got < 0)) {
		errno = EMFILE; /* the descriptor was lost on its way */
	} else {
		errno = res > 0 ? res : EIO;
	}
	return -1;
}

/* Asks whether the port is served under a name, and if so trades the socket. */
static int bind_name(int fd, const struct addr *a)
{
	struct request q = request(OP_BIND, a);
	struct reply r;
	int got, res;

	if (sockopt(fd, SOL_SOCKET, SO_REUSEPORT) > 0)
		q.flags |= REQ_REUSEPORT;
	res = ask(&q, &r, &got, 1);
	if (res == -2)
		return run.flags & RUN_ONLY ? (errno = ENETDOWN, -1) : NOT_OURS - 1;
	if (res == NOT_OURS)
		return NOT_OURS - 1;
	if (res != 0 || got < 0) {
		errno = res > 0 ? res : EMFILE;
		return -1;
	}
	return trade(fd, got);
}

/*
 * To a port that is served under a name (run --listen, --name): trades the
 * socket, 0; or -1 with EADDRINUSE (another socket of this run has the port and
 * not both have SO_REUSEPORT). Port 0 is decided when the socket listens.
 */
EXPORT int bind(int fd, const struct sockaddr *sa, socklen_t len)
{
	struct addr a;
	struct sock s;
	int res;

	if (!run.active || !(run.flags & RUN_LISTEN) || !(a = from_sockaddr(sa, len)).family || !a.port)
		return NEXT(bind)(fd, sa, len);
	if (look(fd, &s) != FOREIGN) {
		errno = EINVAL; /* bound already */
		return -1;
	}
	if (!is_tcp(fd))
		return NEXT(bind)(fd, sa, len);
	res = bind_name(fd, &a);
	return res == NOT_OURS - 1 ? NEXT(bind)(fd, sa, len) : res;
}

/*
 * On a port that is served under a name: flows to the name arrive as
 * connections, 0; or -1 with EACCES (binding the name is not permitted),
 * ENETDOWN (no daemon).
 */
EXPORT int listen(int fd, int backlog)
{
	struct request q;
	struct reply r;
	struct sock s;
	int got, res;

	if (!run.active || !(run.flags & RUN_LISTEN))
		return NEXT(listen)(fd, backlog);
	if (look(fd, &s) != LISTENER) {
		struct sockaddr_storage ss;
		socklen_t len = sizeof(ss);
		struct addr a;

		if (!is_tcp(fd) || syscall(SYS_getsockname, fd, &ss, &len) < 0 ||
		    !(a = from_sockaddr((struct sockaddr *)&ss, len)).family)
			return NEXT(listen)(fd, backlog);
		res = bind_name(fd, &a);
		if (res == NOT_OURS - 1)
			return NEXT(listen)(fd, backlog);
		if (res < 0 || look(fd, &s) != LISTENER)
			return -1;
	}
	if (NEXT(listen)(fd, backlog) < 0)
		return -1;
	q = request(OP_LISTEN, &s.local);
	copy_text(q.text, s.number, 8);
	res = ask(&q, &r, &got, 1);
	if (res != 0) {
		errno = res > 0 ? res : ENETDOWN;
		return -1;
	}
	return 0;
}

/* agent.go's sendBuffer: with less, a byte that stays unread could keep the
 * program from ever writing again. */
static const int send_buffer = 212992;

/*
 * Sends the agent a byte that is never passed on, marked by a descriptor with
 * it. It stays unread, so that the agent can reset the connection: a UNIX socket
 * that is closed with bytes unread is. Without it, all is well but for that.
 * Returns -1 when the connection has been reset already.
 */
static int mark(int fd)
{
	union {
		struct cmsghdr align;
		char buf[CMSG_SPACE(sizeof(int))];
	} control;
	char byte = 0;
	struct iovec iov = { &byte, 1 };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1,
			    .msg_control = control.buf, .msg_controllen = sizeof(control.buf) };
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	int e = errno, any = (int)syscall(SYS_eventfd2, 0, EFD_CLOEXEC), gone = 0;

	if (any >= 0) {
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &any, sizeof(any));
		gone = syscall(SYS_sendmsg, fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 && (errno == EPIPE || errno == ECONNRESET);
		syscall(SYS_close, any);
	}
	errno = e;
	return gone ? -1 : 0;
}

/*
 * Returns what the kernel does. The peer's address is a private one: flows have
 * no addresses. The port tells connections apart. A connection that was reset
 * while it waited is passed over.
 */
EXPORT int accept4(int fd, struct sockaddr *sa, socklen_t *len, int flags)
{
	struct sockaddr_un un;
	socklen_t n;
	struct addr a;
	struct sock s;
	const char *number;
	int c;

	if (!run.active || !(run.flags & RUN_LISTEN) || look(fd, &s) != LISTENER)
		return NEXT(accept4)(fd, sa, len, flags);
	for (;;) {
		n = sizeof(un);
		c = NEXT(accept4)(fd, (struct sockaddr *)&un, &n, flags);
		if (c < 0)
			return c;
		if (mark(c) == 0) {
			int e = errno;
			syscall(SYS_setsockopt, c, SOL_SOCKET, SO_SNDBUF, &send_buffer, (socklen_t)sizeof(send_buffer));
			errno = e;
			break;
		}
		syscall(SYS_close, c);
	}
	if (sa && len) {
		if (classify(&un, n, &a, &number) != CONNECTION) {
			memset(&a, 0, sizeof(a));
			a.family = s.local.family;
		}
		to_sockaddr(&a, sa, len);
	}
	return c;
}

/* accept4 without flags. */
EXPORT int accept(int fd, struct sockaddr *sa, socklen_t *len)
{
	return accept4(fd, sa, len, 0);
}

/* The address the socket was bound to, or one of the private range. */
EXPORT int getsockname(int fd, struct sockaddr *restrict sa, socklen_t *restrict len)
{
	struct sockaddr_un un;
	socklen_t n = sizeof(un);
	struct sock s;

	if (!run.active || !sa || !len || look(fd, &s) == FOREIGN)
		return NEXT(getsockname)(fd, sa, len);
	if (wildcard(&s.local) && syscall(SYS_getpeername, fd, &un, &n) == 0) {
		if (s.local.family == 6)
			memcpy(s.local.ip, mapped, sizeof(mapped));
		memcpy(s.local.ip + (s.local.family == 6 ? 12 : 0), self4, sizeof(self4));
	}
	to_sockaddr(&s.local, sa, len);
	return 0;
}

/* The address that was connected to; -1 with ENOTCONN until it is. */
EXPORT int getpeername(int fd, struct sockaddr *restrict sa, socklen_t *restrict len)
{
	struct sockaddr_un un;
	socklen_t n = sizeof(un);
	struct addr a;
	struct sock s;
	const char *number;

	if (!run.active || !sa || !len || look(fd, &s) == FOREIGN)
		return NEXT(getpeername)(fd, sa, len);
	if (syscall(SYS_getpeername, fd, &un, &n) < 0)
		return -1;
	if (classify(&un, n, &a, &number) != CONNECTION) {
		errno = ENOTCONN;
		return -1;
	}
	to_sockaddr(&a, sa, len);
	return 0;
}

/* Options of TCP and IP that change what a socket is cannot be pretended. */
static int pretend(int level, int opt)
{
	enum { REPAIR = 19, MD5SIG = 14, ULP = 31, MD5SIG_EXT = 32, AO_ADD_KEY = 38 };

	switch (level) {
	case IPPROTO_TCP:
		return opt != REPAIR && opt != MD5SIG && opt != ULP && opt != MD5SIG_EXT && opt < AO_ADD_KEY;
	case IPPROTO_IP:
	case IPPROTO_IPV6:
		return 1;
	case SOL_SOCKET:
		return opt == SO_REUSEPORT;
	}
	return 0;
}

/*
 * Options of TCP and IP are taken and have no effect: flows need no Nagle, no
 * keep-alives and no type of service. TCP_ULP, TCP_REPAIR and signatures fail
 * as on a UNIX socket. A send buffer smaller than ours stays ours. Other options
 * of sockets are the kernel's.
 */
EXPORT int setsockopt(int fd, int level, int opt, const void *v, socklen_t len)
{
	struct sock s;
	int r, n;

	if (run.active && level == SOL_SOCKET && (opt == SO_SNDBUF || opt == SO_SNDBUFFORCE) && v && len >= (socklen_t)sizeof(n)) {
		memcpy(&n, v, sizeof(n));
		if (n >= 0 && n < send_buffer && look(fd, &s) != FOREIGN)
			return 0;
	}
	r = NEXT(setsockopt)(fd, level, opt, v, len);
	if (r < 0 && run.active && (errno == EOPNOTSUPP || errno == ENOPROTOOPT) && pretend(level, opt) &&
	    look(fd, &s) != FOREIGN)
		return 0;
	return r;
}

/* Gives an option's value as the kernel does. */
static int give(void *v, socklen_t *len, const void *from, size_t n)
{
	if (*len > (socklen_t)n)
		*len = (socklen_t)n;
	memcpy(v, from, *len);
	return 0;
}

/*
 * TCP_INFO says established with nothing lost, TCP_MAXSEG 1448, TCP_CONGESTION
 * "o7s", TCP_NODELAY 1; other options of TCP and IP are 0, IP_OPTIONS is empty.
 * SO_DOMAIN, SO_PROTOCOL and SO_ERROR are those of a TCP socket.
 */
EXPORT int getsockopt(int fd, int level, int opt, void *restrict v, socklen_t *restrict len)
{
	int r = NEXT(getsockopt)(fd, level, opt, v, len), n;
	struct sock s;

	if (!run.active || !v || !len)
		return r;
	if (r == 0) {
		enum kind k;

		if (level != SOL_SOCKET || (opt != SO_ERROR && opt != SO_DOMAIN && opt != SO_PROTOCOL) || *len != sizeof(n))
			return r;
		memcpy(&n, v, sizeof(n));
		if ((opt == SO_ERROR && n != ECONNRESET) || (opt == SO_DOMAIN && n != AF_UNIX) || (opt == SO_PROTOCOL && n != 0) ||
		    (k = look(fd, &s)) == FOREIGN)
			return r;
		if (opt == SO_DOMAIN)
			n = s.local.family == 4 ? AF_INET : AF_INET6;
		else if (opt == SO_PROTOCOL)
			n = IPPROTO_TCP;
		else if (k == CONNECTION && (r = status(&s)) > 0 && r != EINPROGRESS)
			n = r;
		memcpy(v, &n, sizeof(n));
		return 0;
	}
	if ((errno != EOPNOTSUPP && errno != ENOPROTOOPT) || !pretend(level, opt) || look(fd, &s) == FOREIGN)
		return r;
	n = 0;
	if (level == IPPROTO_TCP) {
		struct tcp_info info;

		switch (opt) {
		case TCP_INFO:
			memset(&info, 0, sizeof(info));
			info.tcpi_state = TCP_ESTABLISHED;
			info.tcpi_snd_mss = info.tcpi_rcv_mss = info.tcpi_advmss = 1448;
			info.tcpi_snd_cwnd = 10;
			info.tcpi_pmtu = 1500;
			return give(v, len, &info, sizeof(info));
		case TCP_CONGESTION:
			return give(v, len, "o7s", 4);
		case TCP_MAXSEG:
			n = 1448;
			break;
		case TCP_NODELAY:
			n = 1;
			break;
		}
	} else if (level == IPPROTO_IP && opt == IP_OPTIONS) {
		*len = 0;
		return 0;
	}
	return give(v, len, &n, sizeof(n));
}

/*
 * A pipe may hold pieces of 32 KB from another socket, and all that one call
 * moves becomes one piece of memory: as much as sendfile moves is enough, see
 * send_buffer.
 */
EXPORT ssize_t splice(int in, off64_t *inoff, int out, off64_t *outoff, size_t len, unsigned flags)
{
	enum { MOST = 65536 };
	struct sock s;

	if (run.active && len > MOST && !outoff && look(out, &s) != FOREIGN)
		len = MOST;
	return NEXT(splice)(in, inoff, out, outoff, len, flags);
}

/* TCP gives no address with data, a UNIX socket does: *len is 0. */
EXPORT ssize_t recvfrom(int fd, void *restrict b, size_t n, int flags, struct sockaddr *restrict sa, socklen_t *restrict len)
{
	struct sock s;

	if (run.active && sa && len && look(fd, &s) != FOREIGN) {
		ssize_t r = NEXT(recvfrom)(fd, b, n, flags, NULL, NULL);
		if (r >= 0)
			*len = 0;
		return r;
	}
	return NEXT(recvfrom)(fd, b, n, flags, sa, len);
}

/* The same for messages. */
EXPORT ssize_t recvmsg(int fd, struct msghdr *m, int flags)
{
	struct sock s;
	void *name = m ? m->msg_name : NULL;
	ssize_t r = NEXT(recvmsg)(fd, m, flags);

	if (r >= 0 && run.active && name && m->msg_namelen > 0 && look(fd, &s) != FOREIGN)
		m->msg_namelen = 0;
	return r;
}

/* A connected TCP socket ignores the address, a UNIX socket refuses it. */
EXPORT ssize_t sendto(int fd, const void *b, size_t n, int flags, const struct sockaddr *sa, socklen_t len)
{
	struct sock s;

	if (run.active && sa && (sa->sa_family == AF_INET || sa->sa_family == AF_INET6) && look(fd, &s) != FOREIGN)
		return NEXT(sendto)(fd, b, n, flags, NULL, 0);
	return NEXT(sendto)(fd, b, n, flags, sa, len);
}

/* ---- names ---- */

/* The number, and for want of it 0, of a service. */
static unsigned port_of(const char *s)
{
	unsigned n = 0;

	for (; s && *s; s++) {
		if (*s < '0' || *s > '9' || n > 65535)
			return 0;
		n = n * 10 + (unsigned)(*s - '0');
	}
	return n > 65535 ? 0 : n;
}

/* Whether the text is an address already. */
static int numeric(const char *s)
{
	int digits = 1;

	for (; *s; s++) {
		if (*s == ':')
			return 1;
		if ((*s < '0' || *s > '9') && *s != '.')
			digits = 0;
	}
	return digits;
}

/*
 * The text of the address that stands for host, in text; host itself when it is
 * none of ours; NULL when it must not be looked for anywhere else.
 */
static const char *resolve(const char *host, const char *service, int v6, char text[256])
{
	struct request q;
	struct reply r;
	int fd, res, e = errno;

	if (!run.active || !host || !*host || strlen(host) > 255 || numeric(host))
		return host;
	q = request(OP_RESOLVE, NULL);
	q.port = port_of(service);
	q.flags = v6 ? REQ_V6 : 0;
	copy_text(q.text, host, strlen(host));
	res = ask(&q, &r, &fd, 1);
	errno = e;
	if (res == 0) {
		memcpy(text, r.text, 256);
		return text;
	}
	if (res == NOT_OURS || (res == -2 && !(run.flags & RUN_ONLY)))
		return host;
	return NULL;
}

/*
 * The address that stands for a name of the network; other names are looked up
 * as ever, or with run --only are EAI_NONAME. The C library builds the list, so
 * its freeaddrinfo is the right one. Not for datagram sockets.
 */
EXPORT int getaddrinfo(const char *restrict host, const char *restrict service,
		       const struct addrinfo *restrict hints, struct addrinfo **restrict res)
{
	struct addrinfo h;
	char text[256];
	const char *t;

	if (!run.active || !host || (hints && hints->ai_socktype && hints->ai_socktype != SOCK_STREAM))
		return NEXT(getaddrinfo)(host, service, hints, res);
	t = resolve(host, service, hints && hints->ai_family == AF_INET6, text);
	if (!t)
		return EAI_NONAME;
	if (t != text)
		return NEXT(getaddrinfo)(host, service, hints, res);
	memset(&h, 0, sizeof(h));
	if (hints)
		h = *hints;
	h.ai_flags = (h.ai_flags & ~(AI_ADDRCONFIG | AI_ALL)) | AI_NUMERICHOST;
	return NEXT(getaddrinfo)(text, service, &h, res);
}

/* The same for the older interface; h_name is the address. NULL with h_errno
 * HOST_NOT_FOUND for a name that must not be looked up elsewhere. */
static struct hostent *none(void)
{
	int *(*location)(void) = (int *(*)(void))dlsym(RTLD_DEFAULT, "__h_errno_location");

	if (location)
		*location() = HOST_NOT_FOUND;
	return NULL;
}

EXPORT struct hostent *gethostbyname(const char *host)
{
	char text[256];
	const char *t = resolve(host, NULL, 0, text);

	return t || !host ? NEXT(gethostbyname)(t) : none();
}

EXPORT struct hostent *gethostbyname2(const char *host, int af)
{
	char text[256];
	const char *t = resolve(host, NULL, af == AF_INET6, text);

	return t || !host ? NEXT(gethostbyname2)(t, af) : none();
}

EXPORT int gethostbyname_r(const char *restrict host, struct hostent *restrict ret, char *restrict buf, size_t n,
			   struct hostent **restrict res, int *restrict err)
{
	char text[256];
	const char *t = resolve(host, NULL, 0, text);

	if (!t && host) {
		*res = NULL;
		*err = HOST_NOT_FOUND;
		return ENOENT;
	}
	return NEXT(gethostbyname_r)(t, ret, buf, n, res, err);
}

EXPORT int gethostbyname2_r(const char *restrict host, int af, struct hostent *restrict ret, char *restrict buf, size_t n,
			    struct hostent **restrict res, int *restrict err)
{
	char text[256];
	const char *t = resolve(host, NULL, af == AF_INET6, text);

	if (!t && host) {
		*res = NULL;
		*err = HOST_NOT_FOUND;
		return ENOENT;
	}
	return NEXT(gethostbyname2_r)(t, af, ret, buf, n, res, err);
}

/* The name that an address of the private range stands for; where there is
 * none, its digits. Such an address is asked of nobody else. */
EXPORT int getnameinfo(const struct sockaddr *restrict sa, socklen_t len, char *restrict host, socklen_t hostlen,
		       char *restrict service, socklen_t servicelen, int flags)
{
	struct addr a = from_sockaddr(sa, len);
	struct request q;
	struct reply r;
	int fd, e = errno;
	size_t n;

	if (!run.active || !a.family || !synthetic(&a) || !host || !hostlen || flags & NI_NUMERICHOST)
		return NEXT(getnameinfo)(sa, len, host, hostlen, service, servicelen, flags);
	q = request(OP_REVERSE, &a);
	if (ask(&q, &r, &fd, 1) != 0) {
		errno = e;
		if (flags & NI_NAMEREQD)
			return EAI_NONAME;
		return NEXT(getnameinfo)(sa, len, host, hostlen, service, servicelen, flags | NI_NUMERICHOST);
	}
	errno = e;
	n = strlen(r.text);
	if (n >= hostlen)
		return EAI_OVERFLOW;
	memcpy(host, r.text, n + 1);
	if (!service || !servicelen)
		return 0;
	return NEXT(getnameinfo)(sa, len, NULL, 0, service, servicelen, flags);
}
