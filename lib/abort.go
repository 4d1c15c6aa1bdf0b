package o7s

import (
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/ring"
)

// Abort releases the flow at once, as after a failure: the peer reads
// o7serr.EFLOWDOWN, not io.EOF, so that it does not take what it has got for
// all there was. What was written and has not been delivered may be lost.
// Towards a reference peer it is Close without waiting.
func (f *Flow) Abort() error {
	if f.e2e != nil {
		f.e2e.fail(o7serr.EFLOWDOWN) // no end of stream, and nothing to wait for
	} else {
		f.emu.Lock()
		if f.events != nil {
			f.path.SetState(f.path.Own() | ring.Down)
		}
		f.emu.Unlock()
	}
	return f.Close()
}
