// Package row is the frame of the benchmark: rows that are measured in turns
// within one run, compared with each other, held against bars, and written
// down. Machines are shared and noisy, so what counts is the ratio of two rows
// of the same round, and its median over the rounds.
package row

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// Row is one measurement. Measure is called once a round.
type Row struct {
	Name    string // stable: results are compared by it
	Unit    string
	RatioTo string // name of a row of the same group; "" has no ratio
	Measure func(ctx context.Context) (float64, error)
	Note    func() string // what else the rounds have shown; nil: nothing
}

// Group is rows that are measured in turns. Setup makes what they need and
// returns them with what takes it down again.
type Group struct {
	Name   string
	Rounds int
	Setup  func(ctx context.Context, names []string) ([]Row, func(), error)
	Rows   []string // the names Setup can make
	Always []string // of Rows: measured with any other, which are compared with them
}

// Result is one row as it is written to latest.json.
type Result struct {
	Name    string  `json:"name"`
	Value   float64 `json:"value"` // median of the rounds
	Unit    string  `json:"unit"`
	Ratio   float64 `json:"ratio,omitempty"`    // median of the rounds' ratios
	RatioTo string  `json:"ratio_to,omitempty"` // "": compared with nothing
	Runs    int     `json:"runs"`
	Spread  float64 `json:"spread"` // (largest - smallest) / median
	Note    string  `json:"note,omitempty"`

	values []float64
}

// Bar is what a row must reach. One of the limits is set.
type Bar struct {
	Row      string
	To       string  // with MinRatio, MaxRatio: the other row
	MinRatio float64 // row / to
	MaxRatio float64
	Max      float64 // absolute, in the row's unit
	Why      string
}

// Run measures the groups that have rows whose name starts with prefix, which
// may be several, separated by commas. A row
// that fails is left out of the results and the others go on; the error says
// what failed. Only the end of the context ends everything.
func Run(ctx context.Context, groups []Group, prefix string, log io.Writer) ([]Result, error) {
	var out []Result
	var errs []error
	for _, g := range groups {
		want := g.want(prefix)
		if len(want) == 0 {
			continue
		}
		res, err := g.run(ctx, want, log)
		if ctx.Err() != nil {
			return out, errors.Join(append(errs, ctx.Err())...)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", g.Name, err))
		}
		out = append(out, res...)
	}
	return out, errors.Join(errs...)
}

// want returns the rows to measure, in the order of g.Rows.
func (g Group) want(prefix string) (want []string) {
	match := func(n string) bool {
		return slices.ContainsFunc(strings.Split(prefix, ","), func(p string) bool { return strings.HasPrefix(n, p) })
	}
	some := slices.ContainsFunc(g.Rows, match)
	for _, n := range g.Rows {
		if match(n) || some && slices.Contains(g.Always, n) {
			want = append(want, n)
		}
	}
	return want
}

func (g Group) run(ctx context.Context, want []string, log io.Writer) ([]Result, error) {
	began := time.Now()
	_, _ = fmt.Fprintf(log, "# %s: %d rounds of %s\n", g.Name, g.Rounds, strings.Join(want, " "))
	rows, down, err := g.Setup(ctx, want)
	if err != nil {
		return nil, err
	}
	defer down()
	all := make([]Result, len(rows))
	for i, r := range rows {
		all[i] = Result{Name: r.Name, Unit: r.Unit, RatioTo: r.RatioTo}
	}
	var errs []error
	failed := map[int]bool{}
	for round := range g.Rounds {
		for k := range rows {
			// Each round starts with another row, so none is always first.
			i := (k + round) % len(rows)
			if failed[i] {
				continue
			}
			v, err := rows[i].Measure(ctx)
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			if err != nil {
				failed[i] = true
				errs = append(errs, fmt.Errorf("row %s, round %d: %w", rows[i].Name, round+1, err))
				continue
			}
			all[i].values = append(all[i].values, v)
		}
	}
	var res []Result
	for i, r := range all {
		if failed[i] {
			continue
		}
		r.Runs = len(r.values)
		if note := rows[i].Note; note != nil {
			r.Note = note()
		}
		r.Value = median(r.values)
		if r.Value != 0 {
			r.Spread = (slices.Max(r.values) - slices.Min(r.values)) / r.Value
		}
		res = append(res, r)
	}
	for i := range res {
		r := &res[i]
		if r.Ratio = ratio(res, r.Name, r.RatioTo); r.Ratio == 0 {
			r.RatioTo = "" // not measured
		}
	}
	_, _ = fmt.Fprintf(log, "  %s\n", time.Since(began).Round(100*time.Millisecond))
	return res, errors.Join(errs...)
}

// ratio is the median of the rounds' ratios; 0 when a row is missing. Rows of
// different groups have different rounds: then it is the ratio of the medians.
func ratio(res []Result, name, to string) float64 {
	a, b := find(res, name), find(res, to)
	if a == nil || b == nil {
		return 0
	}
	if len(a.values) != len(b.values) || len(a.values) == 0 {
		return a.Value / b.Value
	}
	q := make([]float64, len(a.values))
	for i := range q {
		q[i] = a.values[i] / b.values[i]
	}
	return median(q)
}

func find(res []Result, name string) *Result {
	for i := range res {
		if res[i].Name == name {
			return &res[i]
		}
	}
	return nil
}

func median(v []float64) float64 {
	s := slices.Clone(v)
	slices.Sort(s)
	n := len(s)
	if n == 0 {
		return math.NaN()
	}
	if n%2 == 1 {
		return s[n/2]
	}
	return (s[n/2-1] + s[n/2]) / 2
}

// Check compares results with bars, prints a line for each bar whose rows were
// measured, and reports whether all were reached.
func Check(w io.Writer, res []Result, bars []Bar) bool {
	ok := true
	for _, b := range bars {
		r := find(res, b.Row)
		if r == nil || b.To != "" && find(res, b.To) == nil {
			continue
		}
		var got, limit float64
		var what, unit string
		var pass bool
		switch {
		case b.MinRatio > 0:
			got, limit, what = ratio(res, b.Row, b.To), b.MinRatio, "at least"
			pass = got >= limit
		case b.MaxRatio > 0:
			got, limit, what = ratio(res, b.Row, b.To), b.MaxRatio, "at most"
			pass = got <= limit
		default:
			got, limit, what, unit = r.Value, b.Max, "at most", " "+r.Unit
			pass = got <= limit
		}
		verdict := "reached"
		if !pass {
			verdict, ok = "MISSED ", false
		}
		name := b.Row
		if b.To != "" {
			name += " / " + b.To
		}
		fmt.Fprintf(w, "%s  %-42s %8.3g%s, %s %g%s  %s\n", verdict, name, got, unit, what, limit, unit, b.Why)
	}
	return ok
}

// Table prints the results for people.
func Table(w io.Writer, res []Result) {
	t := tabwriter.NewWriter(w, 2, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "row\tvalue\tunit\tns/packet\tratio\tto\truns\tspread\t")
	for _, r := range res {
		ns, rt := "", ""
		if r.Unit == "Mpps" {
			ns = fmt.Sprintf("%.1f", 1000/r.Value)
		}
		if r.Ratio != 0 {
			rt = fmt.Sprintf("%.3f", r.Ratio)
		}
		fmt.Fprintf(t, "%s\t%.4g\t%s\t%s\t%s\t%s\t%d\t%.0f%%\t\n", r.Name, r.Value, r.Unit, ns, rt, r.RatioTo, r.Runs, 100*r.Spread)
	}
	t.Flush()
	for _, r := range res {
		if r.Note != "" {
			fmt.Fprintf(w, "%s: %s\n", r.Name, r.Note)
		}
	}
}

// Save writes the results, keeping rows of the file that were not measured now,
// and returns all of them, in the order of the groups. Rows that no group has
// any more are dropped.
func Save(file string, res []Result, groups []Group) ([]Result, error) {
	var old []Result
	if b, err := os.ReadFile(file); err == nil {
		if err := json.Unmarshal(b, &old); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
	}
	var all []Result
	for _, g := range groups {
		for _, n := range g.Rows {
			if r := find(res, n); r != nil {
				all = append(all, *r)
			} else if r := find(old, n); r != nil {
				all = append(all, *r)
			}
		}
	}
	b, err := json.MarshalIndent(all, "", "  ")
	if err != nil {
		return nil, err
	}
	return all, os.WriteFile(file, append(b, '\n'), 0o644)
}
