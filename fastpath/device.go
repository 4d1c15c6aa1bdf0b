package fastpath

import (
	"github.com/o7s/o7s-router/fastpath/port"
	"github.com/o7s/o7s-router/lib/packet"
)

// device is an open network device: program attached, sockets bound. Package
// fastpath/port is the real one; tests have one in memory.
type device interface {
	Index() int
	MAC() [6]byte
	MTU() int
	Mode() port.Mode
	Reasons() []string
	Redirectable() (ok bool, why string)
	Up() bool
	SetEtherTypes([]uint16) error
	Send(*packet.Buf) error
	SendBatch([]*packet.Buf) error
	Settle()
	Close() error
}

type opener func(port.Config) (device, error)

func openDevice(c port.Config) (device, error) {
	d, err := port.Open(c)
	if err != nil {
		return nil, err // not a device with nothing in it
	}
	return d, nil
}
