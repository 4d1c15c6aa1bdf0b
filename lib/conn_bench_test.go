package o7s

import (
	"fmt"
	"io"
	"net"
	"path/filepath"
	"testing"

	"github.com/o7s/o7s-router/lib/qos"
)

// BenchmarkConn compares a stream within the machine with a UNIX stream socket:
// bulk in writes of several sizes, and a round trip of 64 bytes.
func BenchmarkConn(b *testing.B) {
	for name, pipe := range map[string]func(b *testing.B) (x, y net.Conn){"o7s": benchFlow, "unix": benchUnix} {
		for _, size := range []int{64, 1500, 32 << 10, 256 << 10} {
			b.Run(fmt.Sprintf("%s/bulk-%d", name, size), func(b *testing.B) {
				x, y := pipe(b)
				b.SetBytes(int64(size))
				buf := make([]byte, size)
				done := make(chan int64)
				go func() {
					n, _ := io.Copy(io.Discard, y)
					done <- n
				}()
				for b.Loop() {
					if _, err := x.Write(buf); err != nil {
						b.Fatal(err)
					}
				}
				x.(interface{ CloseWrite() error }).CloseWrite()
				<-done
			})
		}
		b.Run(name+"/rtt-64", func(b *testing.B) {
			x, y := pipe(b)
			go func() { _, _ = io.CopyBuffer(struct{ io.Writer }{y}, struct{ io.Reader }{y}, make([]byte, 64)) }()
			buf := make([]byte, 64)
			for b.Loop() {
				if _, err := x.Write(buf); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(x, buf); err != nil {
					b.Fatal(err)
				}
			}
			x.Close()
		})
	}
}

func benchFlow(b *testing.B) (x, y net.Conn) {
	d := newFake(b)
	c1, c2 := d.streams(b, &qos.Data)
	return c1, c2
}

func benchUnix(b *testing.B) (x, y net.Conn) {
	l, err := net.Listen("unix", filepath.Join(b.TempDir(), "s"))
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	if x, err = net.Dial("unix", l.Addr().String()); err != nil {
		b.Fatal(err)
	}
	if y, err = l.Accept(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { x.Close(); y.Close() })
	return x, y
}
