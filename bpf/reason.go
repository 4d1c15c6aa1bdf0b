package bpf

// Reason is why a packet left the fast path: exactly one per packet. The
// values are enum reason of structs.h.
type Reason uint8

// Reasons, in the order of enum reason. Up to Forward's group the packet lives
// on; everything from DropMAC on is a drop.
const (
	Aborted Reason = iota

	PassOther
	PassNoSocket
	AppPunt

	UserMgmt
	UserFlow
	UserKeepalive
	UserLocal
	UserPunt

	Forward
	AppRx
	AppTx

	DropMAC
	DropTruncated
	DropLength
	DropEID
	DropDTTruncated
	DropCube
	DropTTL
	DropNoRoute
	DropNexthopDown
	DropMTU
	DropNoPort
	DropAppHandle
	DropAppTruncated

	NumReasons
)

var reasons = [NumReasons]struct{ name, help string }{
	Aborted:          {"aborted", "internal error: a table lookup failed that cannot fail"},
	PassOther:        {"pass_other", "EtherType of no layer on this port, left to the kernel"},
	PassNoSocket:     {"pass_no_socket", "for user space, but the queue has no AF_XDP socket; left to the kernel"},
	AppPunt:          {"app_punt", "sent by a program towards a next hop that user space serves"},
	UserMgmt:         {"user_mgmt", "management frame of an Ethernet layer, to user space"},
	UserFlow:         {"user_flow", "frame of a flow that user space terminates"},
	UserKeepalive:    {"user_keepalive", "keep-alive of a data-transfer flow, to user space"},
	UserLocal:        {"user_local", "data-transfer packet for this node, to user space"},
	UserPunt:         {"user_punt", "transit packet whose next hop user space serves"},
	Forward:          {"forward", "transit packet, forwarded in the kernel"},
	AppRx:            {"app_rx", "delivered to a program's port in the kernel"},
	AppTx:            {"app_tx", "sent by a program's port, forwarded in the kernel"},
	DropMAC:          {"drop_mac", "destination MAC is neither the port's nor broadcast"},
	DropTruncated:    {"drop_truncated", "shorter than the Ethernet layer's header"},
	DropLength:       {"drop_length", "length field exceeds the frame"},
	DropEID:          {"drop_eid", "no such endpoint on this port"},
	DropDTTruncated:  {"drop_dt_truncated", "shorter than the data-transfer header"},
	DropCube:         {"drop_cube", "QoS cube above 2"},
	DropTTL:          {"drop_ttl", "hop limit reached"},
	DropNoRoute:      {"drop_no_route", "destination address not in the forwarding table"},
	DropNexthopDown:  {"drop_nexthop_down", "every next hop of the destination is down"},
	DropMTU:          {"drop_mtu", "longer than the outgoing link carries"},
	DropNoPort:       {"drop_no_port", "outgoing port has no device"},
	DropAppHandle:    {"drop_app_handle", "a program sent with a handle that is not its own"},
	DropAppTruncated: {"drop_app_truncated", "a program sent less than the room for the headers"},
}

// String is the reason's name in tables, JSON and metric labels.
func (r Reason) String() string {
	if r < NumReasons {
		return reasons[r].name
	}
	return "unknown"
}

// Help is one line for people.
func (r Reason) Help() string {
	if r < NumReasons {
		return reasons[r].help
	}
	return ""
}

// Drop tells whether the packet was discarded.
func (r Reason) Drop() bool { return r == Aborted || r >= DropMAC && r < NumReasons }

// XDP actions, as in linux/bpf.h.
const (
	XDPAborted uint32 = iota
	XDPDrop
	XDPPass
	XDPTx
	XDPRedirect
)
