package calls

import (
	"time"

	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

// Check tells whether fd is a flow.
func (p *Process) Check(fd int) int {
	_, no := p.get(fd)
	return no
}

// QoS is the quality of service of a flow.
func (p *Process) QoS(fd int) (qos.Spec, int) {
	d, no := p.get(fd)
	if d == nil {
		return qos.Spec{}, no
	}
	return d.flow.QoS(), 0
}

// SetReadTimeout bounds each read: 0 does not wait, < 0 waits for ever.
func (p *Process) SetReadTimeout(fd int, t time.Duration) int {
	d, no := p.get(fd)
	if d == nil {
		return no
	}
	return d.setTimeout(&d.rd, t, d.flow.SetReadTimeout)
}

// SetWriteTimeout does so for writes.
func (p *Process) SetWriteTimeout(fd int, t time.Duration) int {
	d, no := p.get(fd)
	if d == nil {
		return no
	}
	return d.setTimeout(&d.wr, t, d.flow.SetWriteTimeout)
}

func (d *desc) setTimeout(s *side, t time.Duration, set func(time.Duration)) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	set(max(t, 0))
	s.timeo.Store(int64(max(t, -1)))
	return d.apply()
}

// apply sets the flags of the flow: those of the program, and no blocking
// where a time-out of zero says so. mu is held.
func (d *desc) apply() int {
	fl := d.flags
	rd := d.rd.timeo.Load() == 0 && fl&o7s.RNOBLOCK == 0
	wr := d.wr.timeo.Load() == 0 && fl&o7s.WNOBLOCK == 0
	if rd {
		fl |= o7s.RNOBLOCK
	}
	if wr {
		fl |= o7s.WNOBLOCK
	}
	if err := d.flow.SetFlags(fl); err != nil {
		return code(err)
	}
	d.rd.poll.Store(rd)
	d.wr.poll.Store(wr)
	d.rd.quick.Store(fl&o7s.RNOBLOCK != 0)
	d.wr.quick.Store(fl&o7s.WNOBLOCK != 0)
	return 0
}

// ReadTimeout is what SetReadTimeout set; EPERM when there is none.
func (p *Process) ReadTimeout(fd int) (time.Duration, int) {
	d, no := p.get(fd)
	if d == nil {
		return 0, no
	}
	return d.rd.timeout()
}

// WriteTimeout is what SetWriteTimeout set.
func (p *Process) WriteTimeout(fd int) (time.Duration, int) {
	d, no := p.get(fd)
	if d == nil {
		return 0, no
	}
	return d.wr.timeout()
}

func (s *side) timeout() (time.Duration, int) {
	t := time.Duration(s.timeo.Load())
	if t < 0 {
		return 0, code(o7serr.EPERM)
	}
	return t, 0
}

// SetFlags sets the flags of a flow.
func (p *Process) SetFlags(fd int, fl uint32) int {
	d, no := p.get(fd)
	if d == nil {
		return no
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	old := d.flags
	d.flags = o7s.Flags(fl)
	if no = d.apply(); no != 0 {
		d.flags = old
	}
	return no
}

// Flags are the flags of a flow.
func (p *Process) Flags(fd int) (uint32, int) {
	d, no := p.get(fd)
	if d == nil {
		return 0, no
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return uint32(d.flags&^o7s.DOWN | d.flow.Flags()&o7s.DOWN), 0
}

// RxLen is the number of messages that wait to be read.
func (p *Process) RxLen(fd int) (int, int) {
	d, no := p.get(fd)
	if d == nil {
		return 0, no
	}
	return d.flow.RxLen(), 0
}

// TxLen is the number of messages on their way out of the process.
func (p *Process) TxLen(fd int) (int, int) {
	d, no := p.get(fd)
	if d == nil {
		return 0, no
	}
	return d.flow.TxLen(), 0
}

// FRCTFlags are the flags of the end-to-end protocol; EPERM without one.
func (p *Process) FRCTFlags(fd int) (int, int) {
	d, no := p.get(fd)
	if d == nil {
		return 0, no
	}
	fl, err := d.flow.FRCTFlags()
	return fl, code(err)
}

// SetFRCTFlags sets them, as far as they do not follow from the QoS.
func (p *Process) SetFRCTFlags(fd, fl int) int {
	d, no := p.get(fd)
	if d == nil {
		return no
	}
	return code(d.flow.SetFRCTFlags(fl))
}
