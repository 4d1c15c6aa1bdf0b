// Package irmcmd is the grammar of the reference's management command irm
// (spec 45 §9, §9.1): words without dashes, abbreviated to any prefix, the
// first keyword in a fixed order winning. It turns a command line into requests
// to the daemon and replies into the reference's tables. It does no input or
// output; what it needs to know of the machine it asks Env.
package irmcmd

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/o7s/o7s-router/lib/ipc"
	"github.com/o7s/o7s-router/lib/qos"
)

// Env answers what a command line depends on besides its words.
type Env interface {
	// Program gives the absolute path of an executable: of the file prog, else
	// of the program of that name in PATH. Symbolic links are not followed, as
	// a process is known by the name that it was started by.
	Program(prog string) (string, error)
	// Readable reports nil when the file exists.
	Readable(path string) error
}

// Call is a request to the daemon.
type Call struct {
	Op   ipc.Op
	Args any
}

// Command is a parsed command line.
type Command struct {
	Calls   []Call   // made in order, up to the first that fails
	Notices []string // lines to print first
	Help    string   // text to print instead of calling
}

// Table renders the reply to a list request as the reference prints it, and is
// empty for other requests, which print nothing.
func Table(c Call, r ipc.ListResult) string {
	a, ok := c.Args.(ipc.ListArgs)
	switch {
	case !ok:
		return ""
	case a.What == "ipcps":
		return IPCPTable(r.IPCPs)
	default:
		return NameTable(r.Names)
	}
}

// usage is the error of a command line without what it needs.
func usage(format string, a ...any) error {
	return fmt.Errorf("usage: irm "+format, a...)
}

// match returns the index of the first keyword that word is a prefix of, or -1.
func match(word string, keywords ...string) int {
	if word == "" {
		return -1
	}
	for i, k := range keywords {
		if strings.HasPrefix(k, word) {
			return i
		}
	}
	return -1
}

// verb is a keyword with what it does to the words after it.
type verb struct {
	word string
	run  func(args []string, env Env) (Command, error)
}

// dispatch runs the first verb that args[0] is a prefix of.
func dispatch(what string, args []string, env Env, verbs []verb) (Command, error) {
	words := make([]string, len(verbs))
	for i, v := range verbs {
		words[i] = v.word
	}
	if len(args) == 0 {
		return Command{}, usage("%s{%s}", what, strings.Join(words, "|"))
	}
	i := match(args[0], words...)
	if i < 0 {
		return Command{}, fmt.Errorf("unknown operation %q (expected irm %s{%s})", args[0], what, strings.Join(words, "|"))
	}
	return verbs[i].run(args[1:], env)
}

// Parse reads the words after "irm".
func Parse(args []string, env Env) (Command, error) {
	return dispatch("", args, env, []verb{
		{"ipcp", ipcpVerb},
		{"bind", bindVerb(ipc.OpBind)},
		{"unbind", bindVerb(ipc.OpUnbind)},
		{"name", nameVerb},
		{"help", help(helpTop)},
		// Of older tutorials; after the others, so that no abbreviation changes.
		{"register", oldRegister(ipc.OpNameRegister)},
		{"unregister", oldRegister(ipc.OpNameUnregister)},
	})
}

func help(text string) func([]string, Env) (Command, error) {
	return func([]string, Env) (Command, error) { return Command{Help: text}, nil }
}

func one(op ipc.Op, args any) (Command, error) {
	return Command{Calls: []Call{{op, args}}}, nil
}

// param is an option of a command: a keyword with a value, or a flag.
type param struct {
	word string
	flag bool
	set  func(value string) error
}

func str(dst *string) func(string) error {
	return func(v string) error { *dst = v; return nil }
}

// parse reads pairs of keyword and value, in any order.
func parse(what string, args []string, params []param) error {
	words := make([]string, len(params))
	for i, p := range params {
		words[i] = p.word
	}
	for len(args) > 0 {
		i := match(args[0], words...)
		if i < 0 {
			return fmt.Errorf("%s: unknown option %q (expected %s)", what, args[0], strings.Join(words, ", "))
		}
		p := params[i]
		if p.flag {
			if err := p.set(""); err != nil {
				return err
			}
			args = args[1:]
			continue
		}
		if len(args) == 1 {
			return fmt.Errorf("%s: option %s needs a value", what, p.word)
		}
		if err := p.set(args[1]); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		args = args[2:]
	}
	return nil
}

// Types in the order in which bootstrap matches abbreviations, and the names
// that older tutorials use.
var typeWords = []string{"unicast", "broadcast", "udp4", "udp6", "eth-dix", "eth-llc", "local"}

var oldTypes = map[string]string{
	"normal":       "unicast",
	"shim-eth-llc": "eth-llc",
	"shim-eth-dix": "eth-dix",
	"shim-udp":     "udp4",
	"udp":          "udp4",
	"shim-local":   "local",
}

func unknownType(v string, words []string) error {
	return fmt.Errorf("unknown type %q (expected %s)", v, strings.Join(words, ", "))
}

// ipcpType reads a type: an old name, an exact word, or with abbreviate a prefix.
func ipcpType(dst *string, abbreviate bool, words ...string) func(string) error {
	return func(v string) error {
		i := match(v, words...)
		switch {
		case oldTypes[v] != "" && match(oldTypes[v], words...) >= 0:
			*dst = oldTypes[v]
		case i >= 0 && (abbreviate || words[i] == v):
			*dst = words[i]
		default:
			return unknownType(v, words)
		}
		return nil
	}
}

func ipcpVerb(args []string, env Env) (Command, error) {
	return dispatch("ipcp ", args, env, []verb{
		{"create", ipcpCreate},
		{"destroy", ipcpDestroy},
		{"bootstrap", ipcpBootstrap},
		{"enroll", ipcpEnroll},
		{"connect", ipcpConnect},
		{"disconnect", ipcpDisconnect},
		{"list", ipcpList},
		{"help", help(helpIPCP)},
	})
}

func ipcpCreate(args []string, _ Env) (Command, error) {
	var a ipc.IPCPArgs
	err := parse("ipcp create", args, []param{
		{word: "name", set: str(&a.Name)},
		{word: "type", set: ipcpType(&a.Type, false, typeWords...)},
	})
	if err != nil {
		return Command{}, err
	}
	if a.Name == "" || a.Type == "" {
		return Command{}, usage("ipcp create name <ipcp> type {%s}", strings.Join(typeWords, "|"))
	}
	return one(ipc.OpIPCPCreate, a)
}

func ipcpDestroy(args []string, _ Env) (Command, error) {
	var a ipc.IPCPArgs
	if err := parse("ipcp destroy", args, []param{{word: "name", set: str(&a.Name)}}); err != nil {
		return Command{}, err
	}
	if a.Name == "" {
		return Command{}, usage("ipcp destroy name <ipcp>")
	}
	return one(ipc.OpIPCPDestroy, a)
}

// The options of bootstrap in the order in which abbreviations match, with the
// key that the daemon knows them by and the types that have them. The others
// the reference takes and ignores.
var bootOptions = []struct{ word, key, types string }{
	{"hash", "hash", "local unicast eth-llc eth-dix"},
	{"ip", "ip", "udp4 udp6"},
	{"dns", "dns", "udp4 udp6"},
	{"device", "dev", "eth-llc eth-dix"},
	{"ethertype", "ethertype", "eth-dix"},
	{"addr", "addr_size", "unicast"},
	{"eid", "eid_size", "unicast"},
	{"ttl", "ttl", "unicast"},
	{"port", "port", "udp4 udp6"},
	{"autobind", "", "unicast broadcast"},
	{"addr_auth", "addr_auth", "unicast"},
	{"directory", "directory", "unicast"},
	{"dht_alpha", "dht_alpha", "unicast"},
	{"dht_k", "dht_k", "unicast"},
	{"dht_t_expire", "dht_t_expire", "unicast"},
	{"dht_t_refresh", "dht_t_refresh", "unicast"},
	{"dht_t_replicate", "dht_t_replicate", "unicast"},
	{"routing", "routing", "unicast"},
	{"ls_t_timeo", "ls_t_timeo", "unicast"},
	{"ls_t_update", "ls_t_update", "unicast"},
	{"ls_t_recalc", "ls_t_recalc", "unicast"},
	{"congestion", "congestion", "unicast"},
	// The spellings of the configuration file and of older tutorials.
	{"addr_size", "addr_size", "unicast"},
	{"eid_size", "eid_size", "unicast"},
	{"max_ttl", "ttl", "unicast"},
	{"if", "dev", "eth-llc eth-dix"},
	{"fd", "eid_size", "unicast"},
}

func ipcpBootstrap(args []string, _ Env) (Command, error) {
	a := ipc.BootstrapArgs{Options: map[string]string{}}
	pff := ""
	params := []param{
		{word: "type", set: ipcpType(&a.Type, true, typeWords...)},
		{word: "layer", set: str(&a.Layer)},
		{word: "name", set: str(&a.Name)},
	}
	for _, o := range bootOptions {
		if o.key == "" {
			params = append(params, param{o.word, true, func(string) error { a.Autobind = true; return nil }})
			continue
		}
		params = append(params, param{word: o.word, set: func(v string) error { a.Options[o.key] = v; return nil }})
	}
	params = append(params, param{word: "pff", set: func(v string) error {
		if v != "simple" && v != "alternate" {
			return fmt.Errorf("option pff %q (expected simple or alternate)", v)
		}
		pff = v
		return nil
	}})
	if err := parse("ipcp bootstrap", args, params); err != nil {
		return Command{}, err
	}
	if a.Name == "" || a.Layer == "" {
		return Command{}, usage("ipcp bootstrap name <ipcp> layer <layer> [type {%s}] [option value]... (see irm ipcp help)", strings.Join(typeWords, "|"))
	}
	// The forwarding policy was an option of its own once.
	switch {
	case pff == "alternate":
		a.Options["routing"] = "lfa"
	case pff == "simple" && a.Options["routing"] == "":
		a.Options["routing"] = "link_state"
	}
	if a.Options["addr_auth"] == "flat_random" {
		a.Options["addr_auth"] = "flat"
	}
	c := Command{}
	if a.Type != "" {
		for _, o := range bootOptions {
			if strings.Contains(" "+o.types+" ", " "+a.Type+" ") {
				continue
			}
			_, given := a.Options[o.key]
			if o.key == "" && a.Autobind {
				given, a.Autobind = true, false
			}
			if given {
				delete(a.Options, o.key)
				c.Notices = append(c.Notices, fmt.Sprintf("Option %s does not apply to type %s, ignored.", o.word, a.Type))
			}
		}
	}
	if len(a.Options) == 0 {
		a.Options = nil
	}
	c.Calls = []Call{{ipc.OpIPCPBootstrap, a}}
	return c, nil
}

func ipcpEnroll(args []string, _ Env) (Command, error) {
	a := ipc.EnrollArgs{Type: "unicast"}
	err := parse("ipcp enroll", args, []param{
		{word: "name", set: str(&a.Name)},
		{word: "type", set: ipcpType(&a.Type, true, "unicast", "broadcast")},
		{word: "layer", set: str(&a.Layer)},
		{word: "dst", set: str(&a.Dst)},
		{"autobind", true, func(string) error { a.Autobind = true; return nil }},
	})
	if err != nil {
		return Command{}, err
	}
	if a.Name == "" || a.Layer == "" && a.Dst == "" {
		return Command{}, usage("ipcp enroll name <ipcp> [type {unicast|broadcast}] [layer <layer>] [dst <name>] [autobind], at least one of layer and dst")
	}
	return one(ipc.OpIPCPEnroll, a)
}

func component(dst *string) func(string) error {
	return func(v string) error {
		if v != "dt" && v != "mgmt" && v != "*" {
			return fmt.Errorf("unknown component %q (expected dt, mgmt or *)", v)
		}
		*dst = v
		return nil
	}
}

func ipcpConnect(args []string, _ Env) (Command, error) {
	a := ipc.ConnectArgs{Component: "*", QoS: qos.Raw}
	var c Command
	err := parse("ipcp connect", args, []param{
		{word: "name", set: str(&a.Name)},
		{word: "dst", set: str(&a.Dst)},
		{word: "component", set: component(&a.Component)},
		{word: "qos", set: func(v string) error {
			q, err := qos.ByName(v)
			if err != nil {
				c.Notices = append(c.Notices, fmt.Sprintf("Unknown QoS %q, using raw (expected raw, best, voice, video or data).", v))
				q = qos.Raw
			}
			a.QoS = q
			return nil
		}},
	})
	if err != nil {
		return Command{}, err
	}
	if a.Name == "" || a.Dst == "" {
		return Command{}, usage("ipcp connect name <ipcp> dst <name> [component {dt|mgmt|*}] [qos {raw|best|video|voice|data}]")
	}
	c.Calls = []Call{{ipc.OpIPCPConnect, a}}
	return c, nil
}

func ipcpDisconnect(args []string, _ Env) (Command, error) {
	a := ipc.ConnectArgs{Component: "*"}
	err := parse("ipcp disconnect", args, []param{
		{word: "name", set: str(&a.Name)},
		{word: "dst", set: str(&a.Dst)},
		{word: "component", set: component(&a.Component)},
	})
	if err != nil {
		return Command{}, err
	}
	if a.Name == "" || a.Dst == "" {
		return Command{}, usage("ipcp disconnect name <ipcp> dst <name> [component {dt|mgmt|*}]")
	}
	return one(ipc.OpIPCPDisconnect, a)
}

// ipcpList takes a type and a name and filters by neither, like the reference.
func ipcpList(args []string, _ Env) (Command, error) {
	var t, n string
	err := parse("ipcp list", args, []param{
		{word: "type", set: ipcpType(&t, true, typeWords...)},
		{word: "name", set: str(&n)},
	})
	if err != nil {
		return Command{}, err
	}
	return one(ipc.OpList, ipc.ListArgs{What: "ipcps"})
}

func bindVerb(op ipc.Op) func([]string, Env) (Command, error) {
	return func(args []string, env Env) (Command, error) {
		what, text := "bind", helpBind
		if op == ipc.OpUnbind {
			what, text = "unbind", helpUnbind
		}
		return dispatch(what+" ", args, env, []verb{
			{"program", bindProgram(op, what)},
			{"process", bindProcess(op, what)},
			{"ipcp", bindIPCP(op, what)},
			{"help", help(text)},
		})
	}
}

func bindProgram(op ipc.Op, what string) func([]string, Env) (Command, error) {
	return func(args []string, env Env) (Command, error) {
		var a ipc.BindArgs
		syntax := usage("bind program <program> name <name> [auto] [-- <arguments>]")
		if op == ipc.OpUnbind {
			syntax = usage("unbind program <program> name <name>")
		}
		if len(args) == 0 || args[0] == "" {
			return Command{}, syntax
		}
		prog := args[0]
		args = args[1:]
		if op == ipc.OpBind {
			for i, w := range args {
				if w == "--" {
					a.Args = args[i+1:]
					args = args[:i]
					break
				}
			}
		}
		for len(args) > 0 {
			switch {
			case match(args[0], "name") == 0 && len(args) > 1:
				a.Name = args[1]
				args = args[2:]
			case args[0] == "auto" && op == ipc.OpBind:
				a.Auto = true
				args = args[1:]
			case match(args[0], "name") == 0:
				return Command{}, syntax
			default:
				return Command{}, fmt.Errorf("%s program: unknown option %q (%v)", what, args[0], syntax)
			}
		}
		if a.Name == "" {
			return Command{}, syntax
		}
		path, err := env.Program(prog)
		switch {
		case err == nil:
			a.Prog = path
		case op == ipc.OpUnbind: // it may have been removed; the base name decides
			a.Prog = prog
		default:
			return Command{}, fmt.Errorf("bind program: %w", err)
		}
		return one(op, a)
	}
}

func bindProcess(op ipc.Op, what string) func([]string, Env) (Command, error) {
	return func(args []string, _ Env) (Command, error) {
		if len(args) == 0 {
			return Command{}, usage("%s process <pid> name <name>", what)
		}
		pid, err := strconv.ParseInt(args[0], 10, 32)
		if err != nil || pid <= 0 {
			return Command{}, fmt.Errorf("%s process: %q is not a process id", what, args[0])
		}
		a := ipc.BindArgs{PID: int32(pid)}
		if err := parse(what+" process", args[1:], []param{{word: "name", set: str(&a.Name)}}); err != nil {
			return Command{}, err
		}
		if a.Name == "" {
			return Command{}, usage("%s process <pid> name <name>", what)
		}
		return one(op, a)
	}
}

func bindIPCP(op ipc.Op, what string) func([]string, Env) (Command, error) {
	return func(args []string, _ Env) (Command, error) {
		if len(args) == 0 || args[0] == "" {
			return Command{}, usage("%s ipcp <ipcp> name <name>", what)
		}
		a := ipc.BindArgs{IPCP: args[0]}
		if err := parse(what+" ipcp", args[1:], []param{{word: "name", set: str(&a.Name)}}); err != nil {
			return Command{}, err
		}
		if a.Name == "" {
			return Command{}, usage("%s ipcp <ipcp> name <name>", what)
		}
		return one(op, a)
	}
}

func nameVerb(args []string, env Env) (Command, error) {
	return dispatch("name ", args, env, []verb{
		{"create", nameCreate},
		{"destroy", nameDestroy},
		{"register", nameRegister(ipc.OpNameRegister, "register")},
		{"unregister", nameRegister(ipc.OpNameUnregister, "unregister")},
		{"list", nameList},
		{"help", help(helpName)},
	})
}

// Security files of a name (spec 32 §8).
var pathWords = []string{"sencpath", "scrtpath", "skeypath", "cencpath", "ccrtpath", "ckeypath"}

func nameCreate(args []string, env Env) (Command, error) {
	if len(args) == 0 || args[0] == "" {
		return Command{}, usage("name create <name> [lb {round-robin|spillover}] [{%s} <file>]...", strings.Join(pathWords, "|"))
	}
	a := ipc.NameArgs{Name: args[0], LB: "round-robin"}
	params := []param{{word: "lb", set: func(v string) error {
		if v != "round-robin" && v != "spillover" {
			return fmt.Errorf("unknown load-balancing policy %q (expected round-robin or spillover)", v)
		}
		a.LB = v
		return nil
	}}}
	for _, w := range pathWords {
		params = append(params, param{word: w, set: func(v string) error {
			if err := env.Readable(v); err != nil {
				return fmt.Errorf("%s: %w", w, err)
			}
			if a.Security == nil {
				a.Security = map[string]string{}
			}
			a.Security[w] = v
			return nil
		}})
	}
	if err := parse("name create", args[1:], params); err != nil {
		return Command{}, err
	}
	return one(ipc.OpNameCreate, a)
}

func nameDestroy(args []string, _ Env) (Command, error) {
	if len(args) != 1 || args[0] == "" {
		return Command{}, usage("name destroy <name>")
	}
	return one(ipc.OpNameDestroy, ipc.NameArgs{Name: args[0]})
}

const maxTargets = 128 // of one register command, each of ipcp and layer

func checkTargets(a ipc.RegisterArgs, what string) (Command, error) {
	switch {
	case a.Name == "" || len(a.IPCPs)+len(a.Layers) == 0:
		return Command{}, usage("%s", what)
	case len(a.IPCPs) > maxTargets || len(a.Layers) > maxTargets:
		return Command{}, fmt.Errorf("at most %d ipcps and %d layers in one command", maxTargets, maxTargets)
	}
	return Command{}, nil
}

func nameRegister(op ipc.Op, what string) func([]string, Env) (Command, error) {
	return func(args []string, _ Env) (Command, error) {
		var a ipc.RegisterArgs
		if len(args) > 0 {
			a.Name = args[0]
			err := parse("name "+what, args[1:], []param{
				{word: "ipcp", set: func(v string) error { a.IPCPs = append(a.IPCPs, v); return nil }},
				{word: "layer", set: func(v string) error { a.Layers = append(a.Layers, v); return nil }},
			})
			if err != nil {
				return Command{}, err
			}
		}
		if c, err := checkTargets(a, "name "+what+" <name> {ipcp <ipcp>|layer <layer>}..."); err != nil {
			return c, err
		}
		return one(op, a)
	}
}

// oldRegister reads "register name N layer L…": one layer keyword may have
// several values.
func oldRegister(op ipc.Op) func([]string, Env) (Command, error) {
	return func(args []string, _ Env) (Command, error) {
		var a ipc.RegisterArgs
		what := "register"
		if op == ipc.OpNameUnregister {
			what = "unregister"
		}
		list := (*[]string)(nil)
		for len(args) > 0 {
			k := -1
			if len(args) > 1 {
				k = match(args[0], "name", "layer", "ipcp")
			}
			if k < 0 && a.Name == "" && list == nil {
				a.Name, args = args[0], args[1:] // the older form: without its keyword
				continue
			}
			if k < 0 {
				if list == nil {
					return Command{}, fmt.Errorf("%s: unknown option %q (expected name, layer or ipcp)", what, args[0])
				}
				*list = append(*list, args[0])
				args = args[1:]
				continue
			}
			switch k {
			case 0:
				a.Name, list = args[1], nil
			case 1:
				list = &a.Layers
			case 2:
				list = &a.IPCPs
			}
			if list != nil {
				*list = append(*list, args[1])
			}
			args = args[2:]
		}
		if c, err := checkTargets(a, what+" name <name> layer <layer>..."); err != nil {
			return c, err
		}
		return one(op, a)
	}
}

func nameList(args []string, _ Env) (Command, error) {
	a := ipc.ListArgs{What: "names"}
	switch {
	case len(args) == 0:
	case len(args) == 1 && match(args[0], "list") < 0:
		a.Prefix = args[0]
	default:
		if err := parse("name list", args, []param{{word: "list", set: str(&a.Prefix)}}); err != nil {
			return Command{}, err
		}
	}
	return one(ipc.OpList, a)
}
