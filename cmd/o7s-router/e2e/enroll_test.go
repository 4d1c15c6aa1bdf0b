package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/o7s/o7s-router/control/irm"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/o7serr"
)

// TestEnrolment asks for what must not come about, and then for what must.
func TestEnrolment(t *testing.T) {
	t.Parallel()
	top := topology(t, "line3", false)
	top.Layers = nil
	n := up(t, top)
	n.must("h1", ipc.OpIPCPBootstrap, ipc.BootstrapArgs{Name: "uni.h1", Type: "unicast", Layer: "uni", Autobind: true})
	n.must("h1", ipc.OpNameRegister, ipc.RegisterArgs{Name: "uni.h1", Layers: []string{"dix12"}})
	enroll := ipc.EnrollArgs{Name: "uni.h2", Layer: "uni", Dst: "uni.h1", Autobind: true}
	ipcps := func(host string) (names []string) {
		for _, l := range show[[]irm.LayerInfo](n, host, "layers") {
			names = append(names, l.IPCP)
		}
		return names
	}
	fails := func(op ipc.Op, args any, within time.Duration, want string, e ...o7serr.Errno) {
		t.Helper()
		before, begin := ipcps("h2"), time.Now()
		err := n.call("h2", op, args, nil)
		if err == nil || !strings.Contains(err.Error(), want) || !slices.Contains(e, o7serr.Errno(-o7serr.Code(err))) {
			t.Errorf("%s %+v: %v, want %q and one of %v", op, args, err, want, e)
		}
		if took := time.Since(begin); took > slack*within {
			t.Errorf("%s %+v took %v, want %v", op, args, took, within)
		}
		if after := ipcps("h2"); !slices.Equal(before, after) {
			t.Errorf("%s %+v left ipcps %v, there were %v", op, args, after, before)
		}
	}
	// A name that is not known here; that nobody in the layer knows; a layer that is another.
	fails(ipc.OpIPCPEnroll, enroll, 500*time.Millisecond, "uni.h1", o7serr.ENAME)
	n.create("uni.h1", "h2", "h3")
	n.create("ghost", "h2")
	ghost := enroll
	ghost.Dst = "ghost"
	fails(ipc.OpIPCPEnroll, ghost, 2*time.Second, "ghost", o7serr.EIPCP)
	wrong := enroll
	wrong.Layer = "metro"
	fails(ipc.OpIPCPEnroll, wrong, 2*time.Second, "metro", o7serr.EINVAL)
	// Half a node: nobody to enrol with there.
	n.must("h3", ipc.OpIPCPCreate, ipc.IPCPArgs{Name: "empty", Type: "unicast"})
	n.must("h3", ipc.OpBind, ipc.BindArgs{Name: "empty", IPCP: "empty"})
	n.must("h3", ipc.OpNameRegister, ipc.RegisterArgs{Name: "empty", Layers: []string{"dix23"}})
	n.create("empty", "h2")
	empty := enroll
	empty.Dst = "empty"
	fails(ipc.OpIPCPEnroll, empty, 3*time.Second, "empty", o7serr.ENAME)

	n.must("h2", ipc.OpIPCPEnroll, enroll)
	fails(ipc.OpIPCPEnroll, enroll, 500*time.Millisecond, "already", o7serr.EIPCPSTATE) // twice
	fails(ipc.OpIPCPBootstrap, ipc.BootstrapArgs{Name: "uni.h2", Layer: "other"}, 500*time.Millisecond, "already", o7serr.EIPCPSTATE)
	fails(ipc.OpIPCPConnect, ipc.ConnectArgs{Name: "uni.h2", Dst: "nobody"}, 500*time.Millisecond, "nobody", o7serr.ENAME)
	fails(ipc.OpIPCPConnect, ipc.ConnectArgs{Name: "uni.h2", Dst: "ghost"}, 2*time.Second, "ghost", o7serr.EIPCP)
	fails(ipc.OpIPCPConnect, ipc.ConnectArgs{Name: "nobody", Dst: "uni.h1"}, 500*time.Millisecond, "nobody", o7serr.EIPCP)
	fails(ipc.OpIPCPDisconnect, ipc.ConnectArgs{Name: "uni.h2", Dst: "uni.h1"}, 500*time.Millisecond, "no ", o7serr.ENOTALLOC)
	// Duplicates.
	fails(ipc.OpIPCPCreate, ipc.IPCPArgs{Name: "uni.h2", Type: "unicast"}, 500*time.Millisecond, "exists", o7serr.EINVAL)
	fails(ipc.OpNameCreate, ipc.NameArgs{Name: "uni.h1"}, 500*time.Millisecond, "exists", o7serr.EEXIST)
	fails(ipc.OpBind, ipc.BindArgs{Name: "uni.h2", IPCP: "uni.h2"}, 500*time.Millisecond, "already", o7serr.EINVAL)

	n.must("h2", ipc.OpIPCPConnect, ipc.ConnectArgs{Name: "uni.h2", Dst: "uni.h1"})
	adjacencies := func(host string, want int) {
		t.Helper()
		eventually(t, 3*time.Second, func() error {
			if nb := show[[]ipcp.Neighbor](n, host, "neighbors"); len(nb) != want {
				return fmt.Errorf("%s has %d adjacencies, want %d: %+v", host, len(nb), want, nb)
			}
			return nil
		})
	}
	adjacencies("h1", 2)
	adjacencies("h2", 2)
	eventually(t, 3*time.Second, func() error {
		if n.route("h2", n.address("h1", "uni")) == nil {
			return fmt.Errorf("no route")
		}
		return nil
	})
	// Each component can be released and made again by itself.
	for _, c := range []string{"dt", "mgmt", "*"} {
		n.must("h2", ipc.OpIPCPDisconnect, ipc.ConnectArgs{Name: "uni.h2", Dst: "uni.h1", Component: c})
		want := map[string]int{"dt": 1, "mgmt": 1, "*": 0}[c]
		adjacencies("h1", want)
		adjacencies("h2", want)
		n.must("h2", ipc.OpIPCPConnect, ipc.ConnectArgs{Name: "uni.h2", Dst: "uni.h1", Component: c})
		adjacencies("h1", 2)
	}
	eventually(t, 3*time.Second, func() error {
		if n.route("h1", n.address("h2", "uni")) == nil {
			return fmt.Errorf("no route")
		}
		return nil
	})
	// A member that leaves is gone at once.
	n.must("h2", ipc.OpIPCPDestroy, ipc.IPCPArgs{Name: "uni.h2"})
	adjacencies("h1", 0)
	n.must("h2", ipc.OpIPCPEnroll, enroll)
	n.must("h2", ipc.OpIPCPConnect, ipc.ConnectArgs{Name: "uni.h2", Dst: "uni.h1"})
	adjacencies("h1", 2)
}
