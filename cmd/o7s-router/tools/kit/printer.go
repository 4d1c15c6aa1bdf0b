package kit

import (
	"io"
	"strconv"
	"sync"
	"time"
)

// Printer prints lines without a system call, or an allocation, for each: the
// loop that answers packets does not wait for a terminal.
type Printer struct {
	w io.Writer

	mu    sync.Mutex // guards what follows, and writes to w
	buf   []byte
	timer *time.Timer
	armed bool
}

// NewPrinter returns a printer to w. Flush it in the end.
func NewPrinter(w io.Writer) *Printer { return &Printer{w: w} }

const (
	// How late a line may be, and how much may wait.
	flushAfter = 5 * time.Millisecond
	flushSize  = 8 << 10
)

// Begin starts a line, which Str, Num and Fixed add to and End ends.
func (p *Printer) Begin() *Printer {
	p.mu.Lock()
	return p
}

// Str adds text.
func (p *Printer) Str(s string) *Printer {
	p.buf = append(p.buf, s...)
	return p
}

// Num adds a number.
func (p *Printer) Num(n int) *Printer {
	p.buf = strconv.AppendInt(p.buf, int64(n), 10)
	return p
}

// Fixed adds a number with three decimals.
func (p *Printer) Fixed(v float64) *Printer {
	p.buf = strconv.AppendFloat(p.buf, v, 'f', 3, 64)
	return p
}

// End ends the line.
func (p *Printer) End() {
	p.buf = append(p.buf, '\n')
	switch {
	case len(p.buf) >= flushSize:
		p.write()
	case p.armed:
	case p.timer == nil:
		p.armed = true
		p.timer = time.AfterFunc(flushAfter, p.Flush)
	default:
		p.armed = true
		p.timer.Reset(flushAfter)
	}
	p.mu.Unlock()
}

// Line prints a line.
func (p *Printer) Line(s string) { p.Begin().Str(s).End() }

// write writes what there is. mu is held.
func (p *Printer) write() {
	if len(p.buf) > 0 {
		_, _ = p.w.Write(p.buf)
		p.buf = p.buf[:0]
	}
}

// Flush writes what waits.
func (p *Printer) Flush() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.armed = false
	p.write()
}

// After returns a writer that writes what waits in p before anything else.
func After(p *Printer, w io.Writer) io.Writer { return after{p, w} }

type after struct {
	p *Printer
	w io.Writer
}

func (a after) Write(b []byte) (int, error) {
	a.p.Flush()
	return a.w.Write(b)
}
