/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * What happens to a packet. fastpath/model is the same in Go, step by step; a
 * differential test holds both together, so a change here is a change there.
 *
 * Return codes of the helpers used:
 *   bpf_map_lookup_elem   NULL when the key is not there. For an array that
 *                         means an index beyond its size, which tables written
 *                         by our own user space never hold: R_ABORTED.
 *   bpf_redirect_map      XDP_REDIRECT when the slot is filled, else the action
 *                         given as flags. A device that is down, or a socket
 *                         whose ring is full, loses the frame after that; the
 *                         driver's and the socket's statistics count it.
 *
 * The congestion mark (ecn) passes unchanged: a redirect has no queue of ours
 * whose length could be marked (spec 22 §2).
 *
 * Counting: a packet that a program finishes itself is counted for the wire it
 * came from and the wire it leaves on; a packet that goes to user space is
 * counted there. Verdicts count every packet.
 */
#ifndef O7S_PIPELINE_H
#define O7S_PIPELINE_H

#include "maps.h"
#include "parse.h"

/* The port this program is loaded for; constants of one load. */
const volatile __u32 port_slot;
const volatile __u32 flow_buckets = 2048; /* entries of flows */

/* The two bucket choices are the halves of one product with 2^64 / phi, which
 * spreads consecutive addresses evenly. */
#define FIB_MULTIPLIER 0x9e3779b97f4a7c15ULL

/* Narrow tables: factors of the two bijections of addresses. */
#define FIB_NARROW_FIRST 0x9e3779b1U
#define FIB_NARROW_SECOND 0x85ebca6bU

static __always_inline __u32 scale(__u32 hash, __u32 n)
{
	return ((__u64)hash * n) >> 32;
}

static __always_inline __u32 mix(__u64 a, __u64 b)
{
	__u64 h = (a ^ b * FIB_MULTIPLIER) * 0xff51afd7ed558ccdULL;

	h ^= h >> 32;
	return (h * FIB_MULTIPLIER) >> 32;
}

static __always_inline struct wire *wire_at(__u32 i)
{
	return &wires[i & (MAX_WIRES - 1)];
}

static __always_inline struct nexthop *nexthop_at(__u32 i)
{
	return &nexthops[i & (MAX_NEXTHOPS - 1)];
}

static __always_inline struct layer *layer_at(__u32 i)
{
	return &layers[i & (MAX_LAYERS - 1)];
}

static __always_inline struct count *dt_counter(__u32 wire, __u32 cube)
{
	__u32 key = wire * CUBES + cube;
	struct dt_count *c = bpf_map_lookup_elem(&dt_counters, &key);

	return c ? c->c : NULL;
}

static __always_inline void add(struct count *c, __u32 bytes)
{
	c->packets++;
	c->bytes += bytes;
}

/* The entry of an address in a bucket, 0 when it is not there. Its hash also
 * names one of the eight places; most entries are there. Which of the others it
 * is would be a coin toss to the branch predictor, so there is no branch: the
 * difference of the low halves, less one, is negative for the match only. */
static __always_inline __u64 bucket_find(const struct bucket *b, __u32 place, __u32 addr)
{
	__u64 e = *(volatile __u64 *)&b->entry[place % FIB_SLOTS], found = 0;

	if ((__u32)e == addr)
		return e;
#pragma unroll
	for (int i = 0; i < FIB_SLOTS; i++) {
		e = *(volatile __u64 *)&b->entry[i];
		found |= e & ((__s64)((__u64)((__u32)e ^ addr) - 1) >> 63);
	}
	return found;
}

#define KEEP(x) asm volatile("" : "+r"(x))

/* The next hop of a key in half of a narrow bucket, 0 when it is not there. Both
 * halves of a word are compared at once: where the key bits differ in nothing,
 * taking 1 from that half fills its next-hop bits, and nowhere else does it
 * change them, for a difference of keys is even, so it bears 1 for itself and 1
 * that the lower half borrows. */
static __always_inline __u32 narrow_half_find(const __u64 *entry, __u32 key)
{
	__u64 one = FIB_NARROW_BOTH, mask = FIB_NARROW_KEY * FIB_NARROW_BOTH, want, found = 0;

	/* The compiler should neither make the constants anew for each word, nor
	 * read all words first and run out of registers. */
	KEEP(one);
	KEEP(mask);
	want = key * one;
#pragma unroll
	for (int i = 0; i < FIB_SLOTS / 2; i++) {
		__u64 d = *(volatile __u64 *)&entry[i] ^ want;

		found |= d & ((d & mask) - one);
		KEEP(found);
	}
	return (found | found >> 32) >> FIB_NARROW_HOP & (MAX_NEXTHOPS - 1);
}

/* The next hop of the address that is x in a bijection, see structs.h. Where x
 * is in its bucket's range names a half; most entries are there. */
static __always_inline __u32 narrow_bucket_find(__u64 ref, __u32 x, __u32 choice)
{
	__u32 n = ref >> 32 & ~FIB_NARROW, place = scale(x, 2 * n), key = ref + place / 2, nh;
	struct bucket *b = bpf_map_lookup_elem(&fib, &key);

	if (!b)
		return 0;
	key = (x << 1 & FIB_NARROW_TAG) | choice;
	nh = narrow_half_find(&b->entry[place % 2 * (FIB_SLOTS / 2)], key);
	if (nh)
		return nh;
	return narrow_half_find(&b->entry[(place + 1) % 2 * (FIB_SLOTS / 2)], key);
}

static __always_inline __u32 narrow_find(__u64 ref, __u32 addr)
{
	__u32 nh = narrow_bucket_find(ref, addr * FIB_NARROW_FIRST, 0);

	if (nh)
		return nh;
	return narrow_bucket_find(ref, (addr ^ addr >> 16) * FIB_NARROW_SECOND, FIB_NARROW_CHOICE);
}

/* Next hop of a 4-byte address: the second bucket is read only when the first
 * has no match. A writer moves an entry only from its first to its second
 * bucket and writes the new place before it clears the old one, so reading in
 * this order never misses an entry that is there. */
static __always_inline __u32 fib_find(__u64 ref, __u32 addr)
{
	__u64 h = addr * FIB_MULTIPLIER, e;
	__u32 base = ref, n = ref >> 32;
	struct bucket *b;
	__u32 place, key;

	if (n & FIB_NARROW)
		return narrow_find(ref, addr);
	place = scale(h >> 32, n * FIB_SLOTS);
	key = base + place / FIB_SLOTS;
	b = bpf_map_lookup_elem(&fib, &key);
	if (!b)
		return 0;
	e = bucket_find(b, place, addr);
	if (e)
		return e >> 32;
	place = scale(h, n * FIB_SLOTS);
	key = base + place / FIB_SLOTS;
	b = bpf_map_lookup_elem(&fib, &key);
	if (!b)
		return 0;
	return bucket_find(b, place, addr) >> 32;
}

/* The same from a table with one entry per address, indexed by it: what the
 * benchmark compares fib_find with. */
static __always_inline __u32 fib_index(__u64 ref, __u32 addr)
{
	__u32 key = (__u32)ref + addr / FIB_SLOTS;
	struct bucket *b = bpf_map_lookup_elem(&fib, &key);

	return b ? b->entry[addr % FIB_SLOTS] >> 32 : 0;
}

static __always_inline __u32 route(__u32 layer, const struct layer *l, __u64 dst, bool plain)
{
	if (l->addr_size != 4) {
		struct fib8_key key = { .addr = dst, .layer = layer };
		__u32 *nh = bpf_map_lookup_elem(&fib8, &key);

		return nh ? *nh : 0;
	}
	if (plain)
		return fib_index(*(volatile __u64 *)&l->fib, dst);
	return fib_find(*(volatile __u64 *)&l->fib, dst);
}

/* The wire a packet takes: with several equal-cost wires the one that its
 * destination address and EID choose (all packets of a flow take one path),
 * or the next usable one, then the alternate. NULL when all are down; *index
 * is then the first choice. */
static __always_inline struct wire *choose(const struct nexthop *nh, __u64 dst, __u64 eid, __u32 *index)
{
	__u32 n = nh->count, k = 0, first = nh->wire[0];
	struct wire *w;

	if (n > 1) {
		k = scale(mix(dst, eid), n);
		first = nh->wire[k & (ECMP_WAYS - 1)];
	}
	*index = first;
	w = wire_at(first);
	if (w->state != WIRE_DOWN)
		return w;
	for (__u32 i = 1; i < ECMP_WAYS && i < n; i++) {
		if (++k == n)
			k = 0;
		*index = nh->wire[k & (ECMP_WAYS - 1)];
		w = wire_at(*index);
		if (w->state != WIRE_DOWN)
			return w;
	}
	*index = nh->alternate;
	w = wire_at(*index);
	if (*index && w->state != WIRE_DOWN)
		return w;
	*index = first;
	return NULL;
}

/* Writes the 16 constant bytes of a wire over the start of a frame. */
static __always_inline void stamp(__u8 *frame, const struct wire *w)
{
	put64(frame, get64(w->hdr));
	put64(frame + 8, get64(w->hdr + 8));
}

/* A packet in transit: frame is the length of all, bytes that of the packet
 * with its data-transfer header. */
static __always_inline enum reason forward(__u8 *eth, __u64 frame, const struct dt *dt,
					   __u32 layer, const struct layer *l, __u32 in, __u32 bytes,
					   bool plain)
{
	struct count *rx, *tx;
	struct wire *w;
	__u32 key, out;

	rx = dt_counter(in, dt->cube);
	if (!rx)
		return R_ABORTED;
	if (dt->hops <= 1) {
		add(rx + DT_RCVD, bytes);
		add(rx + DT_TTL, bytes);
		return R_DROP_TTL;
	}
	key = route(layer, l, dt->dst, plain);
	if (!key) {
		add(rx + DT_RCVD, bytes);
		add(rx + DT_NHOP, bytes);
		return R_DROP_NO_ROUTE;
	}
	w = choose(nexthop_at(key), dt->dst, dt->eid, &out);
	if (w && w->state == WIRE_PUNT)
		return R_USER_PUNT;

	add(rx + DT_RCVD, bytes);
	tx = dt_counter(out, dt->cube);
	if (!tx)
		return R_ABORTED;
	if (!w) {
		add(tx + DT_FAILED, bytes);
		return R_DROP_NEXTHOP_DOWN;
	}
	if (frame > w->max_frame) {
		add(tx + DT_FAILED, bytes);
		return R_DROP_MTU;
	}
	if (bpf_redirect_map(&devs, w->port, XDP_DROP) != XDP_REDIRECT) {
		add(tx + DT_FAILED, bytes);
		return R_DROP_NO_PORT;
	}
	add(tx + DT_SENT, bytes);
	stamp(eth, w);
	dt->rest[DT_HOPS] = dt->hops - 1;
	return R_FORWARD;
}

/* The slot of the application handle behind a local endpoint, 0: none. */
static __always_inline __u32 flow_find(__u32 layer, __u64 eid)
{
	__u32 first = scale(mix(eid, layer), flow_buckets);

	for (int i = 0; i < 2; i++) {
		__u32 key = first ^ i;
		struct flow_bucket *b = bpf_map_lookup_elem(&flows, &key);

		if (!b)
			return 0;
		for (int j = 0; j < FLOW_SLOTS; j++) {
			__u64 who = *(volatile __u64 *)&b->flow[j].layer;

			if ((__u32)who == layer && who >> 32 && b->flow[j].eid == eid)
				return who >> 32;
		}
	}
	return 0;
}

/* Hands a frame to a program: payload starts at offset and is length long. */
static __always_inline bool deliver(__u8 *eth, const struct app *a, __u32 slot, __u32 offset, __u32 length)
{
	struct app_count *c = bpf_map_lookup_elem(&app_counters, &slot);

	if (!c || bpf_redirect_map(&devs, a->port, XDP_DROP) != XDP_REDIRECT)
		return false;
	add(&c->rx, length);
	put32(eth, a->handle);
	put16(eth + 4, offset);
	put16(eth + 6, length);
	return true;
}

/* A data-transfer packet on wire in of a layer. */
static __always_inline enum reason transfer(struct cursor *c, __u8 *eth,
					    __u32 layer, __u32 in, __u32 length, bool plain)
{
	struct layer *l = layer_at(layer);
	struct app *a;
	struct count *rx;
	struct dt dt;
	__u32 slot, header;

	header = l->addr_size + DT_FIXED;
	if (length < header || !parse_dt(c, l->addr_size, &dt))
		return R_DROP_DT_TRUNCATED;
	if (dt.cube >= CUBES)
		return R_DROP_CUBE;
	if (dt.dst != *(volatile __u64 *)&l->addr || !dt.dst)
		return forward(eth, c->end - eth, &dt, layer, l, in, length, plain);

	/* Own address: the hop limit does not matter (spec 20 §4). */
	if (dt.eid < 64)
		return R_USER_LOCAL;
	slot = flow_find(layer, dt.eid);
	if (!slot)
		return R_USER_LOCAL;
	a = bpf_map_lookup_elem(&apps, &slot);
	rx = dt_counter(in, dt.cube);
	if (!a || !rx)
		return R_ABORTED;
	if (!a->handle || a->local_eid != dt.eid)
		return R_USER_LOCAL;
	if (!deliver(eth, a, slot, ETH_SIZE + DIX_SIZE + header, length - header))
		return R_USER_LOCAL;
	add(rx + DT_RCVD, length);
	add(rx + DT_LOCAL_RCVD, length);
	return R_APP_RX;
}

/* A frame from the network. */
static __always_inline enum reason ingress(struct xdp_md *ctx, bool plain)
{
	struct cursor c = { (void *)(long)ctx->data, (void *)(long)ctx->data_end };
	struct port *port = &ports[port_slot & (MAX_PORTS - 1)];
	__u32 block, key, length;
	__u64 e, mac;
	struct app *a;
	__u8 *eth, *dix;
	__u16 eid, type;

	if (!parse_eth(&c, &eth))
		return R_PASS_OTHER;
	type = get16(eth + ETH_TYPE);
	/* A free place holds 0, and a frame of type 0 is length-framed, not ours. */
	for (int i = 0; i < PROTOS_PER_PORT; i++) {
		__u32 proto = *(volatile __u32 *)&port->proto[i];

		block = proto >> 16;
		if ((__u16)proto == type && proto)
			goto ours;
	}
	return R_PASS_OTHER;
ours:
	mac = get64(eth) & ETH_MAC_MASK;
	if (mac != port->mac && mac != ETH_MAC_MASK)
		return R_DROP_MAC;
	if (!parse_dix(&c, &dix))
		return R_DROP_TRUNCATED;
	eid = bpf_ntohs(get16(dix + DIX_EID));
	length = bpf_ntohs(get16(dix + DIX_LENGTH));
	if (length > c.end - c.pos)
		return R_DROP_LENGTH;
	if (!eid)
		return R_USER_MGMT;
	if (eid >= EIDS_PER_BLOCK)
		return R_DROP_EID;
	key = block * EIDS_PER_BLOCK + eid;
	e = *(volatile __u64 *)&endpoints[key & (MAX_BLOCKS * EIDS_PER_BLOCK - 1)];
	switch (e & 0xff) {
	case EP_DT:
		if (!length)
			return R_USER_KEEPALIVE;
		return transfer(&c, eth, (__u16)(e >> 16), e >> 32, length, plain);
	case EP_USER:
		return R_USER_FLOW;
	case EP_APP:
		key = e >> 32;
		a = bpf_map_lookup_elem(&apps, &key);
		if (!a)
			return R_ABORTED;
		if (!a->handle || !deliver(eth, a, key, ETH_SIZE + DIX_SIZE, length))
			return R_DROP_EID;
		return R_APP_RX;
	}
	return R_DROP_EID;
}

/*
 * A frame that a program wrote to its tap: {handle, reserved}, unused room for
 * the headers, payload. The program names a handle; addresses and headers are
 * written here, so it cannot send as somebody else.
 */
static __always_inline enum reason app_egress(struct xdp_md *ctx)
{
	struct cursor c = { (void *)(long)ctx->data, (void *)(long)ctx->data_end };
	__u32 length, handle, key, wire;
	__u64 frame;
	struct app_count *n;
	struct count *tx;
	struct wire *w;
	struct app *a;
	__u8 *eth, *dix;

	if (!parse_eth(&c, &eth) || !parse_dix(&c, &dix))
		return R_DROP_APP_TRUNCATED;
	frame = c.end - eth;
	length = c.end - c.pos;
	handle = get32(eth);
	key = handle & 0xffff;
	a = bpf_map_lookup_elem(&apps, &key);
	if (!a || !handle || a->handle != handle || a->port != port_slot)
		return R_DROP_APP_HANDLE;
	n = bpf_map_lookup_elem(&app_counters, &key);
	if (!n)
		return R_ABORTED;

	if (a->kind == APP_DT) {
		if (length < a->addr_size + DT_FIXED)
			return R_DROP_APP_TRUNCATED;
		key = route(a->layer, layer_at(a->layer), a->dst, false);
		if (!key)
			return R_DROP_NO_ROUTE;
		w = choose(nexthop_at(key), a->dst, a->eid, &wire);
	} else {
		wire = a->wire;
		w = wire_at(wire);
		if (w->state == WIRE_DOWN)
			w = NULL;
	}
	if (w && w->state == WIRE_PUNT)
		return R_APP_PUNT;
	tx = dt_counter(wire, a->cube);
	if (!tx)
		return R_ABORTED;
	if (!w) {
		add(tx + DT_FAILED, length);
		return R_DROP_NEXTHOP_DOWN;
	}
	if (frame > w->max_frame) {
		add(tx + DT_FAILED, length);
		return R_DROP_MTU;
	}
	/* Headers are written before the redirect is known to succeed: a frame
	 * that is dropped has no further reader. */
	if (a->kind == APP_DT) {
		__u8 *p = c.pos;

		if (a->addr_size == 4) {
			if (p + 4 + DT_FIXED > c.end)
				return R_DROP_APP_TRUNCATED;
			put32(p, a->dst);
			p += 4;
		} else {
			if (p + 8 + DT_FIXED > c.end)
				return R_DROP_APP_TRUNCATED;
			put64(p, a->dst);
			p += 8;
		}
		p[DT_QC] = a->cube;
		p[DT_HOPS] = a->ttl;
		p[DT_ECN] = 0;
		put64(p + DT_EID, a->eid);
	}
	stamp(eth, w);
	put16(dix + DIX_LENGTH, bpf_htons(length));
	if (bpf_redirect_map(&devs, w->port, XDP_DROP) != XDP_REDIRECT) {
		add(tx + DT_FAILED, length);
		return R_DROP_NO_PORT;
	}
	add(tx + DT_SENT, length);
	add(tx + DT_LOCAL_SENT, length);
	add(&n->tx, a->kind == APP_DT ? length - a->addr_size - DT_FIXED : length);
	return R_APP_TX;
}

/*
 * The one place where a packet leaves: turns the reason into an action and
 * counts it. Frames for user space go to the AF_XDP socket of the queue they
 * came in on; without one they go up the stack, where a packet socket (the
 * fallback of ports without AF_XDP) finds them and nothing else wants them.
 */
static __always_inline int leave(struct xdp_md *ctx, enum reason r)
{
	__u32 slot = port_slot, queue = ctx->rx_queue_index;
	struct verdict_count *v;
	int action;

	if (r >= R_DROP_MAC) {
		action = XDP_DROP;
	} else if (r >= R_FORWARD) {
		action = XDP_REDIRECT;
	} else if (r >= R_USER_MGMT) {
		action = XDP_PASS;
		if (queue < QUEUES_PER_PORT)
			action = bpf_redirect_map(&xsks, slot * QUEUES_PER_PORT + queue, XDP_PASS);
		if (action != XDP_REDIRECT)
			r = R_PASS_NO_SOCKET;
	} else {
		action = r == R_ABORTED ? XDP_ABORTED : XDP_PASS;
	}
	v = bpf_map_lookup_elem(&verdicts, &slot);
	if (v && r < REASONS)
		v->n[r]++;
	return action;
}

#endif
