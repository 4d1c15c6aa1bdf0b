/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * Layouts shared by the XDP programs and user space (package fastpath/tables
 * has the same in Go; a test compares sizes and offsets).
 *
 * User space writes these records through a memory mapping while programs read
 * them, so everything that decides what a packet is (an endpoint, a table
 * reference, a wire's state) is one naturally aligned word of at most 8 bytes:
 * a reader sees it before or after a change, never between. Numbers are in
 * host order unless a comment says otherwise.
 */
#ifndef O7S_STRUCTS_H
#define O7S_STRUCTS_H

#include <linux/types.h>

enum {
	EIDS_PER_BLOCK = 4096, /* DIX EIDs of one EtherType on one port, spec 10 §2.4 */
	PROTOS_PER_PORT = 4,   /* EtherTypes (layers) that share a port */
	QUEUES_PER_PORT = 16,  /* AF_XDP sockets of one port */
	FIB_SLOTS = 8,         /* entries of a table bucket: 8 x 8 bytes = one cache line */
	FLOW_SLOTS = 4,        /* entries of a flow bucket: 4 x 16 bytes = one cache line */
	ECMP_WAYS = 8,         /* equal-cost next hops of one destination */
	CUBES = 3,             /* QoS cubes of a unicast layer, spec 20 §5 */

	/* Records of the fixed tables: powers of two. Slot 0 means "none". */
	MAX_PORTS = 64,
	MAX_BLOCKS = 64,     /* Ethernet layers: one EtherType on one port */
	MAX_LAYERS = 64,     /* unicast layers */
	MAX_NEXTHOPS = 4096, /* distinct sets of wires */
	MAX_WIRES = 2048,    /* neighbours of all layers */
};

/* A port: a network device, or the tap of an application. Key: port slot. */
struct port {
	__u64 mac;                    /* own MAC, first byte in the lowest 8 bits */
	__u32 flags;                  /* PORT_* */
	__u32 pad;
	__u32 proto[PROTOS_PER_PORT]; /* low half: EtherType, network order; high half: endpoint block; 0: unused */
};

enum {
	PORT_TX = 1, /* the device map has a device for this slot; read by the Go model only */
};

/*
 * An endpoint: what a DIX EID of an EtherType on a port leads to.
 * Key: block * EIDS_PER_BLOCK + EID. Read and written as one 64-bit word:
 * bits 0-7 kind, bits 16-31 layer (EP_DT), bits 32-63 index: the wire (EP_DT)
 * or the application handle's slot (EP_APP).
 */
enum {
	EP_NONE = 0,
	EP_USER = 1, /* AF_XDP */
	EP_DT = 2,   /* an N-1 flow of a unicast layer */
	EP_APP = 3,  /* a program's own flow, behind an application port */
};

/* A unicast layer (one member of it). */
struct layer {
	__u64 fib;       /* low half: first bucket, high half: number of buckets | FIB_NARROW */
	__u64 addr;      /* own address, 0: none yet */
	__u32 addr_size; /* 4 or 8 bytes on the wire */
	__u32 pad[3];
};

/*
 * One bucket of the forwarding table. An entry is {address, next hop} in the
 * low and high half of a word; 0 is an empty entry (address 0 is invalid and
 * next hop 0 is never used).
 *
 * In a narrow table, which large ones are, each half of a word is an entry: bit
 * 0 says that it is in use, then come a tag, a bit that says which of the two
 * choices of the address the bucket is, and the next hop. Bucket and tag
 * together are a bijection of the address (package fastpath/fib has the proof),
 * so the tag is all there is to compare.
 */
struct bucket {
	__u64 entry[FIB_SLOTS];
};

#define FIB_NARROW 0x80000000U         /* in the number of buckets of layer.fib */
#define FIB_NARROW_TAG 0x7fffeU        /* bits 1-18 */
#define FIB_NARROW_CHOICE 0x80000U     /* bit 19: the second */
#define FIB_NARROW_KEY 0xffffeULL      /* tag and choice */
#define FIB_NARROW_HOP 20              /* bits 20-31 */
#define FIB_NARROW_BOTH 0x100000001ULL /* a factor: the same in both halves of a word */

/* Key of the table for 8-byte addresses. */
struct fib8_key {
	__u64 addr;
	__u32 layer;
	__u32 pad; /* 0 */
};

/*
 * A next hop never changes once a table entry names it; a change of the wire
 * set is a fresh next hop and one store into the entry.
 */
struct nexthop {
	__u32 count;           /* 1..ECMP_WAYS */
	__u32 alternate;       /* wire to use when every other is down; 0: none */
	__u32 wire[ECMP_WAYS];
	__u32 pad[6];          /* one cache line */
};

/* A wire: the way to one neighbour over one N-1 flow. Slot 0 is never used. */
struct wire {
	__u32 state;     /* WIRE_*; one store takes a neighbour down for every route */
	__u32 port;      /* port slot to send from */
	__u32 max_frame; /* longest frame the way carries, bytes from MAC to end */
	__u32 pad0;
	__u8 hdr[16];    /* first bytes of a frame: dst MAC, src MAC, EtherType, remote EID */
	__u32 pad[8];    /* one cache line */
};

enum {
	WIRE_DOWN = 0,
	WIRE_UP = 1,
	WIRE_PUNT = 2, /* XDP must not send on it: user space forwards */
};

/*
 * What a handle of an application port stands for. Key: the handle's low 16
 * bits; the rest of the handle tells a reused slot from its predecessor.
 * User space writes handle last and clears it first.
 */
struct app {
	__u32 handle;    /* 0: free */
	__u32 port;      /* port slot of the tap that owns it */
	__u8 kind;       /* APP_* */
	__u8 ttl;        /* of packets sent (APP_DT) */
	__u8 cube;       /* qc of packets sent (APP_DT) */
	__u8 addr_size;  /* 4 or 8 (APP_DT) */
	__u32 wire;      /* APP_ETH */
	__u32 layer;     /* APP_DT */
	__u32 pad0;
	__u64 dst;       /* remote address (APP_DT) */
	__u64 eid;       /* remote endpoint (APP_DT) */
	__u64 local_eid; /* own endpoint (APP_DT) */
	__u64 pad[2];    /* one cache line */
};

enum {
	APP_ETH = 1, /* a flow of an Ethernet layer */
	APP_DT = 2,  /* a flow of a unicast layer */
};

/* Local flows behind application ports, found by (layer, EID). */
struct flow {
	__u64 eid;
	__u32 layer; /* layer and app are one word: written together, after eid */
	__u32 app;   /* slot in apps; 0: empty */
};

struct flow_bucket {
	struct flow flow[FLOW_SLOTS];
};

/*
 * What a program finds in front of a packet it reads from its tap: XDP writes
 * it over the first bytes of the frame, whose length stays. For a flow of a
 * unicast layer the congestion mark (ecn) is the byte at offset - 9.
 */
struct app_rx {
	__u32 handle;
	__u16 offset; /* of the payload in the frame */
	__u16 length; /* of the payload; 0 is a keep-alive */
};

/* Counted for a wire and QoS cube, spec 20 §9; index into struct dt_count. */
enum {
	DT_RCVD,
	DT_SENT,
	DT_LOCAL_RCVD,
	DT_LOCAL_SENT,
	DT_TTL,    /* dropped: TTL, on the incoming wire */
	DT_NHOP,   /* dropped: no next hop, on the incoming wire */
	DT_FAILED, /* not sent, on the outgoing wire */
	DT_COUNTERS,
};

struct count {
	__u64 packets;
	__u64 bytes; /* data-transfer header included, Ethernet and padding not */
};

/* Two cache lines; the first holds everything that a forwarded packet counts. */
struct dt_count {
	struct count c[DT_COUNTERS + 1];
};

/* Payloads that passed an application handle. */
struct app_count {
	struct count rx; /* to the program */
	struct count tx; /* from the program */
};

/*
 * Why a packet left a program: one reason per packet, counted per port.
 * package bpf (reason.go) has the names and explanations.
 */
enum reason {
	R_ABORTED, /* a lookup failed that cannot */

	R_PASS_OTHER,     /* EtherType of nobody here */
	R_PASS_NO_SOCKET, /* for user space, but no AF_XDP socket */
	R_APP_PUNT,       /* sent by a program, next hop is user space's */

	R_USER_MGMT,      /* EID 0 */
	R_USER_FLOW,      /* endpoint of user space */
	R_USER_KEEPALIVE, /* empty packet on a data-transfer flow */
	R_USER_LOCAL,     /* own address */
	R_USER_PUNT,      /* transit, next hop is user space's */

	R_FORWARD, /* transit, redirected */
	R_APP_RX,  /* to an application port */
	R_APP_TX,  /* from an application port, redirected */

	R_DROP_MAC,           /* neither own address nor broadcast */
	R_DROP_TRUNCATED,     /* shorter than the DIX header */
	R_DROP_LENGTH,        /* DIX length beyond the frame */
	R_DROP_EID,           /* no such endpoint */
	R_DROP_DT_TRUNCATED,  /* shorter than the data-transfer header */
	R_DROP_CUBE,          /* qc above 2 */
	R_DROP_TTL,           /* hop limit reached */
	R_DROP_NO_ROUTE,      /* destination not in the table */
	R_DROP_NEXTHOP_DOWN,  /* no usable wire */
	R_DROP_MTU,           /* frame longer than the wire takes */
	R_DROP_NO_PORT,       /* wire's port has no device */
	R_DROP_APP_HANDLE,    /* program sent with a handle that is not its own */
	R_DROP_APP_TRUNCATED, /* program sent less than the headers' room */

	REASONS,
};

/* Per-CPU, one record per port. */
struct verdict_count {
	__u64 n[32]; /* by enum reason */
};

#endif
