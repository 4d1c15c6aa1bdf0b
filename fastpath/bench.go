package fastpath

import "github.com/o7s/o7s-router/fastpath/tables"

// Tables is the memory that the programs read. Benchmarks lay out a table of
// their own in it; everybody else leaves it to the Plane.
func (p *Plane) Tables() *tables.Tables { return p.t }
