// Package version knows which build this is.
package version

import "runtime/debug"

// Version is set by the linker (see the Makefile).
var Version = ""

// String returns the version of this build: what the linker set, else the
// module version or commit that Go recorded, else "unknown".
func String() string {
	if Version != "" {
		return Version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return s.Value[:min(12, len(s.Value))]
		}
	}
	return "unknown"
}
