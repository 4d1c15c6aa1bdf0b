package lab

import (
	"fmt"

	"github.com/pelletier/go-toml/v2/unstable"
)

type position struct{ line, column int }

// positions finds where the values of a TOML document stand: "link[1].mtu" is
// the mtu of the second [[link]]. The document is known to be valid.
func positions(data []byte) map[string]position {
	w := &walker{pos: map[string]position{}, count: map[string]int{}}
	w.p.Reset(data)
	prefix := ""
	for w.p.NextExpression() {
		e := w.p.Expression()
		switch e.Kind {
		case unstable.Table, unstable.ArrayTable:
			prefix = w.table(e)
		case unstable.KeyValue:
			w.keyValue(prefix, e)
		}
	}
	return w.pos
}

type walker struct {
	p     unstable.Parser
	pos   map[string]position
	count map[string]int // elements so far of the array of tables at a path
}

func join(prefix, key string) string {
	if prefix == "" {
		return key
	}
	return prefix + "." + key
}

func (w *walker) mark(path string, r unstable.Range) {
	if _, ok := w.pos[path]; !ok && r.Length > 0 {
		s := w.p.Shape(r).Start
		w.pos[path] = position{s.Line, s.Column}
	}
}

// table returns the path of the table that a header opens.
func (w *walker) table(e *unstable.Node) string {
	path := ""
	for it := e.Key(); it.Next(); {
		k := it.Node()
		path = join(path, string(k.Data))
		if e.Kind == unstable.ArrayTable && it.IsLast() {
			w.count[path]++
		}
		if n := w.count[path]; n > 0 {
			path = fmt.Sprintf("%s[%d]", path, n-1)
		}
		w.mark(path, k.Raw)
	}
	return path
}

func (w *walker) keyValue(prefix string, e *unstable.Node) {
	var r unstable.Range
	for it := e.Key(); it.Next(); {
		k := it.Node()
		prefix, r = join(prefix, string(k.Data)), k.Raw
	}
	v := e.Value()
	if v.Raw.Length > 0 {
		r = v.Raw
	}
	w.mark(prefix, r)
	w.value(prefix, v)
}

func (w *walker) value(path string, v *unstable.Node) {
	switch v.Kind {
	case unstable.Array:
		i := 0
		for it := v.Children(); it.Next(); i++ {
			at := fmt.Sprintf("%s[%d]", path, i)
			w.mark(at, it.Node().Raw)
			w.value(at, it.Node())
		}
	case unstable.InlineTable:
		for it := v.Children(); it.Next(); {
			w.keyValue(path, it.Node())
		}
	}
}
