// Package frcp is the end-to-end protocol of a flow (spec 30): sequence
// numbers, ordering, retransmission, acknowledgements and flow control between
// the two programs, which the layers below carry as opaque packets.
//
// A Conn is a state machine without goroutine, clock, socket or lock. Time is
// int64 nanoseconds of any monotonic clock that the caller passes to each call,
// and it is the caller who serialises the calls. Packets are pulled, so that
// nothing is built that the layer below has no room for, and a queue in front
// of a slow layer is never longer than the window.
//
// # How a shell uses it
//
// The library keeps one Conn per flow whose ModeOf(spec) is not Bare, under
// the flow's mutex:
//
//	packet from the layer  -> Input, then wake readers and writers, pump
//	program reads          -> Read; on ErrWouldBlock wait until Readable; pump
//	program writes         -> Write; on ErrWouldBlock wait until Writable; pump.
//	                          A writer that gives up calls CancelWrite.
//	timer at Deadline      -> pump
//	program closes         -> Close, pump until Done, then release the flow and
//	                          pass Quarantine on, so that the layer does not
//	                          reuse the endpoint before old packets have died
//	peer time-out, layer gone, deallocation by the peer -> Abort
//
// where pump is: while the layer takes a packet and Poll returns one, send it;
// then wake those for whom Readable or Writable has become true (failures
// show in both), and set the timer to Deadline. Empty packets are keep-alives: they bypass
// this package in both directions and belong to lib/keepalive (spec 30 §10).
// Encryption sits between FRCP and CRC (spec 30 §2): a Cipher in the Config.
//
// # Towards a reference peer
//
// Everything spec 30 calls an oddity is handled without configuration: control
// packets start our run at the peer (1) or are replaced by a repetition of the
// packet that does; a CRC on all we send, none demanded of its control packets
// (2); each transmission is encrypted afresh (3); window updates are
// volunteered and asked for (5); what is received in order is acknowledged
// before it is read (7); acknowledgements and edges are validated (8, 13); the
// shortest retransmission time is above its delay of acknowledgements (10);
// an unreliable window that has leaked away does not stop us (14).
//
// Our own ends recognise each other by the bit Ext (spec 50 §2). Only then are
// messages fragmented, ends of stream sent and lost packets repeated on
// duplicate acknowledgements.
package frcp
