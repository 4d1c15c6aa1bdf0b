package oping

import (
	"io"
	"strconv"
	"sync"
	"time"
)

// printer prints lines without a system call, or an allocation, for each: the
// loop that answers packets does not wait for a terminal.
type printer struct {
	mu    sync.Mutex // guards what follows
	w     io.Writer
	buf   []byte
	timer *time.Timer
	armed bool
}

const (
	flushAfter = 5 * time.Millisecond
	flushSize  = 8 << 10
)

// begin starts a line, which str, num and fixed add to and end ends.
func (p *printer) begin() *printer {
	p.mu.Lock()
	return p
}

func (p *printer) str(s string) *printer {
	p.buf = append(p.buf, s...)
	return p
}

func (p *printer) num(n int) *printer {
	p.buf = strconv.AppendInt(p.buf, int64(n), 10)
	return p
}

// fixed adds a number with three decimals.
func (p *printer) fixed(v float64) *printer {
	p.buf = strconv.AppendFloat(p.buf, v, 'f', 3, 64)
	return p
}

func (p *printer) end() {
	p.buf = append(p.buf, '\n')
	switch {
	case len(p.buf) >= flushSize:
		p.write()
	case p.armed:
	case p.timer == nil:
		p.armed = true
		p.timer = time.AfterFunc(flushAfter, p.flush)
	default:
		p.armed = true
		p.timer.Reset(flushAfter)
	}
	p.mu.Unlock()
}

func (p *printer) line(s string) { p.begin().str(s).end() }

// write writes what there is. mu is held.
func (p *printer) write() {
	if len(p.buf) > 0 {
		_, _ = p.w.Write(p.buf)
		p.buf = p.buf[:0]
	}
}

func (p *printer) flush() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.armed = false
	p.write()
}
