package port

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/fastpath/xsk"
)

// watcher hears from the kernel about changes of one device. It never polls.
type watcher struct {
	ifindex int
	route   int // rtnetlink socket, link changes of the namespace
	genl    int // generic netlink socket, changes of XDP abilities; -1: kernel too old
	poller  *xsk.Poller
	buf     []byte

	changed bool         // an event was about our device
	gone    bool         // and it was the last
	link    netlink.Link // newest state; nil: ask for it
}

func newWatcher(ifindex int, x *netdev) (w *watcher, err error) {
	w = &watcher{ifindex: ifindex, route: -1, genl: -1, buf: make([]byte, 64<<10)}
	defer func() {
		if err != nil {
			w.close()
			w = nil
		}
	}()
	if w.poller, err = xsk.NewPoller(w.read); err != nil {
		return w, err
	}
	if w.route, err = w.subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK); err != nil {
		return w, err
	}
	if x != nil && x.group != 0 {
		if w.genl, err = w.subscribe(unix.NETLINK_GENERIC, x.group); err != nil {
			return w, err
		}
	}
	return w, nil
}

func (w *watcher) subscribe(protocol, group int) (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return -1, fmt.Errorf("netlink socket: %w", err)
	}
	err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group)
	}
	if err == nil {
		err = w.poller.Add(fd)
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("netlink events: %w", err)
	}
	return fd, nil
}

// read takes all pending messages and tells whether something concerns us.
func (w *watcher) read() bool {
	for _, fd := range []int{w.route, w.genl} {
		for fd >= 0 {
			n, _, err := unix.Recvfrom(fd, w.buf, 0)
			if err == unix.ENOBUFS { // events were lost: look ourselves
				w.changed, w.link = true, nil
				continue
			}
			if err == unix.EINTR {
				continue
			}
			if err != nil || n == 0 {
				break
			}
			if fd == w.route {
				w.routeMessages(w.buf[:n])
			} else {
				w.genlMessages(w.buf[:n])
			}
		}
	}
	return w.changed
}

// messages splits a datagram.
func messages(b []byte, f func(h *unix.NlMsghdr, body []byte)) {
	for len(b) >= unix.SizeofNlMsghdr {
		h := (*unix.NlMsghdr)(unsafe.Pointer(&b[0]))
		if h.Len < unix.SizeofNlMsghdr || int(h.Len) > len(b) {
			return
		}
		f(h, b[unix.SizeofNlMsghdr:h.Len])
		b = b[min(len(b), int(h.Len+3)&^3):]
	}
}

func (w *watcher) routeMessages(b []byte) {
	messages(b, func(h *unix.NlMsghdr, body []byte) {
		if len(body) < unix.SizeofIfInfomsg {
			return
		}
		// A bridge speaks of its ports in the same messages (AF_BRIDGE).
		ifi := (*unix.IfInfomsg)(unsafe.Pointer(&body[0]))
		if int(ifi.Index) != w.ifindex || ifi.Family != unix.AF_UNSPEC {
			return
		}
		switch h.Type {
		case unix.RTM_NEWLINK:
			if link, err := netlink.LinkDeserialize(h, body); err == nil {
				w.link, w.changed = link, true
			}
		case unix.RTM_DELLINK:
			w.gone, w.changed = true, true
		}
	})
}

func (w *watcher) genlMessages(b []byte) {
	messages(b, func(_ *unix.NlMsghdr, body []byte) {
		if i, _, _ := parseNetdev(body); i == w.ifindex {
			w.changed = true
		}
	})
}

func (w *watcher) close() {
	if w.poller != nil {
		_ = w.poller.Close() // nothing to write back
	}
	for _, fd := range []int{w.route, w.genl} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// watchLoop acts on events until the watcher is closed.
func (p *Port) watchLoop() {
	defer p.wg.Done()
	w := p.watcher
	for {
		if err := w.poller.Wait(0); err != nil {
			if !errors.Is(err, os.ErrClosed) {
				p.log.Error("link events ended", "ifname", p.name, "error", err)
			}
			return
		}
		w.changed = false
		if w.gone {
			p.removed()
			return
		}
		link := w.link
		if link == nil {
			var err error
			if link, err = p.src.route.LinkByIndex(p.index); err != nil {
				p.removed()
				return
			}
		}
		p.update(link)
	}
}
