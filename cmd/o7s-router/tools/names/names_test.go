package names

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/qos"
)

func rule(t *testing.T, maps ...string) *Rule {
	t.Helper()
	r := &Rule{}
	for _, m := range maps {
		if err := r.Add(m); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

func TestNames(t *testing.T) {
	r := rule(t, "Web.example=w", "web.example:443=tls", "10.0.0.1=ten", "[fd00::1]:80=six", "fd00::2=v6", "*:25=mail")
	for _, c := range []struct {
		host string
		port uint16
		want []string
	}{
		{"web.example", 80, []string{"w"}},
		{"WEB.example.", 443, []string{"tls"}},
		{"10.0.0.1", 1, []string{"ten"}},
		{"::ffff:10.0.0.1", 1, []string{"ten"}},
		{"10.0.0.2", 1, nil},
		{"fd00::1", 80, []string{"six"}},
		{"fd00::1", 81, nil},
		{"fd00::2", 81, []string{"v6"}},
		{"fd00:0::2", 81, []string{"v6"}},
		{"any", 25, []string{"mail"}},
		{"1.2.3.4", 25, []string{"mail"}},
		{"Srv", 80, []string{"Srv:80", "Srv"}},
		{"srv.", 80, []string{"srv:80", "srv"}},
		{"", 80, nil},
	} {
		if got := r.Names(c.host, c.port); !cmp.Equal(got, c.want) {
			t.Errorf("%s port %d: %v, want %v", c.host, c.port, got, c.want)
		}
	}
	for host, want := range map[string]bool{"web.example": true, "10.0.0.1": true, "other": true, "fd00::1": true} {
		if r.HasHost(host) != want { // * is about all
			t.Errorf("HasHost(%s) is %v", host, !want)
		}
	}
	r = rule(t, "a:1=x")
	if !r.HasHost("A") || r.HasHost("b") || r.HasAddresses() {
		t.Error("one host")
	}
	if !rule(t, "::1=x").HasAddresses() || !rule(t, "*=x").HasAddresses() || (&Rule{}).HasAddresses() {
		t.Error("addresses")
	}
}

func TestBadMaps(t *testing.T) {
	for _, s := range []string{"", "=", "a=", "=b", "a", "a:=b", "a:0=b", "a:65536=b", "a:x=b", ":80=b", "[::1=b"} {
		if err := (&Rule{}).Add(s); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v", s, err)
		}
	}
	r := rule(t, "a:1=b")
	if err := r.Set("A:1=c"); err == nil {
		t.Error("twice the same")
	}
	if r.String() != "a:1=b" {
		t.Error(r.String())
	}
}

// dialer refuses, each name with its error.
type dialer struct {
	asked []string
	errs  map[string]error
}

func (d *dialer) Alloc(_ context.Context, name string, _ *qos.Spec) (*o7s.Flow, error) {
	d.asked = append(d.asked, name)
	if err, ok := d.errs[name]; ok {
		return nil, err
	}
	return &o7s.Flow{}, nil
}

func TestDial(t *testing.T) {
	for _, c := range []struct {
		host  string
		errs  map[string]error
		asked []string
		want  error
	}{
		{"h", nil, []string{"h:1"}, nil},
		{"h", map[string]error{"h:1": o7serr.ENAME}, []string{"h:1", "h"}, nil},
		{"h", map[string]error{"h:1": o7serr.ENAME, "h": o7serr.ENAME}, []string{"h:1", "h"}, o7serr.ENAME},
		{"h", map[string]error{"h:1": o7serr.ENAME, "h": o7serr.EIPCP}, []string{"h:1", "h"}, o7serr.EIPCP},
		{"h", map[string]error{"h:1": o7serr.EIPCP}, []string{"h:1"}, o7serr.EIPCP},
		{"h", map[string]error{"h:1": o7serr.EIRMD}, []string{"h:1"}, o7serr.EIRMD},
		{"1.2.3.4", nil, nil, o7serr.ENAME},
		{"m", map[string]error{"M": o7serr.ENAME}, []string{"M"}, o7serr.ENAME},
	} {
		d := &dialer{errs: c.errs}
		_, err := rule(t, "m=M").Dial(t.Context(), d, c.host, 1, &qos.Data)
		if !errors.Is(err, c.want) || c.want == nil && err != nil || !slices.Equal(d.asked, c.asked) {
			t.Errorf("%s %v: asked %v, error %v", c.host, c.errs, d.asked, err)
		}
	}
}

func FuzzAdd(f *testing.F) {
	for _, s := range []string{"a=b", "a:1=b", "[::1]:2=x", "::1=y", "*=z", "a:b:c=d"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r := &Rule{}
		if r.Add(s) != nil {
			return
		}
		i := strings.LastIndexByte(s, '=')
		host, port, err := splitHost(s[:i])
		if err != nil {
			t.Fatal(err)
		}
		if n, ok := r.Mapped(host, port); port != 0 && (!ok || n != s[i+1:]) {
			t.Errorf("%q: %q %v", s, n, ok)
		}
		if !r.HasHost(host) {
			t.Errorf("%q is not about %q", s, host)
		}
	})
}
