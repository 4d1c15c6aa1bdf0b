package kittest

import (
	"bytes"
	"sync"
	"testing"
	"time"
)

// Buffer is a buffer that a tool writes to while a test reads it.
type Buffer struct {
	mu sync.Mutex // guards what follows
	b  bytes.Buffer
}

func (b *Buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *Buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// Await waits until there is what ok looks for.
func (b *Buffer) Await(t testing.TB, ok func(text string) bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(b.String()); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("what is awaited is not in\n%s", b.String())
		}
	}
}
