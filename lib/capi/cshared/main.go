// Package main is the C library libouroboros-dev: the functions of spec 34 on
// top of package calls. It is built with -buildmode=c-shared (make capi).
//
// The C files have the functions themselves; what they call here has the
// prefix o7s_go_ and is not visible outside the library. Buffers are the
// program's memory, read and written in place. A call from C into Go costs
// about 0.1 µs; nothing on the way of a message allocates.
package main

// #cgo CFLAGS: -I${SRCDIR}/../include -std=gnu11 -Wall -Wextra
// #cgo LDFLAGS: -ldl -lpthread -Wl,--wrap=pthread_create
// #include <ouroboros/fccntl.h>
// #include <stdint.h>
// #include "shim.h"
import "C"

import (
	"context"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/capi/calls"
	"github.com/o7s/o7s-router/lib/qos"
)

func main() {} // not called in a library

// announceWait bounds how long a daemon that does not answer holds up the start
// of the program.
const announceWait = time.Second

var process *calls.Process

// o7s_go_start is called before the program's main. It announces the program;
// without a daemon the first call does.
//
//export o7s_go_start
func o7s_go_start() {
	os.Args = calls.CommandLine()
	process = calls.New(o7s.Options{}, (*atomic.Uint32)(unsafe.Pointer(&C.o7s_cancels)))
	if C.o7s_cancel_fd >= 0 {
		go interrupts(os.NewFile(uintptr(C.o7s_cancel_fd), "cancel"))
	}
	ctx, cancel := context.WithTimeout(context.Background(), announceWait)
	defer cancel()
	_ = process.Announce(ctx)
}

// o7s_go_enter does nothing. It is how a thread comes in for the first time.
//
//export o7s_go_enter
func o7s_go_enter() {}

// interrupts ends all waits whenever a thread was cancelled.
func interrupts(f *os.File) {
	var b [8]byte
	for {
		if _, err := f.Read(b[:]); err != nil {
			return
		}
		process.Interrupt()
	}
}

// timeout makes a time-out of ns; what is negative stays so.
func timeout(ns C.int64_t) time.Duration { return time.Duration(ns) }

//export o7s_go_alloc
func o7s_go_alloc(dst *C.char, q *C.qosspec_t, timeo C.int64_t) C.int {
	var spec *qos.Spec
	if q != nil {
		spec = &qos.Spec{
			Delay: uint32(q.delay), Bandwidth: uint64(q.bandwidth), Availability: uint8(q.availability),
			Loss: uint32(q.loss), BER: uint32(q.ber), InOrder: uint8(q.in_order),
			MaxGap: uint32(q.max_gap), Timeout: uint32(q.timeout),
		}
	}
	return C.int(process.Alloc(C.GoString(dst), spec, timeout(timeo)))
}

//export o7s_go_accept
func o7s_go_accept(timeo C.int64_t) C.int { return C.int(process.Accept(timeout(timeo))) }

//export o7s_go_join
func o7s_go_join(layer *C.char, timeo C.int64_t) C.int {
	return C.int(process.Join(C.GoString(layer), timeout(timeo)))
}

//export o7s_go_dealloc
func o7s_go_dealloc(fd C.int) C.int { return C.int(process.Dealloc(int(fd))) }

//export o7s_go_wait
func o7s_go_wait(op C.int, seen C.uint32_t) C.int { return C.int(process.Wait(int(op), uint32(seen))) }

//export o7s_go_abort
func o7s_go_abort(op C.int) { process.Abort(int(op)) }

//export o7s_go_write
func o7s_go_write(fd C.int, buf unsafe.Pointer, n C.size_t, seen C.uint32_t) C.ssize_t {
	return C.ssize_t(process.Write(int(fd), unsafe.Slice((*byte)(buf), int(n)), uint32(seen)))
}

//export o7s_go_read
func o7s_go_read(fd C.int, buf unsafe.Pointer, n C.size_t, seen C.uint32_t) C.ssize_t {
	return C.ssize_t(process.Read(int(fd), unsafe.Slice((*byte)(buf), int(n)), uint32(seen)))
}

//export o7s_go_check
func o7s_go_check(fd C.int) C.int { return C.int(process.Check(int(fd))) }

//export o7s_go_qos
func o7s_go_qos(fd C.int, q *C.qosspec_t) C.int {
	s, no := process.QoS(int(fd))
	if no != 0 {
		return C.int(no)
	}
	q.delay, q.bandwidth, q.availability = C.uint32_t(s.Delay), C.uint64_t(s.Bandwidth), C.uint8_t(s.Availability)
	q.loss, q.ber, q.in_order = C.uint32_t(s.Loss), C.uint32_t(s.BER), C.uint8_t(s.InOrder)
	q.max_gap, q.timeout = C.uint32_t(s.MaxGap), C.uint32_t(s.Timeout)
	return 0
}

// o7s_go_set is fccntl with the commands that set; the shim lets no others
// through.
//
//export o7s_go_set
func o7s_go_set(fd, cmd C.int, v C.int64_t) C.int {
	switch cmd {
	case C.FLOWSRCVTIMEO:
		return C.int(process.SetReadTimeout(int(fd), timeout(v)))
	case C.FLOWSSNDTIMEO:
		return C.int(process.SetWriteTimeout(int(fd), timeout(v)))
	case C.FLOWSFLAGS:
		return C.int(process.SetFlags(int(fd), uint32(v)))
	}
	return C.int(process.SetFRCTFlags(int(fd), int(v)))
}

// o7s_go_get is fccntl with the commands that get a number.
//
//export o7s_go_get
func o7s_go_get(fd, cmd C.int, out *C.int64_t) C.int {
	var v int64
	var no int
	switch cmd {
	case C.FLOWGRCVTIMEO:
		v, no = get(process.ReadTimeout(int(fd)))
	case C.FLOWGSNDTIMEO:
		v, no = get(process.WriteTimeout(int(fd)))
	case C.FLOWGFLAGS:
		v, no = get(process.Flags(int(fd)))
	case C.FLOWGRXQLEN:
		v, no = get(process.RxLen(int(fd)))
	case C.FLOWGTXQLEN:
		v, no = get(process.TxLen(int(fd)))
	default:
		v, no = get(process.FRCTFlags(int(fd)))
	}
	*out = C.int64_t(v)
	return C.int(no)
}

func get[T int | uint32 | time.Duration](v T, no int) (int64, int) { return int64(v), no }

//export o7s_go_set_create
func o7s_go_set_create() C.int { return C.int(process.NewSet()) }

//export o7s_go_set_destroy
func o7s_go_set_destroy(set C.int) { process.CloseSet(int(set)) }

//export o7s_go_set_zero
func o7s_go_set_zero(set C.int) { process.ZeroSet(int(set)) }

//export o7s_go_set_add
func o7s_go_set_add(set, fd C.int) C.int { return C.int(process.AddSet(int(set), int(fd))) }

//export o7s_go_set_has
func o7s_go_set_has(set, fd C.int) C.int {
	if process.HasSet(int(set), int(fd)) {
		return 1
	}
	return 0
}

//export o7s_go_set_del
func o7s_go_set_del(set, fd C.int) { process.DelSet(int(set), int(fd)) }

//export o7s_go_event
func o7s_go_event(set C.int, evs *C.struct_o7s_event, n C.int, timeo C.int64_t, seen C.uint32_t) C.int {
	out := unsafe.Slice(evs, int(n))
	return C.int(process.Events(int(set), timeout(timeo), uint32(seen), len(out), func(i int, e calls.Event) {
		out[i].fd, out[i]._type = C.int(e.FD), C.int(e.Type)
	}))
}
