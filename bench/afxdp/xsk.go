package afxdp

import (
	"errors"

	"github.com/asavie/xdp"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/bench/live"
	"github.com/o7s/o7s-router/bench/router"
	"github.com/o7s/o7s-router/fastpath/xsk"
)

// sendBuffer is the limit of bytes that a copying socket has under way.
const sendBuffer = 4 << 20

// busy are what a kick answers when it has not sent everything: try again.
func busy(err error) bool {
	return errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENOBUFS)
}

// program is the receiving program of both rows: everything to the socket of
// the queue. It is asavie's.
type program struct {
	p *xdp.Program
	l link.Link
}

func attachTo(dev netlink.Link, fd int) (*program, error) {
	p, err := xdp.NewProgram(1)
	if err != nil {
		return nil, err
	}
	if err := p.Register(0, fd); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	l, err := live.Attach(p.Program, dev)
	if err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return &program{p, l}, nil
}

func (p *program) close() {
	if p != nil {
		_ = p.l.Close() // the namespace goes anyway
		_ = p.p.Close()
	}
}

// ours is a socket of fastpath/xsk.
type ours struct {
	umem  *xsk.Umem
	s     *xsk.Socket
	prog  *program
	descs [batch]xsk.Desc
	addrs [batch]uint64
	free  []uint64 // to send from
	tx    [batch]xsk.Desc
}

func openXSK(dev netlink.Link) (socket, error) {
	u, err := xsk.NewUmem(frames, frameSize)
	if err != nil {
		return nil, err
	}
	o := &ours{umem: u}
	o.s, err = xsk.Open(u, xsk.Config{
		Ifindex: dev.Attrs().Index, Rx: ringSize, Fill: fillSize, Tx: ringSize, Completion: ringSize,
		SendBuffer: sendBuffer, Batch: batch, // as the product has it
	})
	if err != nil {
		_ = u.Close()
		return nil, err
	}
	fill := make([]uint64, ringSize)
	o.s.Fill(fill[:u.Alloc(fill)])
	o.free = make([]uint64, frames)
	o.free = o.free[:u.Alloc(o.free)]
	f := router.Frame([6]byte{2, 0, 0, 0, 0, 2})
	for _, a := range o.free {
		copy(u.Frame(a), f[:])
	}
	return o, nil
}

func (o *ours) attach(dev netlink.Link) (err error) {
	o.prog, err = attachTo(dev, o.s.FD())
	return err
}

func (o *ours) receive(use func([]byte)) (int, error) {
	n := o.s.Receive(o.descs[:])
	for i, d := range o.descs[:n] {
		use(o.umem.Bytes(d))
		o.addrs[i] = o.umem.Base(d.Addr)
	}
	if n > 0 && o.s.Fill(o.addrs[:n]) != n {
		return 0, errors.New("fill ring has no room")
	}
	return n, nil
}

func (o *ours) send() (int, error) {
	done := o.s.Complete(o.addrs[:])
	o.free = append(o.free, o.addrs[:done]...)
	n := min(batch, len(o.free))
	for i := range n {
		o.tx[i] = xsk.Desc{Addr: o.free[len(o.free)-1-i], Len: live.FrameLen}
	}
	n = o.s.Transmit(o.tx[:n])
	o.free = o.free[:len(o.free)-n]
	if err := o.s.Kick(); err != nil && !busy(err) {
		return 0, err
	}
	return n, nil
}

func (o *ours) close() {
	o.prog.close()
	_ = o.s.Close() // the process ends soon
	_ = o.umem.Close()
}

// copyBatch is how many frames the kernel sends per call when it copies and has
// not been asked for more, which this library cannot.
const copyBatch = 32

// asavie is a socket of github.com/asavie/xdp.
type asavie struct {
	s    *xdp.Socket
	prog *program
	tx   []xdp.Desc
}

func openAsavie(dev netlink.Link) (socket, error) {
	s, err := xdp.NewSocket(dev.Attrs().Index, 0, &xdp.SocketOptions{
		NumFrames: frames, FrameSize: frameSize,
		FillRingNumDescs: fillSize, CompletionRingNumDescs: ringSize, RxRingNumDescs: ringSize, TxRingNumDescs: ringSize,
	})
	if err != nil {
		return nil, err
	}
	f := router.Frame([6]byte{2, 0, 0, 0, 0, 2})
	for _, d := range s.GetDescs(frames) {
		copy(s.GetFrame(d), f[:])
	}
	return &asavie{s: s}, nil
}

func (a *asavie) attach(dev netlink.Link) (err error) {
	a.prog, err = attachTo(dev, a.s.FD())
	a.s.Fill(a.s.GetDescs(ringSize))
	return err
}

// receive gives the frames it has just read back, which spares the library's
// linear search for free ones.
func (a *asavie) receive(use func([]byte)) (int, error) {
	descs := a.s.Receive(batch)
	for _, d := range descs {
		use(a.s.GetFrame(d))
	}
	if n := len(descs); n > 0 && a.s.Fill(descs) != n {
		return 0, errors.New("fill ring has no room")
	}
	return len(descs), nil
}

func (a *asavie) send() (int, error) {
	a.s.Complete(a.s.NumCompleted())
	a.tx = append(a.tx[:0], a.s.GetDescs(copyBatch)...)
	for i := range a.tx {
		a.tx[i].Len = live.FrameLen
	}
	return a.s.Transmit(a.tx), nil
}

func (a *asavie) close() {
	a.prog.close()
	_ = a.s.Close() // leaks its queue, which goes with the device
}
