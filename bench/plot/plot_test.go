package plot

import (
	"image/png"
	"os"
	"path/filepath"
	"testing"

	"github.com/o7s/o7s-router/bench/row"
)

func TestSave(t *testing.T) {
	file := filepath.Join(t.TempDir(), "p.png")
	res := []row.Result{
		{Name: "transit/bare", Value: 14, Unit: "Mpps"}, {Name: "transit/1k", Value: 12, Unit: "Mpps", Ratio: 0.86, RatioTo: "transit/bare"},
		{Name: "boot/3node", Value: 0.5, Unit: "s"},
	}
	if err := Save(file, res, func(n string) bool { return n == "transit/bare" }); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c, err := png.DecodeConfig(f)
	if err != nil || c.Width < 800 || c.Height < 200 {
		t.Errorf("%+v, %v", c, err)
	}
}
