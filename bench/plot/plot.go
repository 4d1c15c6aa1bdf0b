// Package plot draws the results.
package plot

import (
	"fmt"
	"image/color"
	"os"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgimg"

	"github.com/o7s/o7s-router/bench/row"
)

// One unit, one picture: rows of different units have no common axis.
const (
	width   = 900
	perRow  = 26 // points of height
	perPlot = 80 // for the title and the axis
	margin  = 14
)

var (
	ours   = color.RGBA{R: 0x1f, G: 0x77, B: 0xb4, A: 0xff}
	theirs = color.RGBA{R: 0xbb, G: 0xbb, B: 0xbb, A: 0xff}
)

// titles are the units in the order in which they are drawn.
var titles = []struct{ unit, title string }{
	{"Mpps", "million packets per second (more is better)"},
	{"Mmsg/s", "million messages per second between two programs of a machine (more is better)"},
	{"Gbit/s", "goodput on a clean link, Gbit/s (more is better)"},
	{"Mbit/s", "goodput on a bad link, Mbit/s (more is better)"},
	{"s/GB", "processor seconds for each gigabyte, both ends"},
	{"ns", "nanoseconds per program run"},
	{"us", "microseconds"},
	{"ms", "milliseconds"},
	{"s", "seconds"},
	{"MiB", "MiB"},
	{"KiB", "KiB for each flow"},
}

// Save writes a PNG with a bar for every row. Rows that are not ours, which
// means that theirs reports true, are grey.
func Save(file string, res []row.Result, theirs func(name string) bool) error {
	var plots []*plot.Plot
	var heights []vg.Length
	for _, t := range titles {
		var rows []row.Result
		for _, r := range res {
			if r.Unit == t.unit {
				rows = append(rows, r)
			}
		}
		if len(rows) == 0 {
			continue
		}
		p, err := chart(t.title, rows, theirs)
		if err != nil {
			return fmt.Errorf("plot %s: %w", t.unit, err)
		}
		plots = append(plots, p)
		heights = append(heights, vg.Points(float64(perPlot+perRow*len(rows))))
	}
	total := vg.Length(0)
	for _, h := range heights {
		total += h
	}
	c := vgimg.New(vg.Points(width), total)
	page := draw.New(c)
	top := total
	for i, p := range plots {
		p.Draw(draw.Crop(page, vg.Points(margin), -vg.Points(margin), top-heights[i]+vg.Points(margin), top-total-vg.Points(margin)))
		top -= heights[i]
	}
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	if _, err := (vgimg.PngCanvas{Canvas: c}).WriteTo(f); err != nil {
		_ = f.Close()
		return fmt.Errorf("write %s: %w", file, err)
	}
	return f.Close()
}

// chart is horizontal bars, the first row at the top, each with its value.
func chart(title string, rows []row.Result, foreign func(string) bool) (*plot.Plot, error) {
	p := plot.New()
	p.Title.Text = title
	p.X.Min = 0
	rows = slices.Clone(rows)
	slices.Reverse(rows)
	var names []string
	labels := plotter.XYLabels{}
	for i, r := range rows {
		b, err := plotter.NewBarChart(plotter.Values{r.Value}, vg.Points(perRow-10))
		if err != nil {
			return nil, err
		}
		b.Horizontal, b.XMin, b.LineStyle.Width, b.Color = true, float64(i), 0, ours
		if foreign(r.Name) {
			b.Color = theirs
		}
		p.Add(b)
		names = append(names, r.Name)
		text := fmt.Sprintf(" %.4g", r.Value)
		if r.RatioTo != "" {
			text += fmt.Sprintf("  (%.2f of %s)", r.Ratio, r.RatioTo)
		}
		labels.XYs = append(labels.XYs, plotter.XY{X: r.Value, Y: float64(i)})
		labels.Labels = append(labels.Labels, text)
		p.X.Max = max(p.X.Max, 1.35*r.Value) // room for the text
	}
	l, err := plotter.NewLabels(labels)
	if err != nil {
		return nil, err
	}
	for i := range l.TextStyle {
		l.TextStyle[i].YAlign = draw.YCenter
	}
	p.Add(l)
	p.NominalY(names...)
	return p, nil
}
