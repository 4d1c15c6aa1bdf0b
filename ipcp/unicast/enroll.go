package unicast

import (
	"context"
	crand "crypto/rand"
	"fmt"
	"time"

	"github.com/o7s/o7s-router/control/enroll"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/packet"
	"github.com/o7s/o7s-router/lib/qos"
)

// Enroll makes this IPC process a member of the layer that the member behind
// dst belongs to (spec 41).
func (l *Layer) Enroll(ctx context.Context, dst string) error {
	if err := l.claim(); err != nil {
		return err
	}
	defer l.unclaim()
	f, err := l.host.AllocFlow(ctx, l, dst, qos.Raw)
	if err != nil {
		return fmt.Errorf("flow to %q: %w", dst, err)
	}
	defer f.Close()
	p := newPending()
	defer p.drop()
	f.SetSink(p)
	if _, err := l.initiate(ctx, f, p, ipcp.Enrollment); err != nil {
		return fmt.Errorf("handshake with %q: %w", dst, err)
	}
	j, err := enroll.NewJoiner(time.Now(), crand.Reader, ipcp.Unicast)
	if err != nil {
		return err
	}
	if err := f.Send(packet.From(j.Request())); err != nil {
		return fmt.Errorf("enrolment request: %w", err)
	}
	msg, err := p.read(ctx, enroll.ResponseTimeout)
	if err != nil {
		return fmt.Errorf("enrolment response of %q: %w", dst, err)
	}
	m, err := j.Receive(time.Now(), msg)
	if err != nil {
		return fmt.Errorf("enrolment response of %q: %w", dst, err)
	}
	for _, w := range m.Warnings {
		l.log.Warn("enrolment", "layer", m.Config.LayerName, "dst", dst, "warning", w)
	}
	if err := l.start(m.Config); err != nil {
		return err
	}
	if err := f.Send(packet.From(j.Ack())); err != nil {
		l.log.Warn("enrolment acknowledgement not sent; we are a member all the same", "dst", dst, "err", err)
	}
	return nil
}

// serveEnrollment gives the layer's configuration to a joiner.
func (l *Layer) serveEnrollment(f ipcp.Flow, p *pending) error {
	l.mu.Lock()
	cfg, state := l.cfg, l.state
	l.mu.Unlock()
	if state != ipcp.StateOperational {
		return fmt.Errorf("enrolment: ipcp is %s", state)
	}
	e := enroll.NewEnroller(time.Now(), cfg, l.addr.Load())
	msg, err := p.read(l.ctx, time.Until(e.Deadline()))
	if err != nil {
		return fmt.Errorf("enrolment request: %w", err)
	}
	resp, err := e.Receive(time.Now(), msg)
	if err != nil {
		return fmt.Errorf("enrolment request: %w", err)
	}
	if err := f.Send(packet.From(resp)); err != nil {
		return fmt.Errorf("enrolment response: %w", err)
	}
	if msg, err = p.read(l.ctx, time.Until(e.Deadline())); err != nil {
		return fmt.Errorf("enrolment acknowledgement: %w", err)
	}
	same, err := e.ReceiveAck(msg)
	if err != nil {
		return fmt.Errorf("enrolment acknowledgement: %w", err)
	}
	l.log.Info("enrolled a new member", "layer", cfg.LayerName, "id_matches", same)
	return f.Close()
}
