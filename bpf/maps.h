/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * Every table and map. Map sizes are defaults: user space sets them before
 * loading. All programs of an instance share one set (map replacement at load).
 *
 * What every packet reads are arrays in one memory section: the program computes
 * an address instead of storing a key and calling a lookup, which is what a
 * chain of dependent reads spends its time on. The compiler makes the section
 * a map of one value. The index is masked, which satisfies the verifier and
 * costs nothing: the tables never hold an index out of range.
 *
 * Tables and the mapped maps below are memory that user space maps: it writes
 * them without system calls and the Go model reads them. Counters are per CPU,
 * so they need no atomic operations: XDP runs under softirq and is not
 * preempted by itself on a CPU.
 */
#ifndef O7S_MAPS_H
#define O7S_MAPS_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "structs.h"

struct port ports[MAX_PORTS] __attribute__((aligned(64)));
__u64 endpoints[MAX_BLOCKS * EIDS_PER_BLOCK] __attribute__((aligned(64))); /* words, see structs.h */
struct layer layers[MAX_LAYERS] __attribute__((aligned(64)));
struct nexthop nexthops[MAX_NEXTHOPS] __attribute__((aligned(64)));
struct wire wires[MAX_WIRES] __attribute__((aligned(64)));

/* The arena in which the layers' tables are regions of consecutive buckets. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, struct bucket);
} fib SEC(".maps");

/* Destinations of layers with 8-byte addresses: next hop by {address, layer}. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 20);
	__type(key, struct fib8_key);
	__type(value, __u32);
} fib8 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct app);
} apps SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 2048);
	__type(key, __u32);
	__type(value, struct flow_bucket);
} flows SEC(".maps");

/* Key: port slot. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MAX_PORTS);
	__type(key, __u32);
	__type(value, struct verdict_count);
} verdicts SEC(".maps");

/* Key: wire * CUBES + cube. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MAX_WIRES * CUBES);
	__type(key, __u32);
	__type(value, struct dt_count);
} dt_counters SEC(".maps");

/* Key: slot in apps. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct app_count);
} app_counters SEC(".maps");

/* Where to send: device by port slot. The kernel empties a slot whose device goes. */
struct {
	__uint(type, BPF_MAP_TYPE_DEVMAP);
	__uint(max_entries, MAX_PORTS);
	__type(key, __u32);
	__type(value, __u32);
} devs SEC(".maps");

/* AF_XDP sockets. Key: port slot * QUEUES_PER_PORT + receive queue. */
struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, MAX_PORTS * QUEUES_PER_PORT);
	__type(key, __u32);
	__type(value, __u32);
} xsks SEC(".maps");

#endif
