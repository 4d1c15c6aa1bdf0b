package row

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func counting(name, to string, vals ...float64) Row {
	i := 0
	return Row{Name: name, Unit: "Mpps", RatioTo: to, Measure: func(context.Context) (float64, error) {
		i++
		return vals[i-1], nil
	}}
}

func TestRun(t *testing.T) {
	downs := 0
	noted := counting("a/one", "", 10, 20, 40)
	noted.Note = func() string { return "three rounds" }
	g := Group{Name: "g", Rounds: 3, Rows: []string{"a/one", "a/two"}, Setup: func(_ context.Context, names []string) ([]Row, func(), error) {
		return []Row{noted, counting("a/two", "a/one", 5, 10, 30)}, func() { downs++ }, nil
	}}
	res, err := Run(context.Background(), []Group{g}, "a/", io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if len(res) != 2 || res[0].Value != 20 || res[1].Ratio != 0.5 || res[0].Spread != 1.5 || res[0].Runs != 3 || downs != 1 {
		t.Errorf("results %+v, taken down %d times", res, downs)
	}
	if res, err := Run(context.Background(), []Group{g}, "b", io.Discard); err != nil || len(res) != 0 {
		t.Errorf("rows of another prefix were measured: %v %v", res, err)
	}
	var out strings.Builder
	Table(&out, res)
	if !strings.Contains(out.String(), "a/one: three rounds\n") {
		t.Errorf("no note in the table: %s", out.String())
	}
	out.Reset()
	bars := []Bar{{Row: "a/two", To: "a/one", MinRatio: 0.5}, {Row: "a/one", Max: 30}, {Row: "not/measured", Max: 1}}
	if !Check(&out, res, bars) || strings.Count(out.String(), "reached") != 2 {
		t.Errorf("bars: %s", out.String())
	}
	if Check(io.Discard, res, []Bar{{Row: "a/two", To: "a/one", MinRatio: 0.51}}) {
		t.Error("a missed bar was not told")
	}
	if Check(io.Discard, res, []Bar{{Row: "a/two", To: "a/one", MaxRatio: 0.49}}) {
		t.Error("a missed bar was not told")
	}
}

func TestSave(t *testing.T) {
	file := filepath.Join(t.TempDir(), "latest.json")
	groups := []Group{{Rows: []string{"b", "a"}}}
	for _, res := range [][]Result{{{Name: "a", Value: 1}, {Name: "b", Value: 2}}, {{Name: "b", Value: 3}}} {
		all, err := Save(file, res, groups)
		if err != nil || len(all) != 2 || all[0].Name != "b" {
			t.Fatal(all, err)
		}
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if s := string(b); !strings.Contains(s, `"value": 1`) || !strings.Contains(s, `"value": 3`) || strings.Contains(s, `"value": 2`) {
		t.Errorf("file after the second run: %s", s)
	}
}

// A row that fails does not take the others along; rows that others are
// compared with are always measured.
func TestRunPart(t *testing.T) {
	bad := Row{Name: "a/bad", Measure: func(context.Context) (float64, error) { return 0, errors.New("not saturated") }}
	g := Group{Name: "g", Rounds: 2, Rows: []string{"a/base", "a/bad", "a/good", "a/other"}, Always: []string{"a/base"},
		Setup: func(_ context.Context, names []string) ([]Row, func(), error) {
			if len(names) == 2 && names[1] == "a/bad" {
				return []Row{counting("a/base", "", 2, 4), bad}, func() {}, nil
			}
			if strings.Join(names, " ") != "a/base a/good" {
				t.Errorf("rows %v", names)
			}
			return []Row{counting("a/base", "", 2, 4), counting("a/good", "a/base", 1, 2)}, func() {}, nil
		}}
	res, err := Run(context.Background(), []Group{g}, "a/good", io.Discard)
	if err != nil || len(res) != 2 || res[1].Ratio != 0.5 {
		t.Errorf("%+v, %v", res, err)
	}
	res, err = Run(context.Background(), []Group{g}, "a/bad", io.Discard)
	if err == nil || len(res) != 1 || res[0].Name != "a/base" {
		t.Errorf("%+v, %v", res, err)
	}
}
