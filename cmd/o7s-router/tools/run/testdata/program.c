//go:build ignore

/*
 * The programs that the tests of run start: plain sockets, no idea of names of
 * the network. The first argument says which. They print what they find and
 * end with 1 at the first thing that is not as with TCP.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(x)                                                                                       \
	do {                                                                                           \
		if (!(x)) {                                                                            \
			printf("line %d: %s (errno %d, %s)\n", __LINE__, #x, errno, strerror(errno)); \
			fflush(stdout);                                                                \
			_exit(1);                                                                      \
		}                                                                                      \
	} while (0)

static struct addrinfo *lookup(const char *host, const char *port, int family)
{
	struct addrinfo h, *a = NULL;

	memset(&h, 0, sizeof(h));
	h.ai_family = family;
	h.ai_socktype = SOCK_STREAM;
	h.ai_flags = AI_ADDRCONFIG;
	if (getaddrinfo(host, port, &h, &a))
		return NULL;
	return a;
}

static int open_socket(const struct addrinfo *a, int flags)
{
	int s = socket(a->ai_family, SOCK_STREAM | flags, 0);
	CHECK(s >= 0);
	return s;
}

static int dial(const char *host, const char *port)
{
	struct addrinfo *a = lookup(host, port, AF_UNSPEC);
	int s;

	CHECK(a);
	s = open_socket(a, SOCK_CLOEXEC);
	CHECK(connect(s, a->ai_addr, a->ai_addrlen) == 0);
	freeaddrinfo(a);
	return s;
}

static void put(int s, const char *b, size_t n)
{
	while (n > 0) {
		ssize_t k = write(s, b, n);
		CHECK(k > 0);
		b += k;
		n -= (size_t)k;
	}
}

static void get(int s, char *b, size_t n)
{
	while (n > 0) {
		ssize_t k = read(s, b, n);
		CHECK(k > 0);
		b += k;
		n -= (size_t)k;
	}
}

/* Echoes until the end of the stream, then ends its own. */
static void echo(int s)
{
	static __thread char b[65536];
	ssize_t n;

	while ((n = read(s, b, sizeof(b))) > 0)
		put(s, b, (size_t)n);
	CHECK(n == 0);
	CHECK(close(s) == 0);
}

static int listen_on(const char *port, int family, int reuseport)
{
	struct sockaddr_in in = { .sin_family = AF_INET };
	struct sockaddr_in6 in6 = { .sin6_family = AF_INET6 };
	int s = socket(family, SOCK_STREAM, 0), one = 1;

	CHECK(s >= 0);
	CHECK(setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) == 0);
	if (reuseport)
		CHECK(setsockopt(s, SOL_SOCKET, SO_REUSEPORT, &one, sizeof(one)) == 0);
	in.sin_port = in6.sin6_port = htons((uint16_t)atoi(port));
	if (family == AF_INET)
		CHECK(bind(s, (struct sockaddr *)&in, sizeof(in)) == 0);
	else
		CHECK(bind(s, (struct sockaddr *)&in6, sizeof(in6)) == 0);
	CHECK(listen(s, 128) == 0);
	return s;
}

static void ready(void)
{
	printf("ready\n");
	fflush(stdout);
}

/* A process for each connection, as many servers of old. */
static void fork_server(const char *port)
{
	int l = listen_on(port, AF_INET, 0);

	signal(SIGCHLD, SIG_IGN);
	ready();
	for (;;) {
		struct sockaddr_in from;
		socklen_t len = sizeof(from);
		int s = accept(l, (struct sockaddr *)&from, &len);

		CHECK(s >= 0);
		CHECK(len == sizeof(from) && from.sin_family == AF_INET && from.sin_port != 0);
		pid_t p = fork();
		CHECK(p >= 0);
		if (p == 0) {
			close(l);
			echo(s);
			_exit(0);
		}
		close(s);
	}
}

static void *echo_thread(void *s)
{
	echo((int)(intptr_t)s);
	return NULL;
}

/* One thread that waits, with epoll, and one for each connection. IPv6. */
static void epoll_server(const char *port)
{
	int l = listen_on(port, AF_INET6, 0), ep = epoll_create1(EPOLL_CLOEXEC);
	struct epoll_event ev = { .events = EPOLLIN, .data.fd = l };

	CHECK(fcntl(l, F_SETFL, O_NONBLOCK) == 0);
	CHECK(epoll_ctl(ep, EPOLL_CTL_ADD, l, &ev) == 0);
	ready();
	for (;;) {
		CHECK(epoll_wait(ep, &ev, 1, -1) == 1);
		for (;;) {
			struct sockaddr_in6 from;
			socklen_t len = sizeof(from);
			pthread_t t;
			int s = accept4(l, (struct sockaddr *)&from, &len, SOCK_CLOEXEC);

			if (s < 0) {
				CHECK(errno == EAGAIN);
				break;
			}
			CHECK(len == sizeof(from) && from.sin6_family == AF_INET6);
			CHECK(pthread_create(&t, NULL, echo_thread, (void *)(intptr_t)s) == 0);
			pthread_detach(t);
		}
	}
}

/* Several processes that share a port. Each says who it is. */
static void reuse_server(const char *port, int workers)
{
	for (int i = 0; i < workers; i++) {
		pid_t p = fork();
		CHECK(p >= 0);
		if (p)
			continue;
		CHECK(prctl(PR_SET_PDEATHSIG, SIGTERM) == 0);
		int l = listen_on(port, AF_INET, 1);
		ready();
		for (;;) {
			char b[32];
			int s = accept(l, NULL, NULL);
			CHECK(s >= 0);
			int n = snprintf(b, sizeof(b), "%d", getpid());
			put(s, b, (size_t)n);
			close(s);
		}
	}
	while (wait(NULL) > 0)
		;
}

/* Closes every connection with a byte unread: the client is to get a reset. */
static void rude_server(const char *port)
{
	int l = listen_on(port, AF_INET, 0);

	ready();
	for (;;) {
		int s = accept(l, NULL, NULL);
		struct pollfd p = { s, POLLIN, 0 };
		CHECK(s >= 0);
		CHECK(poll(&p, 1, 5000) == 1);
		CHECK(close(s) == 0);
	}
}

/* Sends a little, and stays. */
static void mute_server(const char *port)
{
	int l = listen_on(port, AF_INET, 0);

	ready();
	for (;;) {
		int s = accept(l, NULL, NULL);
		CHECK(s >= 0);
		put(s, "x", 1);
	}
}

/* Only reads, and says how it ends. */
static void sink_server(const char *port)
{
	int l = listen_on(port, AF_INET, 0);

	ready();
	for (;;) {
		char b[64];
		ssize_t n;
		int s = accept(l, NULL, NULL);
		CHECK(s >= 0);
		while ((n = read(s, b, sizeof(b))) > 0)
			;
		printf("%s\n", n == 0 ? "end" : errno == ECONNRESET ? "reset" : strerror(errno));
		fflush(stdout);
		close(s);
	}
}

static void addresses(const char *host, const char *port)
{
	struct addrinfo *a = lookup(host, port, AF_UNSPEC);
	struct sockaddr_in to, got;
	struct sockaddr cut;
	socklen_t len = sizeof(got);
	char name[256], service[32];
	int s = dial(host, port), v;

	CHECK(a && a->ai_family == AF_INET);
	memcpy(&to, a->ai_addr, sizeof(to));
	CHECK(getpeername(s, (struct sockaddr *)&got, &len) == 0);
	CHECK(len == sizeof(got) && got.sin_port == to.sin_port && got.sin_addr.s_addr == to.sin_addr.s_addr);
	len = 4;
	CHECK(getpeername(s, &cut, &len) == 0 && len == sizeof(got));
	len = sizeof(got);
	CHECK(getsockname(s, (struct sockaddr *)&got, &len) == 0);
	CHECK(got.sin_family == AF_INET && got.sin_port != 0 && got.sin_addr.s_addr != 0);
	CHECK(getnameinfo((struct sockaddr *)&to, sizeof(to), name, sizeof(name), service, sizeof(service), NI_NUMERICSERV) == 0);
	CHECK(!strcmp(name, host) && !strcmp(service, port));
	CHECK(getnameinfo((struct sockaddr *)&to, sizeof(to), name, sizeof(name), NULL, 0, NI_NUMERICHOST) == 0);
	CHECK(!strncmp(name, "198.19.", 7));
	CHECK(getnameinfo((struct sockaddr *)&to, sizeof(to), name, 2, NULL, 0, 0) == EAI_OVERFLOW);
	struct hostent *h = gethostbyname(host);
	CHECK(h && h->h_addrtype == AF_INET && !memcmp(h->h_addr_list[0], &to.sin_addr, 4));
	h = gethostbyname2(host, AF_INET6);
	CHECK(h && h->h_addrtype == AF_INET6);
	struct hostent hs, *hr = NULL;
	char buf[1024];
	CHECK(gethostbyname_r(host, &hs, buf, sizeof(buf), &hr, &v) == 0 && hr && !memcmp(hr->h_addr_list[0], &to.sin_addr, 4));
	close(s);
	freeaddrinfo(a);

	/* The same with IPv6. */
	a = lookup(host, port, AF_INET6);
	CHECK(a && a->ai_family == AF_INET6);
	s = open_socket(a, 0);
	CHECK(connect(s, a->ai_addr, a->ai_addrlen) == 0);
	struct sockaddr_in6 got6;
	len = sizeof(got6);
	CHECK(getpeername(s, (struct sockaddr *)&got6, &len) == 0 && len == sizeof(got6));
	CHECK(!memcmp(&got6.sin6_addr, &((struct sockaddr_in6 *)a->ai_addr)->sin6_addr, 16));
	len = sizeof(v);
	CHECK(getsockopt(s, SOL_SOCKET, SO_DOMAIN, &v, &len) == 0 && v == AF_INET6);
	put(s, "six", 3);
	CHECK(shutdown(s, SHUT_WR) == 0);
	get(s, buf, 3);
	close(s);
	/* And mapped: an IPv6 socket to an IPv4 address. */
	memset(&got6, 0, sizeof(got6));
	got6.sin6_family = AF_INET6;
	got6.sin6_port = to.sin_port;
	got6.sin6_addr.s6_addr[10] = got6.sin6_addr.s6_addr[11] = 0xff;
	memcpy(got6.sin6_addr.s6_addr + 12, &to.sin_addr, 4);
	s = open_socket(a, 0);
	CHECK(connect(s, (struct sockaddr *)&got6, sizeof(got6)) == 0);
	close(s);
	freeaddrinfo(a);
}

static void option(int s, int level, int opt)
{
	int one = 1, v = -1;
	socklen_t len = sizeof(v);

	CHECK(setsockopt(s, level, opt, &one, sizeof(one)) == 0);
	CHECK(getsockopt(s, level, opt, &v, &len) == 0 && len == sizeof(v) && v >= 0);
}

static void options(const char *host, const char *port)
{
	struct addrinfo *a = lookup(host, port, AF_INET);
	struct timeval tv = { 7, 0 };
	struct tcp_info info;
	char name[16] = { 0 };
	socklen_t len = sizeof(tv);
	int s, v;

	CHECK(a);
	s = open_socket(a, SOCK_CLOEXEC);
	CHECK(setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof(tv)) == 0);
	CHECK(connect(s, a->ai_addr, a->ai_addrlen) == 0);
	tv.tv_sec = 0;
	CHECK(getsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &tv, &len) == 0 && tv.tv_sec == 7);
	CHECK(fcntl(s, F_GETFD) == FD_CLOEXEC);
	CHECK(!(fcntl(s, F_GETFL) & O_NONBLOCK));
	option(s, IPPROTO_TCP, TCP_NODELAY);
	option(s, IPPROTO_TCP, TCP_CORK);
	option(s, IPPROTO_TCP, TCP_KEEPIDLE);
	option(s, IPPROTO_TCP, TCP_KEEPINTVL);
	option(s, IPPROTO_TCP, TCP_USER_TIMEOUT);
	option(s, IPPROTO_TCP, TCP_QUICKACK);
	option(s, IPPROTO_TCP, TCP_MAXSEG);
	option(s, IPPROTO_IP, IP_TOS);
	option(s, SOL_SOCKET, SO_KEEPALIVE);
	option(s, SOL_SOCKET, SO_REUSEADDR);
	option(s, SOL_SOCKET, SO_REUSEPORT);
	option(s, SOL_SOCKET, SO_SNDBUF);
	len = sizeof(info);
	memset(&info, 0xff, sizeof(info));
	CHECK(getsockopt(s, IPPROTO_TCP, TCP_INFO, &info, &len) == 0 && info.tcpi_state == TCP_ESTABLISHED && info.tcpi_snd_mss > 0);
	len = sizeof(name);
	CHECK(getsockopt(s, IPPROTO_TCP, TCP_CONGESTION, name, &len) == 0 && name[0]);
	len = sizeof(v);
	CHECK(getsockopt(s, SOL_SOCKET, SO_DOMAIN, &v, &len) == 0 && v == AF_INET);
	CHECK(getsockopt(s, SOL_SOCKET, SO_PROTOCOL, &v, &len) == 0 && v == IPPROTO_TCP);
	CHECK(getsockopt(s, SOL_SOCKET, SO_TYPE, &v, &len) == 0 && v == SOCK_STREAM);
	CHECK(getsockopt(s, SOL_SOCKET, SO_ERROR, &v, &len) == 0 && v == 0);
	CHECK(setsockopt(s, IPPROTO_TCP, 31 /* TCP_ULP */, "tls", 4) < 0);
	CHECK(connect(s, a->ai_addr, a->ai_addrlen) < 0 && errno == EISCONN);

	/* What a UNIX socket does differently with addresses. */
	struct sockaddr_storage from;
	char b[8];
	CHECK(sendto(s, "ping", 4, 0, a->ai_addr, a->ai_addrlen) == 4);
	len = sizeof(from);
	CHECK(recvfrom(s, b, sizeof(b), MSG_WAITALL * 0, (struct sockaddr *)&from, &len) == 4 && len == 0);
	put(s, "pong", 4);
	struct iovec iov = { b, sizeof(b) };
	struct msghdr m = { .msg_name = &from, .msg_namelen = sizeof(from), .msg_iov = &iov, .msg_iovlen = 1 };
	CHECK(recvmsg(s, &m, 0) == 4 && m.msg_namelen == 0);

	/* A UNIX socket of the program's own stays one. */
	int pair[2];
	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
	len = sizeof(v);
	CHECK(getsockopt(pair[0], SOL_SOCKET, SO_DOMAIN, &v, &len) == 0 && v == AF_UNIX);
	CHECK(setsockopt(pair[0], IPPROTO_TCP, TCP_NODELAY, &v, sizeof(v)) < 0);
	freeaddrinfo(a);
}

/* Adds the socket to epoll before it connects, as nginx does. */
static void epoll_client(const char *host, const char *port)
{
	struct addrinfo *a = lookup(host, port, AF_INET);
	int ep = epoll_create1(0), v = -1, r;
	socklen_t len = sizeof(v);
	char b[4];

	CHECK(a);
	for (int i = 0; i < 50; i++) {
		int s = open_socket(a, SOCK_NONBLOCK);
		struct epoll_event ev = { .events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.u64 = 0x1234567890 + (uint64_t)i };

		CHECK(epoll_ctl(ep, EPOLL_CTL_ADD, s, &ev) == 0);
		r = connect(s, a->ai_addr, a->ai_addrlen);
		CHECK(r == 0 || errno == EINPROGRESS);
		for (;;) {
			CHECK(epoll_wait(ep, &ev, 1, 5000) == 1);
			CHECK(ev.data.u64 == 0x1234567890 + (uint64_t)i);
			if (ev.events & EPOLLOUT && !(ev.events & EPOLLHUP))
				break;
		}
		CHECK(fcntl(s, F_GETFL) & O_NONBLOCK);
		CHECK(getsockopt(s, SOL_SOCKET, SO_ERROR, &v, &len) == 0 && v == 0);
		put(s, "abcd", 4);
		do
			CHECK(epoll_wait(ep, &ev, 1, 5000) == 1);
		while (!(ev.events & EPOLLIN));
		get(s, b, 4);
		CHECK(read(s, b, 1) < 0 && errno == EAGAIN);
		ev.events = EPOLLIN;
		CHECK(epoll_ctl(ep, EPOLL_CTL_MOD, s, &ev) == 0);
		CHECK(shutdown(s, SHUT_WR) == 0);
		CHECK(epoll_wait(ep, &ev, 1, 5000) == 1);
		CHECK(read(s, b, 1) == 0);
		CHECK(epoll_ctl(ep, EPOLL_CTL_DEL, s, &ev) == 0);
		close(s);
	}
	freeaddrinfo(a);
}

/* What connect, poll and SO_ERROR say of a flow that cannot be. */
static void refused(const char *host, const char *port, int want)
{
	struct addrinfo *a = lookup(host, port, AF_INET);
	int s, v = 0, r;
	socklen_t len = sizeof(v);
	char b;

	CHECK(a);
	s = open_socket(a, 0);
	CHECK(connect(s, a->ai_addr, a->ai_addrlen) < 0);
	CHECK(errno == want);
	close(s);
	s = open_socket(a, SOCK_NONBLOCK);
	CHECK(connect(s, a->ai_addr, a->ai_addrlen) < 0);
	CHECK(errno == EINPROGRESS);
	r = connect(s, a->ai_addr, a->ai_addrlen);
	CHECK(r < 0 && (errno == EALREADY || errno == want));
	struct pollfd p = { s, POLLOUT, 0 };
	CHECK(poll(&p, 1, 30000) == 1);
	struct sockaddr_in peer;
	socklen_t plen = sizeof(peer);
	CHECK(getpeername(s, (struct sockaddr *)&peer, &plen) < 0 && errno == ENOTCONN);
	CHECK(getsockopt(s, SOL_SOCKET, SO_ERROR, &v, &len) == 0);
	CHECK((errno = v) == want);
	CHECK(read(s, &b, 1) <= 0);
	close(s);
	freeaddrinfo(a);
}

static const char *thread_host, *thread_port;

static void *client_thread(void *arg)
{
	unsigned seed = (unsigned)(intptr_t)arg;
	static __thread char out[20000], in[20000];

	for (int i = 0; i < 20; i++) {
		int s = dial(thread_host, thread_port);
		size_t n = 1 + (size_t)rand_r(&seed) % sizeof(out);
		for (size_t k = 0; k < n; k++)
			out[k] = (char)rand_r(&seed);
		put(s, out, n);
		CHECK(shutdown(s, SHUT_WR) == 0);
		get(s, in, n);
		CHECK(!memcmp(in, out, n));
		CHECK(read(s, in, 1) == 0);
		close(s);
	}
	return NULL;
}

static void threads(const char *host, const char *port)
{
	pthread_t t[16];

	thread_host = host;
	thread_port = port;
	for (size_t i = 0; i < 16; i++)
		CHECK(pthread_create(&t[i], NULL, client_thread, (void *)(intptr_t)(i + 1)) == 0);
	for (size_t i = 0; i < 16; i++)
		CHECK(pthread_join(t[i], NULL) == 0);
}

/* A connection outlives fork, dup and exec, and is still what it was. */
static void inherit(const char *host, const char *port, char *self)
{
	int s = dial(host, port), d;
	pid_t p;
	int st;
	char b[8], num[16];

	CHECK(fcntl(s, F_SETFD, 0) == 0);
	p = fork();
	CHECK(p >= 0);
	if (p == 0) {
		put(s, "child", 5);
		_exit(0);
	}
	CHECK(waitpid(p, &st, 0) == p && st == 0);
	get(s, b, 5);
	d = dup(s);
	close(s);
	snprintf(num, sizeof(num), "%d", d);
	execl("/proc/self/exe", self, "inherited", num, port, (char *)NULL);
	CHECK(!"exec");
}

static void inherited(int s, const char *port)
{
	struct sockaddr_in peer;
	socklen_t len = sizeof(peer);
	char b[8];

	CHECK(getpeername(s, (struct sockaddr *)&peer, &len) == 0);
	CHECK(peer.sin_family == AF_INET && ntohs(peer.sin_port) == atoi(port));
	int one = 1;
	CHECK(setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)) == 0);
	put(s, "exec", 4);
	CHECK(shutdown(s, SHUT_WR) == 0);
	get(s, b, 4);
	CHECK(read(s, b, 1) == 0);
}

/* Binds to a port of its own first; then the real network is still there. */
static void bound_client(const char *host, const char *port)
{
	struct addrinfo *a = lookup(host, port, AF_INET);
	struct sockaddr_in in = { .sin_family = AF_INET };
	socklen_t len = sizeof(in);
	int s = open_socket(a, 0), l, c;
	char b[2];

	CHECK(bind(s, (struct sockaddr *)&in, sizeof(in)) == 0);
	CHECK(connect(s, a->ai_addr, a->ai_addrlen) == 0);
	put(s, "b", 1);
	get(s, b, 1);
	close(s);

	l = socket(AF_INET, SOCK_STREAM, 0);
	in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	CHECK(bind(l, (struct sockaddr *)&in, sizeof(in)) == 0 && listen(l, 1) == 0);
	CHECK(getsockname(l, (struct sockaddr *)&in, &len) == 0 && in.sin_port != 0);
	c = socket(AF_INET, SOCK_STREAM, 0);
	CHECK(connect(c, (struct sockaddr *)&in, sizeof(in)) == 0);
	s = accept(l, (struct sockaddr *)&in, &len);
	CHECK(s >= 0 && in.sin_addr.s_addr == htonl(INADDR_LOOPBACK));
	int v = 0;
	len = sizeof(v);
	CHECK(getsockopt(c, SOL_SOCKET, SO_DOMAIN, &v, &len) == 0 && v == AF_INET);
	freeaddrinfo(a);
}

/* Gets a reset, not an end, when the other end throws data away or dies. */
static void expect_reset(const char *host, const char *port, int wait_for_byte)
{
	int s = dial(host, port);
	char b;

	if (wait_for_byte) {
		get(s, &b, 1);
		ready();
	} else {
		put(s, "x", 1);
	}
	CHECK(read(s, &b, 1) < 0);
	CHECK(errno == ECONNRESET);
}

/* Two listeners without SO_REUSEPORT do not share a port. */
static void in_use(const char *port)
{
	struct sockaddr_in in = { .sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port)) };
	int l = listen_on(port, AF_INET, 0), s = socket(AF_INET, SOCK_STREAM, 0);

	CHECK(bind(s, (struct sockaddr *)&in, sizeof(in)) < 0 && errno == EADDRINUSE);
	CHECK(bind(l, (struct sockaddr *)&in, sizeof(in)) < 0 && errno == EINVAL);
	CHECK(listen(l, 7) == 0);
	int v = 0;
	socklen_t len = sizeof(v);
	CHECK(getsockopt(l, SOL_SOCKET, SO_ACCEPTCONN, &v, &len) == 0 && v == 1);
	len = sizeof(in);
	CHECK(getsockname(l, (struct sockaddr *)&in, &len) == 0 && ntohs(in.sin_port) == atoi(port) && in.sin_addr.s_addr == 0);
	CHECK(getpeername(l, (struct sockaddr *)&in, &len) < 0 && errno == ENOTCONN);
	close(l);
	CHECK(bind(s, (struct sockaddr *)&in, sizeof(in)) == 0 && listen(s, 1) == 0);
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "", *a = argc > 2 ? argv[2] : "", *b = argc > 3 ? argv[3] : "";

	signal(SIGPIPE, SIG_IGN);
	if (!strcmp(what, "fork-server"))
		fork_server(a);
	else if (!strcmp(what, "epoll-server"))
		epoll_server(a);
	else if (!strcmp(what, "reuse-server"))
		reuse_server(a, 2);
	else if (!strcmp(what, "rude-server"))
		rude_server(a);
	else if (!strcmp(what, "mute-server"))
		mute_server(a);
	else if (!strcmp(what, "sink-server"))
		sink_server(a);
	else if (!strcmp(what, "addresses"))
		addresses(a, b);
	else if (!strcmp(what, "options"))
		options(a, b);
	else if (!strcmp(what, "epoll"))
		epoll_client(a, b);
	else if (!strcmp(what, "refused"))
		refused(a, b, ECONNREFUSED);
	else if (!strcmp(what, "unreachable"))
		refused(a, b, EHOSTUNREACH);
	else if (!strcmp(what, "threads"))
		threads(a, b);
	else if (!strcmp(what, "inherit"))
		inherit(a, b, argv[0]);
	else if (!strcmp(what, "inherited"))
		inherited(atoi(a), b);
	else if (!strcmp(what, "bound-client"))
		bound_client(a, b);
	else if (!strcmp(what, "reset"))
		expect_reset(a, b, 0);
	else if (!strcmp(what, "peer-dies"))
		expect_reset(a, b, 1);
	else if (!strcmp(what, "in-use"))
		in_use(a);
	else if (!strcmp(what, "no-host"))
		CHECK(!lookup(a, b, AF_UNSPEC));
	else
		CHECK(!"known");
	printf("fine\n");
	return 0;
}
