//go:build ignore

// SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only
/*
 * The programs of a router. None is xdp.frags: device maps cannot be shared
 * between both kinds, and jumbo frames are not worth the slower access.
 */
#include "pipeline.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Port to the network: transit, local delivery. */
SEC("xdp")
int xdp_o7s(struct xdp_md *ctx)
{
	return leave(ctx, ingress(ctx, false));
}

/* Tap of an application: what the program sends. */
SEC("xdp")
int xdp_app(struct xdp_md *ctx)
{
	return leave(ctx, app_egress(ctx));
}

/* Far end of a veth of our own: gives it the receive queue without which
 * frames redirected to it are lost. */
SEC("xdp")
int xdp_pass(struct xdp_md *ctx)
{
	return XDP_PASS;
}

/* Benchmarks: xdp_o7s with a plain array in place of the bucket table. */
SEC("xdp")
int xdp_array(struct xdp_md *ctx)
{
	return leave(ctx, ingress(ctx, true));
}

/*
 * Program-run benchmarks: a test run repeats on the same bytes, which a
 * forwarder has changed, so every run writes the headers anew and takes the
 * next destination. The state of the sequence is in the payload.
 */
enum {
	RUN_HEADER = 40, /* bytes written: Ethernet, DIX and data-transfer header, and a bit */
	RUN_DST = 18,    /* destination address in the frame */
	RUN_STATE = 48,
};

enum { RUN_FORWARD, RUN_ARRAY, RUN_NOTHING };

const volatile __u64 run_header[RUN_HEADER / 8];
const volatile __u32 run_count = 1; /* destinations 1 .. count */
const volatile __u32 run_random;    /* 0: one after the other, 1: pseudo-random */
const volatile __u32 run_what;      /* RUN_*: the pipeline, with a plain array, the harness alone */

SEC("xdp")
int xdp_run(struct xdp_md *ctx)
{
	__u8 *frame = (void *)(long)ctx->data;
	__u64 state;

	if (frame + RUN_STATE + 8 > (__u8 *)(long)ctx->data_end)
		return XDP_ABORTED;
	state = get64(frame + RUN_STATE);
#pragma unroll
	for (int i = 0; i < RUN_HEADER / 8; i++)
		put64(frame + 8 * i, run_header[i]);
	if (run_random) {
		state = state * 6364136223846793005ULL + 1442695040888963407ULL;
		put32(frame + RUN_DST, 1 + scale(state >> 32, run_count));
	} else {
		state = state + 1 < run_count ? state + 1 : 0;
		put32(frame + RUN_DST, 1 + state);
	}
	put64(frame + RUN_STATE, state);
	if (run_what == RUN_NOTHING)
		return XDP_DROP;
	if (run_what == RUN_ARRAY)
		return leave(ctx, ingress(ctx, true));
	return leave(ctx, ingress(ctx, false));
}
