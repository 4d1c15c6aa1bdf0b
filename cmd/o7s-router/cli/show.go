package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/urfave/cli/v2"

	"github.com/o7s/o7s-router/control/irm"
	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/wire"
)

// shows are what show knows, with their help.
var shows = []struct{ what, usage string }{
	{"layers", "members of layers on this node"},
	{"flows", "flows of programs"},
	{"names", "names, who serves them and where they are registered"},
	{"neighbors", "adjacencies of members"},
	{"lsdb", "link-state databases"},
	{"routes", "forwarding tables"},
	{"directory", "entries of the directory held here"},
	{"fastpath", "ports, how each is forwarded and why"},
	{"drops", "packets lost, by place and reason"},
}

func (a *App) showCommand() *cli.Command {
	var sub []*cli.Command
	for _, s := range shows {
		sub = append(sub, &cli.Command{
			Name: s.what, Usage: s.usage, Flags: []cli.Flag{output()},
			Action: func(c *cli.Context) error {
				out, err := outputOf(c)
				if err == nil {
					err = arguments(c)
				}
				if err != nil {
					return err
				}
				var raw json.RawMessage
				if err := a.call(c, ipc.OpShow, ipc.ShowArgs{What: s.what}, &raw); err != nil {
					return err
				}
				return a.print(out, s.what, raw)
			},
		})
	}
	return group("show", "show the state of the node", sub...)
}

// print writes v, the result of a list or show request, as JSON or as a table.
func (a *App) print(out, what string, v any) error {
	raw, ok := v.(json.RawMessage)
	if !ok {
		var err error
		if raw, err = json.Marshal(v); err != nil {
			return err
		}
	}
	if len(bytes.TrimSpace(raw)) == 0 || bytes.Equal(raw, []byte("null")) {
		raw = json.RawMessage("[]")
	}
	if out == "json" {
		var b bytes.Buffer
		if err := json.Indent(&b, raw, "", "  "); err != nil {
			return fmt.Errorf("show %s: the daemon sent no JSON: %w", what, err)
		}
		b.WriteByte('\n')
		_, err := b.WriteTo(a.Stdout)
		return err
	}
	var b bytes.Buffer
	if err := tables[what](&b, raw); err != nil {
		return fmt.Errorf("show %s: %w", what, err)
	}
	_, err := b.WriteTo(a.Stdout)
	return err
}

// tables render results by what was asked for.
var tables = map[string]func(io.Writer, json.RawMessage) error{
	"ipcps": table(ipcpColumns), "names": table(nameColumns),
	"layers": table(layerColumns), "flows": table(flowColumns), "neighbors": table(neighborColumns),
	"lsdb": table(lsaColumns), "routes": table(routeColumns), "directory": table(dirColumns),
	"drops": table(dropColumns), "fastpath": fastPath,
}

// column is a column of a table: its header, with the unit, and its cells.
type column[T any] struct {
	head string
	cell func(T) string
}

func table[T any](cols []column[T]) func(io.Writer, json.RawMessage) error {
	return func(w io.Writer, raw json.RawMessage) error {
		var rows []T
		if err := json.Unmarshal(raw, &rows); err != nil {
			return err
		}
		return rowsTo(w, cols, rows)
	}
}

func rowsTo[T any](w io.Writer, cols []column[T], rows []T) error {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	line := make([]string, len(cols))
	for i, c := range cols {
		line[i] = c.head
	}
	put := func() {
		// The last column is not padded.
		_, _ = io.WriteString(tw, strings.Join(line, "\t")+"\n")
	}
	put()
	for _, r := range rows {
		for i, c := range cols {
			if line[i] = clean(c.cell(r)); line[i] == "" {
				line[i] = "-"
			}
		}
		put()
	}
	return tw.Flush()
}

// clean keeps what others chose (names of layers, of programs) from breaking
// the table or the terminal.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return '?'
		}
		return r
	}, s)
}

func num[T ~int | ~int32 | ~uint32 | ~uint64](v T) string { return fmt.Sprint(v) }

// addr is the dotted form of a layer address; 0 is none.
func addr(a uint64) string {
	if a == 0 {
		return ""
	}
	return wire.AddrString(a)
}

func seconds(s float64) string { return strconv.FormatFloat(s, 'f', 1, 64) }

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func join[T any](l []T, f func(T) string) string {
	s := make([]string, len(l))
	for i, v := range l {
		s[i] = f(v)
	}
	return strings.Join(s, ",")
}

func same(s string) string { return s }

// uniq is l without repetitions, in order.
func uniq(l []string) []string {
	var out []string
	for _, s := range l {
		if !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return out
}

var ipcpColumns = []column[ipc.IPCPInfo]{
	{"ID", func(i ipc.IPCPInfo) string { return num(i.ID) }},
	{"IPCP", func(i ipc.IPCPInfo) string { return i.Name }},
	{"TYPE", func(i ipc.IPCPInfo) string { return i.Type }},
	{"LAYER", func(i ipc.IPCPInfo) string { return i.Layer }},
	{"STATE", func(i ipc.IPCPInfo) string { return i.State }},
	{"HASH", func(i ipc.IPCPInfo) string { return i.Hash }},
}

var nameColumns = []column[ipc.NameInfo]{
	{"NAME", func(n ipc.NameInfo) string { return n.Name }},
	{"BALANCING", func(n ipc.NameInfo) string { return n.LB }},
	{"PROGRAMS", func(n ipc.NameInfo) string { return join(n.Programs, same) }},
	{"PIDS", func(n ipc.NameInfo) string { return join(n.Processes, num[int32]) }},
	{"IPCPS", func(n ipc.NameInfo) string { return join(n.IPCPs, same) }},
	{"REGISTERED WITH", func(n ipc.NameInfo) string { return join(n.Registered, same) }},
	{"ACCEPTING", func(n ipc.NameInfo) string { return num(n.Accepting) }},
}

var layerColumns = []column[irm.LayerInfo]{
	{"ID", func(l irm.LayerInfo) string { return num(l.ID) }},
	{"IPCP", func(l irm.LayerInfo) string { return l.IPCP }},
	{"TYPE", func(l irm.LayerInfo) string { return l.Type }},
	{"LAYER", func(l irm.LayerInfo) string { return l.Layer }},
	{"STATE", func(l irm.LayerInfo) string { return l.State }},
	{"HASH", func(l irm.LayerInfo) string { return l.Hash }},
	{"ADDRESS", func(l irm.LayerInfo) string { return addr(l.Address) }},
	{"NAMES", func(l irm.LayerInfo) string { return join(l.Names, same) }},
}

var flowColumns = []column[irm.FlowInfo]{
	{"ID", func(f irm.FlowInfo) string { return num(f.ID) }},
	{"STATE", func(f irm.FlowInfo) string {
		if f.Down {
			return f.State + ",down"
		}
		return f.State
	}},
	{"PID", func(f irm.FlowInfo) string { return num(f.PID) }},
	{"PROGRAM", func(f irm.FlowInfo) string { return f.Prog }},
	{"NAME", func(f irm.FlowInfo) string { return f.Name }},
	{"LAYER", func(f irm.FlowInfo) string { return f.Layer }},
	{"LOCAL", func(f irm.FlowInfo) string { return f.Local }},
	{"REMOTE", func(f irm.FlowInfo) string { return f.Remote }},
	{"MTU(B)", func(f irm.FlowInfo) string { return num(f.MTU) }},
	{"RX(PKT)", func(f irm.FlowInfo) string { return num(f.RxPackets) }},
	{"RX(B)", func(f irm.FlowInfo) string { return num(f.RxBytes) }},
	{"TX(PKT)", func(f irm.FlowInfo) string { return num(f.TxPackets) }},
	{"TX(B)", func(f irm.FlowInfo) string { return num(f.TxBytes) }},
	{"LOST(PKT)", func(f irm.FlowInfo) string { return num(f.RxDropped) }},
	{"PATH", func(f irm.FlowInfo) string { return because(f.Path, f.Why) }},
}

func because(what, why string) string {
	if why == "" {
		return what
	}
	return what + " (" + why + ")"
}

var neighborColumns = []column[ipcp.Neighbor]{
	{"IPCP", func(n ipcp.Neighbor) string { return n.IPCP }},
	{"LAYER", func(n ipcp.Neighbor) string { return n.Layer }},
	{"ADDRESS", func(n ipcp.Neighbor) string { return addr(n.Address) }},
	{"COMPONENT", func(n ipcp.Neighbor) string { return n.Component }},
	{"CONNECTED TO", func(n ipcp.Neighbor) string { return n.Dst }},
	{"VIA", func(n ipcp.Neighbor) string { return n.Via }},
	{"STATE", func(n ipcp.Neighbor) string { return n.State }},
	{"RX(PKT)", func(n ipcp.Neighbor) string { return num(n.RxPackets) }},
	{"TX(PKT)", func(n ipcp.Neighbor) string { return num(n.TxPackets) }},
	{"SILENT(S)", func(n ipcp.Neighbor) string { return seconds(n.Silent) }},
	{"PATH", func(n ipcp.Neighbor) string { return n.Path }},
}

var lsaColumns = []column[ipcp.LSA]{
	{"IPCP", func(l ipcp.LSA) string { return l.IPCP }},
	{"LAYER", func(l ipcp.LSA) string { return l.Layer }},
	{"SRC", func(l ipcp.LSA) string { return addr(l.Src) }},
	{"DST", func(l ipcp.LSA) string { return addr(l.Dst) }},
	{"SEQNO", func(l ipcp.LSA) string { return num(l.Seqno) }},
	{"AGE(S)", func(l ipcp.LSA) string { return seconds(l.Age) }},
	{"OWN", func(l ipcp.LSA) string { return yes(l.Own) }},
	{"USABLE", func(l ipcp.LSA) string { return yes(l.Usable) }},
}

var routeColumns = []column[ipcp.Route]{
	{"IPCP", func(r ipcp.Route) string { return r.IPCP }},
	{"LAYER", func(r ipcp.Route) string { return r.Layer }},
	{"DESTINATION", func(r ipcp.Route) string { return addr(r.Dst) }},
	{"COST(HOPS)", func(r ipcp.Route) string { return num(r.Cost) }},
	{"NEXT HOP", func(r ipcp.Route) string { return join(r.NextHops, addr) }},
	{"ALTERNATE", func(r ipcp.Route) string { return addr(r.Alternate) }},
	{"VIA", func(r ipcp.Route) string { return join(uniq(r.Via), same) }},
	{"PATH", func(r ipcp.Route) string { return r.Path }},
}

var dirColumns = []column[ipcp.DirEntry]{
	{"IPCP", func(d ipcp.DirEntry) string { return d.IPCP }},
	{"LAYER", func(d ipcp.DirEntry) string { return d.Layer }},
	{"NAME", func(d ipcp.DirEntry) string { return d.Name }},
	{"KEY", func(d ipcp.DirEntry) string { return d.Key[:min(16, len(d.Key))] }}, // enough to tell them apart
	{"VALUE", func(d ipcp.DirEntry) string { return d.Value }},
	{"KIND", func(d ipcp.DirEntry) string { return d.Kind }},
	{"EXPIRES(S)", func(d ipcp.DirEntry) string {
		if d.Kind == "local" {
			return ""
		}
		return strconv.FormatFloat(d.Expiry, 'f', 0, 64)
	}},
}

var dropColumns = []column[irm.DropInfo]{
	{"WHERE", func(d irm.DropInfo) string { return d.Where }},
	{"REASON", func(d irm.DropInfo) string { return d.Reason }},
	{"DROPPED(PKT)", func(d irm.DropInfo) string { return num(d.Packets) }},
	{"MEANING", func(d irm.DropInfo) string { return d.Help }},
}

// fastPath renders the one result that is not a list: whether the kernel
// forwards, the ports, and what became of their packets.
func fastPath(w io.Writer, raw json.RawMessage) error {
	var f irm.FastPathInfo
	if err := json.Unmarshal(raw, &f); err != nil {
		return err
	}
	where := "in the kernel"
	if !f.Kernel {
		where = "in user space"
	}
	_, _ = fmt.Fprintf(w, "forwarding %s\n", because(where, f.Reason))
	if len(f.Ports) == 0 {
		return nil
	}
	_, _ = io.WriteString(w, "\n")
	if err := rowsTo(w, portColumns, f.Ports); err != nil {
		return err
	}
	if len(f.Slow) > 0 {
		_, _ = io.WriteString(w, "\n")
		if err := rowsTo(w, []column[irm.SlowInfo]{
			{"USER-SPACE ADJACENCY", func(s irm.SlowInfo) string { return s.IPCP }},
			{"PEER", func(s irm.SlowInfo) string { return addr(s.Address) }},
			{"VIA", func(s irm.SlowInfo) string { return s.Via }},
			{"REASON", func(s irm.SlowInfo) string { return s.Reason }},
		}, f.Slow); err != nil {
			return err
		}
	}
	type verdict struct {
		port string
		v    irm.VerdictInfo
	}
	var rows []verdict
	for _, p := range f.Ports {
		for _, v := range p.Verdicts {
			rows = append(rows, verdict{p.Name, v})
		}
	}
	if len(rows) == 0 {
		return nil
	}
	_, _ = io.WriteString(w, "\n")
	return rowsTo(w, []column[verdict]{
		{"PORT", func(r verdict) string { return r.port }},
		{"VERDICT", func(r verdict) string { return r.v.Reason }},
		{"PACKETS", func(r verdict) string { return num(r.v.Packets) }},
		{"DROP", func(r verdict) string { return yes(r.v.Drop) }},
		{"MEANING", func(r verdict) string { return r.v.Help }},
	}, rows)
}

var portColumns = []column[irm.PortInfo]{
	{"PORT", func(p irm.PortInfo) string { return p.Name }},
	{"SLOT", func(p irm.PortInfo) string { return num(p.Slot) }},
	{"MODE", func(p irm.PortInfo) string { return p.Mode }},
	{"PID", func(p irm.PortInfo) string {
		if p.PID == 0 {
			return ""
		}
		return num(p.PID)
	}},
	{"REASONS", func(p irm.PortInfo) string { return strings.Join(p.Reasons, "; ") }},
}
