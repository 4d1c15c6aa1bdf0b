//go:build ignore

// SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only
/*
 * Programs of the benchmarks: packet generators for live-frame test runs, the
 * bare redirect that everything is compared with, and the sink.
 *
 * A generator touches no table that a forwarder reads: it computes addresses.
 * It writes the whole header every time, because the kernel recycles the pages
 * of live frames as the last program left them.
 */
#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "parse.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

enum {
	TEMPLATE = 64,  /* bytes of a frame that the generators write */
	O7S_DST = 18,   /* destination address in a DIX frame */
	IPV4_CSUM = 24, /* header checksum */
	IPV4_DST = 30,
};

const volatile __u64 gen_template[TEMPLATE / 8];
const volatile __u32 gen_first = 1; /* lowest destination address */
const volatile __u32 gen_count = 1; /* destinations first .. first+count-1 */
const volatile __u32 gen_random;    /* 0: one after the other, 1: pseudo-random */

/* One device: where this collection's generators and xdp_bare send. */
struct {
	__uint(type, BPF_MAP_TYPE_DEVMAP);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} gen_dev SEC(".maps");

/* Position in the sequence; per CPU, so that cores do not share a line. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} gen_state SEC(".maps");

struct sunk {
	__u64 packets;
	__u64 bytes;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct sunk);
} sink_count SEC(".maps");

static __always_inline __u32 next_destination(void)
{
	__u32 zero = 0, i;
	__u64 *state = bpf_map_lookup_elem(&gen_state, &zero);

	if (!state)
		return 0;
	if (gen_random) {
		/* Knuth's MMIX generator; the upper half is good enough. */
		*state = *state * 6364136223846793005ULL + 1442695040888963407ULL;
		i = ((*state >> 32) * gen_count) >> 32;
	} else {
		i = *state;
		*state = i + 1 < gen_count ? i + 1 : 0;
	}
	return gen_first + i;
}

static __always_inline __u8 *write_template(struct xdp_md *ctx)
{
	__u8 *frame = (void *)(long)ctx->data;

	if (frame + TEMPLATE > (__u8 *)(long)ctx->data_end)
		return NULL;
#pragma unroll
	for (int i = 0; i < TEMPLATE / 8; i++)
		put64(frame + 8 * i, gen_template[i]);
	return frame;
}

/* Data-transfer packets with 4-byte addresses in DIX frames. */
SEC("xdp")
int gen_o7s(struct xdp_md *ctx)
{
	__u8 *frame = write_template(ctx);

	if (!frame)
		return XDP_ABORTED;
	put32(frame + O7S_DST, next_destination());
	return bpf_redirect_map(&gen_dev, 0, XDP_DROP);
}

/* IPv4 packets; the template's checksum is that for destination 0.0.0.0. */
SEC("xdp")
int gen_ipv4(struct xdp_md *ctx)
{
	__u8 *frame = write_template(ctx);
	__u32 dst, sum;

	if (!frame)
		return XDP_ABORTED;
	dst = next_destination();
	sum = (__u16)~bpf_ntohs(get16(frame + IPV4_CSUM)) + (dst >> 16) + (dst & 0xffff);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	put16(frame + IPV4_CSUM, bpf_htons((__u16)~sum));
	put32(frame + IPV4_DST, bpf_htonl(dst));
	return bpf_redirect_map(&gen_dev, 0, XDP_DROP);
}

/* The least a forwarder can do. */
SEC("xdp")
int xdp_bare(struct xdp_md *ctx __attribute__((unused)))
{
	return bpf_redirect_map(&gen_dev, 0, XDP_DROP);
}

SEC("xdp")
int xdp_sink(struct xdp_md *ctx)
{
	__u32 zero = 0;
	struct sunk *s = bpf_map_lookup_elem(&sink_count, &zero);

	if (s) {
		s->packets++;
		s->bytes += ctx->data_end - ctx->data;
	}
	return XDP_DROP;
}
