package kit

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/o7s/o7s-router/lib/qos"
)

// Opt is an option of a tool.
type Opt struct {
	Short string // one letter, or ""
	Long  string
	Value bool               // it has one
	Set   func(string) error // its error follows the option's name
}

// name is how messages call the option.
func (o Opt) name() string {
	if o.Short != "" {
		return "-" + o.Short
	}
	return "--" + o.Long
}

// Flag is an option without a value.
func Flag(short, long string, p *bool) Opt {
	return Opt{Short: short, Long: long, Set: func(string) error { *p = true; return nil }}
}

// String is an option with any value.
func String(short, long string, p *string) Opt {
	return Opt{Short: short, Long: long, Value: true, Set: func(v string) error { *p = v; return nil }}
}

// Int is an option with a number within limits.
func Int(short, long string, p *int, low, high int) Opt {
	return Opt{Short: short, Long: long, Value: true, Set: func(v string) error {
		n, err := strconv.Atoi(v)
		if err != nil || n < low || n > high {
			return fmt.Errorf("expected a number from %d to %d", low, high)
		}
		*p = n
		return nil
	}}
}

// Time is an option with a duration within limits; a number without a unit
// counts unit.
func Time(short, long string, p *time.Duration, unit, low, high time.Duration) Opt {
	return Opt{Short: short, Long: long, Value: true, Set: func(v string) error {
		d, err := parseTime(v, unit)
		switch {
		case err != nil:
			return err
		case d < low:
			return fmt.Errorf("expected at least %v", low)
		case high > 0 && d > high:
			return fmt.Errorf("expected at most %v", high)
		}
		*p = d
		return nil
	}}
}

func parseTime(v string, unit time.Duration) (time.Duration, error) {
	digits := strings.TrimRight(v, "abcdefghijklmnopqrstuvwxyz")
	unit = map[string]time.Duration{
		"": unit, "ms": time.Millisecond, "s": time.Second,
		"m": time.Minute, "h": time.Hour, "d": 24 * time.Hour,
	}[v[len(digits):]]
	n, err := strconv.ParseUint(digits, 10, 32)
	if err != nil || unit == 0 || n > uint64(1<<62/unit) {
		return 0, fmt.Errorf("expected a time such as 200ms, 3s, 5m, 1h or 1d")
	}
	return time.Duration(n) * unit, nil
}

// maxRate is the highest rate in bit/s: far beyond any machine, and safe to
// reckon with.
const maxRate = 1e15

// Rate is an option with a rate in bit/s; k, M and G behind it are decimal.
func Rate(short, long string, p *float64) Opt {
	return Opt{Short: short, Long: long, Value: true, Set: func(v string) error {
		scale, digits := 1.0, v
		if n := len(v) - 1; n > 0 {
			if i := strings.IndexByte("kMG", v[n]); i >= 0 {
				scale, digits = []float64{1e3, 1e6, 1e9}[i], v[:n]
			}
		}
		if strings.Trim(digits, "0123456789.") == "" {
			if r, err := strconv.ParseFloat(digits, 64); err == nil && r*scale >= 1 && r*scale <= maxRate {
				*p = r * scale
				return nil
			}
		}
		return fmt.Errorf("expected a rate in bit/s such as 64000, 500k, 10M or 1G")
	}}
}

// QoS is an option with the name of a quality of service.
func QoS(short, long string, p *qos.Spec) Opt {
	return Opt{Short: short, Long: long, Value: true, Set: func(v string) (err error) {
		*p, err = qos.ByName(v)
		return err
	}}
}

// Parse reads a command line as getopt_long does: short options may be joined,
// with each other and with a value; long ones may be cut short where that says
// enough. Its errors are one line.
func Parse(args []string, opts []Opt) error {
	set := func(o *Opt, v string) error {
		if err := o.Set(v); err != nil {
			return fmt.Errorf("%s %s: %w", o.name(), v, err)
		}
		return nil
	}
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		next := func(opt string) (string, error) {
			if len(args) == 0 {
				return "", fmt.Errorf("option %s needs a value", opt)
			}
			v := args[0]
			args = args[1:]
			return v, nil
		}
		switch {
		case len(arg) > 2 && strings.HasPrefix(arg, "--"):
			word, v, inline := strings.Cut(arg[2:], "=")
			o, err := findLong(opts, word)
			switch {
			case err != nil:
			case inline && !o.Value:
				err = fmt.Errorf("option --%s has no value", o.Long)
			case !inline && o.Value:
				v, err = next("--" + o.Long)
			}
			if err == nil {
				err = set(o, v)
			}
			if err != nil {
				return err
			}
		case len(arg) > 1 && arg[0] == '-' && arg[1] != '-':
			for rest := arg[1:]; rest != ""; {
				o, err := findShort(opts, rest[:1])
				if err != nil {
					return err
				}
				v := ""
				rest = rest[1:]
				if o.Value {
					if v, rest = rest, ""; v == "" {
						if v, err = next("-" + o.Short); err != nil {
							return err
						}
					}
				}
				if err := set(o, v); err != nil {
					return err
				}
			}
		default:
			return fmt.Errorf("unexpected argument %q", arg)
		}
	}
	return nil
}

func findShort(opts []Opt, s string) (*Opt, error) {
	for i := range opts {
		if opts[i].Short == s {
			return &opts[i], nil
		}
	}
	return nil, fmt.Errorf("unknown option -%s", s)
}

func findLong(opts []Opt, word string) (*Opt, error) {
	var found *Opt
	var names []string
	for i := range opts {
		switch o := &opts[i]; {
		case o.Long == word:
			return o, nil
		case o.Long != "" && strings.HasPrefix(o.Long, word):
			found = o
			names = append(names, "--"+o.Long)
		}
	}
	switch len(names) {
	case 0:
		return nil, fmt.Errorf("unknown option --%s", word)
	case 1:
		return found, nil
	}
	return nil, fmt.Errorf("option --%s may be %s", word, strings.Join(names, " or "))
}
