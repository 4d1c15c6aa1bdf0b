package lab

import (
	"context"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"

	"github.com/o7s/o7s-router/deploy/lab/impair"
)

// relay is a running relay of a link.
type relay struct {
	*impair.Relay
	link *Link
	end  context.CancelFunc
	done chan error
}

// relayDevices are the devices of every relay, towards the first and the second
// end of its link.
var relayDevices = [2]string{"r0", "r1"}

// addRelay makes the namespace of a link's relay, connects both ends to it and
// starts it.
func (l *Lab) addRelay(k *Link, a, b vethEnd) error {
	// Hosts have no dash in their names.
	ns := fmt.Sprintf("%s-%s-%d", a.ns, k.Ends[1], k.nth)
	if err := addNetns(ns, false); err != nil {
		return err
	}
	for i, end := range []vethEnd{a, b} {
		if err := addVeth(end, vethEnd{ns: ns, dev: relayDevices[i]}, k.MTU, k.index()); err != nil {
			return err
		}
	}
	var r *impair.Relay
	err := inNetns(ns, func() (err error) {
		for _, dev := range relayDevices {
			x, err := netlink.LinkByName(dev)
			if err == nil {
				err = netlink.LinkSetUp(x)
			}
			if err != nil {
				return fmt.Errorf("device %s of the relay: %w", dev, err)
			}
		}
		r, err = impair.New(impair.Config{Devices: relayDevices, Impair: impair.Both(k.Impair.impairment()), Seed: k.Impair.Seed})
		return err
	})
	if err != nil {
		return err
	}
	ctx, end := context.WithCancel(context.Background())
	x := &relay{Relay: r, link: k, end: end, done: make(chan error, 1)}
	go func() { x.done <- r.Run(ctx) }()
	l.mu.Lock()
	l.relays = append(l.relays, x)
	l.mu.Unlock()
	return nil
}

// Relay is the relay in the first link between two hosts that has one, of a lab
// that this process has built. Its Config.Devices[0] is towards host a when the
// link's ends are given in that order.
func (l *Lab) Relay(a, b string) (*impair.Relay, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range l.relays {
		if e := r.link.Ends; e[0] == a && e[1] == b || e[0] == b && e[1] == a {
			return r.Relay, nil
		}
	}
	return nil, fmt.Errorf("no relay of this process between %q and %q", a, b)
}

// endRelays stops the relays. The error is that of one that broke down before.
func (l *Lab) endRelays() error {
	l.mu.Lock()
	rs := l.relays
	l.relays = nil
	l.mu.Unlock()
	var errs []error
	for _, r := range rs {
		r.end()
		if err := <-r.done; err != nil {
			errs = append(errs, fmt.Errorf("link %s - %s: %w", r.link.Ends[0], r.link.Ends[1], err))
		}
	}
	return errors.Join(errs...)
}
