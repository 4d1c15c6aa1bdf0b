package irmcmd

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/o7s/o7s-router/ipcp"
	"github.com/o7s/o7s-router/lib/ipc"
)

// typeValue is the number of a type word, the first key of the order of ipcps.
func typeValue(word string) int {
	for t := ipcp.Local; t <= ipcp.UDP6; t++ {
		if t.String() == word {
			return int(t)
		}
	}
	return int(ipcp.UDP6) + 1
}

// IPCPTable renders the IPC processes, byte for byte like the reference: by
// type in the order of preference, then by id.
func IPCPTable(l []ipc.IPCPInfo) string {
	if len(l) == 0 {
		return "No IPCPs in system.\n\n"
	}
	l = slices.Clone(l)
	slices.SortStableFunc(l, func(a, b ipc.IPCPInfo) int {
		return cmp.Or(cmp.Compare(typeValue(a.Type), typeValue(b.Type)), cmp.Compare(a.ID, b.ID))
	})
	var b strings.Builder
	rule := "+---------+----------------------+------------+----------------------+\n"
	fmt.Fprintf(&b, "%s| %7s | %20s | %10s | %20s |\n%s", rule, "pid", "name", "type", "layer", rule)
	for _, i := range l {
		fmt.Fprintf(&b, "| %7d | %20s | %10s | %20s |\n", i.ID, i.Name, i.Type, cmp.Or(i.Layer, "Not enrolled."))
	}
	b.WriteString(rule + "\n")
	return b.String()
}

// NameTable renders the names, byte for byte like the reference.
func NameTable(l []ipc.NameInfo) string {
	if len(l) == 0 {
		return "No names in system.\n\n"
	}
	l = slices.Clone(l)
	slices.SortFunc(l, func(a, b ipc.NameInfo) int { return cmp.Compare(a.Name, b.Name) })
	var b strings.Builder
	rule := "+" + strings.Repeat("-", 52) + "+" + strings.Repeat("-", 22) + "+\n"
	fmt.Fprintf(&b, "%s| %50s | %20s |\n%s", rule, "name", "load-balance policy", rule)
	for _, n := range l {
		fmt.Fprintf(&b, "| %50s | %20s |\n", n.Name, n.LB)
	}
	b.WriteString(rule)
	return b.String()
}
