package o7s

import "github.com/o7s/o7s-router/lib/o7serr"

// Errors to look for with errors.Is, where the standard library has none that
// says it; see the table in the documentation of the package. They are numbers
// of package o7serr, which has the rest.
var (
	// ErrDown: the flow is down, or was released by the other end or the layer,
	// and was not ended before. To a program it is ECONNRESET and EPIPE, too.
	ErrDown error = o7serr.EFLOWDOWN
	// ErrPeer: nothing was heard from the peer for the time-out of the QoS.
	ErrPeer error = o7serr.EFLOWPEER
	// ErrName: the name is not known, or nobody accepts flows for it.
	ErrName error = o7serr.ENAME
	// ErrUnreachable: no layer of this machine can reach the name.
	ErrUnreachable error = o7serr.EIPCP
	// ErrNoDaemon: the daemon does not run, or went away.
	ErrNoDaemon error = o7serr.EIRMD
)
