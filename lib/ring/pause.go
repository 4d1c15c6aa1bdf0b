//go:build amd64 || arm64

package ring

// pause tells the processor that this is a spinning loop: it leaves the core
// to the other hyperthread and does not speculate ahead.
func pause()
