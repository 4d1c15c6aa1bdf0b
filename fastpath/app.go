package fastpath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/bpf"
	"github.com/o7s/o7s-router/fastpath/port"
	"github.com/o7s/o7s-router/fastpath/tables"
	"github.com/o7s/o7s-router/lib/packet"
)

// App is an application port: a tap device through which one program sends and
// receives packets of its flows without the daemon, by reading and writing the
// device's file. XDP writes and checks all headers.
//
// To send, the program writes a frame: bytes 0-3 the flow's handle
// (little-endian), the rest of the flow's head room undefined, then the
// payload. A packet without payload is a keep-alive.
//
// What it reads is a frame whose first 8 bytes are the handle (uint32), the
// offset of the payload in the frame and its length (uint16 each, all
// little-endian); bytes behind the payload are padding. For a flow of a
// unicast layer the congestion mark is the byte at offset-9. Frames with other
// handles are to be ignored: the kernel may send some of its own.
type App struct {
	plane *Plane
	port  *Port
	file  *os.File
	punts *os.File // packet socket: frames that XDP leaves to user space

	done sync.WaitGroup
	punt atomic.Pointer[func(handle uint32, payload *packet.Buf)]

	handles map[uint32]*appFlow // guarded by plane.mu
	rooms   sync.Map            // head room (int) by handle, for who holds no lock
}

type appFlow struct {
	slot  uint32
	room  int
	clear func() // makes the local endpoint unknown
	layer *Layer // that routes it; nil: an Ethernet flow
}

// tapMTU lets every frame pass that native XDP takes: one page less the room
// XDP and the kernel keep for themselves.
const tapMTU = 3498

// MaxAppFrame is the longest frame, head room included, that passes an
// application port in either direction, bytes.
const MaxAppFrame = tapMTU + 14

// NewApp makes an application port. name labels it in Snapshot; the device has
// a name of its own. It fails when the kernel data path is not in use.
func (p *Plane) NewApp(name string) (*App, error) {
	if p.kernel == nil {
		return nil, fmt.Errorf("application port: kernel data path: %s", p.why)
	}
	slot, err := p.portSlot()
	if err != nil {
		return nil, err
	}
	// Not under the lock: the kernel takes tens of milliseconds for a device.
	a := &App{plane: p, handles: map[uint32]*appFlow{}}
	err = a.open(slot)
	if err == nil {
		a.port.name = "app:" + name + "/" + a.port.name
		p.mu.Lock()
		if p.closed {
			err = ErrClosed
		} else {
			p.ports[a.port.name] = a.port
		}
		p.mu.Unlock()
	}
	if err != nil {
		a.undo(slot)
		return nil, fmt.Errorf("application port: %w", err)
	}
	return a, nil
}

// portSlot takes the slot of a port that is about to be opened.
func (p *Plane) portSlot() (uint32, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return 0, ErrClosed
	}
	return p.alloc(p.portSlots, "ports")
}

// undo releases what open made of a port that nobody has seen.
func (a *App) undo(slot uint32) {
	p := a.plane
	if a.port != nil {
		atomic.StoreUint32(&p.t.Ports[slot].Flags, 0)
		_ = p.kernel.setDevice(slot, 0)
		_ = a.port.dev.Close()
	}
	a.discard() // the device goes with its last descriptor
	a.done.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.retire(func() { p.portSlots.Free(slot) })
}

// tap is the device of an application port.
type tap struct {
	device
	index int
	xdp   link.Link
}

func (t *tap) Index() int         { return t.index }
func (t *tap) Mode() port.Mode    { return port.ModeNative }
func (t *tap) Reasons() []string  { return nil }
func (t *tap) MAC() (mac [6]byte) { return mac }
func (t *tap) MTU() int           { return tapMTU }
func (t *tap) Close() error       { return t.xdp.Close() }
func (t *tap) Settle()            {} // the program receives

func (a *App) open(slot uint32) error {
	k := a.plane.kernel
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/net/tun: %w", err)
	}
	req, err := unix.NewIfreq("o7s%d")
	if err == nil {
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	// A file made of a blocking descriptor is none of the runtime's poller: it
	// would wake the daemon for each packet that the program gets.
	a.file = os.NewFile(uintptr(fd), "/dev/net/tun")
	if err == nil {
		err = unix.SetNonblock(fd, true) // for all who have it
	}
	if err != nil {
		return fmt.Errorf("create tap: %w", err)
	}
	name := req.Name()
	// No address, no neighbour discovery: the program reads what the kernel
	// would send.
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/disable_ipv6", []byte("1"), 0) // absent without IPv6
	nl, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := netlink.LinkSetARPOff(nl); err != nil {
		return fmt.Errorf("set %s: %w", name, err)
	}
	if err := netlink.LinkSetMTU(nl, tapMTU); err != nil {
		return fmt.Errorf("set MTU of %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(nl); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	if err := a.openPunts(nl.Attrs().Index); err != nil {
		return err
	}
	if err := zero[bpf.RouterVerdictCount](k.maps[bpf.RouterMapVerdicts], slot); err != nil {
		return err
	}
	prog, err := k.program(progApp, slot, nil)
	if err != nil {
		return err
	}
	defer prog.Close()
	xdp, err := link.AttachXDP(link.XDPOptions{Program: prog, Interface: nl.Attrs().Index, Flags: link.XDPDriverMode})
	if err != nil {
		return fmt.Errorf("attach XDP to %s: %w", name, err)
	}
	a.port = a.plane.newPort(name, slot)
	a.port.dev = &tap{index: nl.Attrs().Index, xdp: xdp}
	if err := k.setDevice(slot, nl.Attrs().Index); err != nil {
		return fmt.Errorf("device map: %w", err)
	}
	atomic.StoreUint32(&a.plane.t.Ports[slot].Flags, tables.PortTx)
	a.done.Go(a.receivePunts)
	return nil
}

// openPunts opens the packet socket on which frames arrive that XDP passed.
func (a *App) openPunts(ifindex int) error {
	const all = 0x0300 // ETH_P_ALL, network order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("packet socket: %w", err)
	}
	a.punts = os.NewFile(uintptr(fd), "packet socket")
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1); err != nil {
		return fmt.Errorf("packet socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: ifindex}); err != nil {
		return fmt.Errorf("bind packet socket: %w", err)
	}
	return nil
}

func (a *App) receivePunts() {
	frame := make([]byte, tapMTU+64)
	for {
		n, err := a.punts.Read(frame)
		if errors.Is(err, os.ErrClosed) {
			return
		}
		if err != nil { // the device went down
			continue
		}
		f := a.punt.Load()
		if f == nil || n < 4 {
			continue
		}
		handle := binary.LittleEndian.Uint32(frame)
		if room, ok := a.rooms.Load(handle); ok && n >= room.(int) {
			(*f)(handle, packet.From(frame[room.(int):n]))
		}
	}
}

// OnPunt says who gets the payload of packets that the program sent towards a
// next hop that only user space serves; without it they are lost. f must not
// block.
func (a *App) OnPunt(f func(handle uint32, payload *packet.Buf)) { a.punt.Store(&f) }

// File is the tap: pass a duplicate of its descriptor to the program. The
// device lives until the last descriptor is closed, or Close. It does not
// block, and has no deadlines: a read of an empty one is EAGAIN.
func (a *App) File() *os.File { return a.file }

// Slot is the application port's number in Snapshot.
func (a *App) Slot() uint32 { return a.port.slot }

// add enters a handle. plane.mu is held.
func (a *App) add(rec tables.App, flow *appFlow) (uint32, error) {
	p := a.plane
	if p.closed || a.handles == nil {
		return 0, ErrClosed
	}
	slot, err := p.alloc(p.appSlots, "flows of programs")
	if err != nil {
		return 0, err
	}
	if err := zero[bpf.RouterAppCount](p.kernel.maps[bpf.RouterMapAppCounters], slot); err != nil {
		p.appSlots.Free(slot)
		return 0, fmt.Errorf("clear counters of a flow: %w", err)
	}
	p.appGen++
	rec.Handle, rec.Port = 0, a.port.slot
	handle := slot | uint32(p.appGen)<<16
	p.t.Apps[slot] = rec
	atomic.StoreUint32(&p.t.Apps[slot].Handle, handle)
	flow.slot = slot
	a.handles[handle] = flow
	a.rooms.Store(handle, flow.room)
	return handle, nil
}

// AddEthFlow gives the program a flow of an Ethernet layer: frames for eid go
// to it, what it sends leaves on w. It returns the handle and the head room of
// frames the program writes, bytes.
//
// Frames that had arrived for eid were handed to user space when it returns, so
// the first of the program's come behind them.
func (a *App) AddEthFlow(b *EthBlock, eid uint16, w *Wire) (handle uint32, headroom int, err error) {
	defer b.port.dev.Settle() // after the lock
	p := a.plane
	p.mu.Lock()
	defer p.mu.Unlock()
	flow := &appFlow{room: headerRoom, clear: func() { b.Clear(eid) }}
	handle, err = a.add(tables.App{Kind: tables.AppEth, Wire: w.slot}, flow)
	if err != nil {
		return 0, 0, err
	}
	b.set(eid, tables.MakeEndpoint(tables.EndpointApp, 0, flow.slot))
	return handle, flow.room, nil
}

// AddDTFlow gives the program a flow of a unicast layer: packets for localEID
// at the layer's own address go to it; what it sends goes to remoteEID at
// remoteAddr with the given hop limit. What is said of AddEthFlow holds.
func (a *App) AddDTFlow(l *Layer, localEID, remoteAddr, remoteEID uint64, ttl uint8) (handle uint32, headroom int, err error) {
	p := a.plane
	defer p.settle() // after the lock
	p.mu.Lock()
	defer p.mu.Unlock()
	if l.closed {
		return 0, 0, ErrClosed
	}
	flow := &appFlow{
		room:  headerRoom + l.size + 11,
		clear: func() { p.t.RemoveFlow(l.slot, localEID) },
		layer: l,
	}
	handle, err = a.add(tables.App{
		Kind: tables.AppDT, Ttl: ttl, AddrSize: uint8(l.size),
		Layer: l.slot, Dst: remoteAddr, Eid: remoteEID, LocalEid: localEID,
	}, flow)
	if err != nil {
		return 0, 0, err
	}
	l.apps[handle] = a
	if !p.t.AddFlow(l.slot, localEID, flow.slot) {
		flow.clear = func() {}
		a.remove(handle)
		return 0, 0, fmt.Errorf("%w: no more flows of programs with this endpoint's hash", ErrTableFull)
	}
	return handle, flow.room, nil
}

// settle waits until all ports have handed on what has arrived. p.mu is not held.
func (p *Plane) settle() {
	p.mu.Lock()
	ports := slices.Collect(maps.Values(p.ports))
	p.mu.Unlock()
	for _, x := range ports {
		x.dev.Settle()
	}
}

// Remove takes a flow from the program: packets for it go to user space again
// (unicast) or are unknown (Ethernet), and the handle sends nothing any more.
func (a *App) Remove(handle uint32) {
	a.plane.mu.Lock()
	defer a.plane.mu.Unlock()
	a.remove(handle)
}

func (a *App) remove(handle uint32) {
	flow := a.handles[handle]
	if flow == nil {
		return
	}
	delete(a.handles, handle)
	a.rooms.Delete(handle)
	if flow.layer != nil {
		delete(flow.layer.apps, handle)
	}
	flow.clear()
	p := a.plane
	atomic.StoreUint32(&p.t.Apps[flow.slot].Handle, 0)
	p.retire(func() { p.appSlots.Free(flow.slot) })
}

// Counters returns the packets that XDP delivered to the program and took from
// it on a flow; bytes are payload.
func (a *App) Counters(handle uint32) (rx, tx Count) {
	a.plane.mu.Lock()
	flow := a.handles[handle]
	a.plane.mu.Unlock()
	if flow == nil {
		return rx, tx
	}
	return a.plane.kernel.appCounters(flow.slot)
}

// Close removes the port, its flows and the daemon's descriptor of the device.
func (a *App) Close() error {
	p := a.plane
	p.mu.Lock()
	if a.handles == nil {
		p.mu.Unlock()
		return nil
	}
	for h := range a.handles {
		a.remove(h)
	}
	a.handles = nil
	p.mu.Unlock()
	err := a.port.shut()
	err = errors.Join(err, deleteTap(a.port.dev.(*tap).index))
	a.discard()
	a.done.Wait()
	return err
}

// deleteTap removes the device even if the program still holds it open.
func deleteTap(index int) error {
	nl, err := netlink.LinkByIndex(index)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	if err != nil {
		return err
	}
	return netlink.LinkDel(nl)
}

// discard closes the files. Errors of closing have no consequence.
func (a *App) discard() {
	if a.file != nil {
		_ = a.file.Close()
	}
	if a.punts != nil {
		_ = a.punts.Close()
	}
}
