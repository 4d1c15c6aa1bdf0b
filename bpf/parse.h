/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * One parser per header. Each checks that the header lies inside the frame,
 * yields a pointer to it, and moves the cursor behind it; false means that the
 * frame is too short.
 *
 * Headers are read with loads of their natural width at any alignment: XDP
 * frames are in the linear buffer, and every architecture we build for reads
 * unaligned words (a packed struct would make the compiler load single bytes).
 */
#ifndef O7S_PARSE_H
#define O7S_PARSE_H

#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include <stdbool.h>

struct cursor {
	__u8 *pos;
	__u8 *end;
};

static __always_inline __u16 get16(const __u8 *p) { return *(const __u16 *)p; }
static __always_inline __u32 get32(const __u8 *p) { return *(const __u32 *)p; }
static __always_inline __u64 get64(const __u8 *p) { return *(const __u64 *)p; }
static __always_inline void put16(__u8 *p, __u16 v) { *(__u16 *)p = v; }
static __always_inline void put32(__u8 *p, __u32 v) { *(__u32 *)p = v; }
static __always_inline void put64(__u8 *p, __u64 v) { *(__u64 *)p = v; }

/* Ethernet (14 bytes): destination at 0, source at 6, EtherType at 12. */
enum { ETH_SIZE = 14, ETH_TYPE = 12 };

#define ETH_MAC_MASK 0xffffffffffffULL /* the 6 bytes of a MAC in a 64-bit load */

static __always_inline bool parse_eth(struct cursor *c, __u8 **hdr)
{
	if (c->pos + ETH_SIZE > c->end)
		return false;
	*hdr = c->pos;
	c->pos += ETH_SIZE;
	return true;
}

/* DIX (4 bytes, spec 10 §2.1): EID at 0, payload length at 2, big-endian. */
enum { DIX_SIZE = 4, DIX_EID = 0, DIX_LENGTH = 2 };

static __always_inline bool parse_dix(struct cursor *c, __u8 **hdr)
{
	if (c->pos + DIX_SIZE > c->end)
		return false;
	*hdr = c->pos;
	c->pos += DIX_SIZE;
	return true;
}

/*
 * Data transfer (spec 20 §2), everything little-endian. After the address of 4
 * or 8 bytes: qc at 0, ttl at 1, ecn at 2, EID at 3.
 */
enum { DT_QC = 0, DT_HOPS = 1, DT_ECN = 2, DT_EID = 3, DT_FIXED = 11 };

struct dt {
	__u64 dst;
	__u64 eid;
	__u32 cube;
	__u32 hops; /* ttl as received */
	__u8 *rest; /* qc and what follows it */
};

static __always_inline bool parse_dt(struct cursor *c, __u32 addr_size, struct dt *dt)
{
	__u8 *p = c->pos;

	if (addr_size == 4) {
		if (p + 4 + DT_FIXED > c->end)
			return false;
		dt->dst = get32(p);
		p += 4;
	} else {
		if (p + 8 + DT_FIXED > c->end)
			return false;
		dt->dst = get64(p);
		p += 8;
	}
	dt->cube = p[DT_QC];
	dt->hops = p[DT_HOPS];
	dt->eid = get64(p + DT_EID);
	dt->rest = p;
	c->pos = p + DT_FIXED;
	return true;
}

#endif
