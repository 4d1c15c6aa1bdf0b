package ring

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// link is what the benchmarks compare: the rings and a SEQPACKET socket.
type link interface {
	send(p []byte) error
	recv(p []byte) (int, error)
}

type ringLink struct{ *End }

func (l ringLink) send(p []byte) error        { return write(l.End, p) }
func (l ringLink) recv(p []byte) (int, error) { return read(l.End, p) }

type sockLink struct{ net.Conn }

func (l sockLink) send(p []byte) error        { _, err := l.Write(p); return err }
func (l sockLink) recv(p []byte) (int, error) { return l.Read(p) }

func seqpacket(b *testing.B) (x, y net.Conn) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		b.Fatal(err)
	}
	var c [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "seqpacket")
		if c[i], err = net.FileConn(f); err != nil {
			b.Fatal(err)
		}
		f.Close()
	}
	b.Cleanup(func() { c[0].Close(); c[1].Close() })
	return c[0], c[1]
}

func bothKinds(b *testing.B, f func(b *testing.B, x, y link)) {
	b.Run("ring", func(b *testing.B) {
		x, y, done := ends(b, 0)
		defer done()
		f(b, ringLink{x}, ringLink{y})
	})
	b.Run("seqpacket", func(b *testing.B) {
		x, y := seqpacket(b)
		f(b, sockLink{x}, sockLink{y})
	})
}

// BenchmarkOneWay is the time per message from one goroutine to another.
func BenchmarkOneWay(b *testing.B) {
	for _, size := range []int{64, 1500} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			bothKinds(b, func(b *testing.B, x, y link) {
				b.SetBytes(int64(size))
				b.ReportAllocs()
				go func() {
					p := make([]byte, size)
					for range b.N {
						if x.send(p) != nil {
							return
						}
					}
				}()
				p := make([]byte, size)
				for range b.N {
					if _, err := y.recv(p); err != nil {
						b.Fatal(err)
					}
				}
			})
		})
	}
}

// BenchmarkRTT is the time of a round trip of 64 bytes between two processes.
func BenchmarkRTT(b *testing.B) {
	b.Run("ring", func(b *testing.B) {
		e, _ := spawn(b, "echo")
		roundTrips(b, ringLink{e})
	})
	b.Run("seqpacket", func(b *testing.B) {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			b.Fatal(err)
		}
		near, far := os.NewFile(uintptr(fds[0]), "near"), os.NewFile(uintptr(fds[1]), "far")
		defer near.Close()
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), roleEnv+"=seqpacket")
		cmd.ExtraFiles = []*os.File{far}
		if err := cmd.Start(); err != nil {
			b.Fatal(err)
		}
		far.Close()
		c, err := net.FileConn(near)
		if err != nil {
			b.Fatal(err)
		}
		near.Close()
		roundTrips(b, sockLink{c})
		c.Close()
		cmd.Wait()
	})
}

func roundTrips(b *testing.B, l link) {
	b.ReportAllocs()
	p := make([]byte, 64)
	for b.Loop() {
		if err := l.send(p); err != nil {
			b.Fatal(err)
		}
		if _, err := l.recv(p); err != nil {
			b.Fatal(err)
		}
	}
}
